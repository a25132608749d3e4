# SPDX-License-Identifier: Apache-2.0
"""Run on a GPU, with one command, all that these scripts can do and a CPU cannot show; one report says what held.

    python examples/benchmark/gpu_check.py  # everything; more than half an hour on an H200 whose CPU is slow
    python examples/benchmark/gpu_check.py                   # the same again: what failed, or was not reached
    python examples/benchmark/gpu_check.py --only full sdxl  # some parts, some backbones

Nothing is downloaded. `tiny` trains the pipelines of `examples/tiny_world` with each flag and compares losses and LoRA
with a CPU in float32, whose random numbers are the same. `full` trains random weights at the public sizes, `speed` is
`bench.py`, and `launches` (kernels, compilation, CUDA graphs) is `launches.py`. Each check is a process of its own, so
that none can harm another. Without a GPU the same checks run, with models that are small throughout, but for those
that need CUDA.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import bench
import launches
import torch
from models import BACKBONES
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
WORLD = ROOT / "examples" / "tiny_world"
STEPS = 6
CUDA, BITSANDBYTES = "needs CUDA", "needs CUDA and bitsandbytes"
REFERENCES = {"CPU": "", "CPU, encoders": "--train_text_encoder"}
# Of each check its flags, the reference, how far a loss may be from it, how like its LoRA's `lora_B` must be (as their
# cosine), and what it needs.
TINY = {
    "float32": ("", "CPU", 1e-3, 0.99, ""),
    "TF32": ("--allow_tf32", "CPU", 1e-2, 0.95, CUDA),
    "bf16": ("--mixed_precision=bf16", "CPU", 0.1, 0.7, ""),
    "fp16": ("--mixed_precision=fp16", "CPU", 0.05, 0.8, CUDA),
    "gradient checkpointing": ("--gradient_checkpointing", "CPU", 1e-3, 0.99, ""),
    "anchors one by one": ("--anchor_batch_size=1", "CPU", 1e-3, 0.99, ""),
    "offload": ("--offload", "CPU", 1e-3, 0.99, ""),
    "text encoders": ("--train_text_encoder", "CPU, encoders", 1e-3, 0.99, ""),
    "text encoders, fp16": ("--train_text_encoder --mixed_precision=fp16", "CPU, encoders", 0.05, 0.8, CUDA),
    "8-bit Adam": ("--use_8bit_adam", "CPU", 1e-2, 0.95, BITSANDBYTES),
    # On an H200 a base in 4 bits was at worst .18 and .85 from float32, one in 8 bits .01 and .99 where it was right.
    "4-bit base": ("--bnb_quantization_config_path=load_in_4bit", "CPU", 0.25, 0.8, BITSANDBYTES),
    "8-bit base": ("--bnb_quantization_config_path=load_in_8bit", "CPU", 0.05, 0.95, BITSANDBYTES),
    "compiled": ("--compile", "CPU", 1e-2, 0.95, CUDA),
    "xformers": ("--enable_xformers_memory_efficient_attention", "CPU", 1e-2, 0.95, "needs CUDA and xformers"),
}
CHECKPOINTED = "--mixed_precision=bf16 --gradient_checkpointing"
FULL = {
    "sd15": ["--mixed_precision=fp16", "--allow_tf32", "--mixed_precision=bf16 --use_8bit_adam",
             "--mixed_precision=bf16 --compile"],
    "sdxl": [CHECKPOINTED, f"{CHECKPOINTED} --bnb_quantization_config_path=load_in_4bit",
             "--mixed_precision=fp16 --gradient_checkpointing"],
    "sd3": [CHECKPOINTED, f"{CHECKPOINTED} --bnb_quantization_config_path=load_in_4bit",
            f"{CHECKPOINTED} --bnb_quantization_config_path=load_in_8bit", "--mixed_precision=bf16 --compile"],
}  # fmt: skip

PARTS = ["tiny", "full", "speed", "launches"]
LAUNCHES = {"compared": "", "compiled": CUDA, "graphed": CUDA}  # functions of `launches.py`, the first one in rounds


@dataclasses.dataclass(frozen=True)
class Check:
    """One process: `work` returns numbers for the report, and raises what goes wrong."""

    part: str
    backbone: str
    name: str
    work: Callable[[], dict]
    needs: str = ""

    @property
    def key(self) -> str:
        return "".join(c if c.isalnum() else "_" for c in f"{self.part} {self.backbone} {self.name}")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    summary, *_ = __doc__.splitlines()
    parser = argparse.ArgumentParser(description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", default=[], choices=[*PARTS, *FULL], help="Parts and backbones.")
    add(
        "--output",
        type=Path,
        default=ROOT / "outputs" / "gpu_check",
        help="Folder of the report and of what it is of.",
    )
    add("--jobs", type=int, default=min(6, (os.cpu_count() or 1) // 2), help="Small checks at a time.")
    add("--patience", type=int, default=600, help="Seconds after which a check is given up.")
    add("--rounds", type=int, default=2, help="Turns of each variant that is timed.")
    return parser.parse_args(input_args)


# ---- Checks on the tiny world ----


def quantised(flags: str, folder: Path) -> list[str]:
    """The flags as a list, with a file that says what the one of quantisation names."""
    for kind in ("load_in_4bit", "load_in_8bit"):
        path = folder / f"{kind}.json"
        if kind in flags:
            path.write_text(json.dumps({kind: True} | ({"bnb_4bit_quant_type": "nf4"} if "4" in kind else {})))
        flags = flags.replace(kind, str(path)) if kind in flags else flags
    return flags.split()


def train_tiny(backbone: str, flags: list[str], folder: Path) -> list[float]:
    """The losses of a few steps of a script; its files are in `folder`."""
    module = importlib.import_module(f"train_sap_lora_{backbone}")
    shutil.rmtree(folder, ignore_errors=True)
    common = [f"--pretrained_model_name_or_path={WORLD / backbone}", f"--instance_data_dir={WORLD / 'dataset/fish'}"]
    common += ["--instance_prompt=a photo of sks fish", "--class_prompt=a photo of a fish", "--resolution=64"]
    common += ["--seed=0", "--train_batch_size=1", f"--max_train_steps={STEPS}", "--learning_rate=2e-3"]
    common += ["--checkpointing_steps=3", "--report_to=none", "--text_encoder_lr=1e-3", f"--output_dir={folder}"]
    common += ["--final_validation_prompt=a photo of sks fish", "--num_validation_images=1"]
    module.main(module.parse_args([*common, "--validation_inference_steps=4", *flags]))
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def lora_of(folder: Path) -> torch.Tensor:
    """What a LoRA learned: all of its `lora_B`, which start at zero."""
    tensors = load_file(folder / "pytorch_lora_weights.safetensors")
    return torch.cat([tensors[key].flatten().double() for key in sorted(tensors) if "lora_B" in key])


def compare(losses: list[float], folder: Path, reference: Path, loss_limit: float, least_cosine: float) -> dict:
    """How far a run is from another one; raises `ArithmeticError` if it is too far."""
    expected = [json.loads(line)["loss"] for line in (reference / "metrics.jsonl").read_text().splitlines()]
    apart = max(abs(one / other - 1) for one, other in zip(losses, expected[-len(losses) :], strict=True))
    cosine = torch.nn.functional.cosine_similarity(lora_of(folder), lora_of(reference), dim=0).item()
    if apart > loss_limit or cosine < least_cosine:
        wanted = f"{loss_limit:g} and {least_cosine:g} were expected"
        raise ArithmeticError(f"the losses are up to {apart:.2g} from {reference.name}, LoRA {cosine:.4f}; {wanted}")
    return {"losses apart": apart, "LoRA": cosine}


def reference(backbone: str, flags: str, folder: Path) -> dict:
    """A run on the CPU, in float32."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    return {"losses": train_tiny(backbone, flags.split(), folder)}


def feature(backbone: str, name: str, folder: Path) -> dict:
    """A run with flags, compared with its reference."""
    flags, other, *limits, _ = TINY[name]
    place = folder / f"{backbone} {name}"
    torch.backends.cudnn.allow_tf32 = "tf32" in flags  # which is torch's default for convolutions
    losses = train_tiny(backbone, quantised(flags, folder), place)
    return compare(losses, place, folder / f"{backbone} {other}", *limits)


def resumed(backbone: str, folder: Path) -> dict:
    """A run in half precision that goes on from the middle of another one ends as that did, scaler included."""
    flags = [f"--mixed_precision={'fp16' if bench.on_gpu() else 'bf16'}"]
    one, other = folder / f"{backbone} whole", folder / f"{backbone} resumed"
    train_tiny(backbone, flags, one)
    losses = train_tiny(backbone, [*flags, f"--resume_from_checkpoint={one / 'checkpoint-3'}"], other)
    return compare(losses, other, one, 1e-2, 0.999)


def anchored(backbone: str, folder: Path) -> dict:
    """With adapters that have an effect, the anchor is still what the base predicts, bit for bit."""
    module = importlib.import_module(f"train_sap_lora_{backbone}")
    flags = [f"--pretrained_model_name_or_path={WORLD / backbone}", f"--instance_data_dir={WORLD / 'dataset/fish'}"]
    flags += ["--instance_prompt=a photo of sks fish", "--class_prompt=a photo of a fish", "--resolution=64"]
    flags += ["--mixed_precision=bf16", f"--output_dir={folder / 'anchored'}", "--seed=0", "--max_train_steps=4"]
    args = module.parse_args(flags)
    accelerator, images = module.start_accelerator(args), module.SubjectImages(args)
    more = {"scheduler": module.training_scheduler(args), "record": {}, "signals": module.StopRequests()}
    run = module.prepare(args, accelerator, images, **more)
    for parameter in run.student.trained().values():
        parameter.data.add_(0.05)
    pairs, base = list(module.micro_steps(run, 0)), module.load_denoiser(args, accelerator, images).train()
    inputs = [(step.model_input, step.timesteps, step.anchor_conditioning) for step, _ in pairs]
    with accelerator.autocast():
        plain = module.predict_anchors(base, module.denoise, inputs, args.anchor_batch_size)
        tuned = module.predict_anchors(run.student.denoiser, module.denoise, inputs, 4, "finetuned")
    if not all(torch.equal(one, anchor) for one, (_, anchor) in zip(plain, pairs, strict=True)):
        raise ArithmeticError("the anchor is not what the base without adapters predicts")
    if torch.equal(plain[0], tuned[0]):
        raise ArithmeticError("the adapters have no effect, so that this shows nothing")
    return {"samples": len(pairs)}


def two_gpus(backbone: str, folder: Path) -> dict:
    """A run by two processes, through torchrun as a user starts it."""
    place, script = folder / f"{backbone} two", ROOT / f"train_sap_lora_{backbone}.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)]
    command += [f"--pretrained_model_name_or_path={WORLD / backbone}", f"--instance_data_dir={WORLD / 'dataset/fish'}"]
    command += ["--instance_prompt=a photo of sks fish", "--class_prompt=a photo of a fish", "--resolution=64"]
    command += ["--mixed_precision=bf16", "--seed=0", "--max_train_steps=6", f"--output_dir={place}"]
    subprocess.run(command, check=True)
    return {"losses": [json.loads(line)["loss"] for line in (place / "metrics.jsonl").read_text().splitlines()]}


# ---- Checks at full size ----


def full(backbone: str, flags: str) -> dict:
    """Time and memory of a step with these flags and anchors; `train` itself raises where a loss is not finite."""
    with tempfile.TemporaryDirectory() as folder:
        model = BACKBONES[backbone, "full" if bench.on_gpu() else "tiny"]
        module, run = bench.make_run(model, quantised(flags, Path(folder)), Path(folder))
        turn = functools.partial(bench.take_turn, module, run, {}, 4)
        seconds = [turn()[0] for _ in range(3)][1:]
        peak = bench.peak_memory(functools.partial(bench.take_turn, module, run, {}), 4)
        rows = (Path(run.args.output_dir) / "metrics.jsonl").read_text().splitlines()
    return {"milliseconds": 1e3 * statistics.median(seconds), "GB": peak / 1e9, "loss": json.loads(rows[0])["loss"]}


def speed(backbone: str, rounds: int) -> dict:
    """The table of `bench.py`."""
    gpu = bench.on_gpu()
    size, precision, dtype = ("full", "bf16", torch.bfloat16) if gpu else ("tiny", "no", torch.float32)
    options = bench.parse_args([f"--rounds={rounds}", f"--mixed_precision={precision}"])
    rows = bench.measure(BACKBONES[backbone, size], options, bench.peak_flops(dtype))
    return {"table": bench.steps_table(f"{backbone}, {size}", rows)}


# ---- All of them ----


def all_checks(options: argparse.Namespace) -> list[Check]:
    """Every check that `--only` leaves, references first."""
    checks, folder = [], options.output / "runs"
    for backbone in FULL:
        for name, flags in REFERENCES.items():
            work = functools.partial(reference, backbone, flags, folder / f"{backbone} {name}")
            checks.append(Check("tiny", backbone, name, work))
    for backbone in FULL:
        for name, (*_, needs) in TINY.items():
            if backbone != "sd3" or name != "xformers":
                checks.append(Check("tiny", backbone, name, functools.partial(feature, backbone, name, folder), needs))
        checks.append(Check("tiny", backbone, "resumed", functools.partial(resumed, backbone, folder)))
        checks.append(Check("tiny", backbone, "the anchor", functools.partial(anchored, backbone, folder)))
        work = functools.partial(two_gpus, backbone, folder)
        checks.append(Check("tiny", backbone, "two GPUs", work, "needs two GPUs"))
    for backbone, all_flags in FULL.items():
        checks.append(Check("speed", backbone, "bench.py", functools.partial(speed, backbone, options.rounds)))
        for flags in all_flags:
            packages = BITSANDBYTES if "bnb" in flags or "8bit" in flags else ""
            needs = packages or (CUDA if "fp16" in flags or "--compile" in flags else "")
            checks.append(Check("full", backbone, flags, functools.partial(full, backbone, flags), needs))
    for name, needs in LAUNCHES.items():  # in this order, should time run out
        for backbone in FULL:
            work = functools.partial(getattr(launches, name), backbone, options.rounds)
            checks.append(Check("launches", backbone, name, work, needs))
    parts = [name for name in options.only if name in PARTS] or PARTS
    backbones = [name for name in options.only if name in FULL] or list(FULL)
    # The 8 bits that failed on a GPU, and what they are compared with, go with what else waits for one.
    waiting = ("CPU", "8-bit base") if "launches" in parts else ()
    return [
        one
        for one in checks
        if one.backbone in backbones and (one.part in parts or one.part == "tiny" and one.name in waiting)
    ]


def lacking(needs: str) -> str:
    """Why a check cannot run here; empty if it can."""
    lacks = {"CUDA": not bench.on_gpu(), "two GPUs": torch.cuda.device_count() < 2}
    lacks |= {name: importlib.util.find_spec(name) is None for name in ("bitsandbytes", "xformers")}
    return needs if any(name in needs and lack for name, lack in lacks.items()) else ""


def run_check(check: Check, folder: Path) -> None:
    """What the process of a check does."""
    sys.stdout = sys.stderr = log = (folder / f"{check.key}.log").open("w", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    begin = time.perf_counter()
    record = {"numbers": check.work(), "seconds": time.perf_counter() - begin}
    (folder / f"{check.key}.json").write_text(json.dumps(record))


def failure(process: multiprocessing.Process, log: Path) -> str:
    """Why a process ended, or was ended, without a result."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.is_file() else []
    if process.exitcode == 1 and lines:
        return lines[-1][:300]
    return f"ended with {process.exitcode}; {lines[-1][-200:] if lines else 'it said nothing'}"


def work_off(checks: list[Check], options: argparse.Namespace, jobs: int) -> None:
    """Run checks, some at a time, in processes of their own; write why one failed."""
    # A fork imports nothing again, but where there is CUDA it may not use it.
    context, waiting, running = multiprocessing.get_context("spawn" if bench.on_gpu() else "fork"), checks[::-1], {}
    while waiting or running:
        while waiting and len(running) < jobs:
            check = waiting.pop()
            process = context.Process(target=run_check, args=(check, options.output))
            process.start()
            running[check] = process, time.monotonic() + options.patience
        multiprocessing.connection.wait([process.sentinel for process, _ in running.values()], 1)
        for check, (process, end) in list(running.items()):
            if process.is_alive() and time.monotonic() > end:
                process.kill()
                process.join()
            if not process.is_alive():
                del running[check]
                path = options.output / f"{check.key}.json"
                if process.exitcode:
                    path.write_text(json.dumps({"failed": failure(process, path.with_suffix(".log"))}))
                said = "passed" if process.exitcode == 0 else "FAILED"
                print(f"{said}: {check.part}, {check.backbone}, {check.name}", flush=True)


def read(check: Check, folder: Path) -> dict:
    """The record of a check, empty if it has not run."""
    path = folder / f"{check.key}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def cell(record: dict, needs: str) -> str:
    """What a table says of one check."""
    if needs:
        return needs
    numbers = record.get("numbers")
    if numbers is None:
        return "**failed**" if "failed" in record else "not reached"
    return ", ".join(f"{name} {value:.3g}" for name, value in numbers.items() if isinstance(value, float)) or "passed"


def report(checks: list[Check], folder: Path) -> str:
    """All that is known, as Markdown."""
    records = {check: read(check, folder) for check in checks}
    missing = {check: lacking(check.needs) for check in checks}
    failed = {check: record["failed"] for check, record in records.items() if "failed" in record}
    passed = sum("numbers" in record for record in records.values())
    skipped = sum(map(bool, missing.values()))
    versions = [f"{name} {importlib.metadata.version(name)}" for name in
                ("diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "xformers")
                if importlib.util.find_spec(name)]  # fmt: skip
    lines = ["# What held on this device", "", f"{bench.machine()}, {', '.join(versions)}", ""]
    lines += [f"{passed} passed, {len(failed)} failed, {skipped} cannot run here.", ""]
    lines += [f"- **{one.part}, {one.backbone}, {one.name}**: {reason}" for one, reason in failed.items()]
    said = {(one.part, one.name, one.backbone): cell(records[one], missing[one]) for one in checks}
    lines += ["", "## Tiny world, against a CPU in float32", "", f"| | {' | '.join(FULL)} |", "|---" * 4 + "|"]
    for name in dict.fromkeys(name for part, name, _ in said if part == "tiny"):
        lines.append(f"| {name} | {' | '.join(said.get(('tiny', name, backbone), '') for backbone in FULL)} |")
    lines += ["", "## Full size, batch 1, anchors of 4", "", "| backbone | flags | |", "|---|---|---|"]
    lines += [f"| {backbone} | `{name}` | {text} |" for (part, name, backbone), text in said.items() if part == "full"]
    lines += ["", "## Compiled, and as CUDA graphs", "", "| backbone | check | |", "|---|---|---|"]
    for (part, name, backbone), text in said.items():
        if part == "launches" and name != "compared":
            lines.append(f"| {backbone} | {name} | {text} |")
    tables = [record.get("numbers", {}).get("table", "") for record in records.values()]
    return "\n".join([*lines, "", "## What a step costs", "", *filter(None, tables)])


def main(options: argparse.Namespace) -> str:
    """Run what has not passed yet, and write the report of all."""
    (options.output / "runs").mkdir(parents=True, exist_ok=True)
    checks = all_checks(options)
    left = [one for one in checks if not lacking(one.needs) and "numbers" not in read(one, options.output)]
    rank = {check: check.part != "tiny" or -(check.name in REFERENCES) for check in left}  # references come first
    for order in (-1, 0, 1):
        work_off([one for one in left if rank[one] == order], options, 1 if order == 1 else max(1, options.jobs))
    text = report(checks, options.output)
    (options.output / "report.md").write_text(text)
    return text


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with contextlib.suppress(KeyboardInterrupt):
        print(main(parse_args()))
