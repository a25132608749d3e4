# SPDX-License-Identifier: Apache-2.0
"""How a run starts: environment, precision, locks, trackers, several nodes. What cannot work ends in a sentence."""

import errno
import os
import shutil
import tomllib

import pytest
import torch
from copies import ROOT, SCRIPTS
from filelock import FileLock, UnixFileLock
from runner import flags, make_run, reset, train, without

import train_sap_lora_sd15 as sap

SCRIPT = "train_sap_lora_sd15"
posix = pytest.mark.skipif(os.name != "posix", reason="locks and streams of POSIX")


def never_loaded(*_, **__):
    pytest.fail("a model was loaded")


@pytest.fixture
def nothing_loads(monkeypatch):
    """A run that comes to its first stage fails the test."""
    monkeypatch.setattr(sap, "prepare", never_loaded)


# ---- The environment ----


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("LOCAL_RANK", "abc", "abc"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "deepspeed|DeepSpeed|DEEPSPEED"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron|MEGATRON|megatron"),
        ("ACCELERATE_MIXED_PRECISION", "rubbish", "rubbish"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "fp8"),
    ],
)
def test_an_environment_that_cannot_work_ends_in_a_sentence(
    name, value, says, sd15, photos, tmp_path, monkeypatch, nothing_loads
):
    monkeypatch.setenv(name, value)
    with pytest.raises(sap.UsageError, match=says):
        train(SCRIPT, flags(sd15, photos, tmp_path))


def test_compiling_without_a_compiler_is_refused(photos, tmp_path, monkeypatch, capsys):
    arguments = flags("base", photos, tmp_path, "--compile")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "g++")
    with pytest.raises(SystemExit, match="2"):
        sap.parse_args(arguments)
    assert "--compile needs a C++ compiler, and there is none" in capsys.readouterr().err
    compiler = tmp_path / "my-compiler"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", "my-compiler")
    assert sap.parse_args(arguments).compile


@posix
@pytest.mark.parametrize("below", ["", "out"])
def test_an_output_folder_that_is_a_loop_of_links_ends_in_a_sentence(
    below, sd15, photos, tmp_path, monkeypatch, capsys
):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises((SystemExit, sap.UsageError)) as stopped:
        train(SCRIPT, flags(sd15, photos, tmp_path / "loop" / below))
    assert "--output_dir" in str(stopped.value) + capsys.readouterr().err


@posix
def test_a_working_directory_that_is_gone_ends_in_a_sentence(photos, tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit, match="2"):
        sap.parse_args(flags("base", photos, "out"))
    assert "--output_dir out: " in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)


# ---- Locks ----


@posix
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
@pytest.mark.parametrize("when", ["locking", "unlocking"])
def test_a_file_system_without_locks_is_told_and_the_run_goes_on(number, when, tmp_path, monkeypatch, caplog):
    import fcntl

    flock = fcntl.flock

    def refuse(descriptor, operation):
        if (operation == fcntl.LOCK_UN) == (when == "unlocking"):
            raise OSError(number, os.strerror(number))
        return flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".lock").touch()
    for _ in range(2 if when == "locking" else 1):  # a run before leaves nothing that is in the way
        with sap.locked(tmp_path):
            pass
    assert (f"{tmp_path} cannot be locked" in caplog.text) == (when == "locking")
    assert issubclass(FileLock, UnixFileLock)


# ---- Trackers ----


def errors_of_trackers() -> list[Exception]:
    """What TensorBoard raises beside another protobuf, and wandb without a login."""
    wandb_errors = pytest.importorskip("wandb.errors")
    return [
        ImportError("cannot import name 'x' from 'google.protobuf'"),
        TypeError("Descriptors cannot be created directly."),
        AttributeError("'MessageFactory' object has no attribute 'GetPrototype'"),
        wandb_errors.UsageError("api_key not configured (no-tty). call wandb.login(key=[your_api_key])"),
    ]


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("report_to", ["wandb", "all"])
def test_a_tracker_that_cannot_start_ends_in_a_sentence_before_models_are_loaded(
    number, report_to, sd15, photos, tmp_path, monkeypatch, nothing_loads
):
    def start(self, project, config=None, **_):
        raise errors_of_trackers()[number]

    monkeypatch.setattr(sap.Accelerator, "init_trackers", start)
    with pytest.raises(
        sap.UsageError, match=f"--report_to {report_to} cannot start, mend it or pass --report_to none"
    ):
        train(SCRIPT, flags(sd15, photos, tmp_path, f"--report_to={report_to}"))


def test_trackers_are_told_the_command_line_without_the_token(sd15, photos, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(sap.Accelerator, "init_trackers", lambda self, name, config: told.append((name, config)))
    args = sap.parse_args(flags(sd15, photos, tmp_path, "--hub_token=secret", "--report_to=tensorboard"))
    reset()
    sap.start_trackers(args, sap.start_accelerator(args))
    ((name, config),) = told
    assert name == sap.TRACKER
    assert config["learning_rate"] == 1e-2
    assert "secret" not in str(config)


# ---- Several nodes ----


@pytest.mark.parametrize("kind", ["another step", "a finished run", "other photos"])
def test_nodes_that_do_not_see_the_same_folder_end_in_one_sentence(
    kind, sd15, photos, tmp_path, monkeypatch, nothing_loads
):
    """The other node's part is played by what it would send."""

    def gathered(mine: list[str]) -> list[str]:
        state, finished, record = sap.json.loads(mine[0])
        if kind == "another step":
            state = {"global_step": 7}
        elif kind == "a finished run":
            finished = {"global_step": 2}
        else:
            record = record | {"the content of 00.jpg": "another"}
        return [*mine, sap.json.dumps([state, finished, record])]

    monkeypatch.setattr(sap, "gather_object", gathered)
    with pytest.raises(sap.UsageError, match="--output_dir .*not all nodes"):
        train(SCRIPT, flags(sd15, photos, tmp_path))
    monkeypatch.setattr(sap, "gather_object", lambda mine: mine * 2)
    monkeypatch.setattr(sap, "prepare", lambda *_, **__: sys_exit())
    with pytest.raises(SystemExit, match="came through"):
        train(SCRIPT, flags(sd15, photos, tmp_path))


def sys_exit():
    raise SystemExit("came through")


# ---- What is needed ----


def test_requirements_scripts_and_style_agree_on_python_and_floors():
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "Python 3.11 to 3.13" in requirements
    assert settings["tool"]["ruff"]["target-version"] == "py311"
    for script in SCRIPTS:
        assert '# requires-python = ">=3.11,<3.14"' in script.read_text(encoding="utf-8")
    assert hasattr(torch._dynamo.config, "recompile_limit")
    floors = dict(line.split(">=") for line in requirements.splitlines() if line.count(">=") == 1 and ";" not in line)
    assert tuple(map(int, floors["torch"].split("."))) >= (2, 7)  # torch._dynamo.config.recompile_limit
    assert tuple(map(int, floors["peft"].split("."))) >= (0, 20)  # adapters of text encoders in transformers 5.23
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for name, floor in floors.items():
        assert tuple(map(int, floor.split("."))) <= tuple(map(int, pinned[name].split(".")[: floor.count(".") + 1]))


# ---- Captions ----


def test_captions_with_the_customary_word_have_anchors_of_their_own(captioned, caplog):
    sap.logger.setLevel("INFO")
    arguments = without(flags("base", captioned, "/out"), "--class_prompt")
    images = sap.SubjectImages(sap.parse_args(arguments))
    assert images.anchor_captions == [caption.replace("sks ", "") for caption in images.captions]
    assert 'the captions without "sks"; --subject_token to say it better' in caplog.text
    assert "The captions differ and all are anchored" not in caplog.text
    said = sap.SubjectImages(sap.parse_args([*arguments, "--class_prompt=a photo of a dog"]))
    assert set(said.anchor_captions) == {"a photo of a dog"}


def changed(captioned, folder, was: str, now: str):
    """A copy of the photos with one other caption."""
    shutil.copytree(captioned, folder)
    text = (folder / "metadata.jsonl").read_text()
    assert was in text
    (folder / "metadata.jsonl").write_text(text.replace(was, now))
    return folder


def of_my_dog(folder):
    """The pictures of a command line on which neither prompt holds an identifier."""
    arguments = without(flags("base", folder, "/out"), "--class_prompt", "--instance_prompt")
    return sap.SubjectImages(sap.parse_args([*arguments, "--instance_prompt=my dog"]))


def test_an_identifier_that_only_the_captions_hold_is_taken_from_them(captioned, caplog):
    sap.logger.setLevel("INFO")
    images = of_my_dog(captioned)
    assert images.anchor_captions == [caption.replace("sks ", "") for caption in images.captions]
    assert 'the captions without "sks"; --subject_token to say it better' in caplog.text


def test_without_an_anchor_captions_are_left_as_they_are(captioned, caplog):
    sap.logger.setLevel("INFO")
    arguments = without(flags("base", captioned, "/out", "--anchor_weight=0"), "--class_prompt")
    assert sap.SubjectImages(sap.parse_args(arguments)).captions[0] == "a photo of sks dog"
    assert "Anchors:" not in caplog.text


@pytest.mark.parametrize(
    ("caption", "sentence"),
    [
        ("my dog on the sofa", 'the caption "my dog on the sofa" does not hold the word "sks"'),
        ("ohwx dog", "the anchor needs a prompt for the class: --class_prompt"),
    ],
)
def test_captions_that_do_not_all_hold_it_need_a_class_prompt(caption, sentence, captioned, tmp_path):
    with pytest.raises(sap.UsageError, match=sentence):
        of_my_dog(changed(captioned, tmp_path / "photos", "a photo of sks dog", caption))


def test_a_caption_without_that_word_keeps_the_class_prompt(captioned, tmp_path):
    folder = changed(captioned, tmp_path / "photos", "a photo of sks dog", "desks and a dog")
    images = sap.SubjectImages(sap.parse_args(without(flags("base", folder, "/out"), "--class_prompt")))
    assert images.anchor_captions[:2] == ["a photo of dog", "dog in the snow"]


@pytest.mark.parametrize("more", [[], ["--subject_token=sks"]])
def test_a_caption_whose_anchor_names_nothing_is_refused(more, captioned, tmp_path):
    folder = changed(captioned, tmp_path / "photos", "sks dog in the snow", "a photo of sks in the snow")
    with pytest.raises(sap.UsageError, match="a photo of sks in the snow.*names nothing"):
        sap.SubjectImages(sap.parse_args(without(flags("base", folder, "/out", *more), "--class_prompt")))


# ---- Memory ----


@pytest.mark.parametrize("script", ["train_sap_lora_sd15", "train_sap_lora_sdxl", "train_sap_lora_sd3"])
def test_gradient_checkpointing_reaches_text_encoders_that_train(script, bases, photos, tmp_path):
    more = ["--train_text_encoder", "--gradient_checkpointing"]
    _, run = make_run(script, flags(bases[script], photos, tmp_path, *more))
    encoders = run.student.text_encoders.values()
    assert encoders
    assert all(encoder.is_gradient_checkpointing for encoder in encoders)
