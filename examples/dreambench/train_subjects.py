# SPDX-License-Identifier: Apache-2.0
"""Train one LoRA for each subject, anchor weight, anchor source and seed, several at once.

    python train_subjects.py --backbone sd15 --data_dir dreambench --output_dir loras --weights 0 0.5 \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 -- --max_train_steps 500

Each job is a training script in a process of its own, as a user would start it (several GPUs: `accelerate launch`);
what stands after `--` goes to the script as it is, and is read by it before any job starts. This machine runs one job
on each of its GPUs, or without GPUs one on each of its cores; `--ray_address` names a Ray cluster, whose nodes must
see the same folders. A job that fails is tried once more, from its last checkpoint, and the others go on. Started
again, the command skips what is finished. Writes OUT/RUN/SUBJECT/, each with the script's output, train.log and
job.json.
"""

import argparse
import contextlib
import ctypes
import functools
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

from benchmark import Benchmark, HelpFormatter, load_script, model_name, path, read_benchmark, read_json, write_json
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LORA_FILE = "pytorch_lora_weights.safetensors"
ATTEMPTS = 2
POLL = 0.2  # seconds between two looks at the jobs
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Figures 2 and 8 ask for a LoRA every hundred steps, and the script would keep the last few alone.
CHECKPOINTS = ["--checkpointing_steps=100", "--checkpoints_total_limit=100"]
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


# --- What there is to train ---------------------------------------------------------------------------------------


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    usage = "%(prog)s [flags] -- [script's flags]"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=usage, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--backbone", choices=["sd15", "sdxl", "sd3"], required=True, help="Which training script.")
    add("--method", choices=["sap", "prior", "dco", "dop", "l2"], default="sap",
        help="sap: the anchor; others: a neighbour of it, by neighbours.py, one LoRA a seed.")  # fmt: skip
    add("--pretrained_model_name_or_path", type=model_name, required=True, help="Base: hub name or local folder.")
    add("--data_dir", type=path, required=True, help="DreamBench: a folder a subject, and prompts_and_classes.txt.")
    add("--output_dir", type=path, required=True, help="Folder of the LoRAs.")
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
    add("--ray_address", help='Ray cluster, or "local" for one that is started here (default: without Ray).')
    add("--cpus_per_job", type=int, default=1, help="CPU cores of a job.")
    add("--gpus_per_job", type=float, help="GPUs of a job; each whole one is a process (default: 1 if there is one).")
    add("script_args", nargs=argparse.REMAINDER, metavar="-- FLAGS", help="Flags of the training script.")
    args = parser.parse_args(input_args)
    args.script_args = args.script_args[args.script_args[:1] == ["--"] :]
    try:
        args.benchmark = read_benchmark(args.data_dir)
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check(args: argparse.Namespace) -> None:
    """Settle the subjects; raise `ValueError` for jobs that cannot be, or would share a folder."""
    there = args.benchmark.subjects()
    args.subjects = args.subjects or there
    missing = [subject for subject in args.subjects if subject not in there]
    if missing or not there:
        names = ", ".join(missing) or "any subject"
        raise ValueError(f"--subjects: no pictures or no class in {args.data_dir} for {names}")
    named = {"weights": [f"{w:g}" for w in args.weights], "seeds": args.seeds, "subjects": args.subjects}
    named["anchor_sources"] = args.anchor_sources
    for flag, values in named.items():
        repeated = [value for value in values if values.count(value) > 1]
        if repeated:
            raise ValueError(f"--{flag}: {repeated[0]} stands there more than once, for one folder: leave one out")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise ValueError(f"--output_dir: {args.output_dir} is not a folder")
    if args.cpus_per_job < 1 or (args.gpus_per_job or 0) < 0:
        raise ValueError("--cpus_per_job must be at least 1, and --gpus_per_job at least 0")


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
                    *CHECKPOINTS,
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
    before = read_json(record)
    if before.get("command") != list(job.command):
        raise ValueError(f"{folder} has a LoRA of another command (see job.json): take another --output_dir")
    return before.get("status") == "finished"


def check_scripts_flags(args: argparse.Namespace, jobs: Sequence[Job]) -> None:
    """Let the training script read each job's command line now, as it will when the job starts.

    Raises:
        ValueError: with the script's own sentence about a flag that it refuses, or for a flag, abbreviated or not,
            that is each job's own, or a secret.
    """
    script = load_script(Path(jobs[0].command[0]))
    for job in jobs:
        read = read_flags(script, job.command[1:])
    end = len(job.command) - len(args.script_args)
    without = read_flags(script, job.command[1:end])
    for name in OURS:
        if getattr(read, name) != getattr(without, name):
            raise ValueError(f"-- FLAGS: --{name} is set for each job: leave it out")
    if read.hub_token is not None:
        raise ValueError("-- FLAGS: --hub_token would be written to job.json: log in with `hf auth login` instead")


def read_flags(script: ModuleType, flags: Sequence[str]) -> argparse.Namespace:
    """What a training script reads in its flags; `ValueError` with its sentence where it refuses them."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return script.parse_args(list(flags))
    except SystemExit as stopped:
        if not stopped.code:  # --help
            raise
        raise ValueError(f"-- FLAGS: {said.getvalue().strip().rpartition('error: ')[2]}") from stopped


# --- One job ------------------------------------------------------------------------------------------------------


def launcher(job: Job, gpus: float) -> list[str]:
    """The command line of an attempt: a process for each whole GPU, going on from a checkpoint where there is one."""
    launch = [sys.executable]
    if gpus > 1:
        launch += ["-m", "accelerate.commands.launch", "--quiet", f"--num_processes={int(gpus)}", "--num_machines=1"]
        launch += ["--mixed_precision=no"]
    resume = ["--resume_from_checkpoint=latest"] if any(Path(job.folder).glob("checkpoint-*")) else []
    return [*launch, *job.command, *resume]


def ending_with_parent() -> Callable[[], int] | None:
    """For a new child: have the kernel send it SIGTERM, at which a trainer keeps its work, when its parent is gone.

    Linux only; elsewhere a job outlives a killed driver.
    """
    if sys.platform != "linux":
        return None
    return functools.partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGTERM)


def start(job: Job, cpus: int, gpus: float, devices: str | None = None) -> subprocess.Popen:
    """Start an attempt; its output goes to train.log. `devices`: the GPUs that it sees, as CUDA_VISIBLE_DEVICES."""
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(cpus), "TOKENIZERS_PARALLELISM": "false"}
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    with (folder / "train.log").open("ab") as log:
        options = {"stdout": log, "stderr": subprocess.STDOUT, "env": environment}
        return subprocess.Popen(launcher(job, gpus), **options, preexec_fn=ending_with_parent())


def finish(job: Job, code: int, seconds: float) -> Outcome:
    """Write job.json after the last attempt, which ended with an exit status."""
    folder = Path(job.folder)
    outcome = Outcome(job, "finished" if code == 0 else "failed", round(seconds, 1))
    write_json(folder / "job.json", {**asdict(job), "status": outcome.status, "seconds": outcome.seconds})
    if code == 0:
        return outcome
    text = (folder / "train.log").read_text(encoding="utf-8", errors="replace")
    return Outcome(job, outcome.status, outcome.seconds, "\n".join(re.split(r"[\r\n]+", text)[-15:]))


def run_job(job: Job, cpus: int, gpus: float) -> Outcome:
    """Train one LoRA, in as many attempts as it needs or has: a worker's task on a cluster."""
    started = time.monotonic()
    for _ in range(ATTEMPTS):
        code = start(job, cpus, gpus).wait()
        if code == 0:
            break
    return finish(job, code, time.monotonic() - started)


# --- All jobs -----------------------------------------------------------------------------------------------------


@dataclass
class Attempt:
    """A job at work on a place of this machine."""

    job: Job
    place: str
    process: subprocess.Popen
    started: float
    left: int  # attempts after this one


def visible_gpus() -> list[str]:
    """The names of this machine's GPUs for CUDA_VISIBLE_DEVICES, which may leave some of them out."""
    import torch  # the scripts' own parsers have loaded it already

    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]


def places(cpus: int, gpus: float) -> list[str]:
    """Where jobs can run side by side on this machine, as the GPUs that each sees ("": none, it has its CPU cores).

    Raises:
        ValueError: if the machine has not enough for one job.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    names = visible_gpus()
    if cores < cpus or len(names) < gpus:
        raise ValueError(f"{asked(cpus, gpus)}: this machine has only {cores} CPU cores and {len(names)} GPUs")
    if gpus == 0:
        return [""] * (cores // cpus)
    if gpus < 1:
        return names * int(1 / gpus)
    size = int(gpus)
    return [",".join(names[first : first + size]) for first in range(0, len(names) - size + 1, size)]


def asked(cpus: int, gpus: float) -> str:
    return f"--cpus_per_job {cpus}, --gpus_per_job {gpus:g}"


def run_here(args: argparse.Namespace, jobs: Sequence[Job]) -> Iterator[Outcome]:
    """Run the jobs on this machine, one a place; their outcomes, in the order in which they end.

    However this ends, no job is left running: each is asked to keep its work, and waited for.
    """
    gpus = args.gpus_per_job
    if gpus is None:
        gpus = min(1, len(visible_gpus()))
    free = places(args.cpus_per_job, gpus)[::-1]
    waiting = list(jobs)[::-1]
    running = []

    def begin(job: Job, place: str, started: float, left: int) -> None:
        running.append(Attempt(job, place, start(job, args.cpus_per_job, gpus, place), started, left))

    try:
        while waiting or running:
            while waiting and free:
                begin(waiting.pop(), free.pop(), time.monotonic(), ATTEMPTS - 1)
            time.sleep(POLL)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                code = one.process.returncode
                if code != 0 and one.left > 0:
                    begin(one.job, one.place, one.started, one.left - 1)
                    continue
                free.append(one.place)
                yield finish(one.job, code, time.monotonic() - one.started)
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait()


def run_on_cluster(args: argparse.Namespace, jobs: Sequence[Job]) -> Iterator[Outcome]:
    """Run the jobs on Ray; their outcomes, in the order in which they end."""
    try:
        import cluster
    except ModuleNotFoundError as error:
        raise ValueError("--ray_address needs Ray: python -m pip install 'ray>=2.40'") from error
    cpus = args.cpus_per_job
    with cluster.joined(args.ray_address) as have:
        gpus = args.gpus_per_job
        if gpus is None:
            gpus = min(1, have.get("GPU", 0))
        if have.get("CPU", 0) < cpus or have.get("GPU", 0) < gpus:
            has = f"{have.get('CPU', 0):g} CPU cores and {have.get('GPU', 0):g} GPUs"
            raise ValueError(f"{asked(cpus, gpus)}: the cluster has only {has}")

        def run(job: Job) -> Outcome:
            return run_job(job, cpus, gpus)

        for job, result in cluster.run_all(run, list(jobs), cpus, gpus, ATTEMPTS - 1):
            yield Outcome(job, "failed", 0.0, result) if isinstance(result, str) else result


def run_all(args: argparse.Namespace, jobs: Sequence[Job]) -> list[Outcome]:
    """Run the jobs, and tell of those that fail as they do."""
    run = run_on_cluster if args.ray_address else run_here
    outcomes = []
    with tqdm(total=len(jobs), desc="LoRAs") as bar, contextlib.closing(run(args, jobs)) as ended:
        for outcome in ended:
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
        check_scripts_flags(args, todo)
        outcomes = run_all(args, todo)
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in failed:
        print(f"failed: {outcome.job.run}/{outcome.job.subject}, see {outcome.job.folder}/train.log", file=sys.stderr)
    if outcomes:
        seconds = sum(outcome.seconds for outcome in outcomes)
        print(f"{len(outcomes) - len(failed)} trained, {len(failed)} failed, {seconds / 60:.1f} minutes of jobs")
    return len(failed)


def end(number: int, frame: object) -> None:
    """A signal ends the program as an exception does, which lets the jobs keep their work."""
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end)
    try:
        sys.exit(1 if main(parse_args()) else 0)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except ValueError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
