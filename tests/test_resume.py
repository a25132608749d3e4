# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what is in them, which of them stay, and that a resumed run is the run that was not interrupted."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from runner import LORA_FILE, assert_equal, flags, lora, reset, train, without
from safetensors.torch import load_file, save_file

import train_sap_lora_sd15 as sap

SCRIPT = "train_sap_lora_sd15"
OF_RUN = ["--train_text_encoder", "--gradient_accumulation_steps=2", "--lora_dropout=0.2", "--random_flip",
          "--lr_scheduler=cosine", "--lr_warmup_steps=1", "--subject_token=sks"]  # fmt: skip


def arguments(base, photos, output, *more: str, steps: int) -> list[str]:
    return without(flags(base, photos, output, *OF_RUN, *more, steps=steps), "--center_crop")


def forget(checkpoint: Path, *names: str) -> None:
    """Take fields out of a checkpoint's record."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    (checkpoint / "trainer_state.json").write_text(json.dumps({k: v for k, v in state.items() if k not in names}))


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


def test_a_run_that_was_killed_after_its_last_step_still_gets_its_lora(sd15, photos, tmp_path, caplog):
    arguments = flags(sd15, photos, tmp_path, "--checkpointing_steps=1", steps=1)
    train(SCRIPT, arguments)
    whole = lora(tmp_path)
    (tmp_path / LORA_FILE).unlink()
    train(SCRIPT, [*arguments, "--resume_from_checkpoint=latest"])
    assert "already has 1 of 1 steps: nothing is left to train" in caplog.text
    assert_equal(lora(tmp_path), whole)


def test_resuming_a_finished_run_says_so_without_a_model(sd15, photos, tmp_path, monkeypatch, caplog):
    arguments = without(flags(sd15, photos, tmp_path, "--checkpointing_steps=2", steps=3), "--seed")
    train(SCRIPT, arguments)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with monkeypatch.context() as patched:
        patched.setattr(sap, "load_text_pipeline", None)
        train(SCRIPT, [*arguments, "--resume_from_checkpoint=latest"])
    assert "holds the finished run of 3 steps" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    train(SCRIPT, [*arguments, "--resume_from_checkpoint=latest", "--max_train_steps=4"])
    assert json.loads((tmp_path / "finished_run.json").read_text())["max_train_steps"] == 4


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
    forget(checkpoint, "files")
    with pytest.raises(sap.UsageError, match=reason):
        train(SCRIPT, arguments(sd15, captioned, tmp_path, "--resume_from_checkpoint=latest", steps=5))


def test_a_text_encoder_that_no_longer_trains_is_not_forgotten_silently(undisturbed, sd15, captioned, tmp_path):
    shutil.copytree(undisturbed / "checkpoint-2", tmp_path / "checkpoint-2")
    more = without(arguments(sd15, captioned, tmp_path, steps=5), "--train_text_encoder")
    with pytest.raises(sap.UsageError, match="--train_text_encoder was True, is False"):
        train(SCRIPT, [*more, "--resume_from_checkpoint=latest"])
    forget(tmp_path / "checkpoint-2", "settings")
    with pytest.raises(sap.UsageError, match="does not train text_encoder"):
        train(SCRIPT, [*more, "--resume_from_checkpoint=latest"])


def test_checkpoints_of_older_transformers_are_read(undisturbed, sd15, captioned, tmp_path):
    keys = [key for key in lora(undisturbed) if key.startswith("text_encoder.")]
    assert all("text_model." in key for key in keys)
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(undisturbed / "checkpoint-4", checkpoint)
    tensors = {key.replace("text_model.", ""): tensor for key, tensor in load_file(checkpoint / LORA_FILE).items()}
    save_file(tensors, checkpoint / LORA_FILE)
    forget(checkpoint, "files", "settings")
    train(SCRIPT, arguments(sd15, captioned, tmp_path, "--resume_from_checkpoint=latest", steps=5))
    assert_equal(lora(tmp_path), lora(undisturbed))


@pytest.fixture
def stopped(undisturbed, tmp_path):
    """A folder with the undisturbed run's first checkpoint alone."""
    shutil.copytree(undisturbed / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("flag", "was"),
    [
        ("--instance_prompt=a sks dog", "a photo of sks dog"),
        ("--class_prompt=a dog", "a photo of a dog"),
        ("--class_token=good", "None"),
        ("--resolution=128", "64"),
        ("--anchor_weight=0.4", "0.5"),
        ("--anchor_source=finetuned", "pretrained"),
        ("--seed=7", "0"),
        ("--rank=2", "4"),
        ("--lora_alpha=1", "None"),
        ("--lora_layers=to_k", "None"),
        ("--train_batch_size=2", "1"),
        ("--gradient_accumulation_steps=1", "2"),
        ("--repeats=2", "1"),
        ("--caption_dropout=0.1", "0.0"),
        ("--learning_rate=1e-3", "0.01"),
        ("--lr_scheduler=constant", "cosine"),
        ("--snr_gamma=5", "None"),
        ("--mixed_precision=bf16", "no"),
        ("--max_train_steps=9", "5"),
    ],
)
def test_another_run_does_not_go_on_from_a_checkpoint(flag, was, stopped, sd15, captioned):
    more = ["--resume_from_checkpoint=latest", flag]
    with pytest.raises(sap.UsageError, match=f"is of another run: .*{flag.split('=')[0]} was {was}, is "):
        train(SCRIPT, arguments(sd15, captioned, stopped, *more, steps=5))


def test_another_number_of_processes_is_explained(stopped, sd15, captioned):
    state = json.loads((stopped / "checkpoint-2" / "trainer_state.json").read_text())
    state["settings"]["num_processes"] = 4
    (stopped / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(sap.UsageError, match="trained by 4 processes, this run has 1: a step would see 1 batches"):
        train(SCRIPT, arguments(sd15, captioned, stopped, "--resume_from_checkpoint=latest", steps=5))


def replace_picture(folder: Path) -> None:
    shutil.copy(folder / "01.jpg", folder / "00.jpg")


def change_caption(folder: Path) -> None:
    metadata = folder / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("in the snow", "in the rain"))


def add_picture(folder: Path) -> None:
    shutil.copy(folder / "01.jpg", folder / "02b.jpg")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replace_picture, "00.jpg is another picture"),
        (change_caption, "the captions of 01.jpg were .*snow.*, are .*rain"),
        (add_picture, "the pictures were .*02.jpg, 03.jpg.*, are .*02.jpg, 02b.jpg, 03.jpg"),
    ],
)
def test_other_pictures_or_captions_do_not_go_on_from_a_checkpoint(change, reason, stopped, sd15, captioned, tmp_path):
    shutil.copytree(captioned, tmp_path / "photos")
    change(tmp_path / "photos")
    with pytest.raises(sap.UsageError, match=reason):
        train(SCRIPT, arguments(sd15, tmp_path / "photos", stopped, "--resume_from_checkpoint=latest", steps=5))


def test_what_does_not_change_the_result_may_change(stopped, undisturbed, sd15, captioned, tmp_path):
    for source, name in ((sd15, "base"), (captioned, "photos")):
        shutil.copytree(source, tmp_path / name)
    more = ["--resume_from_checkpoint=latest", "--checkpointing_steps=1", "--output_kohya_format"]
    train(SCRIPT, arguments(tmp_path / "base", tmp_path / "photos", stopped, *more, steps=5))
    assert_equal(lora(stopped), lora(undisturbed))


def test_another_base_does_not_go_on_from_a_checkpoint(stopped, sd21, captioned):
    with pytest.raises(sap.UsageError, match="--pretrained_model_name_or_path was a folder with the content"):
        train(SCRIPT, arguments(sd21, captioned, stopped, "--resume_from_checkpoint=latest", steps=5))


def test_a_checkpoint_without_a_record_is_used_with_a_warning(stopped, undisturbed, sd15, captioned, caplog):
    forget(stopped / "checkpoint-2", "settings", "pictures", "files", "max_train_steps")
    train(SCRIPT, arguments(sd15, captioned, stopped, "--resume_from_checkpoint=latest", steps=5))
    assert "does not record its settings" in caplog.text
    assert_equal(lora(stopped), lora(undisturbed))


@pytest.mark.parametrize("name", ["optimizer.bin", "trainer_state.json", LORA_FILE])
def test_a_checkpoint_that_was_cut_short_is_skipped(name, stopped, undisturbed, sd15, captioned, caplog):
    shutil.copytree(undisturbed / "checkpoint-4", stopped / "checkpoint-4")
    content = (stopped / "checkpoint-4" / name).read_bytes()
    (stopped / "checkpoint-4" / name).write_bytes(content[: len(content) // 2])
    reset()
    more = ["--resume_from_checkpoint=latest"]
    args = sap.parse_args(arguments(sd15, captioned, stopped, *more, steps=5))
    assert sap.find_checkpoint(args, sap.start_accelerator(args)) == stopped / "checkpoint-2"
    assert f"{stopped / 'checkpoint-4'} is not complete: it is skipped" in caplog.text


@pytest.mark.parametrize("moment", ["of the old one", "of the new one", "after both"])
def test_a_checkpoint_that_replaces_another_is_never_lost(moment, stopped, sd15, captioned, monkeypatch):
    final = stopped / "checkpoint-2"
    shutil.copytree(final, stopped / ".checkpoint-2.partial")
    (stopped / ".checkpoint-2.partial" / "new").touch()
    calls = []

    def dies(real):
        def call(*paths, **options):
            calls.append(real)
            if calls == [*before, real]:
                raise KeyboardInterrupt
            return real(*paths, **options)

        return call

    replace, remove = sap.os.replace, sap.shutil.rmtree
    before = {
        "of the old one": [remove],
        "of the new one": [remove, replace],
        "after both": [remove, replace, replace],
    }
    before = before[moment]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sap.os, "replace", dies(replace))
        patched.setattr(sap.shutil, "rmtree", dies(remove))
        sap.publish(stopped / ".checkpoint-2.partial", final)
    sap.tidy_checkpoints(stopped)
    assert list(sap.list_checkpoints(stopped)) == [2]
    assert (final / "new").exists()
    assert [path.name for path in stopped.iterdir()] == ["checkpoint-2"]


def test_a_checkpoint_that_was_moved_aside_comes_back(stopped, caplog):
    (stopped / "checkpoint-2").rename(stopped / ".checkpoint-2.old")
    (stopped / ".checkpoint-2.partial").mkdir()
    sap.tidy_checkpoints(stopped)
    assert [path.name for path in stopped.iterdir()] == ["checkpoint-2"]
    assert "checkpoint-2 was not complete when the last run ended: it is skipped" in caplog.text


class Hostile:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.bin", "scheduler.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"])
@pytest.mark.parametrize("with_record", [True, False])
def test_a_pickle_that_would_run_code_is_refused(name, with_record, stopped, sd15, captioned, tmp_path):
    checkpoint = stopped / "checkpoint-2"
    (checkpoint / name).write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    forget(checkpoint, *([] if with_record else ["files", "settings"]))
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    if with_record and name in state["files"]:
        state["files"][name] = (checkpoint / name).stat().st_size
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(sap.UsageError, match=f"--resume_from_checkpoint .*{name} is refused"):
        train(SCRIPT, arguments(sd15, captioned, stopped, "--resume_from_checkpoint=latest", steps=5))
    assert not (tmp_path / "ran").exists()
