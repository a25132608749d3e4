# SPDX-License-Identifier: Apache-2.0
"""The first minutes of three newcomers: a hobbyist with phone photos, a diffusers user, a researcher."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from PIL import Image
from runner import LORA_FILE, ROOT, flags, lora, train

import train_sap_lora_sd3 as sd3
import train_sap_lora_sd15 as sap
import train_sap_lora_sdxl as sdxl

SCRIPT = "train_sap_lora_sd15"
# The LoRA commands of the three README files beside diffusers' examples, of which only the script's name is changed.
SHARED = (
    '--mixed_precision=fp16 --resolution=1024 --train_batch_size=1 --learning_rate=1e-4 --report_to="wandb" '
    '--lr_scheduler="constant" --lr_warmup_steps=0 --max_train_steps=500 --seed="0" --push_to_hub '
    '--validation_prompt="A photo of sks dog in a bucket" --instance_prompt="a photo of sks dog" '
)
COMMANDS = {
    "sd15": (sap, SHARED + "--instance_data_dir=dog --output_dir=out --gradient_accumulation_steps=1 --resolution=512 "
             "--checkpointing_steps=100 --pretrained_model_name_or_path=runwayml/stable-diffusion-v1-5"),
    "sdxl": (sdxl, SHARED + "--instance_data_dir=dog --output_dir=lora-trained-xl --gradient_accumulation_steps=4 "
             "--pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix --validation_epochs=25 "
             "--pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0"),
    "sdxl, 16 GB": (sdxl, SHARED + "--instance_data_dir=dog --output_dir=lora-trained-xl --gradient_checkpointing "
                    "--use_8bit_adam --pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0"),
    "playground": (sdxl, SHARED + '--instance_data_dir="dog" --output_dir="dog-playground-lora" --use_8bit_adam '
                   "--gradient_accumulation_steps=4 --validation_epochs=25 "
                   "--pretrained_model_name_or_path=playgroundai/playground-v2.5-1024px-aesthetic"),
    "sd3": (sd3, SHARED + "--instance_data_dir=dog --output_dir=trained-sd3-lora --resolution=512 "
            "--learning_rate=4e-4 --validation_epochs=25 "
            "--pretrained_model_name_or_path=stabilityai/stable-diffusion-3-medium-diffusers"),
    "sd3, text encoders": (sd3, SHARED + '--dataset_name="Norod78/Yarn-art-style" --train_text_encoder --rank=32 '
                           '--instance_prompt="a photo of TOK yarn art dog" --optimizer="prodigy" --learning_rate=1.0 '
                           "--text_encoder_lr=1.0 --output_dir=trained-sd3-lora "
                           "--pretrained_model_name_or_path=stabilityai/stable-diffusion-3-medium-diffusers"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_a_pasted_command_is_taken_with_nothing_added(name, photos, tmp_path, monkeypatch):
    script, command = COMMANDS[name]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos, tmp_path / "dog")
    args = script.parse_args(shlex.split(command))
    expected = "a photo of yarn art dog" if "TOK" in command else "a photo of dog"
    assert (args.class_prompt, args.anchor_weight) == (expected, 0.5)


def test_a_pasted_command_trains_and_says_what_its_anchor_is(sd15, photos, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos, tmp_path / "dog")
    words = [word for word in shlex.split(COMMANDS["sd15"][1]) if word != "--push_to_hub"]
    on_a_cpu = [f"--pretrained_model_name_or_path={sd15}", "--resolution=64", "--max_train_steps=2",
                "--report_to=none", "--mixed_precision=no", "--num_validation_images=1"]  # fmt: skip
    train(SCRIPT, [*words, *on_a_cpu])
    assert lora(tmp_path / "out")
    assert 'Anchor:   "a photo of dog", w = 0.5 (without "sks"; --class_prompt to say it better)' in caplog.text


# ---- Photos ----


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path, monkeypatch):
    registered = []
    stand_in = types.SimpleNamespace(register_heif_opener=lambda: registered.append(True))
    monkeypatch.setitem(sap.sys.modules, "pillow_heif", stand_in)
    find = sap.importlib.util.find_spec
    monkeypatch.setattr(sap.importlib.util, "find_spec", lambda name: name if name == "pillow_heif" else find(name))
    tiny_pipelines.save_photos(tmp_path, count=1)
    sap.SubjectImages(sap.parse_args(flags("base", tmp_path, "/out")))
    assert registered


# ---- Words ----


def announced(photos: Path, monkeypatch, caplog, count: int, *more: str) -> str:
    """What the opening lines say of a run with some pictures, none of which is read."""
    caplog.clear()
    sap.logger.setLevel("INFO")
    args = sap.parse_args(flags("base", photos, "/out", *more))
    args.seed = 0
    images = types.SimpleNamespace(count=count, captions=["a"], anchor_captions=["b"], sizes=[(64, 64)])
    student = types.SimpleNamespace(trained=dict)
    accelerator = types.SimpleNamespace(num_processes=1)
    run = types.SimpleNamespace(
        args=args, images=images, student=student, accelerator=accelerator, device=torch.device("cpu")
    )
    sap.announce(run)
    return caplog.text


def test_the_number_of_steps_that_would_do_is_told(photos, monkeypatch, caplog):
    few = announced(photos, monkeypatch, caplog, 12, "--max_train_steps=500")
    assert "Each picture is seen 41.7 times; for 100, which is usual: --max_train_steps 1200" in few
    batch = ["--train_batch_size=4", "--gradient_accumulation_steps=2"]
    assert "seen" not in announced(photos, monkeypatch, caplog, 12, "--max_train_steps=150", *batch)
    assert "--max_train_steps 150" in announced(photos, monkeypatch, caplog, 12, "--max_train_steps=149", *batch)


@pytest.mark.parametrize(
    ("schedule", "warm_up", "told"),
    [("cosine", 500, True), ("constant_with_warmup", 6, True), ("cosine", 5, False), ("constant", 500, False)],
)
def test_a_warm_up_that_outlasts_the_run_is_told(schedule, warm_up, told, photos, monkeypatch, caplog):
    more = [f"--lr_scheduler={schedule}", f"--lr_warmup_steps={warm_up}", "--max_train_steps=6"]
    assert ("does not reach its height" in announced(photos, monkeypatch, caplog, 1, *more)) == told


def test_the_device_is_told_and_a_cpu_loudly(photos, monkeypatch, caplog):
    said = announced(photos, monkeypatch, caplog, 1)
    assert "Device:   CPU, WHICH IS SLOW: torch" in said
    assert "https://pytorch.org" in said
    properties = types.SimpleNamespace(name="NVIDIA Test", total_memory=16 * 2**30)
    monkeypatch.setattr(sap.torch.cuda, "get_device_properties", lambda device: properties)
    assert sap.describe_device(torch.device("cuda")) == "NVIDIA Test, 16 GB"


@pytest.mark.parametrize(("rate", "told"), [("5e-6", True), ("1e-4", False), ("0", False)])
def test_a_rate_of_full_dreambooth_is_told(rate, told, photos, caplog):
    sap.warn_about_arguments(sap.parse_args(flags("base", photos, "/out", f"--learning_rate={rate}")))
    assert ("is a rate for whole models" in caplog.text) == told


@pytest.mark.parametrize("prompt", ["a photo of sks dog", "one sks dog"])
def test_a_class_prompt_that_still_names_the_subject_is_warned_of(prompt, photos, caplog):
    sap.warn_about_arguments(sap.parse_args(flags("base", photos, "/out", f"--class_prompt={prompt}")))
    assert "should be --instance_prompt without the word for the subject" in caplog.text


@pytest.mark.parametrize(
    "error",
    [OSError("Cannot reach the hub"), sap.NetworkError("[Errno 111] Connection refused"), sap.NetworkError("")],
)
def test_a_hub_that_cannot_be_reached_ends_in_a_sentence(error, sd15, photos, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(sap, "create_repo", fail)
    with pytest.raises(
        sap.UsageError, match=f"--push_to_hub: ({error}|HTTPError)$".replace("[", r"\[").replace("]", r"\]")
    ):
        train(SCRIPT, flags(sd15, photos, tmp_path, "--push_to_hub"))


def test_two_equal_runs_write_equal_bytes(sd15, photos, tmp_path):
    for name in ("one", "two"):
        train(SCRIPT, flags(sd15, photos, tmp_path / name / "dog", "--output_kohya_format"))
    for file in (LORA_FILE, sap.KOHYA_FILE):
        one, two = ((tmp_path / name / "dog" / file).read_bytes() for name in ("one", "two"))
        assert one == two


def test_the_finished_mark_names_the_step(sd15, photos, tmp_path):
    train(SCRIPT, flags(sd15, photos, tmp_path))
    state = json.loads(Path(tmp_path / sap.FINISHED_FILE).read_text())
    assert (state["format"], state["global_step"]) == (sap.STATE_FORMAT, 2)
    assert Image.MAX_IMAGE_PIXELS is not None  # reading pictures leaves Pillow's guard alone
    assert torch.is_grad_enabled()


def test_nothing_foreign_is_said_before_our_first_line(sd15, photos, tmp_path):
    command = [sys.executable, ROOT / f"{SCRIPT}.py", *flags(sd15, photos, tmp_path / "out")]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
    lines = [line.split("\r")[-1] for line in result.stderr.splitlines() if not re.search(r"\d+%\||^\s*$", line)]
    assert lines[0].startswith("Device: ")
    (took,) = [line for line in lines if line.startswith("Took: ")]
    last = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert took == f"Took:     {last['seconds_per_step']:.3g} s a step, with its share of pictures and checkpoints"
