# SPDX-License-Identifier: Apache-2.0
"""Disks that are full or closed: one sentence, and what was there stays."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from runner import ROOT, assert_equal, flags, left_in, lora, train

import train_sap_lora_sd15 as sap

SCRIPT = str(ROOT / "train_sap_lora_sd15.py")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MB; the tests that need one are left out where this user may not mount it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_an_output_folder_below_a_file_is_told_before_anything_is_loaded(sd15, photos, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(sap, "prepare", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(sap.UsageError, match="--output_dir .*out cannot be written"):
        train("train_sap_lora_sd15", flags(sd15, photos, tmp_path / "file" / "out"))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_takes_no_file_is_told(sd15, photos, small_disk, monkeypatch):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    monkeypatch.setattr(sap, "prepare", lambda *_, **__: pytest.fail("a model was loaded"))
    for output in (small_disk, small_disk / "new"):
        with pytest.raises(sap.UsageError, match="Read-only"):
            train("train_sap_lora_sd15", flags(sd15, photos, output))


def test_a_full_disk_ends_the_run_in_one_sentence_and_loses_nothing(sd15, photos, small_disk, tmp_path):
    """The disk has room for some checkpoints; on a larger one the run goes on as if nothing had happened."""
    more = ["--checkpointing_steps=1", "--rank=8", "--resume_from_checkpoint=latest"]
    command = [sys.executable, SCRIPT, *flags(sd15, photos, small_disk, *more, steps=8)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 1, ended.stderr
    (told,) = [line for line in ended.stderr.splitlines() if line.startswith("train_sap_lora_sd15.py: error: ")]
    assert "cannot be written" in told
    assert "Traceback" not in ended.stderr
    there = [path.name for path in sap.list_checkpoints(small_disk)]
    assert there
    assert f"checkpoints that are whole: {', '.join(there)}" in told
    assert {name for name in left_in(small_disk) if "checkpoint" in name} == set(there)
    moved = tmp_path / "larger"
    subprocess.run(["cp", "-r", str(small_disk), str(moved)], check=True)
    train("train_sap_lora_sd15", flags(sd15, photos, moved, *more, steps=8))
    train("train_sap_lora_sd15", flags(sd15, photos, tmp_path / "whole", "--rank=8", steps=8))
    assert_equal(lora(moved), lora(tmp_path / "whole"))


def test_the_lora_of_an_earlier_run_survives_a_full_disk(sd15, photos, tmp_path, monkeypatch):
    train("train_sap_lora_sd15", flags(sd15, photos, tmp_path, "--output_kohya_format"))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sap, "write_safetensors", full)
    with pytest.raises(sap.RunError, match="No space left"):
        train("train_sap_lora_sd15", flags(sd15, photos, tmp_path, "--seed=7"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "earlier-1").glob("*.safetensors")} == before
    assert list(tmp_path.glob("*.safetensors")) == []
    assert [name for name in left_in(tmp_path) if name.startswith(".")] == []


@pytest.mark.parametrize("size", ["300k", "500k", "700k"])
def test_a_tiny_disk_ends_the_run_in_one_sentence(size, sd15, photos, small_disk):
    """torch's own writer of files tells a full disk as a RuntimeError of its own."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(small_disk)], check=True)
    more = ["--checkpointing_steps=1", "--rank=16"]
    with pytest.raises(sap.RunError, match="cannot be written, .*No space left"):
        train("train_sap_lora_sd15", flags(sd15, photos, small_disk, *more, steps=8))


def test_a_checkpoint_goes_through_an_ordinary_file(sd15, photos, tmp_path, monkeypatch):
    real = Path.write_bytes

    def full(path, data):
        if path.name == sap.TRAINING_FILE:
            raise OSError(28, "No space left on device")
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(sap.RunError, match="No space left.*checkpoints that are whole: none"):
        train("train_sap_lora_sd15", flags(sd15, photos, tmp_path, "--checkpointing_steps=1"))


def test_a_log_that_cannot_be_written_is_given_up(sd15, photos, tmp_path, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    train("train_sap_lora_sd15", flags(sd15, photos, tmp_path / "plain"))
    monkeypatch.setattr(sap.Accelerator, "log", full)
    train("train_sap_lora_sd15", flags(sd15, photos, tmp_path / "full"))
    assert re.search("a tracker failed, training goes on without.*No space left", caplog.text)
    assert_equal(lora(tmp_path / "full"), lora(tmp_path / "plain"))
