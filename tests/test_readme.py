# SPDX-License-Identifier: Apache-2.0
"""Every command and every snippet of the README runs, with tiny models in place of the real ones."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import tiny_pipelines
from runner import LORA_FILE, ROOT, launch, reset

README = (ROOT / "README.md").read_text(encoding="utf-8")
BASES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": tiny_pipelines.save_sd15,
    "stabilityai/stable-diffusion-xl-base-1.0": tiny_pipelines.save_sdxl,
    "stabilityai/stable-diffusion-3-medium-diffusers": tiny_pipelines.save_sd3,
}
# What a CPU and a test's patience ask for; everything else in a command stays as the README says it.
SUBSTITUTES = {"--resolution": "64", "--max_train_steps": "2", "--mixed_precision": "no"}
GPU_ONLY = ("--use_8bit_adam",)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def commands() -> list[str]:
    """The README's shell commands, each on one line."""
    return [line for line in "".join(blocks("bash")).replace("\\\n", " ").splitlines() if split(line)]


def split(command: str) -> list[str]:
    return shlex.split(command, comments=True)


TRAINING = [command for command in commands() if "train_sap_lora_" in command]
OTHERS = [command for command in commands() if "train_sap_lora_" not in command]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: save(folder / name.replace("/", "_")) for name, save in BASES.items()}


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """A folder with photos in `dog`, as the README's reader has it, which is the working directory."""
    tiny_pipelines.save_photos(tmp_path / "dog")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def substituted(command: str, bases: dict[str, Path]) -> tuple[str, list[str]]:
    """The script's name and its arguments, on tiny models and for few steps."""
    words = split(command)
    position = next(i for i, word in enumerate(words) if word.startswith("train_sap_lora_"))
    arguments = [word for word in words[position + 1 :] if word not in GPU_ONLY]
    for i, word in enumerate(arguments):
        if arguments[i - 1] in SUBSTITUTES:
            arguments[i] = SUBSTITUTES[arguments[i - 1]]
        elif word in bases:
            arguments[i] = str(bases[word])
    return words[position].removesuffix(".py"), arguments


def test_the_readme_trains_every_backbone():
    for script in ("sd15", "sdxl", "sd3"):
        assert any(f"train_sap_lora_{script}.py" in command for command in TRAINING)
    assert len(README.splitlines()) <= 250


@pytest.mark.parametrize("command", TRAINING, ids=range(len(TRAINING)))
def test_a_training_command_trains(command, bases, desk):
    script, arguments = substituted(command, bases)
    ranks = 2 if "--num_processes 2" in command else None
    launch(script, arguments, ranks=ranks, cwd=desk)
    output = arguments[arguments.index("--output_dir") + 1]
    assert (desk / output / LORA_FILE).is_file()


@pytest.mark.parametrize("command", OTHERS, ids=range(len(OTHERS)))
def test_another_command_means_something_here(command):
    """`make` targets and the files that commands name are there; examples show their help."""
    words = split(command)
    if words[0] == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[:3] == ["pip", "install", "-r"]:
        assert (ROOT / words[3]).is_file()
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    else:
        pytest.fail(f"no test knows what to do with: {command}")


def test_the_snippets_run_on_what_the_commands_trained(bases, desk):
    script, arguments = substituted(TRAINING[0], bases)
    module = __import__(script)
    reset()
    module.main(module.parse_args(arguments))
    for snippet in blocks("python"):
        for name, folder in bases.items():
            snippet = snippet.replace(name, str(folder))
        exec(snippet.replace('"cuda"', '"cpu"').replace("torch.float16", "torch.float32"), {})
    assert (desk / "dog.png").is_file()
