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
    validation_steps allow_tf32 compile bnb_quantization_config_path logging_steps offload no_kohya_file
    class_share""".split()
# Where it is not given, a checkpoint comes every 100 steps, and the last five stay.
OTHER_DEFAULTS = {"checkpointing_steps": None}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_upstream_flag_is_there_with_its_type_default_and_choices(script):
    actions = {action.dest: action for action in parser_of(script)._actions}
    for flag in UPSTREAM[OF_SCRIPT[script]]:
        action = actions[flag["dest"]]
        assert set(flag["option_strings"]) <= set(action.option_strings)
        assert action.default == OTHER_DEFAULTS.get(flag["dest"], flag["default"]), flag
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


@pytest.mark.parametrize(
    ("prompt", "more", "derived"),
    [
        ("a photo of sks dog", ["--subject_token=sks", "--class_token=brown"], "a photo of brown dog"),
        ("a photo of sks dog", ["--subject_token=sks"], "a photo of dog"),
        ("a photo of sks dog", [], "a photo of dog"),
        ("a photo of a sks dog", [], "a photo of a dog"),
        ("an ohwx elephant in the snow", [], "an elephant in the snow"),
        ("a photo of <new1> apple", [], "a photo of apple"),
        ("sks dog and sks cat", [], "dog and cat"),
        ("sks, brown dog, sitting", [], ", brown dog, sitting"),
        ("a photo of sks", ["--subject_token=sks", "--class_token=a dog"], "a photo of a dog"),
        ("a photo of a [V] dog near desks", [], "a photo of a dog near desks"),
        ("a V* toy", [], "a toy"),
        ("a photo of a dog", ["--anchor_weight=0"], None),
    ],
)
def test_the_class_prompt_is_derived(prompt, more, derived, photos):
    assert without_class_prompt(photos, f"--instance_prompt={prompt}", *more).class_prompt == derived


LACKS = "the anchor needs a prompt for the class: --class_prompt"
NOTHING = "names nothing that the anchor could hold"
WITHOUT_CLASS = {
    "a photo of a dog": LACKS,
    "a photo of sks zwx dog": LACKS,
    "SKS dog": LACKS,
    "masks of two desks": LACKS,
    "sksdog": LACKS,
    "photo of TOK": NOTHING,
    "ohwx": NOTHING,
    "3d icon in the style of TOK": NOTHING,
    "a photo of sks in the snow": NOTHING,
    "sks on a beach.": NOTHING,
    "A photo of the <new1>.": NOTHING,
}


@pytest.mark.parametrize("prompt", WITHOUT_CLASS)
def test_a_class_prompt_that_cannot_be_derived_is_asked_for(prompt, photos, capsys):
    with pytest.raises(SystemExit):
        without_class_prompt(photos, f"--instance_prompt={prompt}")
    said = capsys.readouterr().err
    assert WITHOUT_CLASS[prompt] in said
    assert "--class_prompt" in said


def test_a_class_prompt_of_a_named_subject_that_names_nothing_is_refused(photos, capsys):
    with pytest.raises(SystemExit):
        without_class_prompt(photos, "--instance_prompt=a photo of zwq", "--subject_token=zwq")
    said = capsys.readouterr().err
    assert NOTHING in said
    assert '--class_prompt "a photo of a dog"' in said


def test_a_flag_that_is_like_no_other_gets_no_advice(photos, capsys):
    with pytest.raises(SystemExit, match="2"):
        sap.parse_args(flags("base", photos, "out", "--zzz"))
    assert capsys.readouterr().err.endswith("unrecognized arguments: --zzz\n")


def test_abbreviations_are_taken(photos):
    assert sap.parse_args(flags("base", photos, "out", "--learning=3e-4")).learning_rate == 3e-4


@pytest.mark.parametrize("words", [["--instance_prompt", "@home sks"], ["--instance_prompt=@home sks"]])
def test_a_prompt_may_begin_with_an_at_sign(words, photos):
    assert sap.parse_args(flags("base", photos, "out", *words)).instance_prompt == "@home sks"


def test_a_prompt_that_is_not_utf_8_ends_in_a_sentence(photos, capsys):
    with pytest.raises(SystemExit, match="2"):
        sap.parse_args(flags("base", photos, "out", "--instance_prompt=a \udcff sks dog"))
    assert "--instance_prompt: must be text in UTF-8" in capsys.readouterr().err


def test_a_tilde_is_the_home_folder_in_every_path(sd15, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "photos").symlink_to(photos)
    (tmp_path / "lines.txt").write_text("a dog\n")
    (tmp_path / "four.json").write_text("{}")
    monkeypatch.setattr(sap, "quantization_config", lambda args: None)
    places = {
        "instance_data_dir": "photos", "mask_dir": "photos", "validation_data_dir": "photos", "output_dir": "sap",
        "pretrained_model_name_or_path": "base", "tokenizer_name": "base", "init_lora": "lora", "logging_dir": "logs",
        "resume_from_checkpoint": "sap/checkpoint-1", "validation_prompts_file": "lines.txt", "cache_dir": "cache",
        "bnb_quantization_config_path": "four.json",
    }  # fmt: skip
    (tmp_path / "base").symlink_to(sd15)
    given = [f"--{name}=~/{place}" for name, place in places.items()]
    args = sap.parse_args(flags("base", photos, "out", *given))
    assert {name: getattr(args, name) for name in places} == {name: f"{tmp_path}/{at}" for name, at in places.items()}
    args = sap.parse_args(without(flags("base", photos, "out", "--dataset_name=~/photos"), "--instance_data_dir"))
    assert args.dataset_name == f"{tmp_path}/photos"


def test_checkpoints_come_every_100_steps_and_five_stay_unless_said_otherwise(photos):
    for more, expected in {
        "": (100, 5),
        "--checkpoints_total_limit=2": (100, 2),
        "--checkpointing_steps=500": (500, None),
    }.items():
        args = sap.parse_args(flags("base", photos, "out", *more.split()))
        assert (args.checkpointing_steps, args.checkpoints_total_limit) == expected


def test_every_flag_says_whether_a_resumed_run_may_change_it():
    free = {flag.name[2:] for flag in sap.KNOWN_FLAGS if isinstance(flag, sap.Free)}
    fixed = {flag.name[2:] for flag in sap.KNOWN_FLAGS} - free
    assert {"output_dir", "report_to", "compile", "validation_prompt", "num_class_images", "anchor_batch_size"} <= free
    assert {"learning_rate", "seed", "anchor_weight", "rank", "resolution", "optimizer", "class_prompt"} <= fixed


def test_prior_preservation_is_explained_once_and_unused(sd15, photos, tmp_path, caplog):
    old = ["--with_prior_preservation", f"--class_data_dir={tmp_path / 'class'}", "--num_class_images=7",
           "--prior_loss_weight=0.9", "--prior_generation_precision=fp16", "--sample_batch_size=2"]  # fmt: skip
    train("train_sap_lora_sd15", flags(sd15, photos, tmp_path / "out", *old, steps=1))
    (line,) = [record.message for record in caplog.records if "unused" in record.message]
    assert "--with_prior_preservation" in line
    assert "--class_prompt" in line
    assert not (tmp_path / "class").exists()
