# SPDX-License-Identifier: Apache-2.0
"""Run the scripts in tests: in this process, which is fast, or as a user does, through a launcher."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
LORA_FILE = "pytorch_lora_weights.safetensors"


def flags(pipeline: Path, photos: Path, output: Path, *more: str, steps: int = 2) -> list[str]:
    """A command line that every script accepts; `more` comes last, so it can say otherwise."""
    return [
        f"--pretrained_model_name_or_path={pipeline}", f"--instance_data_dir={photos}", f"--output_dir={output}",
        "--instance_prompt=a photo of sks dog", "--class_prompt=a photo of a dog", "--resolution=64", "--seed=0",
        "--train_batch_size=1", f"--max_train_steps={steps}", "--learning_rate=1e-2", "--text_encoder_lr=1e-2",
        "--report_to=none", "--center_crop", *more,
    ]  # fmt: skip


def train(script: str, arguments: list[str]) -> None:
    """`main(parse_args(arguments))` in this process, as a notebook would, on one thread: results repeat exactly."""
    module = importlib.import_module(script)
    reset()
    module.main(module.parse_args(arguments))


def reset() -> None:
    """Forget accelerate's settings of the last run, which a new process would not have."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    torch.set_num_threads(1)


def launch(script: str, arguments: list[str], ranks: int | None = None, cwd: Path = ROOT, **environment: str):
    """The script as a user starts it: `accelerate launch`, or with `ranks` processes on the CPU by torchrun."""
    launcher = ["accelerate.commands.launch"]
    if ranks is not None:
        launcher = ["torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
        environment["ACCELERATE_USE_CPU"] = "true"
    command = [sys.executable, "-m", *launcher, f"{ROOT / script}.py", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def lora(output: Path) -> dict[str, torch.Tensor]:
    """The tensors of a trained LoRA."""
    return load_file(output / LORA_FILE)


def metrics(output: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; a NaN in it is an error, as in JSON itself."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def left_in(output: Path) -> set[str]:
    """What a run left in its folder, but for the lock, which stays."""
    return {path.name for path in output.iterdir()} - {".lock"}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Two LoRAs are the same, bit for bit."""
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def make_run(script: str, arguments: list[str]):
    """The script's module and its `Run` after all stages, as `main` has it before training."""
    module = importlib.import_module(script)
    reset()
    args = module.parse_args(arguments)
    accelerator, images = module.start_accelerator(args), module.SubjectImages(args)
    more = {"scheduler": module.training_scheduler(args), "record": {}, "signals": module.StopRequests()}
    return module, module.prepare(args, accelerator, images, **more)


def items_of(run, index: int = 0) -> list[dict]:
    """The samples of the run's micro-step `index`."""
    (items,) = run.images.batches(run.images.draws(0, 1, index, index + 1))
    return items


def draw(module, run, index: int = 0):
    """The run's micro-step `index`, with its anchor."""
    step = module.draw_micro_step(run, index, items_of(run, index))
    return step, anchors_of(module, run, [step])[0]


def anchors_of(module, run, steps: list, batch_size: int = 4, source: str = "pretrained") -> list[torch.Tensor]:
    """Anchors of several micro-steps, computed as in training."""
    inputs = [(step.model_input, step.timesteps, step.anchor_conditioning) for step in steps]
    with run.accelerator.autocast():
        return module.predict_anchors(run.student.denoiser, module.denoise, inputs, batch_size, source)


def randomise_adapters(run) -> None:
    """LoRA layers start without effect: give them one."""
    torch.manual_seed(1)
    for parameter in run.student.trained().values():
        parameter.data += 0.05 * torch.randn_like(parameter)


def without(arguments: list[str], *names: str) -> list[str]:
    """A command line without some flags."""
    return [argument for argument in arguments if argument.split("=")[0] not in names]


def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser that a script's command line is read with."""
    return importlib.import_module(script).make_parser()
