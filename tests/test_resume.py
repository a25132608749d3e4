# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what is in them, which of them stay, and that a resumed run is the run that was not interrupted."""

import importlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from runner import LORA_FILE, assert_equal, flags, left_in, lora, metrics, train, without
from tiny_pipelines import KINDS

import train_sap_lora_sd15 as sap

SCRIPT = "train_sap_lora_sd15"
OF_RUN = ["--train_text_encoder", "--gradient_accumulation_steps=2", "--lora_dropout=0.2", "--random_flip",
          "--lr_scheduler=cosine", "--lr_warmup_steps=1", "--subject_token=sks"]  # fmt: skip
EACH_STEP = ["--checkpointing_steps=1", "--resume_from_checkpoint=latest"]


def arguments(base, photos, output, *more: str) -> list[str]:
    return without(flags(base, photos, output, *OF_RUN, *more, steps=5), "--center_crop")


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, in order."""
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-[0-9]*"))


def change_state(checkpoint: Path, change=lambda state: None) -> None:
    """Rewrite a checkpoint's record, hashes included, as if its files had always been what they are."""
    path = checkpoint / sap.STATE_FILE
    state = json.loads(path.read_text())
    state["files"] = {name: sap.fingerprint(checkpoint / name) for name in state["files"]}
    change(state)
    path.write_text(json.dumps(state))


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


@pytest.fixture
def go_on(stopped, sd15, captioned):
    """Resumes the undisturbed run from there, with other flags, pictures or another base."""

    def resume(*more: str, base=sd15, photos=captioned, leave_out=()) -> None:
        command = without(arguments(base, photos, stopped, "--resume_from_checkpoint=latest"), *leave_out)
        train(SCRIPT, [*command, *more])

    return resume


# ---- The same run, bit for bit ----


@pytest.mark.parametrize("value", ["latest", "checkpoint-2", "{}/checkpoint-2/"])
def test_a_resumed_run_is_the_same_run_bit_for_bit(value, undisturbed, stopped, go_on):
    if value == "latest":
        shutil.copytree(undisturbed / "checkpoint-4", stopped / "checkpoint-4")
    torch.manual_seed(12345)
    go_on(f"--resume_from_checkpoint={value.format(stopped)}")
    assert_equal(lora(stopped), lora(undisturbed))


@pytest.mark.parametrize(
    "more",
    [
        ["--anchor_source=finetuned", "--anchor_weight=2", "--lora_dropout=0.5", "--gradient_accumulation_steps=2"],
        ["--optimizer=prodigy", "--learning_rate=1"],
        ["--use_8bit_adam"],
    ],
)
def test_other_anchors_and_optimizers_resume_bit_for_bit(more, sd15, photos, tmp_path):
    for flag, package in (("--optimizer=prodigy", "prodigyopt"), ("--use_8bit_adam", "bitsandbytes")):
        if flag in more:
            pytest.importorskip(package)
    more = [*more, "--checkpointing_steps=2"]
    train(SCRIPT, flags(sd15, photos, tmp_path / "whole", *more, steps=4))
    more += [f"--resume_from_checkpoint={tmp_path}/whole/checkpoint-2"]
    train(SCRIPT, flags(sd15, photos, tmp_path / "resumed", *more, steps=4))
    assert_equal(lora(tmp_path / "resumed"), lora(tmp_path / "whole"))


def test_resuming_finds_its_seed(sd15, photos, tmp_path):
    whole, resumed = (
        without(flags(sd15, photos, tmp_path / name, "--checkpointing_steps=1"), "--seed")
        for name in ("whole", "resumed")
    )
    train(SCRIPT, whole)
    expected = lora(tmp_path / "whole")
    train(SCRIPT, [*resumed, f"--resume_from_checkpoint={tmp_path}/whole/checkpoint-1"])
    assert_equal(lora(tmp_path / "resumed"), expected)
    train(SCRIPT, whole)  # a run without a seed draws another one
    assert any(not torch.equal(tensor, expected[key]) for key, tensor in lora(tmp_path / "whole").items())


def test_resuming_a_finished_run_says_so_without_a_model(sd15, photos, tmp_path, monkeypatch, caplog):
    wanted = without(flags(sd15, photos, tmp_path, *EACH_STEP), "--seed")
    train(SCRIPT, wanted)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".lock"}
    with monkeypatch.context() as patched:
        patched.setattr(sap, "load_text_pipeline", None)
        train(SCRIPT, wanted)
    assert "holds the finished run of 2 steps" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".lock"} == before
    whole = lora(tmp_path)
    (tmp_path / LORA_FILE).unlink()  # as if it was killed after its last step
    train(SCRIPT, wanted)
    assert "already has 2 of 2 steps: nothing is left to train" in caplog.text
    assert_equal(lora(tmp_path), whole)
    train(SCRIPT, [*wanted, "--max_train_steps=3"])
    assert json.loads((tmp_path / sap.FINISHED_FILE).read_text())["global_step"] == 3


# ---- Which checkpoint ----


def test_latest_without_a_checkpoint_starts_fresh(sd15, photos, tmp_path, caplog):
    for name in ("checkpoints_old", "checkpoint-9"):  # one that is none, one that is not complete
        (tmp_path / name).mkdir()
    train(SCRIPT, flags(sd15, photos, tmp_path, "--resume_from_checkpoint=latest", steps=1))
    assert "holds no checkpoint" in caplog.text
    assert lora(tmp_path)


@pytest.mark.parametrize("value", ["checkpoint-7", "/nowhere/checkpoint-2", "checkpoints_old"])
def test_a_checkpoint_that_is_not_there_is_named(value, stopped, go_on):
    (stopped / "checkpoints_old").mkdir()
    with pytest.raises(sap.UsageError, match=f"--resume_from_checkpoint {value}"):
        go_on(f"--resume_from_checkpoint={value}")


@pytest.mark.parametrize(("limit", "kept"), [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_old_checkpoints_go_and_other_folders_stay(limit, kept, sd15, photos, tmp_path):
    others = {"checkpoints_old", "checkpoint-best", "checkpoint-²", "checkpoint-007", "checkpoint-0"}
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / sap.STATE_FILE).write_text("{}")
    more = ["--checkpointing_steps=1", f"--checkpoints_total_limit={limit}"]
    train(SCRIPT, flags(sd15, photos, tmp_path, *more, steps=4))
    assert {name for name in left_in(tmp_path) if "checkpoint" in name} == {f"checkpoint-{i}" for i in kept} | others


@pytest.mark.parametrize("name", [sap.TRAINING_FILE, sap.STATE_FILE, LORA_FILE])
@pytest.mark.parametrize("zeroed", [False, True])
def test_a_damaged_checkpoint_is_skipped(zeroed, name, stopped, undisturbed, go_on, caplog):
    damaged = stopped / "checkpoint-4"
    shutil.copytree(undisturbed / "checkpoint-4", damaged)
    content = (damaged / name).read_bytes()
    (damaged / name).write_bytes(content[:500].ljust(len(content) if zeroed else 500, b"\0"))
    go_on()
    assert f"{damaged} is not complete, or damaged: it is skipped" in caplog.text
    assert_equal(lora(stopped), lora(undisturbed))


# ---- What others wrote stays ----


def test_all_that_an_older_run_wrote_is_moved_out_of_the_way_together(undisturbed, sd15, captioned, tmp_path, caplog):
    output = tmp_path / "out"
    shutil.copytree(undisturbed, output)
    for name in ("validation/validation-000002.png", "image_0.png", f"logs/{sap.TRACKER}/events", "notes.txt"):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(name)
    before = {path.name: path.read_bytes() for path in output.rglob("*") if path.is_file() and path.name != ".lock"}
    for number in (1, 2):
        train(SCRIPT, arguments(sd15, captioned, output, "--checkpointing_steps=2", f"--seed={number}"))
        assert f"it was moved into {output / f'earlier-{number}'}" in caplog.text
    earlier = output / "earlier-1"
    now = {path.name: path.read_bytes() for path in [*earlier.rglob("*"), output / "notes.txt"] if path.is_file()}
    assert now == before
    assert steps_in(earlier) == [2, 4]
    assert [row["step"] for row in metrics(output)] == [1, 2, 3, 4, 5]


def test_a_resumed_run_moves_nothing_of_its_own_but_what_was_edited(sd15, photos, tmp_path):
    """Its log has each step once, and the pictures of its earlier end go."""
    more = ["--checkpointing_steps=2", "--resume_from_checkpoint=latest"]
    pictures = ["--validation_prompt=sks", "--num_validation_images=2", "--validation_inference_steps=1"]
    train(SCRIPT, flags(sd15, photos, tmp_path, *more, *pictures, steps=3))
    assert (tmp_path / "image_1.png").exists()
    train(SCRIPT, flags(sd15, photos, tmp_path, *more, steps=4))
    assert not [name for name in left_in(tmp_path) if name.startswith(("earlier", "image"))]
    assert steps_in(tmp_path) == [2, 4]
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3, 4]
    (tmp_path / "README.md").write_text("my own words")
    train(SCRIPT, flags(sd15, photos, tmp_path, *more, steps=5))
    assert (tmp_path / "earlier-1" / "README.md").read_text() == "my own words"


@pytest.mark.parametrize("taken", [None, "dangling link", "file"])
def test_the_folder_of_a_run_of_diffusers_script_is_not_overwritten(taken, sd15, photos, tmp_path, caplog):
    place = tmp_path / "earlier-1"
    if taken == "dangling link":
        place.symlink_to(tmp_path / "nowhere")
    elif taken == "file":
        place.write_text("mine")
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", LORA_FILE):
            (folder / name).write_text(f"{name} of step {step}")
    (tmp_path / "README.md").write_text("theirs")
    train(SCRIPT, flags(sd15, photos, tmp_path, *EACH_STEP, "--checkpoints_total_limit=1"))
    assert "those of diffusers' scripts are, too" in caplog.text
    earlier = tmp_path / ("earlier-2" if taken else "earlier-1")
    for step in (1, 2):
        assert (earlier / f"checkpoint-{step}" / "optimizer.bin").read_text().endswith(f"step {step}")
    assert (earlier / "README.md").read_text() == "theirs"
    assert steps_in(tmp_path) == [2]


def test_a_log_that_is_a_link_is_not_followed(sd15, photos, tmp_path):
    (tmp_path / "diary").write_text("mine\n")
    log = tmp_path / "out" / sap.METRICS_FILE
    log.parent.mkdir()
    for steps in (1, 2):
        log.unlink(missing_ok=True)
        log.symlink_to(tmp_path / "diary")
        train(SCRIPT, flags(sd15, photos, log.parent, *EACH_STEP, steps=steps))
    assert (tmp_path / "diary").read_text() == "mine\n"
    assert not log.is_symlink()


def test_notes_in_a_checkpoint_stay_when_it_is_over_the_limit(sd15, photos, tmp_path, caplog):
    for steps in (1, 2):
        train(SCRIPT, flags(sd15, photos, tmp_path, *EACH_STEP, "--checkpoints_total_limit=1", steps=steps))
        (tmp_path / "checkpoint-1" / "notes.txt").write_text("mine")
    assert left_in(tmp_path / "checkpoint-1") == {"notes.txt"}
    assert "This stays where it is, and the run goes on" in caplog.text


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


# ---- What makes two runs the same ----


OTHER = ["--train_text_encoder", "--random_flip", "--instance_prompt=a sks dog", "--class_prompt=a dog", "--seed=7",
         "--class_token=good", "--resolution=128", "--anchor_weight=0.4", "--anchor_source=finetuned", "--rank=2",
         "--lora_alpha=1", "--lora_layers=to_k", "--train_batch_size=2", "--gradient_accumulation_steps=1",
         "--repeats=2", "--caption_dropout=0.1", "--learning_rate=1e-3", "--lr_scheduler=constant", "--snr_gamma=5",
         "--mixed_precision=bf16", "--max_train_steps=9"]  # fmt: skip


@pytest.mark.parametrize("flag", OTHER)
def test_another_run_does_not_go_on_from_a_checkpoint(flag, go_on, photos):
    name, value, _ = flag.partition("=")
    was = getattr(sap.parse_args(arguments("base", photos, "out")), name[2:])
    if name == "--mixed_precision":
        was = "no"  # as accelerate has it
    with pytest.raises(sap.UsageError, match=f"is of another run: .*{name} was {was}, is "):
        go_on(*([flag] if value else []), leave_out=[name])  # a switch is left out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: shutil.copy(folder / "01.jpg", folder / "00.jpg"), "the content of 00.jpg was"),
        (
            lambda folder: shutil.copy(folder / "01.jpg", folder / "02b.jpg"),
            "the pictures was .*, is .*'02b.jpg', '03",
        ),
        (lambda folder: (folder / "metadata.jsonl").unlink(), "the captions of 01.jpg was .*snow.*, is "),
    ],
)
def test_other_pictures_or_captions_do_not_go_on_from_a_checkpoint(change, reason, go_on, captioned, tmp_path):
    shutil.copytree(captioned, tmp_path / "photos")
    change(tmp_path / "photos")
    with pytest.raises(sap.UsageError, match=reason):
        go_on(photos=tmp_path / "photos")


def test_another_base_does_not_go_on_from_a_checkpoint(go_on, sd21):
    with pytest.raises(sap.UsageError, match="--pretrained_model_name_or_path was a folder with the content"):
        go_on(base=sd21)


def test_what_does_not_change_the_result_may_change(stopped, undisturbed, go_on, sd15, captioned, tmp_path):
    base, photos = tmp_path / "base", tmp_path / "photos"
    shutil.copytree(sd15, base)
    shutil.copytree(captioned, photos)
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    for name in (".DS_Store", "Thumbs.db", "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin",
                 "diffusion_pytorch_model.fp16-00001-of-00002.safetensors"):  # fmt: skip
        shutil.copy(weights, base / "unet" / name)  # none of them is loaded
    (base / "safety_checker").mkdir()
    (base / "safety_checker" / "config.json").write_text("{}")
    go_on("--checkpointing_steps=1", "--output_kohya_format", "--optimizer=adamw", base=base, photos=photos)
    assert_equal(lora(stopped), lora(undisturbed))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler", "tokenizer"])
def test_one_byte_anywhere_makes_another_base(part, sd15, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(sd15, base)
    path = max((base / part).iterdir(), key=lambda path: path.stat().st_size)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 3 * 2**20)  # behind the first MiB, where none was looked at
        before = sap.folder_fingerprint(base, None)
        file.seek(-5, 2)
        file.write(b"x")
    assert sap.folder_fingerprint(base, None) != before


def test_weights_of_a_variant_count_where_it_is_loaded(sd15, tmp_path):
    shutil.copytree(sd15, tmp_path / "base")
    (tmp_path / "base" / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_text("other")
    assert sap.folder_fingerprint(tmp_path / "base", "fp16") != sap.folder_fingerprint(sd15, "fp16")


@pytest.mark.parametrize(
    ("kind", "flag", "part"),
    [("sd15", "--tokenizer_name", "tokenizer"), ("sdxl", "--pretrained_vae_model_name_or_path", "vae")],
)
def test_another_tokenizer_or_vae_makes_another_run(kind, flag, part, base_of, photos, tmp_path):
    script = KINDS[kind][0]
    folder, moved = tmp_path / "part", tmp_path / "moved"
    shutil.copytree(base_of(kind) / part, folder)
    command = flags(base_of(kind), photos, tmp_path / "out", "--checkpointing_steps=1")
    train(script, [*command, f"{flag}={folder}"])
    folder.rename(moved)
    again = [*command, f"{flag}={moved}", "--resume_from_checkpoint=checkpoint-1"]
    train(script, again)
    (moved / "more.json").write_text("{}")
    with pytest.raises(importlib.import_module(script).UsageError, match=f"{flag} was a folder with the content"):
        train(script, again)


def test_a_derived_class_prompt_may_be_written_out(sd15, photos, tmp_path):
    derived = without(flags(sd15, photos, tmp_path, *EACH_STEP, steps=1), "--class_prompt")
    train(SCRIPT, derived)
    train(SCRIPT, [*derived, "--class_prompt=a photo of dog", "--max_train_steps=2"])
    assert steps_in(tmp_path) == [1, 2]


# ---- What is read from one ----


@pytest.mark.parametrize(
    ("change", "more", "words"),
    [
        (lambda state: state.pop("format"), [], "checkpoint-2: .*format 1, and this script reads 3"),
        (lambda state: state["run"].update({"--num_processes": 4}), [], "of another run: --num_processes was 4, is 1"),
        (lambda state: state.update(global_step=3), [], "it is of step 2, trainer_state.json of step 3"),
        (
            lambda state: state["run"].pop("--max_train_steps"),
            ["--max_train_steps=1"],
            "checkpoint-2 is beyond --max_train_steps 1",
        ),
    ],
)
def test_a_record_that_does_not_fit_is_refused(change, more, words, stopped, go_on):
    change_state(stopped / "checkpoint-2", change)
    with pytest.raises(sap.UsageError, match=f"--resume_from_checkpoint .*{words}"):
        go_on("--resume_from_checkpoint=checkpoint-2", *more)


EDITED = [{"run": None}, {"run": "a word"}, {"run": []}, {"seed": "a word"}, {"seed": -1}, {"seed": 2**70},
          {"seed": True}, {"global_step": 0}, {"global_step": -3}, {"global_step": 1e30},
          {"files": {"../../notes.txt": "0"}}, {"files": ["x"]}, "[" * 100000, "7", "{}", "\x00",
          "a pipe"]  # fmt: skip


@pytest.mark.parametrize("change", EDITED, ids=lambda change: str(change)[:20])
def test_a_record_that_no_run_writes_is_none(change, stopped, go_on):
    record = stopped / "checkpoint-2" / sap.STATE_FILE
    if change == "a pipe":
        record.unlink()
        os.mkfifo(record)
    elif isinstance(change, str):
        record.write_text(change)
    else:
        change_state(record.parent, lambda state: state.update(change))
    with pytest.raises(sap.UsageError, match="no complete checkpoint"):
        go_on("--resume_from_checkpoint=checkpoint-2", leave_out=["--seed"])


class Hostile:
    """Unpickled, it makes a file in the working directory."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


CHANGES = {
    "a tensor is missing": lambda parts, name: parts["lora"].pop(name),
    "one too many": lambda parts, name: parts["lora"].update(extra=torch.zeros(1)),
    "another shape": lambda parts, name: parts["lora"].update({name: torch.zeros(2, 2)}),
    "another precision": lambda parts, name: parts["lora"].update({name: parts["lora"][name].half()}),
    "no optimizer": lambda parts, name: parts.pop("optimizer"),
    "optimizer of fewer tensors": lambda parts, name: parts["optimizer"]["param_groups"].pop(),
    "a part that is a word": lambda parts, name: parts.update(lr_scheduler="constant"),
    "code": lambda parts, name: parts.update(lr_scheduler=Hostile()),
}


@pytest.mark.parametrize("change", [*CHANGES, "a pickle"])
def test_a_training_state_that_does_not_fit_is_refused(change, stopped, go_on, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = stopped / "checkpoint-2" / sap.TRAINING_FILE
    if change == "a pickle":
        path.write_bytes(pickle.dumps(Hostile()))
    else:
        state = torch.load(path, weights_only=True)
        CHANGES[change](state["parts"], next(iter(state["parts"]["lora"])))
        torch.save(state, path)
    change_state(path.parent)
    with pytest.raises(sap.UsageError, match=f"--resume_from_checkpoint {path.parent}: {path.name} is refused"):
        go_on()
    assert not Path("ran").exists()


# ---- How one is written ----


def test_a_checkpoint_is_complete_before_it_has_its_name_and_before_old_ones_go(sd15, photos, tmp_path, monkeypatch):
    def cut_off(*_):
        raise KeyboardInterrupt

    more = [*EACH_STEP, "--checkpoints_total_limit=1"]
    train(SCRIPT, flags(sd15, photos, tmp_path, *more, steps=1))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sap, "write_lora", cut_off)
        train(SCRIPT, flags(sd15, photos, tmp_path, *more, steps=2))
    assert steps_in(tmp_path) == [1]
    train(SCRIPT, flags(sd15, photos, tmp_path, *more, steps=2))
    assert steps_in(tmp_path) == [2]
    assert not [name for name in left_in(tmp_path) if name.startswith(".")]


def test_all_that_is_written_is_on_the_disk_before_it_has_its_name(sd15, photos, tmp_path, monkeypatch):
    events, replace = [], sap.os.replace

    def renamed(source, target):
        events.append(f"{Path(source).name} is renamed")
        replace(source, target)

    monkeypatch.setattr(sap.os, "fsync", lambda number: events.append(Path(f"/proc/self/fd/{number}").resolve().name))
    monkeypatch.setattr(sap.os, "replace", renamed)
    train(SCRIPT, flags(sd15, photos, tmp_path, "--checkpointing_steps=1", steps=1))
    end = events.index(".checkpoint-1.partial is renamed")
    assert {".checkpoint-1.partial", *left_in(tmp_path / "checkpoint-1")} <= set(events[:end])
    assert events[end + 1] == tmp_path.name


def test_a_folder_that_another_run_writes_into_is_refused(sd15, photos, tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(sap.UsageError, match="another run writes into it"):
        train(SCRIPT, flags(sd15, photos, tmp_path))
    assert left_in(tmp_path) == set()
    train(SCRIPT, flags(sd15, photos, tmp_path, steps=1))
