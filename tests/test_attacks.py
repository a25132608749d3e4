# SPDX-License-Identifier: Apache-2.0
"""What broke the trainers when they were attacked: each of these lost work, hung, lied or was a traceback once."""

import contextlib
import functools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny_pipelines
import torch
from PIL import Image
from runner import LORA_FILE, ROOT, assert_equal, flags, lora, make_run, train, without
from safetensors.torch import load_file, save_file

import train_sap_lora_sd15 as sap

SCRIPT = "train_sap_lora_sd15"
posix = pytest.mark.skipif(os.name != "posix", reason="signals and modes of POSIX")


def start(arguments: list[str], launcher: list[str] | None = None, **options) -> subprocess.Popen:
    """The script in a process group of its own, as a terminal or SLURM starts it."""
    command = [sys.executable, *(launcher or []), str(ROOT / f"{SCRIPT}.py"), *arguments]
    options = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(command, start_new_session=True, cwd=ROOT, **options)


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    """Until a run in the background has written something."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def long_run(base, photos, output, *more: str) -> list[str]:
    return flags(base, photos, output, "--checkpointing_steps=2", *more, steps=100000)


ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1", "--mixed_precision=no"]

# ---- Loses work or lies ----


@pytest.mark.parametrize("launcher", [[], ACCELERATE])
def test_a_photo_that_goes_during_training_ends_the_run_and_what_was_trained_is_kept(launcher, sd15, photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    arguments = without(long_run(sd15, folder, tmp_path / "out", "--dataloader_num_workers=1"), "--center_crop")
    process = start(arguments, launcher)
    wait_for(tmp_path / "out" / "checkpoint-2", process)
    (folder / "01.jpg").write_bytes(b"damaged")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "01.jpg of" in err
    assert "cannot be read as a picture" in err
    steps = [int(path.name[11:]) for path in sap.list_checkpoints(tmp_path / "out")]
    assert f"stopped after step {steps[-1]} of" in err
    assert_equal(lora(tmp_path / "out"), lora(tmp_path / "out" / f"checkpoint-{steps[-1]}"))


@pytest.mark.parametrize("moment", ["write_lora", "write_kohya_lora"])
def test_a_stop_after_the_last_step_waits_for_the_files(moment, sd15, photos, tmp_path, monkeypatch, caplog):
    write = getattr(sap, moment)
    monkeypatch.setattr(sap, moment, lambda *args: (signal.raise_signal(signal.SIGTERM), write(*args)))
    with pytest.raises(SystemExit, match="143"):
        train(SCRIPT, flags(sd15, photos, tmp_path, "--output_kohya_format"))
    assert lora(tmp_path)
    assert (tmp_path / sap.KOHYA_FILE).is_file()
    assert "SIGTERM: stopped after step 2 of 2" in caplog.text
    assert str(tmp_path / sap.KOHYA_FILE) in caplog.text  # every file is named


@posix
def test_a_closed_terminal_stops_a_run_as_sigterm_does_and_nohup_does_not(sd15, photos, tmp_path):
    handled, ignored = (
        functools.partial(signal.signal, signal.SIGHUP, how) for how in (signal.SIG_DFL, signal.SIG_IGN)
    )
    process = start(long_run(sd15, photos, tmp_path / "out"), preexec_fn=handled)  # the tests may run under nohup
    wait_for(tmp_path / "out" / "checkpoint-2", process)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGHUP
    assert "SIGHUP: stopped after step" in err
    assert lora(tmp_path / "out")
    process = start(long_run(sd15, photos, tmp_path / "other"), preexec_fn=ignored)
    wait_for(tmp_path / "other" / "checkpoint-2", process)
    process.send_signal(signal.SIGHUP)
    wait_for(tmp_path / "other" / "checkpoint-20", process)
    process.terminate()
    assert process.wait(60) == 143
    process.communicate()


@posix
@pytest.mark.parametrize("closed", ["both", *(pytest.param(one, marks=pytest.mark.slow) for one in ("1", "2"))])
def test_a_run_with_closed_streams_writes_what_any_run_writes(closed, sd15, photos, tmp_path):
    arguments = flags(sd15, photos, tmp_path / "out")
    streams = {"1": ">&-", "2": "2>&-", "both": ">&- 2>&-"}[closed]
    command = f"exec {shlex.join([sys.executable, str(ROOT / SCRIPT) + '.py', *arguments])} {streams}"
    subprocess.run(["bash", "-c", command], timeout=300, check=True, cwd=ROOT)
    train(SCRIPT, flags(sd15, photos, tmp_path / "open"))
    assert_equal(lora(tmp_path / "out"), lora(tmp_path / "open"))
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_second_run_in_the_same_folder_is_refused(sd15, photos, tmp_path):
    process = start(long_run(sd15, photos, tmp_path / "out"))
    wait_for(tmp_path / "out" / "checkpoint-2", process)
    before = sorted((tmp_path / "out").glob("checkpoint-*"))
    second = start(flags(sd15, photos, tmp_path / "out", "--seed=9"))
    _, err = second.communicate(timeout=60)
    assert second.returncode == 2
    assert "another run writes into it" in err.strip().splitlines()[-1]
    assert set(before) <= set((tmp_path / "out").glob("checkpoint-*"))
    process.kill()
    process.communicate()
    train(SCRIPT, flags(sd15, photos, tmp_path / "out", "--seed=9"))  # a killed run holds nothing


@posix
@pytest.mark.parametrize(("launcher", "kept"), [([], True), (ACCELERATE, False)])
def test_slurm_ends_a_job_when_its_first_process_has_ended(launcher, kept, sd15, photos, tmp_path):
    """SIGTERM to all processes, SIGKILL to what is left once the first has ended: plain python keeps the run.

    A launcher does not wait for the script, which is held here, so that it cannot be in time to write.
    """
    process = start(long_run(sd15, photos, tmp_path / "out", "--checkpointing_steps=100000"), launcher)
    wait_for(tmp_path / "out" / "metrics.jsonl", process)
    for script in psutil.Process(process.pid).children(recursive=True):
        script.suspend()
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(60)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode != 0
    files = [*tmp_path.glob(f"out/{LORA_FILE}"), *tmp_path.glob(f"out/checkpoint-*/{LORA_FILE}")]
    assert len(files) == (2 if kept else 0)  # the LoRA and a checkpoint's
    assert all(load_file(file) for file in files)


def test_the_token_flag_says_where_it_shows(sd15, tmp_path):
    text = " ".join(sap.make_parser().format_help().split())
    assert "accelerate launch prints it if the run fails" in text
    process = start(
        flags(sd15, tmp_path / "none", tmp_path / "out"), ACCELERATE, env=os.environ | {"HF_TOKEN": "hf_x1"}
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "hf_x1" not in out + err


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
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len({row["lr"] for row in rows}) == 1  # the schedule waited
    assert [row["skipped"] for row in rows] == list(range(1, len(rows) + 1))


def test_what_an_earlier_run_left_is_not_taken_for_this_ones(sd15, photos, tmp_path):
    picture = ["--final_validation_prompt=a dog", "--num_validation_images=3"]
    train(SCRIPT, flags(sd15, photos, tmp_path, *picture, "--output_kohya_format"))
    assert (tmp_path / "image_2.png").is_file()
    train(SCRIPT, flags(sd15, photos, tmp_path, "--seed=3"))
    assert {path.name for path in tmp_path.glob("*.*") if path.suffix in (".png", ".safetensors")} == {
        LORA_FILE,
        sap.KOHYA_FILE,
    }
    assert "image_" not in (tmp_path / "README.md").read_text()
    assert set(json.loads((tmp_path / sap.FINISHED_FILE).read_text())["files"]) == {
        LORA_FILE,
        sap.KOHYA_FILE,
        "README.md",
    }


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


# ---- Captions and datasets ----


@pytest.mark.parametrize(("line", "caption"), [("null", None), ('""', None), ('"  "', None), ('"a sks"', "a sks")])
def test_nothing_is_no_caption(line, caption, tmp_path):
    tiny_pipelines.save_photos(tmp_path, count=2)
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "00.jpg", "text": {line}}}\n')
    (tmp_path / "01.txt").write_text("")
    images = sap.SubjectImages(sap.parse_args(flags("base", tmp_path, "/out")))
    assert images.captions == [caption or "a photo of sks dog", "a photo of sks dog"]


@pytest.mark.parametrize("line", ["[1]", "{}", "7", "true", '"\\ud800"'])
def test_a_caption_that_is_no_text_is_named_with_its_line(line, tmp_path):
    tiny_pipelines.save_photos(tmp_path, count=1)
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "00.jpg", "text": {line}}}\n')
    with pytest.raises(sap.UsageError, match="metadata.jsonl, line 1"):
        sap.SubjectImages(sap.parse_args(flags("base", tmp_path, "/out")))


def test_captions_that_are_found_are_told_and_one_anchor_for_all_is_warned_of(captioned, caplog):
    sap.logger.setLevel("INFO")
    arguments = flags("base", captioned, "/out")
    sap.SubjectImages(sap.parse_args(arguments))
    assert "Captions: found for 5 of 5 pictures" in caplog.text
    assert "--subject_token" in caplog.text
    caplog.clear()
    sap.SubjectImages(sap.parse_args([*arguments, "--subject_token=sks"]))
    assert "differ" not in caplog.text


ODD_DATASETS = {
    "a picture that is none": ({"image": [None, None]}, "cannot be read as a picture"),
    "numbers": ({"image": [1, 2]}, "--image_column image"),
    "a path that is missing": ({"image": ["/nowhere/a.png"] * 2}, "cannot be read as a picture"),
    "damaged bytes": ({"image": [{"bytes": b"x", "path": None}] * 2}, "cannot be read as a picture"),
    "captions that are numbers": ({"image": ["PHOTO"], "text": [3]}, "--caption_column text"),
    "empty": ({"image": []}, "holds no picture|cannot be loaded|--image_column"),
}


@pytest.mark.parametrize("name", ODD_DATASETS)
def test_an_odd_dataset_ends_in_a_sentence(name, photos, tmp_path):
    import datasets

    rows, words = ODD_DATASETS[name]
    rows = {key: [str(photos / "00.jpg") if one == "PHOTO" else one for one in value] for key, value in rows.items()}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "set")
    arguments = without(
        flags("base", photos, tmp_path / "out", f"--dataset_name={tmp_path / 'set'}"), "--instance_data_dir"
    )
    arguments += ["--caption_column=text"] if "text" in rows else []
    with pytest.raises(sap.UsageError, match=words):
        sap.SubjectImages(sap.parse_args(arguments))


def test_a_damaged_dataset_folder_ends_in_a_sentence(photos, tmp_path):
    (tmp_path / "state.json").write_text("{")
    arguments = without(flags("base", photos, "/out", f"--dataset_name={tmp_path}"), "--instance_data_dir")
    with pytest.raises(sap.UsageError, match="--dataset_name"):
        sap.SubjectImages(sap.parse_args(arguments))


# ---- Files, uploads, the environment ----


def test_an_upload_that_fails_leaves_a_finished_run_and_a_command(sd15, photos, tmp_path, monkeypatch):
    def fail(**_):
        raise ConnectionError("no route")

    monkeypatch.setattr(sap, "create_repo", lambda *_, **__: type("Repo", (), {"repo_id": "me/dog"}))
    monkeypatch.setattr(sap, "upload_folder", fail)
    arguments = flags(sd15, photos, tmp_path, "--push_to_hub")
    with pytest.raises(sap.RunError, match=rf"no route.*hf upload me/dog {tmp_path}"):
        train(SCRIPT, arguments)
    assert (tmp_path / sap.FINISHED_FILE).is_file()
    assert lora(tmp_path)


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


@pytest.mark.parametrize("name", ["checkpoint-²", "checkpoint-007", "checkpoint-0", "checkpoint--1"])
def test_folders_with_odd_numbers_are_left_alone(name, sd15, photos, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / sap.STATE_FILE).write_text("{}")
    train(SCRIPT, flags(sd15, photos, tmp_path, "--checkpointing_steps=1", "--resume_from_checkpoint=latest", steps=1))
    assert (tmp_path / name / sap.STATE_FILE).read_text() == "{}"


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_stands_where_a_partial_checkpoint_would_be_goes(kind, sd15, photos, tmp_path):
    partial = tmp_path / ".checkpoint-1.partial"
    partial.symlink_to(photos) if kind == "link" else partial.write_text("x")
    train(SCRIPT, flags(sd15, photos, tmp_path, "--checkpointing_steps=1", steps=1))
    assert [path.name for path in sap.list_checkpoints(tmp_path)] == ["checkpoint-1"]
    assert len(list(photos.iterdir())) == 5


@pytest.mark.parametrize("content", ['{"global_step": -3}', '{"global_step": 1e30}', "[" * 100000, "7", "{}", "\x00"])
def test_an_edited_record_is_no_checkpoint(content, sd15, photos, tmp_path, caplog):
    arguments = flags(sd15, photos, tmp_path, "--checkpointing_steps=1", steps=1)
    train(SCRIPT, arguments)
    (tmp_path / sap.FINISHED_FILE).unlink()
    (tmp_path / "checkpoint-1" / sap.STATE_FILE).write_text(content)
    train(SCRIPT, [*arguments, "--resume_from_checkpoint=latest"])
    assert "checkpoint-1 is not complete, or damaged: it is skipped" in caplog.text


@posix
def test_a_pipe_for_a_record_does_not_hang(sd15, photos, tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    os.mkfifo(tmp_path / "checkpoint-1" / sap.STATE_FILE)
    for wanted in ("checkpoint-1", str(tmp_path / "checkpoint-1")):
        args = sap.parse_args(flags(sd15, photos, tmp_path, f"--resume_from_checkpoint={wanted}"))
        with pytest.raises(sap.UsageError, match="no complete checkpoint"):
            sap.find_checkpoint(args)


@pytest.mark.parametrize("flag", [f"--output_dir=/tmp/{'x' * 300}", "--learning_rate=4e38"])
def test_names_and_numbers_that_nothing_holds_end_in_a_sentence(flag, sd15, photos, capsys):
    with pytest.raises((SystemExit, sap.UsageError)) as stopped:
        train(SCRIPT, flags(sd15, photos, "/tmp/out", flag))
    assert flag.split("=")[0] in str(stopped.value) + capsys.readouterr().err


def test_an_anchor_batch_beyond_all_bounds_is_that_of_the_run(sd15, photos, tmp_path):
    train(SCRIPT, flags(sd15, photos, tmp_path / "one", "--anchor_batch_size=1000000000"))
    train(SCRIPT, flags(sd15, photos, tmp_path / "two", "--anchor_batch_size=2"))
    one, two = lora(tmp_path / "one"), lora(tmp_path / "two")
    assert all(torch.allclose(one[key], two[key], atol=1e-6) for key in one)


def test_control_characters_do_not_reach_the_terminal(sd15, tmp_path):
    folder = tiny_pipelines.save_photos(tmp_path / "photos", count=1)
    Image.new("RGB", (64, 64)).save(folder / "\x1b[31mred.png")
    (folder / "\x1b]0;title\x07.xyz").write_text("")
    (folder / "00.txt").write_text("sks \x1b[2J dog")
    process = start(flags(sd15, folder, tmp_path / "out", steps=1))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "\\x1b]0;title\\x07.xyz" in err
    assert not any(letter in out + err for letter in ("\x1b[31m", "\x1b]0", "\x1b[2J", "\x07"))
