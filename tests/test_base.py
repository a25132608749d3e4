# SPDX-License-Identifier: Apache-2.0
"""The base: what is refused before anything is loaded, and how its parts are loaded."""

import json
import logging
import os
import re
import shutil
import types
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from runner import LORA_FILE, flags, make_run, randomise_adapters, train
from safetensors.torch import load_file, save_file

import train_sap_lora_sd3 as sd3_script
import train_sap_lora_sd15 as sap
import train_sap_lora_sdxl as sdxl_script

SD15 = "train_sap_lora_sd15"
SCRIPTS = {"train_sap_lora_sd15": sap, "train_sap_lora_sdxl": sdxl_script, "train_sap_lora_sd3": sd3_script}
BASE = "--pretrained_model_name_or_path"


def edit(path: Path, **entries) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def check(base: Path, *more: str, script: str = SD15) -> None:
    """`check_base` of a script."""
    module = SCRIPTS[script]
    module.check_base(module.parse_args(flags(base, base.parent, base.parent.parent / "out", *more)))


@pytest.fixture
def base(sd15, tmp_path) -> Path:
    """A copy of the tiny SD1.5, to be changed."""
    return Path(shutil.copytree(sd15, tmp_path / "base"))


# ---- Schedulers ----


def test_a_multistep_sampler_of_flows_tells_the_shift(bases, tmp_path):
    base = Path(shutil.copytree(bases["train_sap_lora_sd3"], tmp_path / "base"))
    kind = diffusers.UniPCMultistepScheduler
    kind(use_flow_sigmas=True, flow_shift=2.0, prediction_type="flow_prediction").save_pretrained(base / "scheduler")
    check(base, script="train_sap_lora_sd3")
    args = sd3_script.parse_args(flags(base, base, tmp_path / "out"))
    assert sd3_script.training_scheduler(args).config.shift == 2.0


def test_a_shift_that_is_no_number_is_refused_for_sd3(bases, tmp_path):
    base = Path(shutil.copytree(bases["train_sap_lora_sd3"], tmp_path / "base"))
    edit(base / "vae" / "config.json", shift_factor=None)
    with pytest.raises(sd3_script.UsageError, match="shift_factor is no number"):
        check(base, script="train_sap_lora_sd3")


def test_timesteps_in_words_are_refused(base):
    edit(base / "scheduler" / "scheduler_config.json", num_train_timesteps="many")
    with pytest.raises(sap.UsageError, match=f"{BASE}.*arguments"):
        check(base)


@pytest.mark.parametrize("script", SCRIPTS)
def test_names_of_lora_layers_are_refused_if_they_match_nothing(script, bases):
    check(bases[script], "--lora_layers=to_k, to_out.0", script=script)
    with pytest.raises(SCRIPTS[script].UsageError, match="--lora_layers: .* to_qq"):
        check(bases[script], "--lora_layers=to_k,to_qq", script=script)


# ---- Files ----


def test_fp16_files_of_some_parts_are_taken_and_plain_ones_for_the_others(base, photos, tmp_path):
    path = base / "unet" / "diffusion_pytorch_model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(path).items()}
    save_file(half, path.with_suffix("").with_suffix(".fp16.safetensors"), {"format": "pt"})
    path.unlink()
    train(SD15, flags(base, photos, tmp_path / "out", "--variant=fp16"))
    assert (tmp_path / "out" / LORA_FILE).is_file()
    with pytest.raises(sap.UsageError, match="fp16.safetensors, see --variant"):
        check(base)


def test_a_pipe_among_the_weights_is_not_opened(base):
    os.mkfifo(base / "unet" / "more.safetensors")
    check(base)


def test_a_single_file_is_told_the_line_that_makes_a_folder_of_it(base, tmp_path, monkeypatch):
    file = tmp_path / "my model.safetensors"
    file.write_bytes(b"x")
    made = {}

    class Pipeline:
        @staticmethod
        def from_single_file(name):
            made["from"] = name
            return types.SimpleNamespace(save_pretrained=lambda folder: made.update(to=folder))

    with pytest.raises(sap.UsageError, match="is a single file") as refused:
        check(file)
    code = re.search(r'python -c "(.*)"$', str(refused.value))[1]
    monkeypatch.setattr(diffusers, "StableDiffusionPipeline", Pipeline)
    exec(code, {})  # noqa: S102 (what the user would paste)
    assert made == {"from": str(file), "to": "my model"}


# ---- Text encoders ----


def test_a_tokenizer_with_more_tokens_than_the_text_encoder_is_refused(base, photos, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(base / "tokenizer")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(base / "tokenizer")
    with pytest.raises(sap.UsageError, match="tokens"):
        train(SD15, flags(base, photos, tmp_path / "out", "--instance_prompt=a photo of <new> dog"))


@pytest.mark.parametrize("more", [[], ["--train_text_encoder"]])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_subject_behind_the_limit_of_the_text_encoders_is_refused(script, more, bases, photos, tmp_path):
    long = "a photo of " + "a red dog and " * 60
    more = [*more, f"--instance_prompt={long} sks dog", f"--class_prompt={long} dog"]
    with pytest.raises(SCRIPTS[script].UsageError, match="is the same as"):
        make_run(script, flags(bases[script], photos, tmp_path / "out", *more))


@pytest.fixture
def said():
    """What diffusers logs, line by line."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("diffusers").addHandler(handler)
    yield lines
    logging.getLogger("diffusers").removeHandler(handler)


def test_what_is_cut_off_is_told_once(sd15, photos, tmp_path, said):
    long = " and a red dog" * 40
    more = ["--train_text_encoder", f"--instance_prompt=sks dog{long}", f"--class_prompt=a dog{long}"]
    train(SD15, flags(sd15, photos, tmp_path / "out", *more, steps=4))
    assert len([line for line in said if "truncated" in line]) == 2  # of the subject prompt and of the anchor prompt


@pytest.mark.parametrize("script", SCRIPTS)
def test_offloaded_text_encoders_in_fp16_give_no_false_alarm(script, bases, photos, tmp_path, said):
    module = SCRIPTS[script]
    args = module.parse_args(flags(bases[script], photos, tmp_path / "out", "--offload"))
    accelerator = types.SimpleNamespace(mixed_precision="fp16", device=torch.device("cpu"))
    pipeline = module.load_text_pipeline(args, accelerator, module.SubjectImages(args))
    assert pipeline.text_encoder.dtype == torch.float16
    assert [line for line in said if "float16" in line] == []


# ---- The LoRA to go on from ----


def adapters_of(run) -> dict[str, BaseTunerLayer]:
    return {
        f"{part}.{name}": layer
        for part, module in run.student.adapted.items()
        for name, layer in module.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }


def saved_lora(script: str, base: Path, photos: Path, folder: Path, *more: str):
    """A run whose LoRA has an effect, written into the folder."""
    module, run = make_run(script, flags(base, photos, folder, "--train_text_encoder", *more))
    randomise_adapters(run)
    module.write_lora(run, folder)
    return module, run


@pytest.mark.parametrize("more", [[], ["--use_dora"]])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_lora_is_read_in_float32_whatever_the_precision_of_the_run(script, more, bases, photos, tmp_path):
    more = [*more, "--lora_alpha=8"]
    _, run = saved_lora(script, bases[script], photos, tmp_path, *more)
    again = ["--train_text_encoder", "--mixed_precision=bf16", f"--init_lora={tmp_path}", *more]
    _, other = make_run(script, flags(bases[script], photos, tmp_path / "out", *again))
    for name, parameter in other.student.trained().items():
        assert parameter.dtype == torch.float32
        assert torch.allclose(parameter, run.student.trained()[name], rtol=1e-6, atol=0), name
    for name, module in other.student.adapted.items():
        assert {p.dtype for p in module.parameters() if not p.requires_grad} == {torch.bfloat16}, name
    assert all(layer.training for layer in adapters_of(other).values())
    assert all(set(layer.lora_A) == {"default"} for layer in adapters_of(other).values())


@pytest.mark.parametrize("script", ["train_sap_lora_sd15", "train_sap_lora_sdxl"])
def test_a_kohya_file_is_read_in_float32_with_its_alpha(script, bases, photos, tmp_path):
    module, run = saved_lora(script, bases[script], photos, tmp_path, "--lora_alpha=8")
    module.write_kohya_lora(run, tmp_path)
    again = ["--train_text_encoder", "--mixed_precision=bf16", f"--init_lora={tmp_path / module.KOHYA_FILE}"]
    _, other = make_run(script, flags(bases[script], photos, tmp_path / "out", *again))
    for name, parameter in other.student.trained().items():
        expected = run.student.trained()[name] * (2 if "lora_B" in name else 1)  # the scale is 8 / 4 there, 1 here
        assert torch.allclose(parameter, expected, rtol=1e-6, atol=0), name


def test_a_kohya_file_of_dora_is_refused_for_diffusers_drops_its_magnitudes(sd15, photos, tmp_path):
    module, run = saved_lora(SD15, sd15, photos, tmp_path, "--use_dora")
    module.write_kohya_lora(run, tmp_path)
    more = ["--train_text_encoder", f"--init_lora={tmp_path / module.KOHYA_FILE}", "--use_dora"]
    with pytest.raises(sap.UsageError, match="--init_lora"):
        make_run(SD15, flags(sd15, photos, tmp_path / "out", *more))


def test_an_old_peft_is_not_blamed_on_the_layers(sd15, photos, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("the version of peft is too old")

    monkeypatch.setattr(transformers.CLIPTextModel, "add_adapter", refuse)
    with pytest.raises(sap.UsageError, match="--train_text_encoder: the version of peft"):
        make_run(SD15, flags(sd15, photos, tmp_path / "out", "--train_text_encoder"))
