# SPDX-License-Identifier: Apache-2.0
"""The command lines that people have, and what the scripts say to those that cannot work."""

import json
from pathlib import Path

import copies
import pytest
from runner import flags, parser_of, train, without

import train_sap_lora_sd15 as sap

UPSTREAM = json.loads((Path(__file__).parent / "upstream_flags.json").read_text())
OF_SCRIPT = {
    "train_sap_lora_sd15": "train_dreambooth_lora.py",
    "train_sap_lora_sdxl": "train_dreambooth_lora_sdxl.py",
    "train_sap_lora_sd3": "train_dreambooth_lora_sd3.py",
}
SCRIPTS = [path.stem for path in copies.SCRIPTS]
COMMON = """anchor_weight anchor_source anchor_batch_size subject_token class_token dataset_name dataset_config_name
    image_column caption_column cache_dir repeats random_flip optimizer prodigy_beta3 prodigy_decouple snr_gamma
    prodigy_use_bias_correction prodigy_safeguard_warmup use_dora text_encoder_lr output_kohya_format lora_alpha
    lora_layers cache_latents aspect_ratio_buckets caption_dropout skip_final_inference final_validation_prompt
    validation_steps allow_tf32 compile bnb_quantization_config_path logging_steps offload""".split()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_upstream_flag_is_there_with_its_type_default_and_choices(script):
    actions = {action.dest: action for action in parser_of(script)._actions}
    for flag in UPSTREAM[OF_SCRIPT[script]]:
        action = actions[flag["dest"]]
        assert set(flag["option_strings"]) <= set(action.option_strings)
        assert action.default == flag["default"], flag
        assert (list(action.choices) if action.choices else None) == flag["choices"], flag
        assert action.nargs == flag["nargs"], flag
        assert action.const == flag["const"], flag
        assert action.required <= flag["required"], flag
        if flag["type"] is not None:
            assert action.type.__name__ == flag["type"], flag
    assert set(COMMON) <= set(actions)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_help(script):
    parser = parser_of(script)
    assert [action.dest for action in parser._actions if not action.help] == []
    text = parser.format_help()
    assert "None)" not in text
    assert text.index("--class_prompt") < text.index("prior preservation")


def test_booleans_mean_what_they_say(photos):
    values = {text: sap.parse_args(flags("base", photos, "out", f"--prodigy_decouple={text}")).prodigy_decouple
              for text in ("True", "false", "0", "yes")}  # fmt: skip
    assert values == {"True": True, "false": False, "0": False, "yes": True}


def without_class_prompt(photos: Path, *more: str):
    return sap.parse_args(without(flags("base", photos, "out", *more), "--class_prompt"))


def test_without_anchor_no_class_prompt_is_needed(photos):
    assert without_class_prompt(photos, "--anchor_weight=0").class_prompt is None


@pytest.mark.parametrize(
    ("prompt", "more", "derived"),
    [
        ("a photo of sks dog", ["--subject_token=sks", "--class_token=brown"], "a photo of brown dog"),
        ("a photo of sks dog", ["--subject_token=sks"], "a photo of dog"),
        ("a photo of sks dog", [], "a photo of a dog"),
        ("a photo of a sks dog", [], "a photo of a dog"),
        ("an ohwx elephant in the snow", [], "an elephant in the snow"),
        ("a photo of <new1> apple", [], "a photo of an apple"),
        ("a photo of my TOK cat", [], "a photo of my cat"),
        ("photos of sks dogs", [], "photos of dogs"),
        ("a photo of sks dog between desks", [], "a photo of a dog between desks"),
    ],
)
def test_the_class_prompt_is_derived(prompt, more, derived, photos):
    assert without_class_prompt(photos, f"--instance_prompt={prompt}", *more).class_prompt == derived


@pytest.mark.parametrize("prompt", ["a photo of a dog", "a photo of sks zwx dog", "sks dog and sks cat", "two desks"])
def test_a_class_prompt_that_cannot_be_derived_is_asked_for(prompt, photos, capsys):
    with pytest.raises(SystemExit):
        without_class_prompt(photos, f"--instance_prompt={prompt}")
    assert "the anchor needs a prompt for the class: --class_prompt" in capsys.readouterr().err


def test_abbreviations_are_told(photos, capsys):
    assert sap.parse_args(flags("base", photos, "out", "--learning=3e-4")).learning_rate == 3e-4
    assert "--learning is read as --learning_rate" in capsys.readouterr().err


def test_flags_from_a_file(photos, tmp_path):
    (tmp_path / "flags.txt").write_text("--rank=7\n--seed=5\n")
    args = sap.parse_args(flags("base", photos, "out", f"@{tmp_path}/flags.txt"))
    assert (args.rank, args.seed) == (7, 5)


def test_prior_preservation_is_explained_once_and_unused(sd15, photos, tmp_path, caplog):
    old = ["--with_prior_preservation", f"--class_data_dir={tmp_path / 'class'}", "--num_class_images=7",
           "--prior_loss_weight=0.9", "--prior_generation_precision=fp16", "--sample_batch_size=2"]  # fmt: skip
    train("train_sap_lora_sd15", flags(sd15, photos, tmp_path / "out", *old, steps=1))
    (line,) = [record.message for record in caplog.records if "unused" in record.message]
    assert "--with_prior_preservation" in line
    assert "--class_prompt" in line
    assert not (tmp_path / "class").exists()
