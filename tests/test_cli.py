# SPDX-License-Identifier: Apache-2.0
"""The command lines that people have, and what the scripts say to those that cannot work."""

import argparse
import json
from pathlib import Path

import copies
import pytest
from runner import flags, train, without

import train_sap_lora_sd15 as sap

UPSTREAM = json.loads((Path(__file__).parent / "upstream_flags.json").read_text())
OF_SCRIPT = {
    "train_sap_lora_sd15": "train_dreambooth_lora.py",
    "train_sap_lora_sdxl": "train_dreambooth_lora_sdxl.py",
    "train_sap_lora_sd3": "train_dreambooth_lora_sd3.py",
}
SCRIPTS = [path.stem for path in [copies.ORIGINAL, *copies.SCRIPTS]]
COMMON = """anchor_weight anchor_source anchor_batch_size subject_token class_token dataset_name dataset_config_name
    image_column caption_column cache_dir repeats random_flip optimizer prodigy_beta3 prodigy_decouple snr_gamma
    prodigy_use_bias_correction prodigy_safeguard_warmup use_dora text_encoder_lr output_kohya_format lora_alpha
    lora_layers cache_latents aspect_ratio_buckets caption_dropout skip_final_inference final_validation_prompt
    validation_steps allow_tf32 compile bnb_quantization_config_path logging_steps offload""".split()


def parser_of(script: str, monkeypatch) -> argparse.ArgumentParser:
    """The parser that a script's `parse_args` makes."""

    class Caught(Exception):
        pass

    def catch(self, *_):
        raise Caught(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", catch)
    with pytest.raises(Caught) as caught:
        __import__(script).parse_args([])
    return caught.value.args[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_upstream_flag_is_there_with_its_type_default_and_choices(script, monkeypatch):
    actions = {action.dest: action for action in parser_of(script, monkeypatch)._actions}
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
def test_every_flag_has_help(script, monkeypatch):
    parser = parser_of(script, monkeypatch)
    assert [action.dest for action in parser._actions if not action.help] == []
    text = parser.format_help()
    assert "None)" not in text
    assert text.index("--class_prompt") < text.index("prior preservation")


def test_booleans_mean_what_they_say(photos):
    values = {text: sap.parse_args(flags("base", photos, "out", f"--prodigy_decouple={text}")).prodigy_decouple
              for text in ("True", "false", "0", "yes")}  # fmt: skip
    assert values == {"True": True, "false": False, "0": False, "yes": True}


MISTAKES = {
    "neither folder nor dataset": (["--instance_data_dir="], "--instance_data_dir"),
    "folder and dataset": (["--dataset_name=some/dataset"], "--dataset_name"),
    "missing folder": (["--instance_data_dir=/nowhere"], "no folder /nowhere"),
    "negative weight": (["--anchor_weight=-1"], "--anchor_weight"),
    "infinite weight": (["--anchor_weight=inf"], "--anchor_weight"),
    "weight that is no number": (["--anchor_weight=nan"], "--anchor_weight"),
    "weight that is a word": (["--anchor_weight=half"], "--anchor_weight"),
    "unknown source": (["--anchor_source=ema"], "--anchor_source"),
    "no samples in a forward": (["--anchor_batch_size=0"], "--anchor_batch_size"),
    "token that is not there": (["--class_prompt=", "--subject_token=zwx"], '"a photo of sks dog" does not hold'),
    "class token alone": (["--class_token=dog"], "--subject_token"),
    "no steps": (["--max_train_steps=0"], "--max_train_steps"),
    "odd resolution": (["--resolution=65"], "--resolution"),
    "buckets that are no sizes": (["--aspect_ratio_buckets=64x64"], "--aspect_ratio_buckets"),
    "odd bucket": (["--aspect_ratio_buckets=64,60"], "--aspect_ratio_buckets"),
    "dropout of everything": (["--caption_dropout=1"], "--caption_dropout"),
    "negative LoRA dropout": (["--lora_dropout=-.1"], "--lora_dropout"),
    "rank of zero": (["--rank=0"], "--rank"),
    "alpha of zero": (["--lora_alpha=0"], "--lora_alpha"),
    "gamma of zero": (["--snr_gamma=0"], "--snr_gamma"),
    "unknown optimizer": (["--optimizer=sgd"], "--optimizer"),
    "unknown schedule": (["--lr_scheduler=zigzag"], "--lr_scheduler"),
    "no xformers": (["--enable_xformers_memory_efficient_attention"], "xformers"),
    "wandb and a token": (["--report_to=wandb", "--hub_token=secret"], "--hub_token"),
    "empty layers": (["--lora_layers=to_k,,to_v"], "--lora_layers"),
    "output is a file": ([f"--output_dir={__file__}"], "--output_dir"),
    "negative seed": (["--seed=-1"], "--seed"),
    "no boolean": (["--prodigy_decouple=maybe"], "invalid bool value"),
    "pixel space, images": (["--validation_images", "a.png"], "--validation_images"),
    "pixel space, labels": (["--class_labels_conditioning=timesteps"], "--class_labels_conditioning"),
    "embeddings that change": (["--train_text_encoder", "--pre_compute_text_embeddings"], "--train_text_encoder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_one_sentence(name, photos, tmp_path, capsys):
    mistakes, words = MISTAKES[name]
    emptied = [flag[:-1] for flag in mistakes if flag.endswith("=")]
    arguments = without(flags("base", photos, tmp_path / "out", *mistakes), *emptied)
    with pytest.raises(SystemExit) as stopped:
        sap.parse_args(arguments)
    assert stopped.value.code == 2
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert "error: " in last
    assert words in last
    assert "secret" not in last


def without_class_prompt(photos: Path, *more: str) -> list[str]:
    return without(flags("base", photos, "out", *more), "--class_prompt")


def test_an_anchor_needs_a_class_prompt(photos, capsys):
    with pytest.raises(SystemExit):
        sap.parse_args(without_class_prompt(photos))
    assert "--class_prompt" in capsys.readouterr().err


def test_without_anchor_no_class_prompt_is_needed(photos):
    assert sap.parse_args(without_class_prompt(photos, "--anchor_weight=0")).class_prompt is None


def test_the_class_prompt_is_derived_from_the_subject_token(photos):
    args = sap.parse_args(without_class_prompt(photos, "--subject_token=sks", "--class_token=brown"))
    assert args.class_prompt == "a photo of brown dog"


def test_prior_preservation_is_explained_once_and_unused(sd15, photos, tmp_path, caplog):
    old = ["--with_prior_preservation", f"--class_data_dir={tmp_path / 'class'}", "--num_class_images=7",
           "--prior_loss_weight=0.9", "--prior_generation_precision=fp16", "--sample_batch_size=2"]  # fmt: skip
    train("train_sap_lora_sd15", flags(sd15, photos, tmp_path / "out", *old, steps=1))
    (line,) = [record.message for record in caplog.records if "unused" in record.message]
    assert "--with_prior_preservation" in line
    assert "--class_prompt" in line
    assert not (tmp_path / "class").exists()


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder"])
def test_a_base_without_a_part_is_refused_before_it_is_loaded(part, sd15, photos, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    index = json.loads((sd15 / "model_index.json").read_text()) | {part: [None, None]}
    (base / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(sap.UsageError, match=f"without {part}"):
        train("train_sap_lora_sd15", flags(base, photos, tmp_path / "out"))


def test_a_base_of_another_kind_is_refused(sd15, photos, tmp_path):
    index = json.loads((sd15 / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", "CLIPTextModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(sap.UsageError, match="StableDiffusionXLPipeline with text_encoder_2: .*scripts of their own"):
        train("train_sap_lora_sd15", flags(tmp_path, photos, tmp_path / "out"))


@pytest.mark.parametrize("base", ["/nowhere/base", "nobody/nothing"])
def test_a_base_that_is_not_there_is_named(base, photos, tmp_path):
    with pytest.raises(sap.UsageError, match=f"--pretrained_model_name_or_path {base}"):
        train("train_sap_lora_sd15", flags(base, photos, tmp_path / "out"))


def test_lora_layers_that_do_not_exist_are_named(sd15, photos, tmp_path):
    with pytest.raises(sap.UsageError, match="--lora_layers: .*nothing"):
        train("train_sap_lora_sd15", flags(sd15, photos, tmp_path / "out", "--lora_layers=nothing"))


def test_a_tokenizer_length_over_the_limit_is_refused(sd15, photos, tmp_path):
    with pytest.raises(sap.UsageError, match="--tokenizer_max_length 78: the text encoder reads 77"):
        train("train_sap_lora_sd15", flags(sd15, photos, tmp_path / "out", "--tokenizer_max_length=78"))
