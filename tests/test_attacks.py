# SPDX-License-Identifier: Apache-2.0
"""What broke the trainers when they were attacked: each of these lost work, hung, lied or was a traceback once."""

import contextlib
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from PIL import Image
from runner import LORA_FILE, ROOT, assert_equal, flags, lora, make_run, metrics, train
from safetensors.torch import load_file, save_file

import train_sap_lora_sd15 as sap

SCRIPT = "train_sap_lora_sd15"
posix = pytest.mark.skipif(os.name != "posix", reason="signals and modes of POSIX")


def start(arguments: list[str]) -> subprocess.Popen:
    """The script in a process group of its own, as a terminal or SLURM starts it."""
    command = [sys.executable, str(ROOT / f"{SCRIPT}.py"), *arguments]
    streams = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, start_new_session=True, cwd=ROOT, **streams)


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    """Until a run in the background has written something."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def long_run(base, photos, output, *more: str) -> list[str]:
    return flags(base, photos, output, "--checkpointing_steps=2", *more, steps=100000)


# ---- Loses work or lies ----


@posix
def test_a_run_with_closed_streams_writes_what_any_run_writes(sd15, photos, tmp_path):
    command = shlex.join([sys.executable, str(ROOT / SCRIPT) + ".py", *flags(sd15, photos, tmp_path / "out")])
    subprocess.run(["bash", "-c", f"exec {command} >&- 2>&-"], timeout=300, check=True, cwd=ROOT)
    train(SCRIPT, flags(sd15, photos, tmp_path / "open"))
    assert_equal(lora(tmp_path / "out"), lora(tmp_path / "open"))
    assert len(metrics(tmp_path / "out")) == 2


@posix
def test_slurm_ends_a_job_when_its_first_process_has_ended(sd15, photos, tmp_path):
    """SIGTERM to all processes, SIGKILL to what is left once the first has ended: plain python keeps the run."""
    process = start(long_run(sd15, photos, tmp_path / "out", "--checkpointing_steps=100000"))
    wait_for(tmp_path / "out" / "metrics.jsonl", process)
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(60)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert_equal(lora(tmp_path / "out"), lora(checkpoint))


def test_steps_that_fp16_skips_are_counted_wait_and_end_the_run(sd15, photos, tmp_path, monkeypatch):
    """With a scale by which all gradients overflow, on a CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=math.inf)
    prepare = sap.Accelerator.prepare

    def prepare_scaled(self, *objects):
        self.scaler = scaler
        return prepare(self, *objects)

    monkeypatch.setattr(sap.Accelerator, "prepare", prepare_scaled)
    rates = ["--lr_scheduler=linear", "--lr_warmup_steps=0", "--max_grad_norm=1e30"]
    with pytest.raises(sap.RunError, match="2 steps in a row overflowed"):
        train(SCRIPT, flags(sd15, photos, tmp_path / "short", *rates, steps=2))
    assert not (tmp_path / "short" / LORA_FILE).exists()
    with pytest.raises(sap.RunError, match="30 steps in a row overflowed"):
        train(SCRIPT, flags(sd15, photos, tmp_path / "out", *rates, "--report_to=none", steps=50))
    rows = metrics(tmp_path / "out")
    assert len({row["lr"] for row in rows}) == 1  # the schedule waited
    assert [row["skipped"] for row in rows] == list(range(1, len(rows) + 1))


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
@pytest.mark.parametrize("how", ["missing", "misshapen"])
def test_weights_that_are_missing_or_misshapen_are_not_made_up(part, how, sd15, photos, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(sd15, base)
    (path,) = (base / part).glob("*.safetensors")
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith("weight") and tensors[key].ndim > 1)
    if how == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(sap.UsageError, match="--pretrained_model_name_or_path"):
        train(SCRIPT, flags(base, photos, tmp_path / "out"))


# ---- Files, the environment ----


def test_the_card_has_no_path_of_this_machine(sd15, photos, tmp_path):
    train(SCRIPT, flags(sd15, photos, tmp_path / "dog", "--use_dora", "--instance_prompt=a `sks`\n dog"))
    card = (tmp_path / "dog" / "README.md").read_text()
    assert str(tmp_path) not in card
    assert str(sd15.parent) not in card
    assert "- dora\n" in card
    assert "# LoRA for `a 'sks' dog`\n" in card


@posix
def test_files_have_the_mode_that_the_umask_allows(sd15, photos, tmp_path):
    before = os.umask(0o022)
    try:
        train(SCRIPT, flags(sd15, photos, tmp_path, "--output_kohya_format", "--checkpointing_steps=2"))
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o644, path


def test_an_accumulation_in_the_environment_that_differs_is_refused(photos, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(SystemExit, match="2"):
        sap.parse_args(flags("base", photos, "/out"))
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" in capsys.readouterr().err
    sap.parse_args(flags("base", photos, "/out", "--gradient_accumulation_steps=4"))


def test_a_tokenizer_of_another_place_runs_no_code(sd15, photos, tmp_path, monkeypatch):
    asked = {}
    load = sap.transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        sap.transformers.AutoTokenizer, "from_pretrained", lambda name, **options: asked.update(options) or load(name)
    )
    make_run(SCRIPT, flags(sd15, photos, tmp_path, f"--tokenizer_name={sd15 / 'tokenizer'}"))
    assert asked == {"trust_remote_code": False}


# ---- Odd names and numbers ----


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_stands_where_a_partial_checkpoint_would_be_goes(kind, sd15, photos, tmp_path):
    partial = tmp_path / ".checkpoint-1.partial"
    partial.symlink_to(photos) if kind == "link" else partial.write_text("x")
    train(SCRIPT, flags(sd15, photos, tmp_path, "--checkpointing_steps=1", steps=1))
    assert [path.name for path in sap.list_checkpoints(tmp_path)] == ["checkpoint-1"]
    assert len(list(photos.iterdir())) == 5


def test_an_anchor_batch_beyond_all_bounds_is_that_of_the_run(sd15, photos, tmp_path):
    train(SCRIPT, flags(sd15, photos, tmp_path / "one", "--anchor_batch_size=1000000000"))
    train(SCRIPT, flags(sd15, photos, tmp_path / "two", "--anchor_batch_size=2"))
    one, two = lora(tmp_path / "one"), lora(tmp_path / "two")
    assert all(torch.allclose(one[key], two[key], atol=1e-6) for key in one)


def test_control_characters_do_not_reach_the_terminal(sd15, tmp_path, capfd, caplog):
    folder = tiny_pipelines.save_photos(tmp_path / "photos", count=1)
    Image.new("RGB", (64, 64)).save(folder / "\x1b[31mred.png")
    (folder / "\x1b]0;title\x07.xyz").write_text("")
    (folder / "00.txt").write_text("sks \x1b[2J dog")
    train(SCRIPT, flags(sd15, folder, tmp_path / "out", steps=1))
    seen = "".join(capfd.readouterr()) + caplog.text
    assert "\\x1b]0;title\\x07.xyz" in seen
    assert not any(letter in seen for letter in ("\x1b[31m", "\x1b]0", "\x1b[2J", "\x07"))
