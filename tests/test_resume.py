# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what is in them, which of them stay, and that a resumed run is the run that was not interrupted."""

import importlib
import json
import pickle
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from runner import LORA_FILE, assert_equal, flags, left_in, lora, make_run, train, without

import train_sap_lora_sd15 as sap

SCRIPT = "train_sap_lora_sd15"
OF_RUN = ["--train_text_encoder", "--gradient_accumulation_steps=2", "--lora_dropout=0.2", "--random_flip",
          "--lr_scheduler=cosine", "--lr_warmup_steps=1", "--subject_token=sks"]  # fmt: skip


def arguments(base, photos, output, *more: str, steps: int = 5) -> list[str]:
    return without(flags(base, photos, output, *OF_RUN, *more, steps=steps), "--center_crop")


def latest(base, photos, output, *more: str, steps: int = 5) -> list[str]:
    return arguments(base, photos, output, "--resume_from_checkpoint=latest", *more, steps=steps)


def change_state(checkpoint: Path, change) -> None:
    """Rewrite a checkpoint's record, hashes included, as if its files had always been what they are."""
    path = checkpoint / sap.STATE_FILE
    state = json.loads(path.read_text())
    state["files"] = {name: sap.fingerprint(checkpoint / name) for name in state["files"]}
    change(state)
    path.write_text(json.dumps(state))


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, in order."""
    return [int(path.name.removeprefix("checkpoint-")) for path in sap.list_checkpoints(folder)]


@pytest.fixture(scope="module")
def undisturbed(sd15, captioned, tmp_path_factory):
    """A run of 5 steps with checkpoints at 2 and 4: crops, mirrors, noise and dropout are all random."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    train(SCRIPT, arguments(sd15, captioned, output, "--checkpointing_steps=2"))
    return output


@pytest.fixture
def stopped(undisturbed, tmp_path):
    """A folder with the undisturbed run's first checkpoint alone."""
    shutil.copytree(undisturbed / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    return tmp_path / "out"


# ---- The same run, bit for bit ----


@pytest.mark.parametrize("value", ["latest", "checkpoint-2", "{}/checkpoint-2/"])
def test_a_resumed_run_is_the_same_run_bit_for_bit(value, undisturbed, stopped, sd15, captioned):
    if value == "latest":
        shutil.copytree(undisturbed / "checkpoint-4", stopped / "checkpoint-4")
    torch.manual_seed(12345)
    train(SCRIPT, arguments(sd15, captioned, stopped, f"--resume_from_checkpoint={value.format(stopped)}"))
    assert_equal(lora(stopped), lora(undisturbed))


def test_anchors_of_the_model_in_training_resume_bit_for_bit_with_dropout(sd15, photos, tmp_path):
    more = ["--anchor_source=finetuned", "--lora_dropout=0.5", "--gradient_accumulation_steps=2"]
    more += ["--checkpointing_steps=1", "--anchor_weight=2"]
    train(SCRIPT, flags(sd15, photos, tmp_path / "whole", *more, steps=3))
    more += [f"--resume_from_checkpoint={tmp_path}/whole/checkpoint-1"]
    train(SCRIPT, flags(sd15, photos, tmp_path / "resumed", *more, steps=3))
    assert_equal(lora(tmp_path / "resumed"), lora(tmp_path / "whole"))


@pytest.mark.parametrize("optimizer", [["--optimizer=prodigy", "--learning_rate=1"], ["--use_8bit_adam"]])
def test_other_optimizers_resume_bit_for_bit(optimizer, sd15, photos, tmp_path):
    pytest.importorskip("prodigyopt" if "--learning_rate=1" in optimizer else "bitsandbytes")
    more = [*optimizer, "--checkpointing_steps=2"]
    train(SCRIPT, flags(sd15, photos, tmp_path / "whole", *more, steps=4))
    more += [f"--resume_from_checkpoint={tmp_path}/whole/checkpoint-2"]
    train(SCRIPT, flags(sd15, photos, tmp_path / "resumed", *more, steps=4))
    assert_equal(lora(tmp_path / "resumed"), lora(tmp_path / "whole"))


def test_resuming_finds_its_seed(sd15, photos, tmp_path):
    without_seed = without(flags(sd15, photos, tmp_path, "--checkpointing_steps=1", steps=2), "--seed")
    train(SCRIPT, without_seed)
    whole = lora(tmp_path)
    for name in left_in(tmp_path) - {"checkpoint-1"}:
        shutil.rmtree(tmp_path / name) if (tmp_path / name).is_dir() else (tmp_path / name).unlink()
    train(SCRIPT, [*without_seed, "--resume_from_checkpoint=latest"])
    assert_equal(lora(tmp_path), whole)
    train(SCRIPT, without_seed)  # a run without a seed draws another one
    assert any(not torch.equal(tensor, whole[key]) for key, tensor in lora(tmp_path).items())


def test_a_run_that_was_killed_after_its_last_step_still_gets_its_lora(sd15, photos, tmp_path, caplog):
    wanted = flags(sd15, photos, tmp_path, "--checkpointing_steps=1", "--resume_from_checkpoint=latest", steps=1)
    train(SCRIPT, wanted)
    whole = lora(tmp_path)
    (tmp_path / LORA_FILE).unlink()
    train(SCRIPT, wanted)
    assert "already has 1 of 1 steps: nothing is left to train" in caplog.text
    assert_equal(lora(tmp_path), whole)


def test_resuming_a_finished_run_says_so_without_a_model(sd15, photos, tmp_path, monkeypatch, caplog):
    wanted = without(flags(sd15, photos, tmp_path, "--checkpointing_steps=2", steps=3), "--seed")
    wanted += ["--resume_from_checkpoint=latest"]
    train(SCRIPT, wanted)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".lock"}
    with monkeypatch.context() as patched:
        patched.setattr(sap, "load_text_pipeline", None)
        train(SCRIPT, wanted)
    assert "holds the finished run of 3 steps" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".lock"} == before
    train(SCRIPT, [*wanted, "--max_train_steps=4"])
    assert json.loads((tmp_path / sap.FINISHED_FILE).read_text())["global_step"] == 4


def test_a_step_beyond_the_end_of_the_run_is_refused(stopped, sd15, captioned):
    change_state(stopped / "checkpoint-2", lambda state: state["run"].pop("--max_train_steps"))
    with pytest.raises(sap.UsageError, match="checkpoint-2 is beyond --max_train_steps 1"):
        train(SCRIPT, latest(sd15, captioned, stopped, steps=1))


# ---- Which checkpoint ----


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


@pytest.mark.parametrize(("limit", "kept"), [(1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5])])
def test_old_checkpoints_go_and_other_folders_stay(limit, kept, sd15, photos, tmp_path):
    others = {"checkpoints_old", "checkpoint-best"}
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / sap.STATE_FILE).write_text("{}")
    more = ["--checkpointing_steps=1", f"--checkpoints_total_limit={limit}"]
    train(SCRIPT, flags(sd15, photos, tmp_path, *more, steps=5))
    assert {name for name in left_in(tmp_path) if "checkpoint" in name} == {f"checkpoint-{i}" for i in kept} | others
    assert steps_in(tmp_path) == kept


def test_a_number_that_no_run_writes_is_no_checkpoint(stopped):
    shutil.copytree(stopped / "checkpoint-2", stopped / "checkpoint-007")
    assert steps_in(stopped) == [2]


def test_all_that_an_older_run_wrote_is_moved_out_of_the_way_together(undisturbed, sd15, captioned, tmp_path, caplog):
    output = tmp_path / "out"
    shutil.copytree(undisturbed, output)
    (output / "validation").mkdir()
    (output / "validation" / "validation-000002.png").write_text("a grid")
    (output / "image_0.png").write_text("a picture")
    (output / "logs" / sap.TRACKER).mkdir(parents=True)
    (output / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in output.rglob("*") if path.is_file() and path.name != ".lock"}
    for number in (1, 2):
        train(SCRIPT, arguments(sd15, captioned, output, "--checkpointing_steps=2", f"--seed={number}", steps=2))
        assert f"it was moved into {output / f'earlier-{number}'}" in caplog.text
    earlier = output / "earlier-1"
    assert steps_in(earlier) == [2, 4]
    assert_equal(lora(earlier / "checkpoint-2"), lora(undisturbed / "checkpoint-2"))
    assert {LORA_FILE, sap.KOHYA_FILE, sap.FINISHED_FILE, sap.METRICS_FILE, "README.md", "image_0.png",
            "validation-000002.png", sap.TRACKER} <= left_in(earlier)  # fmt: skip
    now = {path.name: path.read_bytes() for path in [*earlier.rglob("*"), output / "notes.txt"] if path.is_file()}
    assert now == before
    seeds = [json.loads((output / folder / "checkpoint-2" / sap.STATE_FILE).read_text())["seed"]
             for folder in ("earlier-1", "earlier-2", ".")]  # fmt: skip
    assert seeds == [0, 1, 2]
    assert [json.loads(line)["step"] for line in (output / sap.METRICS_FILE).read_text().splitlines()] == [1, 2]


def test_a_resumed_run_moves_nothing_of_its_own(undisturbed, sd15, captioned, tmp_path):
    """Its log has each step once, and the pictures of its earlier end go."""
    output = tmp_path / "out"
    shutil.copytree(undisturbed, output)
    (output / "image_7.png").write_text("of the earlier end")
    path = output / sap.FINISHED_FILE
    state = json.loads(path.read_text())
    state["files"]["image_7.png"] = sap.fingerprint(output / "image_7.png")
    state["run"].pop("--max_train_steps")
    path.write_text(json.dumps(state))
    for step in (2, 4):
        change_state(output / f"checkpoint-{step}", lambda state: state["run"].pop("--max_train_steps"))
    train(SCRIPT, latest(sd15, captioned, output, steps=6))
    assert not [name for name in left_in(output) if name.startswith("earlier")]
    assert not (output / "image_7.png").exists()
    assert steps_in(output) == [2, 4]
    rows = [json.loads(line)["step"] for line in (output / sap.METRICS_FILE).read_text().splitlines()]
    assert rows == [1, 2, 3, 4, 5, 6]


def test_what_is_edited_since_is_moved_when_a_run_goes_on(undisturbed, sd15, captioned, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(undisturbed, output)
    (output / "README.md").write_text("my own words")
    (output / sap.FINISHED_FILE).write_text(json.dumps(json.loads((output / sap.FINISHED_FILE).read_text())))
    train(SCRIPT, latest(sd15, captioned, output))
    assert (output / "earlier-1" / "README.md").read_text() == "my own words"


@pytest.mark.parametrize("script", ["train_sap_lora_sd15", "train_sap_lora_sdxl", "train_sap_lora_sd3"])
def test_the_folder_of_a_run_of_diffusers_script_is_not_overwritten(script, bases, photos, tmp_path, caplog):
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", LORA_FILE):
            (folder / name).write_text(f"{name} of step {step}")
    (tmp_path / "README.md").write_text("theirs")
    more = ["--resume_from_checkpoint=latest", "--checkpointing_steps=1", "--checkpoints_total_limit=1"]
    train(script, flags(bases[script], photos, tmp_path, *more))
    assert "those of diffusers' scripts are, too" in caplog.text
    for step in (1, 2):
        assert (tmp_path / "earlier-1" / f"checkpoint-{step}" / "optimizer.bin").read_text().endswith(f"step {step}")
    assert (tmp_path / "earlier-1" / "README.md").read_text() == "theirs"
    assert steps_in(tmp_path) == [2]


def test_a_log_that_is_a_link_is_not_followed(sd15, photos, tmp_path):
    (tmp_path / "diary").write_text("mine\n")
    output = tmp_path / "out"
    output.mkdir()
    (output / sap.METRICS_FILE).symlink_to(tmp_path / "diary")
    train(SCRIPT, flags(sd15, photos, output, "--checkpointing_steps=1", steps=1))
    (output / sap.METRICS_FILE).unlink()
    (output / sap.METRICS_FILE).symlink_to(tmp_path / "diary")
    train(SCRIPT, flags(sd15, photos, output, "--resume_from_checkpoint=latest", steps=2))
    assert (tmp_path / "diary").read_text() == "mine\n"
    assert not (output / sap.METRICS_FILE).is_symlink()


def test_notes_in_a_checkpoint_stay_when_it_is_over_the_limit(sd15, photos, tmp_path, monkeypatch, caplog):
    save = sap.save_checkpoint

    def noted(run, training):
        save(run, training)
        (tmp_path / f"checkpoint-{training.step}" / "notes.txt").write_text("mine")

    monkeypatch.setattr(sap, "save_checkpoint", noted)
    train(SCRIPT, flags(sd15, photos, tmp_path, "--checkpointing_steps=1", "--checkpoints_total_limit=1"))
    assert left_in(tmp_path / "checkpoint-1") == {"notes.txt"}
    assert "This stays where it is, and the run goes on" in caplog.text
    assert lora(tmp_path)


@pytest.mark.parametrize("stands", ["dangling link", "file"])
def test_a_place_for_older_files_that_is_taken_is_not_used(stands, sd15, photos, tmp_path):
    place = tmp_path / "earlier-1"
    place.symlink_to(tmp_path / "nowhere") if stands == "dangling link" else place.write_text("mine")
    (tmp_path / "README.md").write_text("theirs")
    train(SCRIPT, flags(sd15, photos, tmp_path, steps=1))
    assert (tmp_path / "earlier-2" / "README.md").read_text() == "theirs"


@pytest.mark.parametrize("call", ["replace", "rmdir", "unlink"])
def test_tidying_up_that_fails_never_ends_a_run(call, sd15, photos, tmp_path, monkeypatch, caplog):
    """What cannot be moved or removed (a link, another owner's, an immutable file) is told; the LoRA is written."""
    (tmp_path / "README.md").write_text("theirs")
    owner = sap.os if call == "replace" else Path
    real = getattr(owner, call)

    def refused(path, *rest, **more):
        at_work = {"replace": Path(path).name == "README.md", "rmdir": True, "unlink": Path(path).name == LORA_FILE}
        if at_work[call]:
            raise PermissionError(1, "Operation not permitted", str(path))
        return real(path, *rest, **more)

    monkeypatch.setattr(owner, call, refused)
    train(SCRIPT, flags(sd15, photos, tmp_path, "--checkpointing_steps=1", "--checkpoints_total_limit=1", steps=3))
    assert "and the run goes on: [Errno 1] Operation not permitted" in caplog.text
    assert lora(tmp_path)


@pytest.mark.parametrize("name", [sap.TRAINING_FILE, sap.STATE_FILE, LORA_FILE])
@pytest.mark.parametrize("zeroed", [False, True])
def test_a_damaged_checkpoint_is_skipped(zeroed, name, stopped, undisturbed, sd15, captioned, caplog):
    damaged = stopped / "checkpoint-4"
    shutil.copytree(undisturbed / "checkpoint-4", damaged)
    content = (damaged / name).read_bytes()
    (damaged / name).write_bytes(content[:500].ljust(len(content) if zeroed else 500, b"\0"))
    path, state = sap.find_checkpoint(sap.parse_args(latest(sd15, captioned, stopped)))
    assert (path, state["global_step"]) == (stopped / "checkpoint-2", 2)
    assert f"{damaged} is not complete, or damaged: it is skipped" in caplog.text


@pytest.mark.parametrize("value", ["latest", "checkpoint-2"])
def test_a_checkpoint_of_an_older_format_is_refused(value, stopped, sd15, captioned):
    change_state(stopped / "checkpoint-2", lambda state: state.pop("format"))
    with pytest.raises(sap.UsageError, match=f"--resume_from_checkpoint {value}: .*format 1, and this script reads 3"):
        train(SCRIPT, arguments(sd15, captioned, stopped, f"--resume_from_checkpoint={value}"))


# ---- What makes two runs the same ----


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
        ("--lora_alpha=1", "4"),
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
    with pytest.raises(sap.UsageError, match=f"is of another run: .*{flag.split('=')[0]} was {was}, is "):
        train(SCRIPT, latest(sd15, captioned, stopped, flag))


@pytest.mark.parametrize("flag", ["--train_text_encoder", "--random_flip"])
def test_a_switch_that_is_left_out_makes_another_run(flag, stopped, sd15, captioned):
    with pytest.raises(sap.UsageError, match=f"{flag} was True, is False"):
        train(SCRIPT, without(latest(sd15, captioned, stopped), flag))


def test_another_number_of_processes_is_explained(stopped, sd15, captioned):
    change_state(stopped / "checkpoint-2", lambda state: state["run"].update({"--num_processes": 4}))
    with pytest.raises(sap.UsageError, match="is of another run: --num_processes was 4, is 1"):
        train(SCRIPT, latest(sd15, captioned, stopped))


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
        (replace_picture, "the content of 00.jpg was"),
        (change_caption, "the captions of 01.jpg was .*snow.*, is .*rain"),
        (add_picture, "the pictures was .*02.jpg', '03.jpg.*, is .*02.jpg', '02b.jpg', '03.jpg"),
    ],
)
def test_other_pictures_or_captions_do_not_go_on_from_a_checkpoint(change, reason, stopped, sd15, captioned, tmp_path):
    shutil.copytree(captioned, tmp_path / "photos")
    change(tmp_path / "photos")
    with pytest.raises(sap.UsageError, match=reason):
        train(SCRIPT, latest(sd15, tmp_path / "photos", stopped))


def test_another_base_does_not_go_on_from_a_checkpoint(stopped, sd21, captioned):
    with pytest.raises(sap.UsageError, match="--pretrained_model_name_or_path was a folder with the content"):
        train(SCRIPT, latest(sd21, captioned, stopped))


def copied(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    return folder


def test_files_that_are_not_loaded_may_come_into_a_base(sd15, photos, tmp_path):
    base = copied(sd15, tmp_path / "base")
    train(SCRIPT, flags(base, photos, tmp_path / "out", "--checkpointing_steps=1", steps=1))
    for name in (".DS_Store", "Thumbs.db", "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin",
                 "diffusion_pytorch_model.fp16-00001-of-00002.safetensors"):  # fmt: skip
        (base / "unet" / name).write_text("later")
    (base / "safety_checker").mkdir()
    (base / "safety_checker" / "config.json").write_text("{}")
    before = sap.folder_fingerprint(sd15, None)
    assert sap.folder_fingerprint(base, None) == before
    (base / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_text("other")
    assert sap.folder_fingerprint(base, "fp16") != before


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler", "tokenizer"])
def test_one_byte_anywhere_makes_another_base(part, sd15, tmp_path):
    base = copied(sd15, tmp_path / "base")
    path = max((base / part).iterdir(), key=lambda path: path.stat().st_size)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 3 * 2**20)  # behind the first MiB, where none was looked at
        before = sap.folder_fingerprint(base, None)
        file.seek(-5, 2)
        file.write(b"x")
    assert sap.folder_fingerprint(base, None) != before


def test_another_tokenizer_or_vae_makes_another_run(bases, photos, tmp_path):
    module = importlib.import_module("train_sap_lora_sdxl")
    base = bases["train_sap_lora_sdxl"]
    vae = copied(base / "vae", tmp_path / "vae")
    output = tmp_path / "out"
    command = flags(base, photos, output, f"--pretrained_vae_model_name_or_path={vae}", "--checkpointing_steps=1")
    train("train_sap_lora_sdxl", command)
    moved = vae.rename(tmp_path / "moved")
    again = [*command, "--resume_from_checkpoint=checkpoint-1", f"--pretrained_vae_model_name_or_path={moved}"]
    train("train_sap_lora_sdxl", again)
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    with pytest.raises(module.UsageError, match="--pretrained_vae_model_name_or_path was a folder with the content"):
        train("train_sap_lora_sdxl", again)


def test_a_tokenizer_with_other_content_makes_another_run(stopped, sd15, captioned, tmp_path):
    tokenizer = copied(sd15 / "tokenizer", tmp_path / "tokenizer")
    command = arguments(sd15, captioned, tmp_path / "own", f"--tokenizer_name={tokenizer}", "--checkpointing_steps=1")
    train(SCRIPT, [*command, "--max_train_steps=5"])
    (tokenizer / "more.txt").write_text("other")
    with pytest.raises(sap.UsageError, match="--tokenizer_name was a folder with the content"):
        train(SCRIPT, [*command, "--resume_from_checkpoint=checkpoint-1"])


def test_the_name_of_an_optimizer_may_be_written_in_small_letters(stopped, sd15, captioned, undisturbed):
    train(SCRIPT, latest(sd15, captioned, stopped, "--optimizer=adamw"))
    assert_equal(lora(stopped), lora(undisturbed))


def test_a_file_is_hashed_by_blocks(tmp_path):
    """However large a file is, no more of it than a block is in memory."""
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**28)
    tracemalloc.start()
    sap.fingerprint(tmp_path / "sparse")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


def test_what_does_not_change_the_result_may_change(stopped, undisturbed, sd15, captioned, tmp_path):
    for source, name in ((sd15, "base"), (captioned, "photos")):
        shutil.copytree(source, tmp_path / name)
    more = ["--checkpointing_steps=1", "--output_kohya_format", "--class_prompt=a photo of a dog"]
    train(SCRIPT, latest(tmp_path / "base", tmp_path / "photos", stopped, *more))
    assert_equal(lora(stopped), lora(undisturbed))


def test_a_derived_class_prompt_may_be_written_out(sd15, photos, tmp_path):
    derived = without(flags(sd15, photos, tmp_path, "--checkpointing_steps=1", steps=1), "--class_prompt")
    train(SCRIPT, derived)
    said = ["--class_prompt=a photo of dog", "--resume_from_checkpoint=latest", "--max_train_steps=2"]
    train(SCRIPT, [*derived, *said])
    assert steps_in(tmp_path) == [1, 2]


# ---- What is read from one ----


@pytest.fixture(scope="module")
def begun(sd15, captioned, tmp_path_factory):
    """The undisturbed run before its first step."""
    run = make_run(SCRIPT, arguments(sd15, captioned, tmp_path_factory.mktemp("run")))[1]
    return run, sap.start_training(run, None, 0)


CHANGES = {
    "a tensor is missing": lambda parts, name: parts["lora"].pop(name),
    "one too many": lambda parts, name: parts["lora"].update(extra=torch.zeros(1)),
    "another shape": lambda parts, name: parts["lora"].update({name: torch.zeros(2, 2)}),
    "another precision": lambda parts, name: parts["lora"].update({name: parts["lora"][name].half()}),
    "no optimizer": lambda parts, name: parts.pop("optimizer"),
    "optimizer of fewer tensors": lambda parts, name: parts["optimizer"]["param_groups"].pop(),
    "a part that is a word": lambda parts, name: parts.update(lr_scheduler="constant"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_training_state_that_does_not_fit_is_refused(change, begun, stopped):
    path = stopped / "checkpoint-2" / sap.TRAINING_FILE
    begun[1].step = 2
    sap.load_checkpoint(*begun, path.parent)
    state = torch.load(path, weights_only=True)
    CHANGES[change](state["parts"], next(iter(state["parts"]["lora"])))
    torch.save(state, path)
    with pytest.raises(sap.UsageError, match=f"--resume_from_checkpoint {path.parent}: {path.name} is refused"):
        sap.load_checkpoint(*begun, path.parent)


def test_a_training_state_of_another_step_than_the_record_is_refused(stopped, sd15, captioned):
    change_state(stopped / "checkpoint-2", lambda state: state.update(global_step=3))
    with pytest.raises(sap.UsageError, match="it is of step 2, trainer_state.json of step 3"):
        train(SCRIPT, latest(sd15, captioned, stopped))


EDITED = [{"run": None}, {"run": "a word"}, {"run": []}, {"seed": "a word"}, {"seed": -1}, {"seed": 2**70},
          {"seed": True}, {"global_step": 0}, {"files": {"../../notes.txt": "0"}}, {"files": ["x"]}]  # fmt: skip


@pytest.mark.parametrize("change", EDITED)
def test_a_record_that_no_run_writes_is_none(change, stopped, sd15, captioned):
    change_state(stopped / "checkpoint-2", lambda state: state.update(change))
    without_seed = without(latest(sd15, captioned, stopped), "--seed")
    assert sap.find_checkpoint(sap.parse_args(without_seed)) == (None, {})
    with pytest.raises(sap.UsageError, match="no complete checkpoint"):
        sap.find_checkpoint(sap.parse_args([*without_seed, "--resume_from_checkpoint=checkpoint-2"]))


class Hostile:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_training_state_that_would_run_code_is_refused(save, stopped, sd15, captioned, tmp_path):
    save({"parameters": Hostile(tmp_path / "ran")}, stopped / "checkpoint-2" / sap.TRAINING_FILE)
    change_state(stopped / "checkpoint-2", lambda state: None)
    with pytest.raises(sap.UsageError, match=f"{sap.TRAINING_FILE} is refused"):
        train(SCRIPT, latest(sd15, captioned, stopped))
    assert not (tmp_path / "ran").exists()


# ---- How one is written ----


def test_a_checkpoint_is_complete_before_it_has_its_name_and_before_old_ones_go(sd15, photos, tmp_path, monkeypatch):
    def cut_off(source, target):
        raise KeyboardInterrupt

    more = ["--checkpointing_steps=1", "--checkpoints_total_limit=1", "--resume_from_checkpoint=latest"]
    train(SCRIPT, flags(sd15, photos, tmp_path, *more, steps=1))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sap, "write_lora", cut_off)
        train(SCRIPT, flags(sd15, photos, tmp_path, *more, steps=2))
    assert steps_in(tmp_path) == [1]
    train(SCRIPT, flags(sd15, photos, tmp_path, *more, steps=2))
    assert steps_in(tmp_path) == [2]
    assert not [name for name in left_in(tmp_path) if name.startswith(".")]


def test_all_that_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events, replace = [], sap.os.replace
    monkeypatch.setattr(sap.os, "fsync", lambda number: events.append(Path(f"/proc/self/fd/{number}").resolve().name))
    monkeypatch.setattr(sap.os, "replace", lambda source, target: (events.append("renamed"), replace(source, target)))
    with sap.replacing(tmp_path / "checkpoint-1") as partial:
        partial.mkdir()
        (partial / "one").write_text("1")
        (partial / "other").write_text("2")
    assert sorted(events[:3]) == [".checkpoint-1.partial", "one", "other"]
    assert events[3:] == ["renamed", tmp_path.name]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["while it is written", "before it has its name"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_write_that_is_cut_short_leaves_what_was_there(kind, moment, tmp_path, monkeypatch):
    """The process dies: nothing is tidied up, until the next run begins."""

    def die(*_):
        raise Killed

    (tmp_path / "LoRA").write_text("old")
    final = tmp_path / ("LoRA" if kind == "file" else "checkpoint-2")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(sap.os, "replace", die)
        patched.setattr(sap, "tidy", lambda final: None)
        with sap.replacing(final) as partial:
            if kind == "folder":
                partial.mkdir()
            (partial if kind == "file" else partial / "text").write_text("new")
            if moment == "while it is written":
                die()
    with sap.locked(tmp_path):  # as the next run begins
        pass
    sap.tidy(final)
    assert left_in(tmp_path) == {"LoRA"}
    assert (tmp_path / "LoRA").read_text() == "old"
    with sap.replacing(tmp_path / "LoRA") as partial:
        partial.write_text("new")
    assert (tmp_path / "LoRA").read_text() == "new"


def test_a_folder_that_another_run_writes_into_is_refused(sd15, photos, tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(sap.UsageError, match="another run writes into it"):
        train(SCRIPT, flags(sd15, photos, tmp_path))
    assert left_in(tmp_path) == set()
    train(SCRIPT, flags(sd15, photos, tmp_path, steps=1))
