# SPDX-License-Identifier: Apache-2.0
"""DreamBench's LoRAs and pictures, in small, on the tiny world: Ray's jobs, the manifest, the baselines."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from runner import LORA_FILE, ROOT, assert_equal, lora
from safetensors.torch import save_file

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
    names = ["benchmark", "train", "generate", "prior_preservation", "evaluate", "table", "report"]
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


def test_an_attempt_goes_on_from_a_checkpoint(scripts, tmp_path):
    job = scripts["train"].grid(train_args(scripts, tmp_path))[0]
    assert "--resume_from_checkpoint=latest" not in scripts["train"].launcher(job, 0)
    (tmp_path / job.run / job.subject / "checkpoint-1").mkdir(parents=True)
    assert "--resume_from_checkpoint=latest" in scripts["train"].launcher(job, 0)


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
    ],
)
def test_mistakes_are_told_in_one_sentence(scripts, tmp_path, capsys, flags, says):
    with pytest.raises(SystemExit) as stopped:
        generate(scripts, tmp_path, "x", *flags)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_prior_preservation_trains_resumes_and_is_a_method(scripts, tmp_path):
    def run(output, *more):
        arguments = [f"--pretrained_model_name_or_path={BASE}", f"--instance_data_dir={DATA / 'ball'}", *more]
        arguments += ["--instance_prompt=a photo of sks ball", "--class_prompt=a photo of a ball", "--resolution=64"]
        arguments += [f"--output_dir={output}", "--num_class_images=2", "--sampling_steps=2", "--learning_rate=1e-2"]
        module = scripts["prior_preservation"]
        module.main(module.parse_args([*arguments, "--checkpointing_steps=2"]))

    run(tmp_path / "ball", "--max_train_steps=3")
    run(tmp_path / "part", "--max_train_steps=2")
    first = (tmp_path / "part" / "class_images" / "0.png").stat().st_mtime_ns
    run(tmp_path / "part", "--max_train_steps=3", "--resume_from_checkpoint=latest")
    assert (tmp_path / "part" / "class_images" / "0.png").stat().st_mtime_ns == first
    assert_equal(lora(tmp_path / "ball"), lora(tmp_path / "part"))
    assert any(tensor.abs().max() > 1e-4 for key, tensor in lora(tmp_path / "ball").items() if ".up." in key)
    told = generate(scripts, tmp_path, "prior", "--loras", str(tmp_path / "{subject}"))
    assert len(told["images"]) == 2


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


def test_the_command_lines_answer():
    for name in ("train", "generate", "prior_preservation"):
        command = [sys.executable, str(FOLDER / f"{name}.py"), "--help"]
        assert "usage" in subprocess.run(command, check=True, capture_output=True, text=True).stdout
