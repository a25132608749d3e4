# SPDX-License-Identifier: Apache-2.0
"""The training loop: what is kept when it ends early, in which order things happen, and what its records hold."""

import math

import pytest
import torch
from runner import LORA_FILE, assert_equal, flags, left_in, lora, make_run, metrics, randomise_adapters, train

import train_sap_lora_sd15 as sap

SCRIPT = "train_sap_lora_sd15"


def fail_at(monkeypatch, micro_step: int, error: BaseException) -> None:
    """Raise `error` in a micro-step of the next run."""
    loss_terms = sap.loss_terms

    def failing(step, *rest):
        if step.index == micro_step:
            raise error
        return loss_terms(step, *rest)

    monkeypatch.setattr(sap, "loss_terms", failing)


# ---- However training ends, what was trained is kept ----


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), MemoryError(), KeyError("a bug")], ids=repr)
def test_an_error_in_a_step_keeps_what_was_trained_and_shows_itself(
    error, sd15, photos, tmp_path, monkeypatch, caplog
):
    train(SCRIPT, flags(sd15, photos, tmp_path / "whole", steps=4))
    with monkeypatch.context() as patches:
        fail_at(patches, 3, error)
        with pytest.raises(type(error)):
            train(SCRIPT, flags(sd15, photos, tmp_path / "broken", steps=4))
    assert {LORA_FILE, "checkpoint-3"} <= left_in(tmp_path / "broken")
    assert "stopped after step 3 of 4. To go on, add --resume_from_checkpoint latest" in caplog.text
    train(SCRIPT, flags(sd15, photos, tmp_path / "broken", "--resume_from_checkpoint=latest", steps=4))
    assert_equal(lora(tmp_path / "broken"), lora(tmp_path / "whole"))


def test_an_error_before_the_first_step_writes_nothing(sd15, photos, tmp_path, monkeypatch):
    fail_at(monkeypatch, 0, KeyError("a bug"))
    with pytest.raises(KeyError):
        train(SCRIPT, flags(sd15, photos, tmp_path, steps=4))
    assert left_in(tmp_path) == set()


# ---- Order ----


def test_steps_that_wait_are_logged_before_what_validation_logs(sd15, photos, tmp_path):
    more = [f"--validation_data_dir={photos}", "--validation_steps=2", "--logging_steps=3"]
    train(SCRIPT, flags(sd15, photos, tmp_path, *more, steps=5))
    rows = [(row["step"], "loss" in row) for row in metrics(tmp_path) if "loss" in row or "val/anchor" in row]
    assert rows == [(1, True), (2, True), (2, False), (3, True), (4, True), (4, False), (5, True)]


def test_pictures_come_before_the_checkpoint_of_their_step(sd15, photos, tmp_path, monkeypatch):
    def killed(*_):
        raise SystemExit

    monkeypatch.setattr(sap, "save_checkpoint", killed)
    more = [
        "--validation_prompt=sks dog",
        "--num_validation_images=1",
        "--validation_steps=2",
        "--checkpointing_steps=2",
    ]
    with pytest.raises(SystemExit):
        train(SCRIPT, flags(sd15, photos, tmp_path, *more, steps=4))
    assert [path.name for path in (tmp_path / "validation").iterdir()] == ["validation-000002.png"]


# ---- Held-out losses ----


@pytest.mark.parametrize("script", ["train_sap_lora_sd15", "train_sap_lora_sdxl", "train_sap_lora_sd3"])
def test_held_out_pictures_are_drawn_in_float32(script, bases, photos, tmp_path, monkeypatch):
    more = ["--mixed_precision=bf16", f"--validation_data_dir={photos}"]
    module, run = make_run(script, [*flags(bases[script], photos, tmp_path, *more)])
    in_autocast = []
    draw_micro_step = module.draw_micro_step

    def watched(*arguments):
        in_autocast.append(torch.is_autocast_enabled("cpu"))
        return draw_micro_step(*arguments)

    monkeypatch.setattr(module, "draw_micro_step", watched)
    module.log_held_out(run, 1)
    assert in_autocast == [False] * 40  # five pictures, each eight times
    (row,) = metrics(tmp_path)
    assert row.keys() == {"step", "val/reconstruction", "val/anchor"}


def test_held_out_losses_are_the_same_whenever_they_are_taken(sd15, photos, tmp_path):
    """The same noise and timesteps, and no dropout."""
    more = [f"--validation_data_dir={photos}", "--lora_dropout=0.5"]
    _, run = make_run(SCRIPT, flags(sd15, photos, tmp_path, *more))
    randomise_adapters(run)
    run.student.train()
    for step in (1, 2):
        sap.log_held_out(run, step)
    one, two = metrics(tmp_path)
    assert one | {"step": 2} == two


def test_a_held_out_loss_that_is_not_finite_ends_the_run_and_reaches_no_file(sd15, photos, tmp_path, monkeypatch):
    loss_terms = sap.loss_terms

    def overflowing(step, *rest):
        factor = math.nan if step.index < 0 else 1.0
        return {name: factor * term for name, term in loss_terms(step, *rest).items()}

    monkeypatch.setattr(sap, "loss_terms", overflowing)
    more = [f"--validation_data_dir={photos}", "--validation_steps=2"]
    with pytest.raises(sap.RunError, match="the loss on --validation_data_dir at step 2 is nan"):
        train(SCRIPT, flags(sd15, photos, tmp_path, *more, steps=4))
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2]


# ---- What is given up ----


def test_a_log_that_fails_is_told_once_and_training_goes_on(sd15, photos, tmp_path, monkeypatch, caplog):
    def broken(self, values, step):
        raise RuntimeError("the tracker is gone")

    monkeypatch.setattr(sap.Accelerator, "log", broken)
    train(SCRIPT, flags(sd15, photos, tmp_path, steps=3))
    assert caplog.text.count("the tracker is gone") == 1
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3]
    assert (tmp_path / LORA_FILE).is_file()


# ---- Groups of anchors ----


def test_groups_of_anchors_are_counted_from_the_start_and_whole():
    assert list(sap.whole_groups(5, 10, 4)) == [range(4, 8), range(8, 12)]
    assert list(sap.whole_groups(0, 3, 1)) == [range(0, 1), range(1, 2), range(2, 3)]
    assert list(sap.whole_groups(8, 8, 4)) == []
