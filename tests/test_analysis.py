# SPDX-License-Identifier: Apache-2.0
"""The analysis scripts: drift of a run's checkpoints, and the trade-off figures."""

import csv
import functools
import itertools
import json
import os
import shutil
import sys

import numpy as np
import pytest
import runner
import tiny_pipelines
import torch
from conftest import ROOT
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

FOLDERS = [str(ROOT / "examples" / name) for name in ("analysis", "dreambench")]
sys.path[:0] = FOLDERS
import drift  # noqa: E402
import evaluate  # noqa: E402
import tradeoff  # noqa: E402

sys.path[:] = [path for path in sys.path if path not in FOLDERS]

SUBJECT, CLASS = "a photo of sks dog", "a photo of a dog"
SCRIPTS = {"sd15": "train_sap_lora_sd15", "sdxl": "train_sap_lora_sdxl", "sd3": "train_sap_lora_sd3"}


@pytest.fixture(scope="module")
def train(tmp_path_factory, photos):
    """backbone -> a base model, and a run with LoRAs of steps 1 and 2 and its last one, by our own trainer."""
    return functools.cache(lambda backbone: train_run(backbone, tmp_path_factory.mktemp(backbone), photos))


@pytest.fixture
def sd15_run(train):
    return train("sd15")


def train_run(backbone, folder, photos):
    base = getattr(tiny_pipelines, f"save_{backbone}")(folder / "base")
    more = ["--checkpointing_steps=1", "--skip_final_inference"]
    more += ["--output_kohya_format"] if backbone != "sd3" else []  # where kohya's tools read the diffusers keys
    runner.train(SCRIPTS[backbone], runner.flags(base, photos, folder / "run", *more))
    return base, folder / "run"


def measure(base, photos, output, *more, fast=("--num_timesteps=2", "--num_noises=1")):
    """Run drift.py; the rows of its table, as numbers where they are."""
    drift.main(drift.parse_args(command(base, photos, output, *fast, *more)))
    assert (output / "drift.png").stat().st_size > 10_000
    return read(output / "drift.csv")


def command(base, photos, output, *more):
    return [
        f"--pretrained_model_name_or_path={base}", f"--instance_data_dir={photos}", f"--instance_prompt={SUBJECT}",
        f"--class_prompt={CLASS}", "--resolution=64", f"--output_dir={output}", "--device=cpu", *more,
    ]  # fmt: skip


def read(file):
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    texts = ("label", "run", "file", "backbone", "kind", "anchor", "point", "minus")
    return [{k: value if k in texts or not value else float(value) for k, value in row.items()} for row in rows]


def by_hand(base, photos, lora=None):
    """(a) and (b) of one picture at two timesteps, written out anew: L2 and MSE."""
    pipeline = DiffusionPipeline.from_pretrained(base)
    picture = Image.open(sorted(photos.iterdir())[0]).convert("RGB")
    left = (picture.width - picture.height) // 2
    pixels = np.asarray(picture.crop((left, 0, left + picture.height, picture.height))) / 127.5 - 1
    pixels = torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]
    vae = pipeline.vae
    latents = (vae.encode(pixels).latent_dist.mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    noisy, times, target = diffused(pipeline, latents, noise, (250, 750))
    anchor = predicted(pipeline, noisy, times, CLASS)
    if lora:
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    student = predicted(pipeline, noisy, times, SUBJECT)
    numbers = {}
    for name, other in {"reconstruction": target, "same": anchor}.items():
        square = (student - other).square()
        numbers |= {f"{name}_l2": square.sum((1, 2, 3)).sqrt().mean().item(), f"{name}_mse": square.mean().item()}
    return numbers


def diffused(pipeline, latents, noise, indices):
    if hasattr(pipeline, "transformer"):  # a flow with SD3's shift of 3
        sigmas = torch.tensor([1 - index / 1000 for index in indices])
        sigmas = 3 * sigmas / (1 + 2 * sigmas)
        shaped = sigmas[:, None, None, None]
        return (1 - shaped) * latents + shaped * noise, 1000 * sigmas, (noise - latents).expand(2, -1, -1, -1)
    times = torch.tensor(indices)
    alphas = DDPMScheduler.from_config(pipeline.scheduler.config).alphas_cumprod[times][:, None, None, None]
    target = noise.expand(2, -1, -1, -1)
    if pipeline.scheduler.config.prediction_type == "v_prediction":
        target = alphas.sqrt() * noise - (1 - alphas).sqrt() * latents
    return alphas.sqrt() * latents + (1 - alphas).sqrt() * noise, times, target


@torch.no_grad()
def predicted(pipeline, noisy, times, prompt):
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    prompts = [prompt] * len(noisy)
    if hasattr(pipeline, "transformer"):
        found = pipeline.encode_prompt(prompts, None, None, max_sequence_length=77, **options)
        return pipeline.transformer(noisy, found[0], found[2], times, return_dict=False)[0]
    found, added = pipeline.encode_prompt(prompts, **options), None
    if len(found) == 4:
        added = {"text_embeds": found[2], "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * len(noisy))}
    return pipeline.unet(noisy, times, found[0], added_cond_kwargs=added, return_dict=False)[0]


def one_photo(photos, folder):
    folder.mkdir()
    shutil.copy(sorted(photos.iterdir())[0], folder)
    return folder


def assert_close(row, expected):
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("backbone", [*SCRIPTS, "v prediction"])
def test_drift_is_what_the_definition_says(backbone, train, sd21, photos, tmp_path):
    base, run = train("sd15" if backbone == "v prediction" else backbone)
    base = sd21 if backbone == "v prediction" else base
    photo = one_photo(photos, tmp_path / "photo")
    rows = measure(base, photo, tmp_path / "out", f"--run=w = 0={run}", "--anchor_weight=0.25")
    assert [(row["label"], row["step"]) for row in rows] == [("w = 0", 0), ("w = 0", 1), ("w = 0", 2)]
    assert_close(rows[0], by_hand(base, photo))
    assert_close(rows[2], by_hand(base, photo, run / "checkpoint-2" / drift.LORA_FILE))
    assert rows[2]["same_l2"] != pytest.approx(rows[0]["same_l2"], rel=0.01)
    for row in rows:
        assert row["objective"] == pytest.approx(row["reconstruction_mse"] + 0.25 * row["same_mse"])


@pytest.mark.parametrize("backbone", ["sd15", "sd3"])
def test_other_trainers_files(backbone, train, photos, tmp_path):
    """kohya's keys and names give the numbers of our own file; test_clients.py reads SDXL's, which count layers."""
    base, run = train(backbone)
    (tmp_path / "kohya").mkdir()
    file = run / (drift.LORA_FILE if backbone == "sd3" else "pytorch_lora_weights_kohya.safetensors")
    shutil.copy(file, tmp_path / "kohya" / "dog-step00000002.safetensors")
    shutil.copy(run / drift.LORA_FILE, tmp_path / "kohya" / "dog.safetensors")  # without a step: left out
    rows = measure(base, photos, tmp_path / "out", f"--run=ours={run}", f"--run=kohya={tmp_path / 'kohya'}")
    ours, kohya = ([row for row in rows if row["label"] == label] for label in ("ours", "kohya"))
    assert [row["step"] for row in kohya] == [0, 2]
    assert_close(kohya[1], {name: ours[2][name] for name in ("reconstruction_l2", "same_l2", "objective")})


def test_the_same_prompt_without_lora_has_no_drift(sd15_run, photos, tmp_path):
    base, run = sd15_run
    rows = measure(base, photos, tmp_path / "out", f"--run=a={run}", f"--instance_prompt={CLASS}")
    assert rows[0]["same_l2"] == 0 < rows[1]["same_l2"]


def test_the_anchor_at_class_latents(sd15_run, photos, tmp_path):
    """Pictures of the subject in place of class pictures: both choices of z_t agree. Others: they differ."""
    base, run = sd15_run
    at_class = [f"--run=a={run}", "--anchor_latents=class", f"--class_data_dir={photos}"]
    for row in measure(base, photos, tmp_path / "same", *at_class):
        assert row["class_l2"] == pytest.approx(row["same_l2"])
    others = tiny_pipelines.save_photos(tmp_path / "others", count=7)
    (others / "00.jpg").unlink()
    rows = measure(base, photos, tmp_path / "others_out", *at_class[:2], f"--class_data_dir={others}")
    assert rows[0]["class_l2"] > 2 * rows[0]["same_l2"]


def test_class_pictures_by_the_base_model(sd15_run, photos, tmp_path):
    base, run = sd15_run
    more = [f"--run=a={run}", "--anchor_latents=class", "--num_class_images=2", "--num_inference_steps=2"]
    first = measure(base, photos, tmp_path / "out", *more)
    pictures = sorted((tmp_path / "out" / "class_images").iterdir())
    assert [picture.name for picture in pictures] == ["0.png", "1.png"]
    times = [picture.stat().st_mtime_ns for picture in pictures]
    (tmp_path / "out" / "measured.json").unlink()
    assert measure(base, photos, tmp_path / "out", *more) == first
    assert [picture.stat().st_mtime_ns for picture in pictures] == times


def test_measured_files_are_not_measured_again(sd15_run, photos, tmp_path, monkeypatch):
    base, run = sd15_run
    growing = tmp_path / "growing"
    shutil.copytree(run / "checkpoint-1", growing / "checkpoint-1")
    first = measure(base, photos, tmp_path / "out", f"--run=a={growing}")
    shutil.copytree(run / "checkpoint-2", growing / "checkpoint-2")
    loaded = []
    original = drift.StableDiffusionPipeline.load_lora_weights

    def load(self, folder, **options):
        loaded.append(folder.name)
        return original(self, folder, **options)

    monkeypatch.setattr(drift.StableDiffusionPipeline, "load_lora_weights", load)
    second = measure(base, photos, tmp_path / "out", f"--run=a={growing}")
    assert loaded == ["checkpoint-2"]
    assert second[:2] == first
    monkeypatch.setattr(drift, "load_pipeline", None)
    assert measure(base, photos, tmp_path / "out", f"--run=a={growing}") == second
    with pytest.raises(drift.UsageError, match="another num_timesteps"):
        measure(base, photos, tmp_path / "out", f"--run=a={growing}", "--num_timesteps=3")


def test_another_bases_lora_is_a_sentence(sd15_run, photos, tmp_path):
    """Its layers have the names of this base's and other shapes."""
    base, run = sd15_run
    tensors = load_file(run / "checkpoint-1" / drift.LORA_FILE)
    wide = {name: torch.ones(tensor.shape[0], tensor.shape[1] + 8) for name, tensor in tensors.items()}
    save_file(wide, tmp_path / "x-1.safetensors")
    with pytest.raises(drift.UsageError, match="does not fit the base model"):
        measure(base, photos, tmp_path / "out", f"--run=a={tmp_path}")


def test_seeds_of_a_label_share_a_line(sd15_run, photos, tmp_path):
    """The line's mean over the steps that all runs have; the last LoRA counts where its step is given."""
    base, run = sd15_run
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(run / drift.LORA_FILE, other)
    rows = measure(base, photos, tmp_path / "out", f"--run=a={run}", f"--run=a={other}", "--final_step=2")
    steps, values = drift.curves(rows, "a", "same_l2")
    assert steps.tolist() == [0, 2]
    assert values.shape == (2, 2)
    assert values[0] == pytest.approx(values[1])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--run=nothing"], "give LABEL=FOLDER"),
        (["--run=a=missing"], "where the folder exists"),
        (["--run=a={photos}"], "no checkpoint-STEP folder"),
        (["--run=a={run}", "--num_timesteps=0"], "at least 1"),
        (["--run=a={run}", "--class_data_dir={photos}"], "with --anchor_latents class only"),
        (["--run=a={run}", "--pretrained_model_name_or_path={photos}"], "cannot be loaded"),
        (["--run=a={broken}"], "cannot be read"),
        (["--run=a={full}"], "has no LoRA layers"),
        (["--run=a={last}"], "give the step of its pytorch_lora_weights.safetensors with --final_step"),
        (["--run=a={nan}"], "holds numbers that are not finite, in lora"),
        (["--run=a={run}", "--instance_data_dir={pipes}"], "has no pictures"),  # and is not waited for
        (["--run=a={run}", "--output_dir={nan}/x-1.safetensors"], "is not a folder"),
        (["--run=a=~/nothing"], "where the folder exists"),
    ],
)
def test_bad_input_gets_one_sentence(sd15_run, photos, tmp_path, capsys, more, message):
    folders = {name: tmp_path / name for name in ("broken", "full", "last", "nan", "pipes")}
    for folder in folders.values():
        folder.mkdir()
    os.mkfifo(tmp_path / "pipes" / "0.png")
    save_file({"lora": torch.tensor(float("nan"))}, tmp_path / "nan" / "x-1.safetensors")
    shutil.copy(sd15_run[1] / drift.LORA_FILE, tmp_path / "last")
    (tmp_path / "broken" / "x-1.safetensors").write_bytes(b"no tensors")
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "full" / "x-1.safetensors")
    more = [text.format(photos=photos, run=sd15_run[1], **folders) for text in more]
    with pytest.raises(SystemExit, match="2"):
        drift.parse_args(command(sd15_run[0], photos, tmp_path / "out", *more))
    assert message in capsys.readouterr().err


def method(value, **tags):
    """A method's entry in scores.json: three subjects that differ, all metrics moved by `value`."""
    subjects = {"ball": 0.6, "fish": 0.7, "tree": 0.9}
    scores = {name: {"clip_t": v + value, "clip_i": v - value, "dino": v - 2 * value} for name, v in subjects.items()}
    return {"tags": tags, "subjects": scores}


def write_scores(folder, methods, metrics=None):
    file = folder / f"scores{len(list(folder.glob('*.json')))}.json"
    file.write_text(json.dumps({"metrics": metrics or {"clip_model": "clip"}, "methods": methods}))
    return file


@pytest.fixture
def scores(tmp_path):
    methods = {}
    for seed in (0, 1):
        noise = 0.01 * seed
        for w in (1, 0, 0.5):
            anchor = "finetuned" if w == 0 else "pretrained"  # without weight there is no anchor
            methods[f"w{w}-{seed}"] = method(0.1 * w + noise, backbone="sd15", w=w, anchor=anchor, seed=seed)
        methods[f"tuned-{seed}"] = method(0.02 + noise, backbone="sd15", w=0.5, anchor="finetuned", seed=seed)
        methods[f"prior-seed{seed}"] = method(0.03 + noise, backbone="sd15", seed=seed)
    methods["base"] = method(0.2, backbone="sd15", label="base model")
    methods["sd3"] = method(0.3, backbone="sd3", w=0.5)
    return write_scores(tmp_path, methods)


def plot(output, *files, more=()):
    arguments = ["--scores", *map(str, files), f"--output_dir={output}", "--bootstrap_samples=500", *more]
    tradeoff.main(tradeoff.parse_args(arguments))
    return read(output / "tradeoff.csv")


def test_trade_off_points(scores, tmp_path):
    rows = plot(tmp_path / "out", scores)
    assert [(row["backbone"], row["kind"], row["label"], row["seeds"]) for row in rows] == [
        ("sd15", "curve", "w = 0", 2),
        ("sd15", "curve", "w = 0.5", 2),
        ("sd15", "curve", "w = 1", 2),
        ("sd15", "anchor", "finetuned anchor, w = 0.5", 2),
        ("sd15", "reference", "base model", 1),
        ("sd15", "reference", "prior", 2),
        ("sd3", "curve", "w = 0.5", 1),
    ]
    mean = (0.6 + 0.7 + 0.9) / 3
    assert rows[1]["clip_t"] == pytest.approx(mean + 0.055, abs=1e-5)
    assert rows[1]["dino"] == pytest.approx(mean - 0.11, abs=1e-5)
    for row in rows:
        for metric in tradeoff.METRICS:
            assert row[f"{metric}_low"] < row[metric] < row[f"{metric}_high"]
    for name in ("tradeoff.png", "anchors.png"):
        assert Image.open(tmp_path / "out" / name).size[0] > 400


def test_differences_are_paired(scores, tmp_path):
    """Subjects differ far more than weights do, and yet the difference is exact: it is the same for each subject."""
    plot(tmp_path / "out", scores)
    rows = {(row["backbone"], row["point"], row["minus"]): row for row in read(tmp_path / "out" / "differences.csv")}
    row = rows["sd15", "w = 1", "w = 0"]
    assert (row["clip_t"], row["clip_i"], row["dino"]) == pytest.approx((0.1, -0.1, -0.2), abs=1e-5)
    assert row["clip_t_low"] == row["clip_t_high"] == pytest.approx(0.1, abs=1e-5)
    assert row["paired_seeds"] == 2
    assert (row["subjects"], row["clip_t_better"], row["dino_better"]) == (3, 3, 0)
    row = rows["sd15", "w = 0.5", "finetuned anchor, w = 0.5"]
    assert row["clip_t"] == pytest.approx(0.03, abs=1e-5)
    row = rows["sd15", "base model", "w = 0"]
    assert (row["clip_t"], row["paired_seeds"]) == (pytest.approx(0.195, abs=1e-5), 0)
    assert not any(key[0] == "sd3" for key in rows)


def test_interval_of_a_mean():
    """One seed and many subjects: close to mean +- 1.96 standard errors. Seeds count too. One cell has no width."""
    table = np.random.default_rng(0).normal(3, 1, (1, 200))
    mean, low, high = tradeoff.interval(table, 4000, 0)
    error = table.std() / np.sqrt(table.size)
    assert mean == pytest.approx(table.mean())
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.2 * error)
    seeds = np.vstack([table, table + 1])
    assert tradeoff.interval(seeds, 4000, 0)[2] == pytest.approx(mean + 1, abs=0.2)
    assert tradeoff.interval(np.array([[0.3]]), 10, 0) == pytest.approx((0.3, 0.3, 0.3))
    assert tradeoff.interval(np.array([[1.0, np.nan], [np.nan, 3.0]]), 200, 0)[0] == 2


def test_scores_of_evaluate_are_read_and_a_baseline_from_a_folder_stands_beside_the_curve(tmp_path):
    """As examples/dreambench documents it: pictures of others with a manifest of one line."""
    world = ROOT / "examples" / "tiny_world"
    readme = (ROOT / "examples" / "dreambench" / "README.md").read_text()
    tags = {name: f'{{"tags": {{"backbone": "sd15", "w": {w}}}}}' for name, w in (("w0", 0), ("sap", 0.5))}
    (tags["SuDe"],) = [
        line.split("'")[1] for line in readme.splitlines() if line.strip().endswith("> images/SuDe/manifest.json")
    ]
    for number, (name, manifest) in enumerate(tags.items()):
        pictures = tmp_path / "images" / name / "ball" / "0"
        pictures.mkdir(parents=True)
        shutil.copy(world / "dataset" / "ball" / f"0{number}.png", pictures / "0.png")
        (pictures.parents[1] / "manifest.json").write_text(manifest)
    paths = [f"--images_dir={tmp_path / 'images'}", f"--data_dir={world / 'dataset'}", f"--output_dir={tmp_path}"]
    runner.reset()
    evaluate.main(evaluate.parse_args([*paths, f"--clip_model={world / 'clip'}", f"--dino_model={world / 'vit'}"]))
    scored = json.loads((tmp_path / "scores.json").read_text())["methods"]
    rows = plot(tmp_path / "out", tmp_path / "scores.json")
    assert [(row["backbone"], row["kind"], row["label"]) for row in rows] == [
        ("sd15", "curve", "w = 0"),
        ("sd15", "curve", "w = 0.5"),
        ("sd15", "reference", "SuDe"),
    ]
    for row, name in zip(rows, ("w0", "sap", "SuDe"), strict=True):
        assert row["clip_i"] == pytest.approx(scored[name]["clip_i"]["mean"], abs=1e-5)


def test_tick_labels_do_not_overlap():
    """Scores that differ little have long labels."""
    place = [{"w": w, "clip_t": 0.69 + 1e-4 * w, "dino": 0.5 - 1e-4 * w} for w in (0, 1, 2)]
    rows = [{"kind": "curve", "label": f"w = {one['w']}", "subjects": 1, **one} for one in place]
    figure, axis = tradeoff.plt.subplots(figsize=(5.5, 4.1))
    tradeoff.draw_panel(axis, rows, "dino")
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in axis.get_xticklabels()]
    assert all(one.x1 < other.x0 for one, other in itertools.pairwise(boxes))
    tradeoff.plt.close(figure)


def test_no_figure_6_without_both_anchors(tmp_path, capsys):
    file = write_scores(tmp_path, {"a": method(0.1, w=0.5), "b": method(0.0, w=0)})
    plot(tmp_path / "out", file)
    assert not (tmp_path / "out" / "anchors.png").exists()
    assert "no Figure 6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"a": method(0)}, None, "no method has a weight"),
        ({"a": method(0, w=0.5), "b": method(0.1, w=0.5)}, None, "b has the same tags"),
        ({"a": method(0, w=0.5)}, {"a": method(0, w=0)}, "a is in two files"),
        ({"a": {"tags": {"w": 1}}}, None, "has no scores of subjects"),
        ({"a": method(0, w=0.5)}, "other", "scored by other models"),
        ({"a": method(float("nan"), w=0.5)}, None, "has a score that is not finite"),
        (None, None, "is no scores.json"),
    ],
)
def test_scores_that_cannot_be_used(tmp_path, capsys, first, second, message):
    files = [write_scores(tmp_path, first) if first else tmp_path / "missing.json"]
    if second == "other":
        files.append(write_scores(tmp_path, {"b": method(0, w=0)}, {"clip_model": "another"}))
    elif second:
        files.append(write_scores(tmp_path, second))
    with pytest.raises(SystemExit, match="2"):
        tradeoff.parse_args(["--scores", *map(str, files), f"--output_dir={tmp_path / 'out'}"])
    assert message in capsys.readouterr().err
