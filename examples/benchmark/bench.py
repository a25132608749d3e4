# SPDX-License-Identifier: Apache-2.0
"""Time the scripts' own training loop on random weights: plain, with anchors, and with a doubled batch.

    python examples/benchmark/bench.py --output outputs/benchmark              # on a GPU: full size, bf16
    python examples/benchmark/bench.py --trainer "train_sap_lora_sd15.py FLAGS" --trainer "other.py FLAGS"

All variants of a backbone train one denoiser in one process, in turns, so that other load on the machine falls on all
of them alike. One turn is `train` of the script, from its first draw to its last step: no line of it is written here
again. A doubled batch is what prior preservation costs, whose batches carry as many class pictures as pictures of the
subject. Random weights cost what trained ones do; the losses mean nothing.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import importlib
import json
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.training_utils import free_memory
from models import BACKBONES, Backbone
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8  # optimizer steps in a turn: whole groups for every anchor batch below
PLAIN, DOUBLED = "plain", "doubled batch"
VARIANTS = {
    PLAIN: {"anchor_weight": 0.0},
    **{f"SAP, anchor batch {size}": {"anchor_weight": 0.5, "anchor_batch_size": size} for size in (1, 2, 4, 8)},
    DOUBLED: {"anchor_weight": 0.0, "train_batch_size": 2},
}


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    summary, *_ = __doc__.splitlines()
    parser = argparse.ArgumentParser(description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    names = sorted({name for name, _ in BACKBONES})
    add("--backbone", nargs="+", default=["sd15", "sdxl", "sd3"], choices=names, help="Which denoisers.")
    add("--size", choices=["full", "mid", "tiny"], help="Of the denoisers (default: full on a GPU, mid on a CPU).")
    add("--rounds", type=int, default=5, help="Turns of each variant.")
    add("--mixed_precision", choices=["no", "bf16", "fp16"], help="Default: bf16 on a GPU, no on a CPU.")
    add("--gradient_checkpointing", action="store_true", help="As the scripts' flag.")
    add("--compile", action="store_true", help="As the scripts' flag.")
    add(
        "--peak_tflops", type=float, help="What the device can do, in TFLOP/s (default: measured by a matrix product)."
    )
    add("--trainer", action="append", help="A training command, timed as a user runs it; repeat it to compare.")
    add("--trainer_steps", type=int, nargs=2, default=[4, 12], help="Its --max_train_steps: the difference is timed.")
    add("--output", type=Path, help="Folder for benchmark.md and benchmark.json (default: only printed).")
    args = parser.parse_args(input_args)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {args.rounds}")
    if not 0 < args.trainer_steps[0] < args.trainer_steps[1]:
        parser.error(f"--trainer_steps must be two numbers that grow, not {args.trainer_steps}")
    return args


def on_gpu() -> bool:
    return torch.cuda.is_available()


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if on_gpu():
        torch.cuda.synchronize()


def machine() -> str:
    """The device and the versions, for a table's caption."""
    device = torch.cuda.get_device_name() if on_gpu() else f"CPU, {torch.get_num_threads()} threads, {cpu_name()}"
    return f"{device}; Python {platform.python_version()}, torch {torch.__version__}"


def cpu_name() -> str:
    """The processor's name where Linux tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_flops(dtype: torch.dtype) -> float:
    """FLOP/s of the best of several products of square matrices."""
    size, device = (8192, "cuda") if on_gpu() else (1024, "cpu")
    left, right = torch.randn(2, size, size, device=device, dtype=dtype).unbind()
    seconds = []
    for _ in range(10):
        synchronise()
        begin = time.perf_counter()
        left @ right
        synchronise()
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)


# ---- A run of a script, with stages that make random tensors ----


def make_run(backbone: Backbone, flags: list[str], folder: Path) -> tuple:
    """The script's module and its `Run` as `main` has it before training: five pictures, one prompt, an anchor."""
    module, edge = importlib.import_module(backbone.script), backbone.resolution
    photos = folder / "photos"
    photos.mkdir()
    for name in range(5):
        pixels = np.random.default_rng(name).integers(0, 255, (edge, edge, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{name}.png")
    common = [f"--pretrained_model_name_or_path={folder}", f"--instance_data_dir={photos}", "--report_to=none"]
    common += ["--instance_prompt=a photo of sks dog", "--class_prompt=a photo of a dog", "--seed=0", "--center_crop"]
    common += ["--train_batch_size=1", f"--resolution={edge}", f"--output_dir={folder / 'out'}"]
    args = module.parse_args([*common, f"--max_train_steps={STEPS}", *flags])
    accelerator, images = module.start_accelerator(args), module.SubjectImages(args)
    dtype, generator = module.base_files(args, accelerator)["dtype"], torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator)

    embeddings = {prompt: {name: draw(*shape).to(dtype) for name, shape in backbone.conditioning.items()}
                  for prompt in sorted({*images.captions, *images.anchor_captions})}  # fmt: skip
    posteriors = {(i, False): draw(2 * backbone.latent_channels, edge // 8, edge // 8) for i in range(len(images))}
    vae = AutoencoderKL(latent_channels=backbone.latent_channels, **backbone.vae_config)  # only its scale is used
    torch.manual_seed(0)
    load_part = module.load_part
    if args.bnb_quantization_config_path is None:
        load_part = lambda *_, dtype, **__: backbone.build(dtype, accelerator.device).requires_grad_(False)  # noqa: E731
    else:  # diffusers quantises what it reads from a disk
        backbone.build(dtype, accelerator.device).save_pretrained(folder / module.DENOISER)
        free_memory()
    with mock.patch.object(module, "load_part", load_part):
        denoiser = module.load_denoiser(args, accelerator, images)
    module.add_adapters(args, {module.DENOISER: denoiser})
    student, more = module.Student(denoiser), {"record": {}, "signals": module.StopRequests()}
    scheduler = backbone.scheduler()
    return module, module.Run(args, accelerator, images, embeddings, {}, vae, posteriors, student, scheduler, **more)


def take_turn(module, run, settings: dict, steps: int = STEPS) -> tuple[float, float]:
    """Seconds and CPU seconds of one step, from a turn of the script's `train` with other settings."""
    args = copy.copy(run.args)
    vars(args).update(settings, max_train_steps=steps)
    student = module.Student(run.student.denoiser)  # accelerate wraps what it prepares, each time
    with mock.patch.object(module, "tqdm", functools.partial(tqdm, disable=True)):
        run = dataclasses.replace(run, args=args, images=module.SubjectImages(args), student=student)
        training = module.start_training(run, None, 0)
        synchronise()
        begin = time.perf_counter(), time.process_time()
        module.train(run, training)
        synchronise()
    seconds, cpu_seconds = time.perf_counter() - begin[0], time.process_time() - begin[1]
    run.accelerator.free_memory()
    student.zero_grad()
    return seconds / steps, cpu_seconds / steps


def count_flops(turn: Callable[..., object]) -> int:
    """FLOPs of one step. The counter knows the fused attention of a GPU; that of a CPU is taken apart for it."""
    attention = contextlib.nullcontext() if on_gpu() else sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, attention:
        turn(steps=1)
    return counter.get_total_flops()


def peak_memory(turn: Callable[..., object], steps: int = 1) -> int:
    """The most bytes in steps with their anchors: of all tensors on a GPU, on a CPU of those that the steps make."""
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
        turn(steps=steps)
        return torch.cuda.max_memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        turn(steps=steps)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(changes).max())


def measure(backbone: Backbone, options: argparse.Namespace, peak: float) -> list[dict]:
    """A row for each variant of one backbone: all take turns, in an order that changes."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--mixed_precision={options.mixed_precision}"]
        flags += [f"--{name}" for name in ("gradient_checkpointing", "compile") if getattr(options, name)]
        module, run = make_run(backbone, flags, Path(folder))
        turns = {name: functools.partial(take_turn, module, run, settings) for name, settings in VARIANTS.items()}
        rows = {}
        for name, turn in tqdm(turns.items(), desc=f"{backbone.script}: counting", leave=False):
            if on_gpu() or options.compile:
                turn()  # warms up
            # A step's FLOPs are the same for all sizes of a group, and one anchor for one step is easily counted.
            alone = functools.partial(take_turn, module, run, VARIANTS[name] | {"anchor_batch_size": 1})
            memory = peak_memory(turn, VARIANTS[name].get("anchor_batch_size", 1))
            flops = None if options.compile else count_flops(alone)
            rows[name] = {"variant": name, "peak_bytes": memory, "flops": flops, "seconds": [], "cpu_seconds": []}
        order = list(turns)
        for _ in tqdm(range(options.rounds), desc=f"{backbone.script}: rounds", leave=False):
            for name in order:
                seconds, cpu_seconds = turns[name]()
                rows[name]["seconds"].append(seconds)
                rows[name]["cpu_seconds"].append(cpu_seconds)
            order = order[1:] + order[:1]
    for row in rows.values():
        row["utilisation"] = row["flops"] and row["flops"] / statistics.median(row["seconds"]) / peak
        for other in (PLAIN, DOUBLED):
            for clock in ("seconds", "cpu_seconds"):
                row[f"{clock} / {other}"] = statistics.median(
                    one / base for one, base in zip(row[clock], rows[other][clock], strict=True)
                )
    return list(rows.values())


def quartiles(values: list[float], scale: float = 1.0) -> str:
    """Median and the middle half of values, as text."""
    low, middle, high = np.percentile(values, [25, 50, 75]) * scale
    return f"{middle:.0f} ({low:.0f} to {high:.0f})" if middle >= 10 else f"{middle:.2f} ({low:.2f} to {high:.2f})"


def steps_table(title: str, rows: list[dict]) -> str:
    """The rows of one backbone as Markdown."""
    lines = [
        f"### {title}", "",
        "| step | ms | CPU s | TFLOP | utilisation | peak MiB | time / plain | CPU / plain | CPU / doubled |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        flops = "" if row["flops"] is None else f"{row['flops'] / 1e12:.4g}"
        utilisation = "" if row["utilisation"] is None else f"{row['utilisation']:.0%}"
        lines.append(
            f"| {row['variant']} | {quartiles(row['seconds'], 1e3)} | {quartiles(row['cpu_seconds'])} | {flops} "
            f"| {utilisation} | {row['peak_bytes'] / 2**20:.0f} | {row['seconds / plain']:.2f} "
            f"| {row['cpu_seconds / plain']:.2f} | {row['cpu_seconds / doubled batch']:.2f} |"
        )
    return "\n".join(lines) + "\n"


# ---- Whole commands ----


def run_command(command: str, steps: int) -> tuple[float, float]:
    """Seconds and CPU seconds of a training command with so many steps.

    Raises:
        SystemExit: if it fails, with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, *shlex.split(command), f"--max_train_steps={steps}", f"--output_dir={folder}"]
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        result = subprocess.run(words, capture_output=True, text=True)
        seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if result.returncode:
        raise SystemExit(f"--trainer {command}: ended with status {result.returncode}\n{result.stderr[-2000:]}")
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure_commands(commands: list[str], options: argparse.Namespace) -> list[dict]:
    """A row for each command: what a step costs is the difference between a long and a short run, in turns."""
    few, many = options.trainer_steps
    rows = [{"command": command, "seconds": [], "cpu_seconds": [], "start_seconds": []} for command in commands]
    for _ in tqdm(range(options.rounds), desc="Commands", leave=False):
        for row in rows:
            short, long = (run_command(row["command"], steps) for steps in (few, many))
            row["seconds"].append((long[0] - short[0]) / (many - few))
            row["cpu_seconds"].append((long[1] - short[1]) / (many - few))
            row["start_seconds"].append(short[0] - few * row["seconds"][-1])
    return rows


def commands_table(rows: list[dict]) -> str:
    """Commands side by side as Markdown; ratios are to the first one."""
    lines = ["| command | ms a step | CPU s a step | s before the first step | CPU / first |", "|---|---|---|---|---|"]
    first = statistics.median(rows[0]["cpu_seconds"])
    for row in rows:
        lines.append(
            f"| `{row['command'].split()[0]}` | {quartiles(row['seconds'], 1e3)} | {quartiles(row['cpu_seconds'])} "
            f"| {quartiles(row['start_seconds'])} | {statistics.median(row['cpu_seconds']) / first:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main(args: argparse.Namespace) -> None:
    """Measure what the command line asks for, and write it."""
    args.size = args.size or ("full" if on_gpu() else "mid")
    args.mixed_precision = args.mixed_precision or ("bf16" if on_gpu() else "no")
    report = {"machine": machine(), "options": {name: str(value) for name, value in vars(args).items()}}
    text = f"{report['machine']}\n\n"
    if args.trainer:
        report["commands"] = measure_commands(args.trainer, args)
        text += commands_table(report["commands"])
    else:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision, torch.float32)
        report["peak_flops"] = args.peak_tflops * 1e12 if args.peak_tflops else peak_flops(dtype)
        text += f"Peak: {report['peak_flops'] / 1e12:.3g} TFLOP/s\n\n"
        for name in args.backbone:
            report[name] = measure(BACKBONES[name, args.size], args, report["peak_flops"])
            text += steps_table(f"{name}, {args.size}", report[name]) + "\n"
            write(args.output, text, report)  # what is measured stays, should the next one fail
    print(text)
    write(args.output, text, report)


def write(folder: Path | None, text: str, report: dict) -> None:
    """Write the tables and all that was measured, if a folder is named."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "benchmark.md").write_text(text)
        (folder / "benchmark.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    with contextlib.suppress(KeyboardInterrupt):
        main(parse_args())
