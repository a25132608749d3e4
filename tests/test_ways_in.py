# SPDX-License-Identifier: Apache-2.0
"""The ways to start a run: `python`, `accelerate launch` as the readme has it, its flags, and accelerate's own files.

All of them train the same LoRA, byte for byte, and none compiles anything that nobody asked for.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.utils import write_basic_config
from runner import LORA_FILE, ROOT, flags

SD15, OTHERS = "train_sap_lora_sd15", ["train_sap_lora_sdxl", "train_sap_lora_sd3"]
LAUNCH = ["-m", "accelerate.commands.launch"]


def run_by(
    launcher: list[str], script: str, arguments: list[str], home: Path
) -> tuple[subprocess.CompletedProcess, int]:
    """Start a script by `python LAUNCHER SCRIPT ...`, without a configuration of this machine; also returns how many
    files torch's compiler left."""
    cache = home / "compiled"
    environment = os.environ | {"HF_HOME": str(home), "TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, f"{ROOT / script}.py", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stderr, sum(path.is_file() for path in cache.rglob("*"))


@pytest.fixture(scope="module")
def by_python(bases, photos, tmp_path_factory):
    """A function that gives the LoRA file that `python` alone makes of a script's tiny base."""

    @functools.cache
    def lora_file(script: str) -> bytes:
        folder = tmp_path_factory.mktemp("by_python")
        _, compiled = run_by([], script, flags(bases[script], photos, folder / "out"), folder)
        assert compiled == 0
        return (folder / "out" / LORA_FILE).read_bytes()

    return lora_file


@pytest.mark.parametrize("script", [SD15, *(pytest.param(script, marks=pytest.mark.slow) for script in OTHERS)])
def test_the_launcher_with_its_defaults_compiles_nothing_and_trains_the_same(
    script, bases, photos, tmp_path, by_python
):
    said, compiled = run_by(LAUNCH, script, flags(bases[script], photos, tmp_path / "out"), tmp_path)
    assert compiled == 0
    assert "dynamo backend" not in said
    assert (tmp_path / "out" / LORA_FILE).read_bytes() == by_python(script)


@pytest.mark.parametrize("way", ["inductor", "file"])
def test_nothing_that_a_launcher_is_told_compiles(way, sd15, photos, tmp_path, by_python):
    launcher = [*LAUNCH, f"--dynamo_backend={way}"]
    if way == "file":
        write_basic_config(save_location=str(tmp_path / "written.yaml"))
        launcher = [*LAUNCH, f"--config_file={tmp_path / 'written.yaml'}"]
    said, compiled = run_by(launcher, SD15, flags(sd15, photos, tmp_path / "out"), tmp_path)
    assert compiled == 0
    assert ("dynamo backend INDUCTOR: unused, --compile compiles" in said) == (way == "inductor")
    assert (tmp_path / "out" / LORA_FILE).read_bytes() == by_python(SD15)


@pytest.mark.slow
def test_the_compiler_is_seen_where_it_is_asked_for(sd15, photos, tmp_path):
    """The tests above look for files: here they are, so none that were compiled could be overlooked."""
    arguments = flags(sd15, photos, tmp_path / "out", "--compile", "--anchor_weight=0", "--lora_layers=to_q", steps=1)
    _, compiled = run_by([], SD15, arguments, tmp_path)
    assert compiled > 0
