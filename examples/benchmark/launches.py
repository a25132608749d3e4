# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can say of the kernels that a step starts: `python examples/benchmark/gpu_check.py --only launches`.

A small batch keeps a GPU waiting for its host, which starts a few thousand kernels a step. Here a step is timed as the
scripts train and as they would in autocast, with more kernels; compiled; and as CUDA graphs, which the host starts as
one. Every number is printed as soon as it is known, so that a check which is ended early leaves what it found.
"""

import contextlib
import functools
import importlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import bench
import torch
from accelerate.utils import AutocastKwargs
from models import BACKBONES

VARIANTS = {bench.PLAIN: {"anchor_weight": 0.0}}
VARIANTS |= {f"SAP, anchor batch {size}": {"anchor_weight": 0.5, "anchor_batch_size": size} for size in (1, 4, 8)}
WARM_UP = 3  # calls before a capture: libraries choose their kernels and make their workspaces


def backbone_here(name: str):
    """The full size on a GPU; elsewhere the tiny one, on which the same code runs."""
    return BACKBONES[name, "full" if bench.on_gpu() else "tiny"]


@contextlib.contextmanager
def in_autocast(module) -> Iterator[None]:
    """Inside, a script trains in autocast, with peft's own LoRA layers and an optimizer that makes many calls."""
    predict_anchors, optimizer = module.predict_anchors, torch.optim.AdamW
    dtype = torch.bfloat16

    def anchors(model, *arguments):
        with torch.autocast(next(model.parameters()).device.type, dtype):
            return predict_anchors(model, *arguments)

    with contextlib.ExitStack() as patches:
        for place, name, stand_in in (
            (module, "AutocastKwargs", lambda enabled: AutocastKwargs()),
            (module, "compute_as_base", lambda module: None),
            (module, "predict_anchors", anchors),
            (torch.optim, "AdamW", lambda groups, fused=None, **options: optimizer(groups, **options)),
        ):
            patches.enter_context(mock.patch.object(place, name, stand_in))
        yield


def say(**numbers) -> None:
    """Into the check's log, at once."""
    print(json.dumps(numbers), flush=True)


def kernels(turn) -> int | None:
    """What the host starts in a step, with its share of an anchor, as CUDA's own profiler counts it."""
    if not bench.on_gpu():
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        turn()
    started = [event.count for event in profile.key_averages() if "LaunchKernel" in event.key]
    return round(sum(started) / bench.STEPS)


def compared(name: str, rounds: int) -> dict:
    """Milliseconds, memory and kernels of a step, as the scripts train and in autocast, in turns."""
    module = importlib.import_module(backbone_here(name).script)
    ways = {"autocast": in_autocast, "as it is": lambda module: contextlib.nullcontext()}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for way, inside in ways.items():
            place = Path(folder) / way.replace(" ", "_")
            place.mkdir()
            with inside(module):
                _, runs[way] = bench.make_run(backbone_here(name), ["--mixed_precision=bf16"], place)
        for variant, settings in VARIANTS.items():
            row = {"step": variant}
            seconds = {way: [] for way in ways}
            turns = {way: functools.partial(bench.take_turn, module, run, settings) for way, run in runs.items()}
            for way, turn in turns.items():
                with ways[way](module):
                    turn()  # warms up
                    row[f"{way}, kernels"] = kernels(turn)
                    row[f"{way}, GB"] = bench.peak_memory(turn, bench.STEPS) / 1e9
            for _ in range(rounds):
                for way, turn in turns.items():
                    with ways[way](module):
                        seconds[way].append(turn()[0])
            for way in ways:
                row[f"{way}, ms"] = 1e3 * statistics.median(seconds[way])
            say(backbone=name, **row)
            rows.append(row)
    return {"table": table(f"{name}: in autocast and as it is", rows)}


def table(title: str, rows: list[dict]) -> str:
    """Rows of the same keys as Markdown."""
    lines = [f"### {title}", "", f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    for row in rows:
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def compiled(name: str, rounds: int) -> dict:
    """Seconds until the first step of `--compile` is done, and milliseconds of those that follow."""
    with tempfile.TemporaryDirectory() as folder:
        module, run = bench.make_run(backbone_here(name), ["--mixed_precision=bf16", "--compile"], Path(folder))
        begin = time.perf_counter()
        bench.take_turn(module, run, {}, steps=1)
        numbers = {"seconds to the first step": time.perf_counter() - begin}
        say(backbone=name, **numbers)
        bench.take_turn(module, run, {})  # a group of anchors is another shape
        seconds = [bench.take_turn(module, run, {})[0] for _ in range(rounds)]
    return numbers | {"milliseconds": 1e3 * statistics.median(seconds)}


# ---- CUDA graphs ----


class Denoise(torch.nn.Module):
    """The denoiser's forward as a function of tensors alone, as a graph takes it."""

    def __init__(self, module, denoiser: torch.nn.Module, names: list[str]):
        super().__init__()
        self.module = module
        self.denoiser = denoiser
        self.names = names

    def forward(self, model_input: torch.Tensor, timesteps: torch.Tensor, *conditioning: torch.Tensor) -> torch.Tensor:
        return self.module.denoise(
            self.denoiser, model_input, timesteps, dict(zip(self.names, conditioning, strict=True))
        )


class GraphedAnchors:
    """`predict_anchors` as one graph, for groups that are all of one shape."""

    def __init__(self, predict_anchors, arguments: tuple):
        self.model, self.denoise, inputs, *self.options = arguments
        self.inputs = [
            (one.clone(), t.clone(), {name: c.clone() for name, c in more.items()}) for one, t, more in inputs
        ]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.predict(predict_anchors)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = self.predict(predict_anchors)

    def predict(self, predict_anchors) -> list[torch.Tensor]:
        return predict_anchors(self.model, self.denoise, self.inputs, *self.options)

    def __call__(self, model, denoise, inputs: list[tuple], *_) -> list[torch.Tensor]:
        for (latents, timesteps, conditioning), (x, t, c) in zip(self.inputs, inputs, strict=True):
            latents.copy_(x)
            timesteps.copy_(t)
            for key, tensor in conditioning.items():
                tensor.copy_(c[key])
        self.graph.replay()
        return [output.clone() for output in self.outputs]


def graphed(name: str, rounds: int) -> dict:
    """Milliseconds of a step with the student and the anchors as CUDA graphs, and how far its losses are from others.

    All pictures have one size, nothing is checkpointed or dropped out, and there is no autocast whose cache of cast
    weights a graph would keep: what graphs ask for.
    """
    with tempfile.TemporaryDirectory() as folder:
        module, run = bench.make_run(backbone_here(name), ["--mixed_precision=bf16"], Path(folder))
        begin = {key: parameter.detach().clone() for key, parameter in run.student.trained().items()}
        eager = losses_and_time(module, run, begin, rounds)
        say(backbone=name, eager=eager[1])
        step, _ = next(module.micro_steps(run, 0))
        names = list(step.conditioning)
        sample = (step.model_input, step.timesteps, *step.conditioning.values())
        graph = torch.cuda.make_graphed_callables(
            Denoise(module, run.student.denoiser, names), sample, num_warmup_iters=WARM_UP, allow_unused_input=True
        )
        found, made = module.predict_anchors, []

        def anchors(*arguments):
            if not made:
                made.append(GraphedAnchors(found, arguments))
            return made[0](*arguments)

        def forward(student, model_input, timesteps, conditioning, prompts):
            return graph(model_input, timesteps, *conditioning.values())

        with mock.patch.object(module, "predict_anchors", anchors):
            with mock.patch.object(module.Student, "forward", forward):
                graphs = losses_and_time(module, run, begin, rounds)
    apart = max(abs(one / other - 1) for one, other in zip(graphs[0], eager[0], strict=True))
    return {"milliseconds": graphs[1], "eager": eager[1], "losses apart": apart}


def losses_and_time(module, run, begin: dict[str, torch.Tensor], rounds: int) -> tuple[list[float], float]:
    """Losses of a turn from the same LoRA on, and the milliseconds of a step in those that follow."""
    for key, parameter in run.student.trained().items():
        parameter.data.copy_(begin[key])
    metrics = Path(run.args.output_dir) / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    bench.take_turn(module, run, {})
    losses = [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]
    return losses, 1e3 * statistics.median(bench.take_turn(module, run, {})[0] for _ in range(rounds))
