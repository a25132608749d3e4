# SPDX-License-Identifier: Apache-2.0
"""DreamBench's LoRAs and pictures, in small, on the tiny world: the jobs, the manifest, the baselines."""

import argparse
import contextlib
import json
import math
import os
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from runner import LORA_FILE, ROOT, assert_equal, lora, reset
from safetensors.torch import load_file, save_file

FOLDER = ROOT / "examples" / "dreambench"
sys.path.insert(0, str(FOLDER))
import benchmark  # noqa: E402 (the path comes first)
import evaluate  # noqa: E402
import generate  # noqa: E402
import neighbours  # noqa: E402
import report  # noqa: E402
import table  # noqa: E402
import train_subjects  # noqa: E402

WORLD = ROOT / "examples" / "tiny_world"
DATA, BASE = WORLD / "dataset", WORLD / "sd15"
QUICK = ["--resolution=64", "--train_batch_size=1", "--max_train_steps=2", "--learning_rate=1e-3", "--report_to=none",
         "--skip_final_inference", "--center_crop"]  # fmt: skip


def train_flags(output, *more, weights=("0", "0.5"), subjects=("ball", "fish"), passed=QUICK):
    arguments = ["--backbone=sd15", f"--pretrained_model_name_or_path={BASE}", f"--data_dir={DATA}"]
    return arguments + [f"--output_dir={output}", "--weights", *weights, "--subjects", *subjects, *more, "--", *passed]


def train_args(*args, **kwargs):
    return train_subjects.parse_args(train_flags(*args, **kwargs))


def log_of(output, subject):
    return (output / "sd15-w0-pretrained-seed0" / subject / "train.log").read_text()


def drawn(images, method, *more, subjects=("ball",), base=BASE):
    """Draw a method's pictures by generate.py; its manifest."""
    arguments = [f"--data_dir={DATA}", f"--images_dir={images}", f"--method={method}", "--subjects", *subjects]
    arguments += ["--prompts", "0", "3", "--images=1", "--num_inference_steps=2", "--guidance_scale=3", *more]
    arguments += [f"--pretrained_model_name_or_path={base}"] if base is not None else []
    generate.main(generate.parse_args(arguments))
    return json.loads((images / method / "manifest.json").read_text())


# --- The jobs -----------------------------------------------------------------------------------------------------


def test_the_grid_has_every_point_once(tmp_path):
    jobs = train_subjects.grid(
        train_args(tmp_path, "--anchor_sources", "pretrained", "finetuned", "--seeds", "0", "7")
    )
    runs = {job.run for job in jobs}
    points = ["w0-pretrained", "w0.5-pretrained", "w0.5-finetuned"]  # w = 0 has no anchor, so no source
    assert runs == {f"sd15-{point}-seed{seed}" for point in points for seed in (0, 7)}
    assert len(jobs) == len(set(jobs)) == 2 * len(runs)
    fish = next(job for job in jobs if job.run == "sd15-w0.5-finetuned-seed7" and job.subject == "fish")
    wanted = {"--instance_prompt=a photo of sks fish", "--class_prompt=a photo of a fish", "--seed=7", *QUICK}
    assert wanted | {"--anchor_weight=0.5", "--anchor_source=finetuned"} <= set(fish.command)
    args = train_args(tmp_path, "--method=dco")
    neighbours_jobs = train_subjects.grid(args)
    assert [job.run for job in neighbours_jobs] == ["sd15-dco-seed0"] * 2
    train_subjects.check_scripts_flags(args, neighbours_jobs)
    assert {"--method=dco", "--backbone=sd15", "--class_prompt=a photo of a fish"} <= set(neighbours_jobs[1].command)


@pytest.mark.parametrize("backbone", ["sd15", "sdxl", "sd3"])
def test_the_preset_is_read_by_the_script_and_later_flags_win(tmp_path, backbone):
    flags = ["--preset=nearest", f"--backbone={backbone}"]
    job, *_ = train_subjects.grid(train_args(tmp_path, *flags, passed=["--max_train_steps=7"]))
    read = benchmark.load_script(Path(job.command[0])).parse_args(list(job.command[1:]))
    rates = {"sd15": (1e-4, 16, 1), "sdxl": (5e-4, 4, 4), "sd3": (4e-4, 4, 4)}
    assert (read.learning_rate, read.rank, read.gradient_accumulation_steps) == rates[backbone]
    assert read.max_train_steps == 7
    assert (read.checkpointing_steps, read.checkpoints_total_limit) == (100, 100)  # for Figures 2 and 8


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--", "--hub_tok=hf_secret"], "--hub_token would be written to job.json"),
        (["--", "--see", "1"], "--seed is set for each job"),
        (["--", "--anchor_w=1"], "--anchor_weight is set for each job"),
        (["--", "--resume_from_checkpoint=latest"], "--resume_from_checkpoint is set for each job"),
        (["--", "--rank=0"], "FLAGS: argument --rank: must be at least 1"),
        (["--weights", "0.1", "0.10000001"], "--weights: 0.1 stands there more than once"),
        (["--seeds", "1", "1"], "--seeds: 1 stands"),
        (["--subjects", "fish", "ball", "fish"], "--subjects: fish stands"),
        (["--subjects", "cow"], "no pictures or no class"),
        (["--cpus_per_job=0"], "--cpus_per_job must be at least 1"),
        ([f"--output_dir={FOLDER / 'README.md'}"], "README.md is not a folder"),
    ],
)
def test_flags_that_cannot_be_start_no_job(tmp_path, capsys, flags, says):
    own, passed = (flags, []) if flags[0] != "--" else ([], flags[1:])
    with pytest.raises((SystemExit, ValueError)) as told:
        train_subjects.main(train_args(tmp_path / "out", *own, passed=[*QUICK, *passed]))
    assert says in capsys.readouterr().err + str(told.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """LoRAs of two subjects and two weights, by the jobs' commands, but all in this process."""
    output = tmp_path_factory.mktemp("loras")
    script = benchmark.load_script(ROOT / "train_sap_lora_sd15.py")
    for job in train_subjects.grid(train_args(output)):
        reset()
        script.main(script.parse_args(list(job.command[1:])))
        train_subjects.finish(job, 0, 1.0)
    return output


FAKE = """
import argparse, os, pathlib, signal, sys, time

def parse_args(arguments):
    names = "pretrained_model_name_or_path instance_data_dir instance_prompt class_prompt anchor_weight anchor_source"
    values = {name: None for name in [*names.split(), "seed", "output_dir", "resume_from_checkpoint", "hub_token"]}
    return argparse.Namespace(**values)

def main():
    folder = pathlib.Path(next(a for a in sys.argv if a.startswith("--output_dir=")).split("=")[1])
    print("tried", folder.name, sys.argv[-1], "sees", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
    if folder.name == "fish" and "--kill" in sys.argv:
        os.kill(os.getppid(), signal.SIGKILL)
    if folder.name == "fish" and "--mend" not in sys.argv:
        (folder / "checkpoint-1").mkdir(exist_ok=True)
        sys.exit("no more fish")
    if "--wait" in sys.argv:
        (folder / "pid").write_text(str(os.getpid()))
        time.sleep(120)
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"x")

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """A script in place of the trainer's."""
    (tmp_path / "train_sap_lora_sd15.py").write_text(FAKE)
    monkeypatch.setattr(train_subjects, "ROOT", tmp_path)
    return tmp_path


def test_jobs_are_not_done_again_and_need_no_ray(quick, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    one = {"weights": ("0.5",), "subjects": ("ball",), "passed": ["--x"]}
    assert train_subjects.main(train_args(quick, **one)) == 0
    record = json.loads((quick / "sd15-w0.5-pretrained-seed0" / "ball" / "job.json").read_text())
    assert record["status"] == "finished" and "--anchor_weight=0.5" in record["command"]
    with pytest.raises(ValueError, match="--ray_address needs Ray: python -m pip install 'ray>=2.40'"):
        train_subjects.main(train_args(quick, "--ray_address=local", "--seeds=1", **one))
    monkeypatch.setattr(train_subjects, "start", lambda *args: pytest.fail("nothing is left to do"))
    assert train_subjects.main(train_args(quick, **one)) == 0
    assert "1 are there, 0 to train" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another command"):
        train_subjects.main(train_args(quick, **one | {"passed": ["--y"]}))


def test_a_failed_job_is_tried_twice_and_told_and_the_others_go_on(quick, capsys):
    args = train_args(quick, weights=("0",), passed=["--x"])
    assert train_subjects.main(args) == 1
    assert log_of(quick, "fish").count("tried fish --x") == 1
    assert log_of(quick, "fish").count("tried fish --resume_from_checkpoint=latest") == 1  # the second one goes on
    assert log_of(quick, "ball").count("tried") == 1
    said = capsys.readouterr()
    assert "no more fish" in said.out and "1 trained, 1 failed" in said.out
    assert "failed: sd15-w0-pretrained-seed0/fish, see" in said.err
    assert [job.subject for job in train_subjects.grid(args) if not train_subjects.is_finished(job)] == ["fish"]


def test_every_job_has_its_own_gpus(quick, monkeypatch):
    monkeypatch.setattr(train_subjects, "visible_gpus", lambda: ["2", "5"])
    assert train_subjects.places(1, 1) == ["2", "5"]
    assert train_subjects.places(1, 2) == ["2,5"]
    assert train_subjects.places(1, 0.5) == ["2", "5", "2", "5"]
    assert set(train_subjects.places(1, 0)) == {""}
    with pytest.raises(ValueError, match="--gpus_per_job 3: this machine has only"):
        train_subjects.places(1, 3)
    args = train_args(quick, weights=("0",), passed=["--mend"])
    assert train_subjects.main(args) == 0  # by default one each
    assert sorted(log_of(quick, name).split("sees ")[1].strip() for name in args.subjects) == ["2", "5"]
    job = train_subjects.grid(args)[0]
    assert train_subjects.launcher(job, 1) == [sys.executable, *job.command]
    launched = train_subjects.launcher(job, 2)
    assert {"accelerate.commands.launch", "--quiet", "--num_processes=2"} <= set(launched)


def driver(root, *passed, change="pass", more=()):
    """train_subjects.py in a process of its own, with the quick script."""
    flags = train_flags(root, *more, weights=("0",), passed=passed)
    code = f"import pathlib, sys, train_subjects as t; t.ROOT = pathlib.Path({str(root)!r}); {change}\n"
    code += "import signal; signal.signal(signal.SIGTERM, t.end)\n"
    code += f"sys.exit(t.main(t.parse_args({flags!r})))"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": os.environ | {"PYTHONPATH": str(FOLDER)}}
    return subprocess.Popen([sys.executable, "-c", code], text=True, **options)


def wait_for(condition, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def runs(pid: int) -> bool:
    """Whether a process lives; one that ended and was not waited for does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


ON_RAY = ["--ray_address=local"]
WORKER = "t.main = lambda args: t.run_job(t.grid(args)[0], 1, 0)"  # what a worker of a cluster does


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells children of their parent's death on Linux only")
@pytest.mark.parametrize(
    ("number", "change", "more"),
    [
        (signal.SIGKILL, "pass", []),
        pytest.param(signal.SIGTERM, "pass", [], marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "pass", [], marks=pytest.mark.slow),
        (signal.SIGKILL, "pass", ON_RAY),
        (signal.SIGKILL, WORKER, []),  # which cannot tidy up as the driver's Ray does
    ],
    ids=["killed", "terminated", "interrupted", "ray", "worker"],
)
def test_the_trainer_ends_with_its_driver_or_worker(quick, number, change, more):
    process = driver(quick, "--wait", change=change, more=["--subjects", "ball", *more])
    file = quick / "sd15-w0-pretrained-seed0" / "ball" / "pid"
    wait_for(lambda: file.is_file() and file.read_text())
    assert runs(int(file.read_text()))
    os.kill(process.pid, number)
    process.communicate()
    wait_for(lambda: not runs(int(file.read_text())), seconds=120)
    assert log_of(quick, "ball").count("tried") == 1  # and is not started again


def test_a_killed_worker_costs_its_own_job_alone(quick):
    process = driver(quick, "--kill", more=ON_RAY)
    said, error = process.communicate(timeout=200)
    assert process.returncode == 1, error
    assert "1 trained, 1 failed" in said
    assert "failed: sd15-w0-pretrained-seed0/fish" in error and "Traceback" not in error
    assert (quick / "sd15-w0-pretrained-seed0" / "ball" / LORA_FILE).is_file()


def test_a_wrong_ray_address_ends_in_a_sentence(quick):
    with socket.create_server(("127.0.0.1", 0)) as server:  # something listens there, but is no Ray
        address = f"127.0.0.1:{server.getsockname()[1]}"
        change = "import cluster; cluster.PATIENCE = 3"
        process = driver(quick, change=change, more=[f"--ray_address={address}"])
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"--ray_address {address}: no Ray cluster answers there within 3 s" in error


# --- The pictures -------------------------------------------------------------------------------------------------


def test_pictures_have_the_same_seeds_for_every_method(loras, tmp_path, capsys):
    base = drawn(tmp_path, "base", subjects=("ball", "fish"))
    pattern = str(loras / "sd15-w0.5-pretrained-seed0" / "{subject}")
    capsys.readouterr()
    tuned = drawn(tmp_path, "sap", "--loras", pattern, "--tags", "w=0.5", "x=[1]", subjects=("ball", "fish"))
    assert "No LoRA keys" not in capsys.readouterr().err  # of a text encoder, which has none
    assert [one["seed"] for one in base["images"]] == [one["seed"] for one in tuned["images"]]
    assert len({one["seed"] for one in base["images"]}) == 4
    assert base["images"][0]["prompt"] == "a photo of a ball on the grass"
    assert tuned["images"][0]["prompt"] == "a photo of a sks ball on the grass"
    assert (tuned["tags"], tuned["scheduler"]) == ({"w": 0.5, "x": "[1]"}, "DDIMScheduler")
    assert len({one["weights_sha256"] for one in tuned["images"]}) == 2
    assert all((tmp_path / "sap" / one["file"]).is_file() for one in tuned["images"])
    folder = Path(pattern.format(subject="ball"))
    (tmp_path / "ball").mkdir()
    shutil.copy(folder / LORA_FILE, tmp_path / "ball")  # alone: its copy for other programs is not what was drawn
    assert generate.digest(folder) == generate.digest(tmp_path / "ball")


def half(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_a_picture_depends_on_its_seed_alone_and_only_missing_and_cut_ones_are_made(loras, tmp_path):
    more = ["--loras", str(loras / "sd15-w0-pretrained-seed0" / "{subject}"), "--batch_size=2"]
    drawn(tmp_path, "m", *more)
    first, second = (tmp_path / "m" / "ball" / name / "0.png" for name in ("0", "3"))
    before = np.asarray(Image.open(second)).astype(int)
    kept = first.stat().st_mtime_ns
    second.unlink()
    drawn(tmp_path, "m", *more)  # now alone in its batch
    assert first.stat().st_mtime_ns == kept
    assert np.abs(np.asarray(Image.open(second)) - before).max() <= 1  # another batch rounds otherwise
    half(first)
    second.write_bytes(b"")
    drawn(tmp_path, "m", *more)
    assert np.array_equal(np.asarray(Image.open(second)), before)
    assert Image.open(first).convert("RGB").size == (64, 64)
    with pytest.raises(ValueError, match="guidance_scale"):
        drawn(tmp_path, "m", *more, "--guidance_scale=9")
    half(tmp_path / "m" / "manifest.json")
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        drawn(tmp_path, "m", *more)


def test_textual_inversion(tmp_path):
    (tmp_path / "ti").mkdir()
    width = DiffusionPipeline.from_pretrained(BASE).text_encoder.config.hidden_size
    for subject, seed in (("ball", 0), ("fish", 1)):
        vector = torch.randn(1, width, generator=torch.Generator().manual_seed(seed))
        save_file({"<it>": vector}, tmp_path / "ti" / f"{subject}.safetensors")
    more = ["--textual_inversion", str(tmp_path / "ti" / "{subject}.safetensors"), "--token=<it>"]
    told = drawn(tmp_path, "ti-images", *more, subjects=("ball", "fish"))
    assert told["images"][0]["prompt"] == "a photo of a <it> ball on the grass"
    alone = drawn(tmp_path, "fish-alone", *more, subjects=("fish",))
    one = (tmp_path / "ti-images" / alone["images"][0]["file"]).read_bytes()
    assert one == (tmp_path / "fish-alone" / alone["images"][0]["file"]).read_bytes()  # ball's word is gone


def test_whole_pipelines_and_beyond_finetuning_are_methods(tmp_path):
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "ball").symlink_to(BASE, target_is_directory=True)
    pattern = str(tmp_path / "tuned" / "{subject}")
    settings = {"standard": [], "switching": ["--switch_step=0"], "mixed": [], "multistage": ["--switch_step=1"]}
    images = {}
    for sampler, more in settings.items():
        told = drawn(tmp_path, sampler, "--pipelines", pattern, f"--sampler={sampler}", *more, base=None)
        assert told["sampler"]["name"] == sampler
        assert told["images"][0]["prompt"] == "a photo of a sks ball on the grass"
        images[sampler] = [(tmp_path / sampler / one["file"]).read_bytes() for one in told["images"]]
    assert images["switching"] == images["standard"]  # the subject's prompt from the first step on
    assert images["mixed"] != images["standard"]
    assert images["multistage"] != images["mixed"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--loras=x/{subject}", "--pipelines=y/{subject}"], "cannot go with"),
        (["--loras=fixed"], "{subject}"),
        (["--loras=~/nowhere/{subject}"], f"{Path.home()}/nowhere/ball is not there"),
        (["--sampler=mixed"], "--sampler mixed needs"),
        (["--switch_step=3"], "belong to --sampler"),
        (["--tags", "w"], "KEY=VALUE"),
        (["--prompts", "99"], "--prompts must be from 0 to 11"),
        (["--images=0"], "--images must be at least 1"),
        (["--method=../../outside"], '--method "../../outside" is no name for a folder'),
        (["--method==cmd"], '--method "=cmd" would break tables'),
        (["--guidance_scale=nan"], "--guidance_scale must be a number"),
        ([f"--images_dir={FOLDER / 'README.md'}"], "README.md is not a folder"),
    ],
)
def test_mistakes_are_told_in_one_sentence(tmp_path, capsys, flags, says):
    with pytest.raises(SystemExit, match="2"):
        drawn(tmp_path, "x", *flags)
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def not_finite(file):
    save_file({name: tensor * float("nan") for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (half, "is damaged"),
        (not_finite, "holds numbers that are not finite"),
        (lambda file: [one.unlink() for one in file.parent.glob("*.safetensors")], "has no .safetensors file"),
    ],
)
def test_weights_that_cannot_be_used_are_named_before_anything_is_loaded(loras, tmp_path, capsys, spoil, says):
    shutil.copytree(loras / "sd15-w0-pretrained-seed0" / "ball", tmp_path / "ball")
    spoil(tmp_path / "ball" / LORA_FILE)
    with pytest.raises(SystemExit, match="2"):
        drawn(tmp_path / "images", "x", f"--loras={tmp_path}/{{subject}}")
    said = capsys.readouterr().err.splitlines()[-1]
    assert says in said and str(tmp_path / "ball") in said
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize(("base", "says"), [("sd3", "has no layer that fits"), ("sdxl", "does not fit the base")])
def test_another_models_lora_draws_nothing(loras, tmp_path, base, says):
    pattern = str(loras / "sd15-w0-pretrained-seed0" / "{subject}")
    with pytest.raises(ValueError, match=says):
        drawn(tmp_path, "x", f"--loras={pattern}", "--max_sequence_length=77", base=WORLD / base)
    assert list(tmp_path.rglob("*.png")) == []


def test_a_manifest_grows_by_subjects_but_not_by_other_weights(tmp_path):
    write, folder = generate.write_manifest, tmp_path / "m"
    ball, fish = ({"file": f"{name}/0/0.png", "seed": 0} for name in ("ball", "fish"))
    write(folder, {"method": "m", "images": [ball]})
    write(folder, {"method": "m", "images": [fish]})
    assert json.loads((folder / "manifest.json").read_text())["images"] == [ball, fish]
    for other in ({"method": "m", "images": [fish | {"seed": 1}]}, {"method": "n", "images": [fish]}):
        with pytest.raises(ValueError, match="was made with other"):
            write(folder, other)
    assert json.loads((folder / "manifest.json").read_text())["images"] == [ball, fish]


# --- The baselines ------------------------------------------------------------------------------------------------


def neighbour(method, output, *more, backbone="sd15", script=None):
    """Train two or three steps on the ball with a neighbour of the loss."""
    arguments = [f"--pretrained_model_name_or_path={WORLD / backbone}", f"--instance_data_dir={DATA / 'ball'}"]
    arguments += ["--instance_prompt=a photo of sks ball", "--class_prompt=a photo of a ball", *QUICK, "--seed=0"]
    arguments += [f"--output_dir={output}", "--num_class_images=2", "--sampling_steps=2", "--learning_rate=1e-2"]
    reset()
    neighbours.main(neighbours.parse_args([f"--method={method}", f"--backbone={backbone}", *arguments, *more], script))
    return lora(output)


def test_prior_preservation_trains_resumes_and_is_a_method(tmp_path):
    def run(output, *more):
        neighbour("prior", output, "--checkpointing_steps=2", *more)

    run(tmp_path / "ball", "--max_train_steps=3")
    run(tmp_path / "part", "--max_train_steps=2")
    first = (tmp_path / "part" / "class_images" / "0000.png").stat().st_mtime_ns
    run(tmp_path / "part", "--max_train_steps=3", "--resume_from_checkpoint=latest")
    assert (tmp_path / "part" / "class_images" / "0000.png").stat().st_mtime_ns == first
    assert_equal(lora(tmp_path / "ball"), lora(tmp_path / "part"))
    assert any(tensor.abs().max() > 1e-4 for key, tensor in lora(tmp_path / "ball").items() if ".lora_B." in key)
    assert len(drawn(tmp_path, "prior", "--loras", str(tmp_path / "{subject}"))["images"]) == 2


@pytest.mark.parametrize("method", ["prior", "dop", "l2"])
def test_a_neighbour_without_strength_is_dreambooth(tmp_path, method):
    """And with it, it is something else: the added term acts, and the rest is the script's own."""
    script = benchmark.load_script(ROOT / "train_sap_lora_sd15.py")
    none = neighbour(method, tmp_path / "none", "--strength=0", script=script)
    plain = [f"--pretrained_model_name_or_path={BASE}", f"--instance_data_dir={DATA / 'ball'}", *QUICK]
    plain += ["--instance_prompt=a photo of sks ball", "--seed=0", "--learning_rate=1e-2", "--anchor_weight=0"]
    reset()
    script.main(script.parse_args([*plain, f"--output_dir={tmp_path / 'plain'}"]))
    assert_equal(none, lora(tmp_path / "plain"))
    strong = neighbour(method, tmp_path / "strong", "--strength=5", script=script)
    assert any((none[key] != strong[key]).any() for key in none)


class Linear(torch.nn.Module):
    """A student whose prediction is its one parameter (without gradients: .6), plus the conditioning's value."""

    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))
        self.frozen = torch.nn.Parameter(torch.tensor(9.0), requires_grad=False)

    def forward(self, model_input, timesteps, conditioning, prompts):
        value = self.value if torch.is_grad_enabled() else 0.6
        return (value + conditioning["c"]) * torch.ones_like(model_input)


def terms(method, strength, anchor=None):
    """The method's loss and its derivative by the student's value of 0.5: target 1, weights 1 and 3, two samples."""
    script = benchmark.load_script(ROOT / "train_sap_lora_sd15.py")
    functions = argparse.Namespace(**vars(script))
    functions.adapters_disabled = contextlib.nullcontext
    run = argparse.Namespace(args=argparse.Namespace(strength=strength, anchor_weight=0.5, seed=0))
    run.accelerator = argparse.Namespace(process_index=0)
    run.scheduler = argparse.Namespace(config=argparse.Namespace(num_train_timesteps=4))
    step = script.MicroStep(
        index=0,
        pictures=[0, 1],
        prompts=["a", "b"],
        conditioning={"c": torch.zeros(2, 1, 1, 1)},
        anchor_conditioning={"c": torch.full((2, 1, 1, 1), 0.25)},
        mask=1.0,
        model_input=torch.zeros(2, 4, 2, 2),
        timesteps=torch.ones(2),
        target=torch.ones(2, 4, 2, 2),
        sample_weights=torch.tensor([1.0, 3.0])[:, None, None, None],
    )
    student = Linear(0.5)
    anchor = anchor and torch.full((2, 4, 2, 2), anchor)
    loss = neighbours.METHODS[method](functions, step, anchor, student, run)["loss"]
    loss.backward()
    return loss.item(), student.value.grad.item()


def test_the_neighbours_losses_are_those_of_their_papers():
    # L2: mean(weights * .5 ** 2) = .5, and 2 * .5 ** 2; what does not train does not count
    assert terms("l2", 2.0) == pytest.approx((1.0, -2.0 + 2.0))
    # DOP: the student on the class prompt, .75, against the frozen .55: mean(weights * .2 ** 2) = .08
    assert terms("dop", 10.0, anchor=0.55) == pytest.approx((0.5 + 0.8, -2.0 + 8.0))
    # DCO: the errors of the two samples are .25 and .75, the frozen model's (.6 on the subject's prompt) .16 and .48
    x = [1.5 * (0.25 - 0.16), 1.5 * (0.75 - 0.48)]
    expected = sum(math.log1p(math.exp(value)) for value in x) / 2
    slope = sum(1.5 * -weight / (1 + math.exp(-value)) for weight, value in zip((1, 3), x, strict=True)) / 2
    assert terms("dco", 1.5) == pytest.approx((expected, slope), rel=1e-5)


def test_the_changes_of_the_anchor_by_hand():
    # all samples see the class prompt: no photo is a target, .5 * mean(weights * (.75 - .55) ** 2)
    assert terms("share", 1.0, anchor=0.55) == pytest.approx((0.04, 0.4))
    assert terms("share", 0.0, anchor=0.3) == pytest.approx((0.5 + 0.04, -2.0 + 0.4))  # and none: the anchor as it is
    # a quarter of the noise: w is .25 where it rises, .75 where it falls
    assert terms("rising", 1.0, anchor=0.3) == pytest.approx((0.5 + 0.02, -2.0 + 0.2))
    assert terms("falling", 1.0, anchor=0.3) == pytest.approx((0.5 + 0.06, -2.0 + 0.6))


@pytest.mark.parametrize("method", ["prior", "dco", "dop", "share"])
@pytest.mark.parametrize("backbone", ["sdxl", "sd3"])
def test_neighbours_of_the_other_backbones(tmp_path, method, backbone):
    assert neighbour(method, tmp_path / "ball", backbone=backbone)


def test_the_frozen_model_of_dco_is_the_student_without_its_lora(tmp_path):
    """Before the first step both models are one, so the loss is log 2; another prompt would give another one.

    On photos that are held out, the loss is the neighbour's, too.
    """
    neighbour("dco", tmp_path / "ball", f"--validation_data_dir={DATA / 'star'}", "--validation_steps=1")
    rows = [json.loads(row) for row in (tmp_path / "ball" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(losses[-1] - math.log(2)) > 1e-3  # the frozen one did not move along
    assert [row["val/change"] > 0 for row in rows if "val/change" in row] == [True, True]


def test_flags_without_meaning_for_neighbours_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        neighbour("dop", tmp_path / "x", "--train_text_encoder")
    assert "have no meaning here" in capsys.readouterr().err


# --- All of it ----------------------------------------------------------------------------------------------------


def commands(*words, **environment):
    """The command lines that reproduce.sh prints."""
    printed = subprocess.run(
        ["bash", str(FOLDER / "reproduce.sh"), *words],
        env=os.environ | environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return [shlex.split(line) for line in printed.splitlines()]


def here(args, jobs):
    """The jobs in this process."""
    for job in jobs:
        script = benchmark.load_script(Path(job.command[0]))
        reset()
        script.main(script.parse_args(list(job.command[1:])))
        yield train_subjects.finish(job, 0, 1.0)


def test_the_papers_tables_and_figures_in_small(tmp_path, monkeypatch, capsys):
    """What reproduce.sh prints for the tiny world, run: from the LoRAs to the tables, the page and the plots."""
    monkeypatch.setattr(train_subjects, "run_here", here)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name in ("tiny_world", "analysis"):
        (tmp_path / name).symlink_to(WORLD.parent / name)
    modules = {f"{module.__name__}.py": module for module in (train_subjects, generate, evaluate, table, report)}
    for name in ("drift", "tradeoff"):
        modules[f"../analysis/{name}.py"] = benchmark.load_script(WORLD.parent / "analysis" / f"{name}.py")
    done = []
    for item in ("table1", "figure3", "table2", "figure2", "figure6"):
        for command in commands("--tiny", "sd15", item, SUBJECTS="ball", STEPS="2"):
            assert command[0] == "python"
            if command not in done:
                reset()
                modules[command[1]].main(modules[command[1]].parse_args(command[2:]))
                done += [command] if command[1] in ("train_subjects.py", "generate.py") else []
    methods = json.loads(Path("results/scores.json").read_text())["methods"]
    assert set(methods) == {f"sd15-{name}" for name in ("w0", "w0.5", "prior", "beyond", "w0.5-finetuned")}
    assert all(-1 <= methods[m][metric]["mean"] <= 1 for m in methods for metric in ("clip_i", "clip_t", "dino"))
    said = capsys.readouterr()
    assert "| sd15-w0.5 " in said.out
    assert "No LoRA keys" not in said.err
    assert "a photo of a ball on the grass" in Path("report.html").read_text(encoding="utf-8")
    for figure in ("tradeoff/tradeoff.png", "tradeoff/anchors.png", "drift-sd15/drift.png"):
        assert Path(figure).is_file()


@pytest.mark.parametrize("backbone", ["sd15", "sdxl", "sd3"])
def test_the_commands_for_all_of_dreambench_are_taken_by_the_trainers(backbone):
    printed = commands(backbone, "table1", DATA=str(DATA), MODEL=str(WORLD / backbone), SUBJECTS="ball")
    trainings = [command[2:] for command in printed if command[1] == "train_subjects.py"]
    assert len(trainings) == 2
    for words in trainings:
        args = train_subjects.parse_args(words)
        train_subjects.check_scripts_flags(args, train_subjects.grid(args))
    assert ["accelerate", "launch", "evaluate.py"] in [command[:3] for command in printed]


def test_the_readme_has_a_row_for_every_table_and_figure():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for item in ("table1", "table2", *(f"figure{number}" for number in range(2, 9))):
        assert f"`{item}`" in text


def test_the_command_lines_answer(capsys, monkeypatch):
    for name in ("train_subjects", "generate", "neighbours"):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        assert "usage" in capsys.readouterr().out
