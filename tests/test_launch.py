# SPDX-License-Identifier: Apache-2.0
"""The ready commands of examples/launch: what they would start, seen by a stand-in for `accelerate` and `python`."""

import importlib
import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from runner import ROOT

FOLDER = ROOT / "examples" / "launch"
COMMANDS = sorted(FOLDER.glob("*.sh"))
CONFIGURATIONS = sorted(FOLDER.glob("*.yaml"))


@pytest.fixture
def started(tmp_path, photos):
    """Run a command file with an `accelerate` and a `python` that write down what they are given; returns that."""
    stand_in = tmp_path / "bin" / "accelerate"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word" >> {tmp_path}/words; done\n')
    stand_in.chmod(0o755)
    (stand_in.parent / "python").symlink_to(stand_in)
    (stand_in.parent / "srun").write_text('#!/bin/sh\nexec "$@"\n')
    (stand_in.parent / "srun").chmod(0o755)
    environment = os.environ | {"PATH": f"{stand_in.parent}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "2"}

    def run(command: Path) -> list[str]:
        arguments = [str(photos), "stuffed animal", str(tmp_path / "out")]
        if command.name.startswith("slurm"):
            (tmp_path / "subjects.tsv").write_text(f"/nowhere\tcat\n{photos}\tstuffed animal\n")
            arguments = [str(tmp_path / "subjects.tsv"), str(tmp_path / "out")]
        subprocess.run(["bash", str(command), *arguments], check=True, env=environment, cwd=ROOT)
        return (tmp_path / "words").read_text().splitlines()

    return run


@pytest.mark.parametrize("command", COMMANDS, ids=lambda path: path.name)
def test_a_command_is_one_that_its_trainer_takes(command, started, photos):
    script, *arguments = started(command)
    if not command.name.startswith("slurm"):  # which starts the trainer itself, so that signals reach it
        flag, config, script, *arguments = arguments
        assert (flag, Path(config).is_file()) == ("--config_file", True)
    assert Path(script).is_file()
    args = importlib.import_module(Path(script).stem).parse_args(arguments)
    assert (args.instance_data_dir, args.class_prompt) == (str(photos), "a photo of a stuffed animal")
    assert args.anchor_weight == 0.5
    assert args.resume_from_checkpoint == "latest"


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda path: path.name)
def test_a_configuration_is_one_that_accelerate_takes(configuration):
    config = load_config_from_file(str(configuration))
    ranks = 1 if "one_gpu" in configuration.name else 2
    assert config.num_processes == ranks
    assert config.mixed_precision == ("fp16" if "fp16" in configuration.name else "bf16")


def test_the_readme_names_every_file():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in COMMANDS + CONFIGURATIONS if f"`{path.name}`" not in text] == []
