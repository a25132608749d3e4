# SPDX-License-Identifier: Apache-2.0
"""Runs of the scripts in processes of their own that start in no time: forks of one that has imported everything.

Such a run can be killed at any moment, and several of them make a distributed run, as torchrun would start it.
"""

import multiprocessing
import os
import random
import socket
import sys
import time
from pathlib import Path

import runner
import torch
from safetensors.torch import save_file

CONTEXT = multiprocessing.get_context("forkserver")
SCRIPTS = ["train_sap_lora_sd15", "train_sap_lora_sdxl", "train_sap_lora_sd3"]
PATIENCE = 300


def start_server() -> None:
    """Import the scripts in the process that the others are forked of, which takes some seconds, once."""
    # The server looks for modules where a new Python does.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(runner.ROOT), str(runner.ROOT / "tests")])
    CONTEXT.set_forkserver_preload(["runner", *SCRIPTS])


def trace(module, log: Path) -> None:
    """Let a run keep what each of its ranks ends with, beside its log: the LoRA in memory and the targets it saw."""
    draw_micro_step, finish, targets = module.draw_micro_step, module.finish, []

    def draw(run, index, items):
        step = draw_micro_step(run, index, items)
        targets.append(step.target)
        return step

    def end(run, *rest):
        layers = {
            f"{part}.{key}": value for part, all in module.lora_layers(run).items() for key, value in all.items()
        }
        path = log.with_name(f"{log.stem}-{run.accelerator.process_index}.safetensors")
        seen = {"targets": torch.cat(targets)} if targets else {}  # none where only the end was left to do
        save_file(layers | seen, path)
        finish(run, *rest)

    module.draw_micro_step, module.finish = draw, end


def run(script: str, arguments: list[str], log: Path, environment: dict[str, str], training) -> None:
    """What a fork does: train, with its messages in a file, and tell when training itself begins."""
    os.environ |= environment
    with log.open("a", buffering=1) as stream:
        os.dup2(stream.fileno(), 2)
        os.dup2(stream.fileno(), 1)
    module = sys.modules[script]
    prepare_optimizer = module.make_optimizer

    def make_optimizer(*args):
        training.set()
        return prepare_optimizer(*args)

    module.make_optimizer = make_optimizer
    trace(module, log)
    runner.train(script, arguments)


class Forked:
    """One run of a script, by one process or by several ranks."""

    def __init__(self, script: str, arguments: list[str], log: Path, ranks: int = 1):
        self.log, self.training = log, CONTEXT.Event()
        common = {}
        if ranks > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            common |= {"ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": str(ranks)}
        self.processes = []
        for rank in range(ranks):
            environment = common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
            process = CONTEXT.Process(target=run, args=(script, arguments, log, environment, self.training))
            process.start()
            self.processes.append(process)

    def wait(self) -> list[int]:
        """The exit codes, when all have ended."""
        for process in self.processes:
            process.join(PATIENCE)
        return [process.exitcode for process in self.processes]

    def kill_after(self, seconds: float, within_training: bool) -> bool:
        """Kill all ranks, the first one to be hit by chance; whether the run was still going."""
        if within_training:
            self.training.wait(PATIENCE)
        end = time.monotonic() + seconds
        while time.monotonic() < end and any(process.is_alive() for process in self.processes):
            time.sleep(0.001)
        for process in random.sample(self.processes, len(self.processes)):
            process.kill()
        codes = self.wait()
        assert set(codes) <= {0, -9}, self.log.read_text()
        return set(codes) == {-9}
