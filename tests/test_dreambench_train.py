# SPDX-License-Identifier: Apache-2.0
"""DreamBench's LoRAs and pictures, in small, on the tiny world: Ray's jobs, the manifest, the baselines."""

import argparse
import importlib
import json
import math
import os
import runpy
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
WORLD = ROOT / "examples" / "tiny_world"
DATA, BASE = WORLD / "dataset", WORLD / "sd15"
QUICK = ["--resolution=64", "--train_batch_size=1", "--max_train_steps=2", "--learning_rate=1e-3", "--report_to=none",
         "--skip_final_inference", "--center_crop"]  # fmt: skip
LAUNCHED = """
import pathlib, sys
folder = pathlib.Path(next(a for a in sys.argv if a.startswith("--output_dir=")).split("=")[1])
folder.mkdir(parents=True, exist_ok=True)
print("tried", folder.name, sys.argv[-1])
if folder.name == "fish" and "--mend" not in sys.argv:
    (folder / "checkpoint-1").mkdir(exist_ok=True)
    sys.exit("no more fish")
(folder / "pytorch_lora_weights.safetensors").write_bytes(b"x")
"""


@pytest.fixture(scope="module")
def scripts():
    """The example's modules, which import one another by name."""
    sys.path.insert(0, str(FOLDER))
    names = ["benchmark", "train", "generate", "neighbours", "evaluate", "table", "report"]
    for name in names:
        sys.modules.pop(name, None)  # examples/tiny_world has a train.py too
    yield {name: importlib.import_module(name) for name in names}
    sys.path.remove(str(FOLDER))
    for name in names:
        sys.modules.pop(name, None)


def train_flags(output, *more, weights=("0", "0.5"), subjects=("ball", "fish"), passed=QUICK):
    arguments = ["--backbone=sd15", f"--pretrained_model_name_or_path={BASE}", f"--data_dir={DATA}"]
    return arguments + [f"--output_dir={output}", "--weights", *weights, "--subjects", *subjects, *more, "--", *passed]


def train_args(scripts, *args, **kwargs):
    return scripts["train"].parse_args(train_flags(*args, **kwargs))


def generate(scripts, images, method, *more, subjects=("ball",), base=BASE):
    arguments = [f"--data_dir={DATA}", f"--images_dir={images}", f"--method={method}", "--subjects", *subjects]
    arguments += ["--prompts", "0", "3", "--images=1", "--num_inference_steps=2", "--guidance_scale=3", *more]
    arguments += [f"--pretrained_model_name_or_path={base}"] if base is not None else []
    args = scripts["generate"].parse_args(arguments)
    scripts["generate"].main(args)
    return json.loads((images / method / "manifest.json").read_text())


def test_the_grid_has_every_point_once(scripts, tmp_path):
    args = train_args(scripts, tmp_path, "--anchor_sources", "pretrained", "finetuned", "--seeds", "0", "7")
    jobs = scripts["train"].grid(args)
    runs = {job.run for job in jobs}
    points = ["w0-pretrained", "w0.5-pretrained", "w0.5-finetuned"]  # w = 0 has no anchor, so no source
    assert runs == {f"sd15-{point}-seed{seed}" for point in points for seed in (0, 7)}
    assert len(jobs) == len(set(jobs)) == 2 * len(runs)
    fish = next(job for job in jobs if job.run == "sd15-w0.5-finetuned-seed7" and job.subject == "fish")
    wanted = {"--instance_prompt=a photo of sks fish", "--class_prompt=a photo of a fish", "--seed=7", *QUICK}
    assert wanted | {"--anchor_weight=0.5", "--anchor_source=finetuned"} <= set(fish.command)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--hub_token=hf_secret"], "--hub_token"),
        (["--seed=1"], "--seed is set for each job"),
    ],
)
def test_flags_that_do_not_belong_after_the_dashes(scripts, tmp_path, capsys, flags, says):
    with pytest.raises(SystemExit) as stopped:
        train_args(scripts, tmp_path, passed=flags)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """LoRAs of two subjects and two weights, trained through Ray."""
    output = tmp_path_factory.mktemp("loras")
    subprocess.run([sys.executable, str(FOLDER / "train.py"), *train_flags(output)], check=True)
    return output


def test_jobs_train_and_are_not_done_again(scripts, loras, capsys, monkeypatch):
    files = sorted(loras.glob(f"*/*/{LORA_FILE}"))
    assert len(files) == 4
    record = json.loads((loras / "sd15-w0.5-pretrained-seed0" / "ball" / "job.json").read_text())
    assert record["status"] == "finished"
    assert "--anchor_weight=0.5" in record["command"]
    monkeypatch.setattr(scripts["train"], "start_ray", lambda args: pytest.fail("nothing is left to do"))
    assert scripts["train"].main(train_args(scripts, loras)) == 0
    assert "4 are there, 0 to train" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another command"):
        scripts["train"].main(train_args(scripts, loras, passed=[*QUICK, "--rank=2"]))


def test_a_failed_job_is_tried_twice_and_told_and_the_others_go_on(scripts, tmp_path, capsys, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(LAUNCHED)
    monkeypatch.setattr(scripts["train"], "launcher", lambda job, gpus: [sys.executable, str(script), *job.command])
    for job in scripts["train"].grid(train_args(scripts, tmp_path / "out", weights=("0",))):
        outcome = scripts["train"].run_job(job, 1, 0)
        assert outcome.status == ("failed" if job.subject == "fish" else "finished")
    run = tmp_path / "out" / "sd15-w0-pretrained-seed0"
    assert (run / "fish" / "train.log").read_text().count("tried fish") == 2
    assert (run / "ball" / "train.log").read_text().count("tried ball") == 1
    assert "no more fish" in scripts["train"].run_job(job, 1, 0).log
    left = [job.subject for job in scripts["train"].grid(train_args(scripts, tmp_path / "out", weights=("0",)))
            if not scripts["train"].is_finished(job)]  # fmt: skip
    assert left == ["fish"]


FAKE = """
import os, pathlib, signal, sys, time

def parse_args(arguments):
    if "--rank=0" in arguments:
        print("usage: x\\nx: error: --rank must be at least 1", file=sys.stderr)
        sys.exit(2)

def main():
    folder = pathlib.Path(next(a for a in sys.argv if a.startswith("--output_dir=")).split("=")[1])
    if folder.name == "fish":
        os.kill(os.getppid(), signal.SIGKILL)
    if "--rank=9" in sys.argv:
        (folder / "pid").write_text(str(os.getpid()))
        time.sleep(120)
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"x")

if __name__ == "__main__":
    main()
"""


def driver(root, output, *passed, ray="pass", more=()):
    """train.py in a process of its own, with a script in `root` that is quick and, for "fish", kills its worker."""
    (root / "train_sap_lora_sd15.py").write_text(FAKE)
    flags = train_flags(output, *more, weights=("0",), passed=passed)
    code = f"import pathlib, sys, train; {ray}; train.ROOT = pathlib.Path({str(root)!r}); "
    code += f"sys.exit(train.main(train.parse_args({flags!r})))"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": os.environ | {"PYTHONPATH": str(FOLDER)}}
    return subprocess.Popen([sys.executable, "-c", code], text=True, **options)


def test_a_killed_worker_costs_its_own_job_alone(tmp_path):
    process = driver(tmp_path, tmp_path / "out")
    said, error = process.communicate(timeout=200)
    assert process.returncode == 1, error
    assert "1 trained, 1 failed" in said
    assert "failed: sd15-w0-pretrained-seed0/fish" in error and "Traceback" not in error
    assert (tmp_path / "out" / "sd15-w0-pretrained-seed0" / "ball" / LORA_FILE).is_file()


def wait_for(condition, seconds=60):
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


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells children of their parent's death on Linux only")
@pytest.mark.parametrize("ray", ["pass", "train.main = lambda args: train.run_job(train.grid(args)[0], 1, 0)"])
def test_the_trainer_ends_with_a_killed_driver_or_worker(tmp_path, ray):
    """A worker that is killed, which the second one plays without Ray, cannot tidy up as the driver's Ray does."""
    process = driver(tmp_path, tmp_path / "out", "--rank=9", ray=ray, more=["--subjects", "ball"])
    file = tmp_path / "out" / "sd15-w0-pretrained-seed0" / "ball" / "pid"
    wait_for(lambda: file.is_file() and file.read_text())
    assert runs(int(file.read_text()))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not runs(int(file.read_text())), seconds=30)


def test_flags_that_the_script_refuses_start_no_job(tmp_path):
    process = driver(tmp_path, tmp_path / "out", "--rank=0", ray="train.start_ray = None")
    _, error = process.communicate(timeout=60)
    assert "ValueError: -- FLAGS: --rank must be at least 1" in error
    assert not (tmp_path / "out").exists()


def test_the_real_script_reads_its_flags_before_the_jobs(scripts, tmp_path, monkeypatch):
    monkeypatch.setattr(scripts["train"], "start_ray", lambda args: pytest.fail("a job would have started"))
    with pytest.raises(ValueError, match="FLAGS: argument --rank: must be at least 1"):
        scripts["train"].main(train_args(scripts, tmp_path, passed=[*QUICK, "--rank=0"]))


def test_a_wrong_ray_address_ends_in_a_sentence(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:  # something listens there, but is no Ray
        address = f"127.0.0.1:{server.getsockname()[1]}"
        process = driver(tmp_path, tmp_path / "out", ray="train.RAY_PATIENCE = 3", more=[f"--ray_address={address}"])
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"--ray_address {address}: no Ray cluster answers there within 3 s" in error


def test_an_attempt_goes_on_from_a_checkpoint(scripts, tmp_path):
    job = scripts["train"].grid(train_args(scripts, tmp_path))[0]
    assert "--resume_from_checkpoint=latest" not in scripts["train"].launcher(job, 0)
    (tmp_path / job.run / job.subject / "checkpoint-1").mkdir(parents=True)
    assert "--resume_from_checkpoint=latest" in scripts["train"].launcher(job, 0)


def test_several_gpus_are_several_processes(scripts, tmp_path):
    job = scripts["train"].grid(train_args(scripts, tmp_path))[0]
    assert scripts["train"].launcher(job, 1) == [sys.executable, *job.command]
    launched = scripts["train"].launcher(job, 2)
    assert {"accelerate.commands.launch", "--quiet", "--num_processes=2"} <= set(launched)


def test_pictures_have_the_same_seeds_for_every_method(scripts, loras, tmp_path):
    base = generate(scripts, tmp_path, "base", subjects=("ball", "fish"))
    pattern = str(loras / "sd15-w0.5-pretrained-seed0" / "{subject}")
    tuned = generate(scripts, tmp_path, "sap", "--loras", pattern, "--tags", "w=0.5", subjects=("ball", "fish"))
    assert [one["seed"] for one in base["images"]] == [one["seed"] for one in tuned["images"]]
    assert len({one["seed"] for one in base["images"]}) == 4
    assert base["images"][0]["prompt"] == "a photo of a ball on the grass"
    assert tuned["images"][0]["prompt"] == "a photo of a sks ball on the grass"
    assert (tuned["tags"], tuned["scheduler"]) == ({"w": 0.5}, "DDIMScheduler")
    hashes = {one["subject"]: one["weights_sha256"] for one in tuned["images"]}
    assert len(set(hashes.values())) == 2
    for one in tuned["images"]:
        assert (tmp_path / "sap" / one["file"]).is_file()


def test_a_picture_depends_on_its_seed_alone_and_only_missing_ones_are_made(scripts, loras, tmp_path):
    pattern = str(loras / "sd15-w0-pretrained-seed0" / "{subject}")
    generate(scripts, tmp_path, "m", "--loras", pattern, "--batch_size=2")
    files = {name: tmp_path / "m" / "ball" / name / "0.png" for name in ("0", "3")}
    before = np.asarray(Image.open(files["3"])).astype(int)
    kept = files["0"].stat().st_mtime_ns
    files["3"].unlink()
    generate(scripts, tmp_path, "m", "--loras", pattern, "--batch_size=2")  # now alone in its batch
    assert files["0"].stat().st_mtime_ns == kept
    assert np.abs(np.asarray(Image.open(files["3"])) - before).max() <= 1  # another batch rounds otherwise
    with pytest.raises(ValueError, match="guidance_scale"):
        generate(scripts, tmp_path, "m", "--loras", pattern, "--guidance_scale=9")


def test_textual_inversion(scripts, tmp_path):
    (tmp_path / "ti").mkdir()
    width = DiffusionPipeline.from_pretrained(BASE).text_encoder.config.hidden_size
    for subject, seed in (("ball", 0), ("fish", 1)):
        vector = torch.randn(1, width, generator=torch.Generator().manual_seed(seed))
        save_file({"<it>": vector}, tmp_path / "ti" / f"{subject}.safetensors")
    more = ["--textual_inversion", str(tmp_path / "ti" / "{subject}.safetensors"), "--token=<it>"]
    told = generate(scripts, tmp_path, "ti-images", *more, subjects=("ball", "fish"))
    assert told["images"][0]["prompt"] == "a photo of a <it> ball on the grass"
    alone = generate(scripts, tmp_path, "fish-alone", *more, subjects=("fish",))
    one = (tmp_path / "ti-images" / alone["images"][0]["file"]).read_bytes()
    assert one == (tmp_path / "fish-alone" / alone["images"][0]["file"]).read_bytes()  # ball's word is gone


def test_beyond_finetuning_is_a_method(scripts, tmp_path):
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "ball").symlink_to(BASE, target_is_directory=True)
    pattern = str(tmp_path / "tuned" / "{subject}")
    settings = {"standard": [], "switching": ["--switch_step=0"], "mixed": [], "multistage": ["--switch_step=1"]}
    pictures = {}
    for sampler, more in settings.items():
        told = generate(scripts, tmp_path, sampler, "--pipelines", pattern, f"--sampler={sampler}", *more, base=None)
        assert told["sampler"]["name"] == sampler
        pictures[sampler] = [(tmp_path / sampler / one["file"]).read_bytes() for one in told["images"]]
    assert pictures["switching"] == pictures["standard"]  # the subject's prompt from the first step on
    assert pictures["mixed"] != pictures["standard"]
    assert pictures["multistage"] != pictures["mixed"]


def test_whole_pipelines(scripts, tmp_path):
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "ball").symlink_to(BASE, target_is_directory=True)
    told = generate(scripts, tmp_path, "ft", "--pipelines", str(tmp_path / "tuned" / "{subject}"), base=None)
    assert told["images"][0]["prompt"] == "a photo of a sks ball on the grass"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--loras=x/{subject}", "--pipelines=y/{subject}"], "cannot go with"),
        (["--loras=fixed"], "{subject}"),
        (["--loras=/nowhere/{subject}"], "/nowhere/ball is not there"),
        (["--sampler=mixed"], "--sampler mixed needs"),
        (["--switch_step=3"], "belong to --sampler"),
        (["--tags", "w"], "KEY=VALUE"),
        (["--prompts", "99"], "--prompts must be from 0 to 11"),
        (["--images=0"], "--images must be at least 1"),
        (["--method=../../outside"], '--method "../../outside" is no name for a folder'),
        (["--guidance_scale=nan"], "--guidance_scale must be a number"),
    ],
)
def test_mistakes_are_told_in_one_sentence(scripts, tmp_path, capsys, flags, says):
    with pytest.raises(SystemExit) as stopped:
        generate(scripts, tmp_path, "x", *flags)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def half(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def not_finite(file):
    save_file({name: tensor * float("nan") for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (half, "is damaged"),
        (not_finite, "holds numbers that are not finite"),
        (lambda file: file.unlink(), "has no .safetensors file"),
    ],
)
def test_weights_that_cannot_be_used_are_named_before_anything_is_loaded(
    scripts, loras, tmp_path, capsys, spoil, says
):
    shutil.copytree(loras / "sd15-w0-pretrained-seed0" / "ball", tmp_path / "ball")
    spoil(tmp_path / "ball" / LORA_FILE)
    with pytest.raises(SystemExit) as stopped:
        generate(scripts, tmp_path / "images", "x", f"--loras={tmp_path}/{{subject}}")
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert says in said and str(tmp_path / "ball") in said
    assert not (tmp_path / "images").exists()


def test_another_models_lora_draws_nothing(scripts, tmp_path):
    (tmp_path / "ball").mkdir()
    key = "transformer.to_k.lora"
    save_file(
        {f"{key}.down.weight": torch.ones(2, 4), f"{key}.up.weight": torch.ones(4, 2)},
        tmp_path / "ball" / "pytorch_lora_weights.safetensors",
    )
    with pytest.raises(ValueError, match="has no layer that fits the base"):
        generate(scripts, tmp_path / "images", "x", f"--loras={tmp_path}/{{subject}}")


def test_cut_pictures_are_made_again_and_a_cut_manifest_is_named(scripts, tmp_path):
    generate(scripts, tmp_path, "m")
    files = [tmp_path / "m" / "ball" / name / "0.png" for name in ("0", "3")]
    before = [file.read_bytes() for file in files]
    half(files[0])
    files[1].write_bytes(b"")
    generate(scripts, tmp_path, "m")
    assert [file.read_bytes() for file in files] == before
    half(tmp_path / "m" / "manifest.json")
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        generate(scripts, tmp_path, "m")


def test_a_manifest_grows_by_subjects_but_not_by_other_weights(scripts, tmp_path):
    write, folder = scripts["generate"].write_manifest, tmp_path / "m"
    ball, fish = ({"file": f"{name}/0/0.png", "seed": 0} for name in ("ball", "fish"))
    write(folder, {"method": "m", "images": [ball]})
    write(folder, {"method": "m", "images": [fish]})
    assert json.loads((folder / "manifest.json").read_text())["images"] == [ball, fish]
    for other in ({"method": "m", "images": [fish | {"seed": 1}]}, {"method": "n", "images": [fish]}):
        with pytest.raises(ValueError, match="was made with other"):
            write(folder, other)
    assert json.loads((folder / "manifest.json").read_text())["images"] == [ball, fish]


def neighbour(scripts, method, output, *more, backbone="sd15", script=None):
    """Train two or three steps on the ball with a neighbour of the loss."""
    arguments = [f"--pretrained_model_name_or_path={WORLD / backbone}", f"--instance_data_dir={DATA / 'ball'}"]
    arguments += ["--instance_prompt=a photo of sks ball", "--class_prompt=a photo of a ball", *QUICK, "--seed=0"]
    arguments += [f"--output_dir={output}", "--num_class_images=2", "--sampling_steps=2", "--learning_rate=1e-2"]
    module = scripts["neighbours"]
    reset()
    module.main(module.parse_args([f"--method={method}", f"--backbone={backbone}", *arguments, *more], script))
    return lora(output)


def test_prior_preservation_trains_resumes_and_is_a_method(scripts, tmp_path):
    def run(output, *more):
        neighbour(scripts, "prior", output, "--checkpointing_steps=2", *more)

    run(tmp_path / "ball", "--max_train_steps=3")
    run(tmp_path / "part", "--max_train_steps=2")
    first = (tmp_path / "part" / "class_images" / "0000.png").stat().st_mtime_ns
    run(tmp_path / "part", "--max_train_steps=3", "--resume_from_checkpoint=latest")
    assert (tmp_path / "part" / "class_images" / "0000.png").stat().st_mtime_ns == first
    assert_equal(lora(tmp_path / "ball"), lora(tmp_path / "part"))
    assert any(tensor.abs().max() > 1e-4 for key, tensor in lora(tmp_path / "ball").items() if ".lora_B." in key)
    told = generate(scripts, tmp_path, "prior", "--loras", str(tmp_path / "{subject}"))
    assert len(told["images"]) == 2


@pytest.mark.parametrize("method", ["prior", "dop", "l2"])
def test_a_neighbour_without_strength_is_dreambooth(scripts, tmp_path, method):
    """And with it, it is something else: the added term acts, and the rest is the script's own."""
    script = scripts["benchmark"].load_script(ROOT / "train_sap_lora_sd15.py")
    none = neighbour(scripts, method, tmp_path / "none", "--strength=0", script=script)
    plain = [f"--pretrained_model_name_or_path={BASE}", f"--instance_data_dir={DATA / 'ball'}", *QUICK]
    plain += ["--instance_prompt=a photo of sks ball", "--seed=0", "--learning_rate=1e-2", "--anchor_weight=0"]
    reset()
    script.main(script.parse_args([*plain, f"--output_dir={tmp_path / 'plain'}"]))
    assert_equal(none, lora(tmp_path / "plain"))
    strong = neighbour(scripts, method, tmp_path / "strong", "--strength=5", script=script)
    assert any((none[key] != strong[key]).any() for key in none)


class Linear(torch.nn.Module):
    """A student whose prediction is its one parameter, plus the conditioning's value."""

    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))
        self.frozen = torch.nn.Parameter(torch.tensor(9.0), requires_grad=False)

    def forward(self, model_input, timesteps, conditioning, prompts):
        return self.value + conditioning["c"] * torch.ones_like(model_input)


def terms(scripts, method, strength, anchor):
    """The method's loss and its derivative by the student's value of 0.5: target 1, weights 1 and 3, two samples."""
    script = scripts["benchmark"].load_script(ROOT / "train_sap_lora_sd15.py")
    args = argparse.Namespace(strength=strength, anchor_weight=1.0)
    step = script.MicroStep(
        index=0,
        pictures=[0, 1],
        prompts=["a", "b"],
        conditioning={"c": 0.0},
        anchor_conditioning={"c": 0.25},
        mask=1.0,
        model_input=torch.zeros(2, 4, 2, 2),
        timesteps=torch.zeros(2),
        target=torch.ones(2, 4, 2, 2),
        sample_weights=torch.tensor([1.0, 3.0])[:, None, None, None],
    )
    student = Linear(0.5)
    functions = scripts["neighbours"].METHODS[method](script, args)
    loss, *_ = functions["loss_terms"](step, torch.full((2, 4, 2, 2), anchor), student, args)
    loss.backward()
    return loss.item(), student.value.grad.item()


def test_the_neighbours_losses_are_those_of_their_papers(scripts):
    # L2: mean(weights * .5 ** 2) = .5, and 2 * .5 ** 2; what does not train does not count
    assert terms(scripts, "l2", 2.0, anchor=0.0) == pytest.approx((1.0, -2.0 + 2.0))
    # DOP: the student on the class prompt, .75, against the frozen .55: mean(weights * .2 ** 2) = .08
    assert terms(scripts, "dop", 10.0, anchor=0.55) == pytest.approx((0.5 + 0.8, -2.0 + 8.0))
    # DCO: the errors of the two samples are .25 and .75, the frozen model's .16 and .48
    x = [1.5 * (0.25 - 0.16), 1.5 * (0.75 - 0.48)]
    expected = sum(math.log1p(math.exp(value)) for value in x) / 2
    slope = sum(1.5 * -weight / (1 + math.exp(-value)) for weight, value in zip((1, 3), x, strict=True)) / 2
    assert terms(scripts, "dco", 1.5, anchor=0.6) == pytest.approx((expected, slope), rel=1e-5)


@pytest.mark.parametrize("method", ["prior", "dco", "dop", "l2"])
@pytest.mark.parametrize("backbone", ["sdxl", "sd3"])
def test_neighbours_of_the_other_backbones(scripts, tmp_path, method, backbone):
    assert neighbour(scripts, method, tmp_path / "ball", backbone=backbone)


def test_the_frozen_model_of_dco_reads_the_subjects_prompt(scripts, tmp_path):
    """Before the first step both models are one, so the loss is log 2; another prompt would give another one."""
    script = scripts["benchmark"].load_script(ROOT / "train_sap_lora_sd15.py")
    neighbour(scripts, "dco", tmp_path / "ball", script=script)
    first = json.loads((tmp_path / "ball" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_flags_without_meaning_for_neighbours_are_refused(scripts, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        neighbour(scripts, "dop", tmp_path / "x", "--train_text_encoder")
    assert stopped.value.code == 2 and "have no meaning here" in capsys.readouterr().err


def test_neighbours_are_jobs_of_the_grid(scripts, tmp_path):
    args = train_args(scripts, tmp_path, "--method=dco", "--seeds", "0", "1")
    jobs = scripts["train"].grid(args)
    assert [job.run for job in jobs] == ["sd15-dco-seed0"] * 2 + ["sd15-dco-seed1"] * 2
    scripts["train"].check_scripts_flags(jobs)
    assert {"--method=dco", "--backbone=sd15", "--class_prompt=a photo of a ball"} <= set(jobs[0].command)


@pytest.mark.parametrize("backbone", ["sd15", "sdxl", "sd3"])
def test_the_preset_is_read_by_the_script_and_later_flags_win(scripts, tmp_path, backbone):
    flags = ["--preset=nearest", f"--backbone={backbone}"]
    job, *_ = scripts["train"].grid(train_args(scripts, tmp_path, *flags, passed=["--max_train_steps=7"]))
    script = scripts["benchmark"].load_script(Path(job.command[0]))
    read = script.parse_args(list(job.command[1:]))
    rates = {"sd15": (1e-4, 16, 1), "sdxl": (5e-4, 4, 4), "sd3": (4e-4, 4, 4)}
    assert (read.learning_rate, read.rank, read.gradient_accumulation_steps) == rates[backbone]
    assert read.max_train_steps == 7


def test_the_whole_way_from_the_loras_to_the_page(scripts, loras, tmp_path):
    """Two subjects, one seed, few steps: what RESULTS.md does at length."""
    images, results = tmp_path / "images", tmp_path / "results"
    both = {"subjects": ("ball", "fish")}
    generate(scripts, images, "base", "--tags", "backbone=sd15", **both)
    for w in ("0", "0.5"):
        tags = ["--tags", "backbone=sd15", f"w={w}", "anchor=pretrained", "seed=0"]
        pattern = str(loras / f"sd15-w{w}-pretrained-seed0" / "{subject}")
        generate(scripts, images, f"w{w}", "--loras", pattern, *tags, **both)
    where = [f"--images_dir={images}", f"--data_dir={DATA}"]
    models = [f"--clip_model={WORLD / 'clip'}", f"--dino_model={WORLD / 'vit'}", f"--output_dir={results}"]
    scripts["evaluate"].main(scripts["evaluate"].parse_args([*where, *models]))
    methods = json.loads((results / "scores.json").read_text())["methods"]
    assert set(methods) == {"base", "w0", "w0.5"}
    assert all(-1 <= methods[m][metric]["mean"] <= 1 for m in methods for metric in ("clip_i", "clip_t", "dino"))
    scores = str(results / "scores.json")
    scripts["table"].main(scripts["table"].parse_args([scores, f"--output={results / 'table.md'}"]))
    assert all(f"| {method} " in (results / "table.md").read_text() for method in methods)
    scripts["report"].main(scripts["report"].parse_args([scores, *where, f"--output={tmp_path / 'report.html'}"]))
    assert "a photo of a ball on the grass" in (tmp_path / "report.html").read_text(encoding="utf-8")
    command = [sys.executable, str(ROOT / "examples" / "analysis" / "tradeoff.py"), f"--scores={scores}"]
    subprocess.run([*command, f"--output_dir={tmp_path}", "--bootstrap_samples=100"], check=True)
    assert (tmp_path / "tradeoff.png").is_file()


def test_the_command_lines_answer(scripts, capsys, monkeypatch):
    for name in ("train", "generate", "neighbours"):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        assert "usage" in capsys.readouterr().out
