# SPDX-License-Identifier: Apache-2.0
"""The ready commands of examples/launch: what they would start, seen by stand-ins for `python` and `torchrun`."""

import importlib
import os
import subprocess
from pathlib import Path

import pytest
from runner import ROOT

FOLDER = ROOT / "examples" / "launch"
LAUNCH = FOLDER / "launch.sh"
SETTINGS = [line.split()[:4] for line in LAUNCH.read_text().split("SETTINGS='\n")[1].split("'")[0].splitlines()]


@pytest.fixture
def started(tmp_path):
    """Run a command file where `python` and `torchrun` write down how they are called; returns these words."""
    folder = tmp_path / "bin"
    folder.mkdir()
    write_down = f'#!/bin/sh\nfor word in "${{0##*/}}" "$@"; do printf "%s\\n" "$word" >> {tmp_path}/words; done\n'
    for name, text in {"python": write_down, "torchrun": write_down, "srun": '#!/bin/sh\nexec "$@"\n'}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "2"}

    def run(file: Path, *words: str) -> list[str]:
        subprocess.run(["bash", str(file), *words], check=True, env=environment, cwd=ROOT)
        return (tmp_path / "words").read_text().splitlines()

    return run


def read(words: list[str]):
    """What the trainer's parser reads in the words after the launcher's."""
    script = next(word for word in words if word.endswith(".py"))
    assert Path(script).is_file()
    return importlib.import_module(Path(script).stem).parse_args(words[words.index(script) + 1 :])


@pytest.mark.parametrize(("name", "backbone", "gpus", "precision"), SETTINGS, ids=[one[0] for one in SETTINGS])
def test_a_setting_is_a_command_that_its_trainer_takes(name, backbone, gpus, precision, started, photos):
    words = started(LAUNCH, name, str(photos), "elephant", "out put", "--anchor_weight", "0.3", "--rank", "2")
    launcher = ["python"] if gpus == "1" else ["torchrun", "--standalone", "--nproc_per_node", gpus]
    assert words[: len(launcher) + 1] == [*launcher, str(ROOT / f"train_sap_lora_{backbone}.py")]
    args = read(words)
    assert (args.instance_data_dir, args.output_dir, args.mixed_precision) == (str(photos), "out put", precision)
    assert (args.instance_prompt, args.class_prompt) == ("a photo of sks elephant", "a photo of an elephant")
    assert (args.anchor_weight, args.rank, args.learning_rate) == (
        0.3,
        2,
        1e-4,
    )  # later flags win
    assert args.max_train_steps * int(gpus) == 500
    assert args.resume_from_checkpoint == "latest"
    assert backbone != "sdxl" or args.anchor_batch_size == 1


def test_a_slurm_array_trains_the_subject_of_its_line(started, photos, tmp_path):
    (tmp_path / "subjects.tsv").write_text(f"/nowhere\tcat\n{photos}\tstuffed animal\n")
    words = started(FOLDER / "slurm_subjects.sh", str(tmp_path / "subjects.tsv"), "24gb-sd15", "out", "--rank", "2")
    args = read(words)
    assert (args.instance_data_dir, args.output_dir) == (str(photos), f"out/{photos.name}")
    assert (args.class_prompt, args.rank) == ("a photo of a stuffed animal", 2)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("launch.sh", []),
        ("launch.sh", ["t4-sd15", "photos", "dog"]),
        ("launch.sh", ["t5", "photos", "dog", "out"]),
        ("slurm_subjects.sh", ["subjects.tsv"]),
    ],
)
def test_what_is_missing_gets_a_usage_line(file, words):
    result = subprocess.run(["bash", str(FOLDER / file), *words], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith(f"usage: {file}")


def test_the_readme_names_every_setting():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name, *_ in SETTINGS if f"`{name}`" not in text] == []
