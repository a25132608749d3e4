# SPDX-License-Identifier: Apache-2.0
"""Train one LoRA for each subject, anchor weight, anchor source and seed, several at once.

    python train.py --backbone sd15 --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --data_dir dreambench --output_dir loras --weights 0 0.5 --gpus_per_job 1 -- --max_train_steps 500

Each job is a training script in a process of its own, as a user would start it (several GPUs: `accelerate launch`);
what stands after `--` goes to the script as it is, and is read by it before any job starts. Jobs run on Ray: on this
machine, or on the cluster of `--ray_address`, whose nodes must see the same folders. A job that fails is tried once
more, from its last checkpoint, and the others go on. Started again, the command skips what is finished. Writes
OUT/RUN/SUBJECT/, each with the script's output, train.log and job.json.
"""

import argparse
import contextlib
import ctypes
import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import ray
from benchmark import Benchmark, HelpFormatter, load_script, read_benchmark
from ray.exceptions import RayError
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LORA_FILE = "pytorch_lora_weights.safetensors"
ATTEMPTS = 2
RAY_PATIENCE = 30  # seconds in which a cluster must answer
PR_SET_PDEATHSIG = 1  # linux/prctl.h
PRESETS = {
    "nearest": {
        "sd15": "--learning_rate=1e-4 --rank=16 --lora_alpha=27 --lora_layers=to_q,to_v --max_train_steps=500 "
        "--adam_weight_decay=0",
        "sdxl": "--resolution=1024 --train_batch_size=1 --gradient_accumulation_steps=4 --learning_rate=5e-4 --rank=4 "
        "--max_train_steps=500",
        "sd3": "--resolution=512 --train_batch_size=1 --gradient_accumulation_steps=4 --learning_rate=4e-4 --rank=4 "
        "--max_train_steps=500",
    }
}
OURS = ("pretrained_model_name_or_path", "instance_data_dir", "instance_prompt", "class_prompt", "anchor_weight",
        "anchor_source", "seed", "output_dir", "resume_from_checkpoint")  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One LoRA to train: `command` is the training script and its arguments."""

    run: str
    subject: str
    folder: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """How a job went; `log` has the end of its output where it failed."""

    job: Job
    status: str
    seconds: float
    log: str = ""


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    usage = "%(prog)s [flags] -- [script's flags]"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=usage, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--backbone", choices=["sd15", "sdxl", "sd3"], required=True, help="Which training script.")
    add("--method", choices=["sap", "prior", "dco", "dop", "l2"], default="sap",
        help="sap: the anchor; others: a neighbour of it, by neighbours.py, one LoRA a seed.")  # fmt: skip
    add("--pretrained_model_name_or_path", required=True, help="Base pipeline: hub name or local folder.")
    add("--data_dir", type=Path, required=True, help="DreamBench: a folder a subject, and prompts_and_classes.txt.")
    add("--output_dir", type=Path, required=True, help="Folder of the LoRAs.")
    add("--subjects", nargs="+", help="Some subjects (default: all that have pictures).")
    add("--weights", nargs="+", type=float, default=[0.0, 0.5], help="Anchor weights w.")
    add("--anchor_sources", nargs="+", default=["pretrained"], choices=["pretrained", "finetuned"],
        help="Models that give the anchor.")  # fmt: skip
    add("--seeds", nargs="+", type=int, default=[0], help="Seeds.")
    add("--token", default="sks", help="Word for the subject.")
    add("--instance_prompt", default="a photo of {token} {class}", help="Subject prompt.")
    add("--class_prompt", default="a photo of a {class}", help="Anchor prompt.")
    add("--preset", choices=list(PRESETS),
        help="nearest: the settings of rlgnswk/Preserve-and-Personalize (arXiv 2505.19519), the nearest public ones; "
        "NOT the SAP paper's, which does not state its own. Flags after -- win over them.")  # fmt: skip
    add("--ray_address", help="Ray cluster (default: this machine).")
    add("--cpus_per_job", type=int, default=1, help="CPU cores of a job.")
    add("--gpus_per_job", type=float, default=0, help="GPUs of a job; each whole one is a process.")
    add("script_args", nargs=argparse.REMAINDER, metavar="-- FLAGS", help="Flags of the training script.")
    args = parser.parse_args(input_args)
    args.script_args = args.script_args[args.script_args[:1] == ["--"] :]
    for flag in args.script_args:
        name = flag.split("=")[0].removeprefix("--")
        if name == "hub_token":
            parser.error("--hub_token would be written to job.json: log in with `hf auth login` instead")
        if name in OURS:
            parser.error(f"--{name} is set for each job: leave it out after --")
    try:
        args.benchmark = read_benchmark(args.data_dir)
    except ValueError as error:
        parser.error(f"--data_dir: {error}")
    there = args.benchmark.subjects()
    args.subjects = args.subjects or there
    missing = [subject for subject in args.subjects if subject not in there]
    if missing or not there:
        parser.error(
            f"--subjects: no pictures or no class in {args.data_dir} for {', '.join(missing) or 'any subject'}"
        )
    return args


def variants(args: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """(run name without seed, the script's flags) of each point of the grid; w = 0 has no source, so it comes once."""
    if args.method != "sap":
        return [(f"{args.backbone}-{args.method}", [f"--method={args.method}", f"--backbone={args.backbone}"])]
    points = {(w, source if w > 0 else "pretrained"): None for w in args.weights for source in args.anchor_sources}
    return [
        (f"{args.backbone}-w{w:g}-{source}", [f"--anchor_weight={w:g}", f"--anchor_source={source}"])
        for w, source in points
    ]


def grid(args: argparse.Namespace) -> list[Job]:
    """All jobs, in the order in which they start."""
    script = ROOT / f"train_sap_lora_{args.backbone}.py" if args.method == "sap" else HERE / "neighbours.py"
    preset = PRESETS[args.preset][args.backbone].split() if args.preset else []
    benchmark: Benchmark = args.benchmark
    jobs = []
    for seed in args.seeds:
        for name, flags in variants(args):
            for subject in args.subjects:
                words = {"token": args.token, "class": benchmark.classes[subject]}
                folder = (args.output_dir / f"{name}-seed{seed}" / subject).resolve()
                command = [
                    str(script),
                    f"--pretrained_model_name_or_path={args.pretrained_model_name_or_path}",
                    f"--instance_data_dir={args.data_dir.resolve() / subject}",
                    f"--instance_prompt={args.instance_prompt.format(**words)}",
                    f"--class_prompt={args.class_prompt.format(**words)}",
                    *flags,
                    f"--seed={seed}",
                    f"--output_dir={folder}",
                    *preset,
                    *args.script_args,
                ]
                jobs.append(Job(f"{name}-seed{seed}", subject, str(folder), tuple(command)))
    return jobs


def is_finished(job: Job) -> bool:
    """Whether the job's LoRA is there.

    Raises:
        ValueError: if it was trained by another command, whose result must not be lost.
    """
    folder = Path(job.folder)
    record = folder / "job.json"
    if not (folder / LORA_FILE).is_file() or not record.is_file():
        return False
    before = json.loads(record.read_text(encoding="utf-8"))
    if before["command"] != list(job.command):
        raise ValueError(f"{folder} has a LoRA of another command (see job.json): take another --output_dir")
    return before["status"] == "finished"


def write_json(path: Path, content: object) -> None:
    """Write a file that is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, path)


def check_scripts_flags(jobs: Sequence[Job]) -> None:
    """Let the training script read each job's command line now, as it will when the job starts.

    Raises:
        ValueError: with the script's own sentence about a flag that it refuses.
    """
    script = load_script(Path(jobs[0].command[0]))
    for job in jobs:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                script.parse_args(list(job.command[1:]))
        except SystemExit as stopped:
            if not stopped.code:  # --help
                raise
            raise ValueError(f"-- FLAGS: {said.getvalue().strip().rpartition('error: ')[2]}") from stopped


def launcher(job: Job, gpus: float) -> list[str]:
    """The command line of an attempt: a process for each whole GPU, going on from a checkpoint where there is one."""
    launch = [sys.executable]
    if gpus > 1:
        launch += ["-m", "accelerate.commands.launch", "--quiet", f"--num_processes={int(gpus)}", "--num_machines=1"]
        launch += ["--mixed_precision=no", "--dynamo_backend=no"]
    resume = ["--resume_from_checkpoint=latest"] if any(Path(job.folder).glob("checkpoint-*")) else []
    return [*launch, *job.command, *resume]


def ending_with_parent() -> Callable[[], int] | None:
    """For a new child: have the kernel send it SIGTERM, at which a trainer keeps its work, when its parent is gone.

    Linux only; elsewhere a job outlives a killed driver.
    """
    if sys.platform != "linux":
        return None
    return functools.partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGTERM)


def run_job(job: Job, cpus: int, gpus: float) -> Outcome:
    """Train one LoRA in a process of its own, twice at most; its output goes to train.log."""
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(cpus), "TOKENIZERS_PARALLELISM": "false"}
    started = time.monotonic()
    for _ in range(ATTEMPTS):
        with (folder / "train.log").open("ab") as log:
            options = {"stdout": log, "stderr": subprocess.STDOUT, "env": environment}
            code = subprocess.call(launcher(job, gpus), **options, preexec_fn=ending_with_parent())
        if code == 0:
            break
    outcome = Outcome(job, "finished" if code == 0 else "failed", round(time.monotonic() - started, 1))
    record = {**asdict(job), "status": outcome.status, "seconds": outcome.seconds}
    write_json(folder / "job.json", record)
    if code == 0:
        return outcome
    text = (folder / "train.log").read_text(encoding="utf-8", errors="replace")
    return Outcome(job, outcome.status, outcome.seconds, "\n".join(re.split(r"[\r\n]+", text)[-15:]))


def give_up(address: str) -> None:
    """End the program: there is no cluster."""
    sentence = f"--ray_address {address}: no Ray cluster answers there within {RAY_PATIENCE} s; check host and port"
    print(f"{Path(__file__).name}: error: {sentence}, or leave the flag out", file=sys.stderr, flush=True)
    os._exit(2)


def start_ray(args: argparse.Namespace) -> None:
    """Join the cluster or start Ray here, with nothing listening to the outside and nothing sent home."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_worker_niceness", "0")  # by default its workers give way to everything else
    local = {} if args.ray_address else {"include_dashboard": False}
    watchdog = threading.Timer(RAY_PATIENCE, give_up, [args.ray_address])  # init would wait for ten minutes, deaf
    try:
        if args.ray_address:
            watchdog.start()
        ray.init(address=args.ray_address, log_to_driver=False, logging_level="ERROR", **local)
    except (ConnectionError, ValueError) as error:
        raise ValueError(f"--ray_address {args.ray_address}: {error}") from error
    finally:
        watchdog.cancel()
    have = ray.cluster_resources()
    if have.get("CPU", 0) < args.cpus_per_job or have.get("GPU", 0) < args.gpus_per_job:
        raise ValueError(
            f"--cpus_per_job {args.cpus_per_job}, --gpus_per_job {args.gpus_per_job:g}: Ray has only "
            f"{have.get('CPU', 0):g} CPU cores and {have.get('GPU', 0):g} GPUs"
        )


def outcome_of(result: ray.ObjectRef, job: Job) -> Outcome:
    """How a job that ended went; where its Ray worker was killed or broke, that is a failure of this job alone."""
    try:
        return ray.get(result)
    except RayError as error:
        return Outcome(job, "failed", 0.0, "\n".join(str(error).splitlines()[-15:]))


def run_all(args: argparse.Namespace, jobs: list[Job]) -> list[Outcome]:
    """Run the jobs on Ray; their outcomes, in the order in which they end. Ray starts a job anew whose worker died."""
    options = {"num_cpus": args.cpus_per_job, "num_gpus": args.gpus_per_job, "max_retries": ATTEMPTS - 1}
    remote = ray.remote(**options)(run_job)
    pending = {remote.remote(job, args.cpus_per_job, args.gpus_per_job): job for job in jobs}
    outcomes = []
    with tqdm(total=len(jobs), desc="LoRAs") as bar:
        while pending:
            (ready,), _ = ray.wait(list(pending))
            outcome = outcome_of(ready, pending.pop(ready))
            outcomes.append(outcome)
            bar.update()
            if outcome.status == "failed":
                tqdm.write(f"failed: {outcome.job.run}/{outcome.job.subject}\n{outcome.log}\n")
    return outcomes


def main(args: argparse.Namespace) -> int:
    """Train what is not trained yet; the number of jobs that failed."""
    jobs = grid(args)
    todo = [job for job in jobs if not is_finished(job)]
    print(f"{len(jobs)} LoRAs: {len(jobs) - len(todo)} are there, {len(todo)} to train", flush=True)
    outcomes = []
    if todo:
        check_scripts_flags(todo)
        start_ray(args)
        try:
            outcomes = run_all(args, todo)
        finally:
            ray.shutdown()
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in failed:
        print(f"failed: {outcome.job.run}/{outcome.job.subject}, see {outcome.job.folder}/train.log", file=sys.stderr)
    if outcomes:
        seconds = sum(outcome.seconds for outcome in outcomes)
        print(f"{len(outcomes) - len(failed)} trained, {len(failed)} failed, {seconds / 60:.1f} minutes of jobs")
    return len(failed)


if __name__ == "__main__":
    try:
        sys.exit(1 if main(parse_args()) else 0)
    except ValueError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
