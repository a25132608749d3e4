# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what is in them, which of them stay, and that a resumed run is the run that was not interrupted."""

import json
import shutil

import pytest
import torch
from runner import LORA_FILE, assert_equal, flags, lora, train, without
from safetensors.torch import load_file, save_file

import train_sap_lora_sd15 as sap

SCRIPT = "train_sap_lora_sd15"
OF_RUN = ["--train_text_encoder", "--gradient_accumulation_steps=2", "--lora_dropout=0.2", "--random_flip",
          "--lr_scheduler=cosine", "--lr_warmup_steps=1", "--subject_token=sks"]  # fmt: skip


def arguments(base, photos, output, *more: str, steps: int) -> list[str]:
    return without(flags(base, photos, output, *OF_RUN, *more, steps=steps), "--center_crop")


@pytest.fixture(scope="module")
def undisturbed(sd15, captioned, tmp_path_factory):
    """A run of 5 steps with checkpoints at 2 and 4: crops, mirrors, noise and dropout are all random."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    train(SCRIPT, arguments(sd15, captioned, output, "--checkpointing_steps=2", steps=5))
    return output


@pytest.mark.parametrize("value", ["latest", "checkpoint-2", "{}/checkpoint-2", "{}/checkpoint-2/"])
def test_a_resumed_run_is_the_same_run_bit_for_bit(value, undisturbed, sd15, captioned, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    for step in (2, 4) if value == "latest" else (2,):
        shutil.copytree(undisturbed / f"checkpoint-{step}", output / f"checkpoint-{step}")
    torch.manual_seed(12345)
    more = [f"--resume_from_checkpoint={value.format(output)}"]
    train(SCRIPT, arguments(sd15, captioned, output, *more, steps=5))
    assert_equal(lora(output), lora(undisturbed))


def test_resuming_finds_its_seed(sd15, photos, tmp_path, caplog):
    without_seed = without(flags(sd15, photos, tmp_path, "--checkpointing_steps=1", steps=3), "--seed")
    train(SCRIPT, without_seed)
    whole = lora(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-3")
    shutil.rmtree(tmp_path / "checkpoint-2")
    train(SCRIPT, [*without_seed, "--resume_from_checkpoint=latest"])
    assert_equal(lora(tmp_path), whole)


def test_runs_without_seed_differ(sd15, photos, tmp_path):
    for name in ("one", "other"):
        train(SCRIPT, without(flags(sd15, photos, tmp_path / name, steps=1), "--seed"))
    one, other = lora(tmp_path / "one"), lora(tmp_path / "other")
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_a_finished_run_says_so_and_writes_its_lora_again(undisturbed, sd15, captioned, tmp_path, caplog):
    shutil.copytree(undisturbed / "checkpoint-4", tmp_path / "checkpoint-4")
    train(SCRIPT, arguments(sd15, captioned, tmp_path, "--resume_from_checkpoint=latest", steps=4))
    assert "already has 4 of 4 steps: nothing is left to train" in caplog.text
    assert_equal(lora(tmp_path), load_file(undisturbed / "checkpoint-4" / LORA_FILE))


def test_latest_without_a_checkpoint_starts_fresh(sd15, photos, tmp_path, caplog):
    (tmp_path / "checkpoints_old").mkdir()
    (tmp_path / "checkpoint-9").mkdir()  # not complete
    train(SCRIPT, flags(sd15, photos, tmp_path, "--resume_from_checkpoint=latest", steps=1))
    assert "holds no checkpoint" in caplog.text
    assert lora(tmp_path)


@pytest.mark.parametrize("value", ["checkpoint-7", "/nowhere/checkpoint-2", "checkpoints_old"])
def test_a_checkpoint_that_is_not_there_is_named(value, sd15, photos, tmp_path):
    (tmp_path / "checkpoints_old").mkdir()
    with pytest.raises(sap.UsageError, match=f"--resume_from_checkpoint {value}"):
        train(SCRIPT, flags(sd15, photos, tmp_path, f"--resume_from_checkpoint={value}"))


@pytest.mark.parametrize(("limit", "kept"), [(1, {5}), (2, {4, 5}), (9, {1, 2, 3, 4, 5})])
def test_old_checkpoints_go_and_other_folders_stay(limit, kept, sd15, photos, tmp_path):
    for name in ("checkpoints_old", "checkpoint-best", "checkpoint-900"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    more = ["--checkpointing_steps=1", f"--checkpoints_total_limit={limit}"]
    train(SCRIPT, flags(sd15, photos, tmp_path, *more, steps=5))
    found = {path.name for path in tmp_path.iterdir() if "checkpoint" in path.name}
    assert found == {f"checkpoint-{step}" for step in kept} | {"checkpoints_old", "checkpoint-best", "checkpoint-900"}


def test_a_checkpoint_is_complete_before_it_has_its_name_and_before_old_ones_go(sd15, photos, tmp_path, monkeypatch):
    def cut_off(source, target):
        raise KeyboardInterrupt

    more = ["--checkpointing_steps=1", "--checkpoints_total_limit=1"]
    arguments = flags(sd15, photos, tmp_path, *more, steps=2)
    train(SCRIPT, flags(sd15, photos, tmp_path, *more, steps=1))
    monkeypatch.setattr(sap, "write_lora", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train(SCRIPT, [*arguments, "--resume_from_checkpoint=latest"])
    assert list(sap.list_checkpoints(tmp_path)) == [1]
    monkeypatch.undo()
    train(SCRIPT, [*arguments, "--resume_from_checkpoint=latest"])
    assert list(sap.list_checkpoints(tmp_path)) == [2]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_second_run_replaces_the_checkpoints_of_the_first(sd15, photos, tmp_path):
    arguments = flags(sd15, photos, tmp_path, "--checkpointing_steps=1", steps=1)
    train(SCRIPT, arguments)
    train(SCRIPT, [*arguments, "--seed=5"])
    assert json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())["seed"] == 5
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: tensors.pop(next(iter(tensors))), "other layers or another rank"),
        (
            lambda tensors: tensors.update({"unet.extra.lora.up.weight": torch.zeros(1)}),
            "other layers or another rank",
        ),
        (lambda tensors: tensors.update({"prior.extra": torch.zeros(1)}), "does not train prior.extra"),
    ],
)
def test_every_tensor_of_a_checkpoint_must_be_used(change, reason, undisturbed, sd15, captioned, tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(undisturbed / "checkpoint-2", checkpoint)
    tensors = load_file(checkpoint / LORA_FILE)
    change(tensors)
    save_file(tensors, checkpoint / LORA_FILE)
    with pytest.raises(sap.UsageError, match=reason):
        train(SCRIPT, arguments(sd15, captioned, tmp_path, "--resume_from_checkpoint=latest", steps=5))


def test_a_text_encoder_that_no_longer_trains_is_not_forgotten_silently(undisturbed, sd15, captioned, tmp_path):
    shutil.copytree(undisturbed / "checkpoint-2", tmp_path / "checkpoint-2")
    more = without(arguments(sd15, captioned, tmp_path, steps=5), "--train_text_encoder")
    with pytest.raises(sap.UsageError, match="does not train text_encoder"):
        train(SCRIPT, [*more, "--resume_from_checkpoint=latest"])


def test_checkpoints_of_older_transformers_are_read(undisturbed, sd15, captioned, tmp_path):
    keys = [key for key in lora(undisturbed) if key.startswith("text_encoder.")]
    assert all("text_model." in key for key in keys)
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(undisturbed / "checkpoint-4", checkpoint)
    tensors = {key.replace("text_model.", ""): tensor for key, tensor in load_file(checkpoint / LORA_FILE).items()}
    save_file(tensors, checkpoint / LORA_FILE)
    train(SCRIPT, arguments(sd15, captioned, tmp_path, "--resume_from_checkpoint=latest", steps=5))
    assert_equal(lora(tmp_path), lora(undisturbed))
