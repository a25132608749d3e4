# SPDX-License-Identifier: Apache-2.0
"""Scores of generated images, the table of methods with its ranks, and the report page."""

import base64
import csv
import io
import itertools
import json
import os
import runpy
import shutil
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, CLIPModel, CLIPProcessor, ViTConfig, ViTModel

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "dreambench"
WORLD = ROOT / "examples" / "tiny_world"
DATA = WORLD / "dataset"

sys.path.insert(0, str(FOLDER))
import benchmark  # noqa: E402
import evaluate  # noqa: E402
import generate  # noqa: E402
import report  # noqa: E402
import table  # noqa: E402

sys.path.remove(str(FOLDER))

TWO_LISTS = """Classes

subject_name,class
mug,mug
bear_toy,stuffed animal
rex,dog

Prompts

Object Prompts

prompt_list = [
'a {0} {1} on a shelf'.format(unique_token, class_token),
'a {0} {1} beside a lamp'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} asleep'.format(unique_token, class_token),
]
"""


# --- The benchmark's files ----------------------------------------------------------------------------------------


def written(folder: Path, text: str) -> benchmark.Benchmark:
    (folder / "prompts_and_classes.txt").write_text(text)
    return benchmark.read_benchmark(folder)


def test_cats_and_dogs_have_the_live_prompts_and_the_token_is_dropped(tmp_path):
    read = written(tmp_path, TWO_LISTS)
    assert read.classes == {"mug": "mug", "bear_toy": "stuffed animal", "rex": "dog"}
    assert read.prompts("bear_toy") == ["a stuffed animal on a shelf", "a stuffed animal beside a lamp"]
    assert read.prompts("rex") == ["a dog asleep"]
    assert read.prompts("mug", "sks")[0] == "a sks mug on a shelf"


@pytest.mark.parametrize("heading", ["Object Prompts", "Live Subject Prompts", "Prompts"])
def test_one_list_is_for_all(tmp_path, heading):
    before = TWO_LISTS.split("Object Prompts")[0]
    read = written(tmp_path, f"{before}{heading}\nprompt_list = [\n'a {{0}} {{1}} at sea'\n]\n")
    assert read.prompts("rex") == ["a dog at sea"] and read.prompts("mug") == ["a mug at sea"]


def test_nothing_in_the_file_is_executed(tmp_path):
    code = f"[\n'a {{0}} {{1}}'.format(open({str(tmp_path / 'made')!r}, 'w'), 2)\n]"
    read = written(tmp_path, TWO_LISTS.split("Object Prompts")[0] + "prompt_list = " + code + "\n")
    assert not (tmp_path / "made").exists() and read.prompts("mug")[0] == "a mug"


def test_only_subjects_with_references_are_listed(tmp_path):
    read = written(tmp_path, TWO_LISTS)
    assert read.subjects() == []
    (tmp_path / "rex").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "rex" / "1.jpg")
    (tmp_path / "rex" / ".2.jpg").write_text("hidden")
    assert read.subjects() == ["rex"] and [file.name for file in read.references("rex")] == ["1.jpg"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no table of classes"),
        (TWO_LISTS.split("Prompts")[0], "no prompts"),
        (TWO_LISTS.replace("shelf'", "shelf"), "not a Python list"),
        (TWO_LISTS.replace("shelf'", "shelf {2}'"), "no other braces"),
        (TWO_LISTS.replace("shelf'", "shelf {foo}'"), "no other braces"),
        (TWO_LISTS.replace("shelf'", "shelf {'"), "no other braces"),
        (TWO_LISTS.replace("mug,mug", "../mug,mug"), "no name for a folder"),
    ],
)
def test_a_text_file_that_cannot_be_understood(tmp_path, text, says):
    with pytest.raises(ValueError, match=says):
        written(tmp_path, text)


# --- Scores -------------------------------------------------------------------------------------------------------


def command(images: Path, results: Path, *more: str, data: Path = DATA) -> list[str]:
    models = [f"--clip_model={WORLD / 'clip'}", f"--dino_model={WORLD / 'vit'}", "--num_workers=1", *more]
    return [f"--data_dir={data}", f"--images_dir={images}", f"--output_dir={results}", *models]


def score(*arguments, **options) -> dict:
    """Run evaluate.py in this process; its scores.json."""
    args = evaluate.parse_args(command(*arguments, **options))
    evaluate.main(args)
    return json.loads((args.output_dir / "scores.json").read_text())


@pytest.fixture
def images(tmp_path) -> Path:
    """Two methods on two subjects and two prompts: "copies" of the references, and "noise"."""
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    for subject in ("ball", "fish"):
        for index in (0, 3):
            for method in ("copies", "noise"):
                (folder / method / subject / str(index)).mkdir(parents=True)
            shutil.copy(DATA / subject / "00.png", folder / "copies" / subject / str(index) / "0.png")
            pixels = Image.fromarray(rng.integers(0, 256, (80, 64, 3), dtype=np.uint8))
            pixels.save(folder / "noise" / subject / str(index) / "0.jpg")
    return folder


def read_rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


@torch.no_grad()
def expected(file: Path, subject: str, prompt: str) -> list[float]:
    """CLIP-I, CLIP-T and DINO of one image, every pair by itself."""
    clip, processor = CLIPModel.from_pretrained(WORLD / "clip"), CLIPProcessor.from_pretrained(WORLD / "clip")
    references = [Image.open(path).convert("RGB") for path in sorted((DATA / subject).glob("*.png"))]
    pictures = [Image.open(file).convert("RGB"), *references]
    output = clip(**processor(text=[prompt], images=pictures, return_tensors="pt"))
    vit, vit_processor = ViTModel.from_pretrained(WORLD / "vit"), AutoImageProcessor.from_pretrained(WORLD / "vit")
    features = vit(**vit_processor(images=pictures, return_tensors="pt")).last_hidden_state[:, 0]
    identity = [F.cosine_similarity(features[0], other, dim=0).item() for other in features[1:]]
    likeness = [F.cosine_similarity(output.image_embeds[0], other, dim=0).item() for other in output.image_embeds[1:]]
    text = F.cosine_similarity(output.image_embeds[0], output.text_embeds[0], dim=0).item()
    return [np.mean(likeness), text, np.mean(identity)]


def test_scores_are_mean_cosines_over_pairs(images, tmp_path):
    scores = score(images, tmp_path / "results", "--batch_size=3")
    rows = read_rows(tmp_path / "results" / "images.csv")
    assert len(rows) == 8
    for row in (rows[1], rows[-1]):
        prompt = f"a photo of a {row['subject']} in the night sky"
        assert row["prompt_index"] == "3" and row["prompt"] == prompt
        values = [float(row[metric]) for metric in evaluate.METRICS]
        assert values == pytest.approx(expected(images / row["file"], row["subject"], prompt), abs=2e-5)
    for method, entry in scores["methods"].items():
        for metric in evaluate.METRICS:
            own = {
                s: [float(r[metric]) for r in rows if (r["method"], r["subject"]) == (method, s)]
                for s in entry["subjects"]
            }
            means = {subject: np.mean(values) for subject, values in own.items()}
            assert {s: v[metric] for s, v in entry["subjects"].items()} == pytest.approx(means, abs=1e-6)
            assert entry[metric]["mean"] == pytest.approx(np.mean(list(means.values())), abs=2e-6)
            assert entry[metric]["low"] <= entry[metric]["mean"] <= entry[metric]["high"]
    copies, noise = scores["methods"]["copies"], scores["methods"]["noise"]
    assert copies["dino"]["mean"] > noise["dino"]["mean"] + 0.2
    assert copies["clip_i"]["mean"] > noise["clip_i"]["mean"] + 0.2
    assert scores["metrics"]["clip_model"] == str(WORLD / "clip")


def test_tables_repeat_the_json_and_tags_come_from_the_manifest(images, tmp_path):
    tags = {"backbone": "sd3", "w": 0.5, "seed": 1}
    (images / "noise" / "manifest.json").write_text(json.dumps({"method": "noise", "tags": tags, "images": []}))
    scores = score(images, tmp_path / "results")
    assert scores["methods"]["noise"]["tags"] == tags and scores["methods"]["copies"]["tags"] == {}
    for row in read_rows(tmp_path / "results" / "scores.csv"):
        entry = scores["methods"][row["method"]]
        assert (row["images"], row["subjects"]) == ("4", "2")
        assert [float(row["dino"]), float(row["dino_high"])] == [entry["dino"]["mean"], entry["dino"]["high"]]
    for row in read_rows(tmp_path / "results" / "subjects.csv"):
        assert float(row["clip_t"]) == scores["methods"][row["method"]]["subjects"][row["subject"]]["clip_t"]
    assert table.read_methods([tmp_path / "results" / "scores.csv"])[0].means == {
        metric: scores["methods"]["copies"][metric]["mean"] for metric in evaluate.METRICS
    }


def test_what_is_scored_is_not_scored_again(images, tmp_path, monkeypatch):
    first, scored = score(images, tmp_path / "results"), []
    original = evaluate.score_batch

    def spy(clip, dino, batch, *rest):
        scored.extend(picture.file for picture in batch)
        return original(clip, dino, batch, *rest)

    monkeypatch.setattr(evaluate, "score_batch", spy)
    assert score(images, tmp_path / "results") == first and scored == []
    os.utime(images / "noise" / "fish" / "3" / "0.jpg", ns=(1, 1))
    assert score(images, tmp_path / "results") == first and scored == ["noise/fish/3/0.jpg"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text((DATA / "prompts_and_classes.txt").read_text().replace("'a photo of", "'one photo of"))
    score(images, tmp_path / "results", "--methods", "copies", f"--prompts_file={prompts}")
    assert len(scored) == 5 and all(file.startswith("copies") for file in scored[1:])
    rows = read_rows(tmp_path / "results" / "images.csv")
    assert [row["prompt"].split()[0] for row in rows] == ["one"] * 4 + ["a"] * 4  # "noise" was not asked for


def test_an_interrupted_run_goes_on(images, tmp_path, monkeypatch):
    undisturbed = score(images, tmp_path / "undisturbed")
    original, calls = evaluate.score_batch, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "score_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            score(images, tmp_path / "results", "--batch_size=2")
    part = tmp_path / "results" / "images.part0.csv"
    part.write_text(part.read_text()[:-9])  # the fourth line was half written
    seen = []
    monkeypatch.setattr(evaluate, "score_batch", lambda *rest: seen.extend(rest[2]) or original(*rest))
    assert score(images, tmp_path / "results") == undisturbed
    assert len(seen) == 5 and not part.exists()


def test_two_processes_score_as_one(images, tmp_path):
    alone = score(images, tmp_path / "alone")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    arguments = [*launcher, str(FOLDER / "evaluate.py"), *command(images, tmp_path / "two")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("8 images, 8 to score") == 1
    assert json.loads((tmp_path / "two" / "scores.json").read_text()) == alone
    assert read_rows(tmp_path / "two" / "images.csv") == read_rows(tmp_path / "alone" / "images.csv")


def test_methods_with_other_images_are_pointed_out(images, tmp_path, capsys):
    score(images, tmp_path / "results")
    assert "note:" not in capsys.readouterr().out
    shutil.rmtree(images / "noise" / "fish")
    score(images, tmp_path / "results")
    said = capsys.readouterr().out
    assert "4 images of 2 subjects: copies; 2 images of 1 subjects: noise" in said and "no width" in said


# --- The class after training -------------------------------------------------------------------------------------


def with_class_images(images: Path, method: str, subject: str, index: int, photos: list[str]) -> None:
    """Copies of references as the method's images of a class prompt."""
    folder = images / method / subject / "class" / str(index)
    folder.mkdir(parents=True)
    for number, photo in enumerate(photos):
        shutil.copy(DATA / photo, folder / f"{number}.png")


@torch.no_grad()
def dino_features(files: list[Path]) -> torch.Tensor:
    """Unit CLS features (files, 128) of the world's ViT."""
    vit, processor = ViTModel.from_pretrained(WORLD / "vit"), AutoImageProcessor.from_pretrained(WORLD / "vit")
    pixels = processor(images=[Image.open(file).convert("RGB") for file in files], return_tensors="pt")
    return F.normalize(vit(**pixels).last_hidden_state[:, 0], dim=-1)


def test_what_was_kept_of_the_class_is_scored_by_itself(images, tmp_path, capsys):
    """PRES and DIV by hand: "copies" draws the fish where the class is asked for, and its own ball."""
    before = score(images, tmp_path / "before")["methods"]["copies"]
    for index in (0, 3):
        with_class_images(images, "copies", "ball", index, ["fish/00.png", "star/00.png", "ball/01.png"])
        with_class_images(images, "copies", "fish", index, ["fish/01.png"])
    capsys.readouterr()
    entry = score(images, tmp_path / "results", "--batch_size=2")["methods"]["copies"]
    assert "note:" not in capsys.readouterr().out
    for metric in evaluate.METRICS:  # the images of the class prompts are none of the subject's
        assert entry[metric] == before[metric]
    assert entry["images"] == before["images"] == 4
    drawn = dino_features([DATA / name for name in ("fish/00.png", "star/00.png", "ball/01.png")])
    photos = dino_features(sorted((DATA / "ball").glob("*.png")))
    assert entry["subjects"]["ball"]["pres"] == pytest.approx((drawn @ photos.T).mean().item(), abs=2e-6)
    distances = [1 - (drawn[a] @ drawn[b]).item() for a, b in ((0, 1), (0, 2), (1, 2))]
    assert entry["subjects"]["ball"]["div"] == pytest.approx(np.mean(distances), abs=2e-6)
    assert "div" not in entry["subjects"]["fish"] and "div" not in entry  # one image differs from nothing
    assert entry["pres"]["mean"] == pytest.approx(np.mean([s["pres"] for s in entry["subjects"].values()]), abs=2e-6)


def test_a_class_image_made_anew_is_compared_with_all_of_its_prompt(images, tmp_path):
    with_class_images(images, "noise", "ball", 0, ["fish/00.png", "star/00.png"])
    first = score(images, tmp_path / "results")["methods"]["noise"]["subjects"]["ball"]["div"]
    file = images / "noise" / "ball" / "class" / "0" / "1.png"
    shutil.copy(DATA / "fish" / "00.png", file)
    os.utime(file, ns=(1, 1))
    same = score(images, tmp_path / "results")["methods"]["noise"]["subjects"]["ball"]["div"]
    assert first > 0.1 and same == pytest.approx(0, abs=1e-6)


def test_class_images_of_a_part_of_the_subjects_give_no_score(images, tmp_path, capsys):
    with_class_images(images, "noise", "ball", 0, ["fish/00.png", "star/00.png"])
    assert "pres" not in score(images, tmp_path / "results")["methods"]["noise"]
    assert "noise has no PRES and no DIV, since 1 of its 2 subjects" in capsys.readouterr().out
    shutil.rmtree(images / "noise" / "ball" / "0")
    shutil.rmtree(images / "noise" / "ball" / "3")
    with pytest.raises(SystemExit):
        evaluate.parse_args(command(images, tmp_path / "results"))
    assert "images of class prompts alone" in capsys.readouterr().err


def test_class_prompts_are_drawn_from_the_same_noise(tmp_path, monkeypatch):
    """The picture of the class prompt is what the base model, which has no other prompt, draws from that seed."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    shutil.copytree(WORLD / "sd3", tmp_path / "ball")
    options = [f"--data_dir={DATA}", f"--images_dir={tmp_path / 'images'}", "--images=1", "--subjects=ball"]
    options += ["--prompts=3", "--num_inference_steps=2", "--resolution=64", "--max_sequence_length=77"]
    own = ["--method=own", f"--pipelines={tmp_path}/{{subject}}", *options]
    generate.main(generate.parse_args(own))
    first = (tmp_path / "images" / "own" / "ball" / "3" / "0.png").read_bytes()
    assert not (tmp_path / "images" / "own" / "ball" / "class").exists()
    generate.main(generate.parse_args([*own, "--class_prompts"]))  # goes on from what is there
    base = ["--method=base", f"--pretrained_model_name_or_path={WORLD / 'sd3'}", *options]
    generate.main(generate.parse_args(base))
    drawn = (tmp_path / "images" / "own" / "ball" / "class" / "3" / "0.png").read_bytes()
    assert drawn == (tmp_path / "images" / "base" / "ball" / "3" / "0.png").read_bytes()
    assert drawn != first == (tmp_path / "images" / "own" / "ball" / "3" / "0.png").read_bytes()
    told = json.loads((tmp_path / "images" / "own" / "manifest.json").read_text())["images"]
    assert [(one["file"], one["prompt"]) for one in told] == [
        ("ball/3/0.png", "a photo of a sks ball in the night sky"),
        ("ball/class/3/0.png", "a photo of a ball in the night sky"),
    ]


def test_intervals_are_those_of_a_mean_over_subjects():
    values = np.random.default_rng(1).normal([0.0, 5.0], [1.0, 2.0], (400, 2))
    low, high = evaluate.bootstrap(values, 4000, seed=0)
    assert np.allclose(high - low, 2 * 1.96 * values.std(0) / 20, rtol=0.08)
    assert np.allclose((high + low) / 2, values.mean(0), atol=0.03)
    again = evaluate.bootstrap(values, 4000, seed=0)
    assert np.array_equal(low, again[0]) and not np.array_equal(low, evaluate.bootstrap(values, 4000, seed=1)[0])


def test_imagenet_preparation_keeps_the_aspect_and_crops_the_centre():
    wide = np.zeros((100, 300, 3), dtype=np.uint8)
    wide[:, 100:200] = 255  # the middle third, which is 256 wide when the short side is
    pixels = evaluate.imagenet_pixels(Image.fromarray(wide))
    assert pixels.shape == (3, 224, 224) and pixels.dtype == torch.float32
    white = (1 - torch.tensor(evaluate.IMAGENET_MEAN)) / torch.tensor(evaluate.IMAGENET_STD)
    torch.testing.assert_close(pixels, white[:, None, None].expand(3, 224, 224))
    rows = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 256, 1).repeat(3, 2)
    red = evaluate.imagenet_pixels(Image.fromarray(rows))[0] * evaluate.IMAGENET_STD[0] + evaluate.IMAGENET_MEAN[0]
    torch.testing.assert_close(red[:, 0] * 255, torch.arange(16.0, 240.0))


# What stands beside DINO's published weights, in the form of that time.
PUBLISHED = {"feature_extractor_type": "ViTFeatureExtractor", "do_normalize": True, "do_resize": True, "size": 224}
PUBLISHED |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 2}


@pytest.mark.parametrize(
    ("size", "processor", "chosen"),
    [(224, {}, "imagenet"), (224, {"image_mean": [0.5, 0.5, 0.5]}, "model"), (64, {"size": 64}, "model")],
)
def test_preprocessing_follows_the_model(tmp_path, images, size, processor, chosen):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTModel(ViTConfig(image_size=size, patch_size=32, **shape)).eval()
    model.save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(PUBLISHED | processor))
    args = evaluate.parse_args(command(images, tmp_path / "results", f"--dino_model={tmp_path / 'vit'}"))
    assert args.dino_preprocessing == chosen
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    features = evaluate.Dino(args.dino_model, args.dino_preprocessing, torch.device("cpu")).images([picture])
    pixels = AutoImageProcessor.from_pretrained(args.dino_model)(images=picture, return_tensors="pt").pixel_values
    if chosen == "imagenet":
        pixels = evaluate.imagenet_pixels(picture)[None]
    with torch.no_grad():
        expected_features = F.normalize(model(pixels).last_hidden_state[:, 0], dim=-1)
    torch.testing.assert_close(features, expected_features)


def empty(images: Path) -> None:
    for folder in images.iterdir():
        shutil.rmtree(folder)


def stranger(images: Path) -> None:
    (images / "noise" / "fish").rename(images / "noise" / "whale")


def out_of_range(images: Path) -> None:
    (images / "noise" / "fish" / "3").rename(images / "noise" / "fish" / "12")


def no_index(images: Path) -> None:
    (images / "noise" / "fish" / "3").rename(images / "noise" / "fish" / "beach")


def no_image(images: Path) -> None:
    (images / "noise" / "fish" / "3" / "0.jpg").write_text("nothing")


def bomb(images: Path) -> None:
    """A picture of a few bytes that would fill the memory."""
    size = struct.pack(">II", 100_000, 100_000) + bytes([8, 2, 0, 0, 0])
    header = struct.pack(">I", 13) + b"IHDR" + size + struct.pack(">I", zlib.crc32(b"IHDR" + size))
    (images / "noise" / "fish" / "3" / "0.jpg").write_bytes(b"\x89PNG\r\n\x1a\n" + header)


def manifest(text: str):
    return lambda images: (images / "noise" / "manifest.json").write_text(text)


@pytest.mark.parametrize(
    ("spoil", "more", "says"),
    [
        (empty, [], "no images in"),
        (bomb, [], "0.jpg is not an image"),
        (manifest('{"tags": {"w": 0.5'), [], "manifest.json is damaged"),
        (manifest('{"tags": {"w": NaN}}'), [], "manifest.json is damaged"),
        (manifest('["tags"]'), [], "manifest.json is damaged"),
        (stranger, [], "no subject of this name"),
        (out_of_range, [], "fish has prompts 0 to 11"),
        (no_index, [], "not a prompt's index"),
        (no_image, [], "0.jpg is not an image"),
        (None, ["--methods", "nobody"], "no images in"),
        (None, ["--prompts_file=nowhere.txt"], "nowhere.txt is not there"),
        (None, ["--clip_model=/nowhere"], "--clip_model /nowhere cannot be read"),
        (None, [f"--clip_model={WORLD / 'vit'}"], "must be a CLIP model"),
        (None, ["--batch_size=0"], "--batch_size must be at least 1"),
    ],
)
def test_bad_input_gets_one_sentence(images, tmp_path, capsys, spoil, more, says):
    if spoil:
        spoil(images)
    with pytest.raises(SystemExit) as exit_:
        evaluate.parse_args(command(images, tmp_path / "results", *more))
    assert exit_.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "results").exists()


def test_a_subject_without_references(images, tmp_path, capsys):
    (tmp_path / "data" / "ball").mkdir(parents=True)
    shutil.copy(DATA / "prompts_and_classes.txt", tmp_path / "data")
    with pytest.raises(SystemExit):
        evaluate.parse_args(command(images, tmp_path / "results", data=tmp_path / "data"))
    assert "no references to compare with" in capsys.readouterr().err


def test_an_odd_table_of_an_earlier_run_is_named_before_models_are_loaded(images, tmp_path, monkeypatch):
    score(images, tmp_path / "results")
    file = tmp_path / "results" / "images.csv"
    text = file.read_text()
    file.write_bytes(b"\xff" + text.encode())
    monkeypatch.setattr(evaluate, "Clip", None)
    with pytest.raises(ValueError, match="images.csv is damaged"):
        score(images, tmp_path / "results")
    row = read_rows_of(text)[0]
    file.write_text(text.replace(row["dino"], "nan"))
    assert row["file"] not in evaluate.known_rows(evaluate.parse_args(command(images, tmp_path / "results")))


def read_rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_a_model_that_gives_no_numbers_is_named(images, tmp_path):
    shutil.copytree(WORLD / "vit", tmp_path / "vit")
    weights = tmp_path / "vit" / "model.safetensors"
    save_file({name: tensor * float("nan") for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(ValueError, match="--dino_model gives no number for copies/ball/0/0.png"):
        score(images, tmp_path / "results", f"--dino_model={tmp_path / 'vit'}")
    assert not (tmp_path / "results" / "scores.json").exists()


def test_a_damaged_image_ends_the_run_with_its_name(images, tmp_path, monkeypatch, capsys):
    file = images / "noise" / "fish" / "3" / "0.jpg"
    file.write_bytes(file.read_bytes()[:1500])
    arguments = command(images, tmp_path / "results", "--batch_size=1")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    monkeypatch.syspath_prepend(FOLDER)
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(FOLDER / "evaluate.py"), run_name="__main__")
    assert exit_.value.code == 2 and f"{file} is damaged" in capsys.readouterr().err
    file.unlink()
    assert len(evaluate.known_rows(evaluate.parse_args(arguments))) == 7  # those before it are kept


# --- The table ----------------------------------------------------------------------------------------------------

# The paper's printed numbers: method, CLIP-I, CLIP-T, DINO, rank.
TABLE_1 = """Ours .7821 .3059 .6031 1 | DreamBooth (FT) .7751 .3035 .5870 4 | DreamBooth .7302 .3191 .4839 6
SuDe .7791 .3044 .5931 3 | SVDiff .7455 .3162 .5144 5 | Textual Inversion .7579 .2633 .5287 8
Custom Diffusion .6479 .3154 .5568 7 | IP-Adapter .8311 .2646 .6290 2 | BLIP-Diffusion .7016 .2949 .4544 9"""
TABLE_2 = {
    "SD1.5": "DreamBooth .7302 .3191 .4839 2 | Beyond-Finetuning .7293 .3212 .4786 3 | Ours .7821 .3059 .6031 1",
    "SDXL": "DreamBooth .7939 .3107 .6586 2 | Beyond-Finetuning .7874 .3140 .6429 3 | Ours .8005 .3154 .6661 1",
    "SD3": "DreamBooth .7465 .3182 .5130 2 | Beyond-Finetuning .7461 .3211 .4997 3 | Ours .7579 .3187 .5679 1",
}


def printed(text: str, group: str = "") -> tuple[list[str], list[str]]:
    """Lines of the CSV that table.py reads, and the ranks that the paper prints."""
    rows = [row.strip().rsplit(" ", 4) for row in text.replace("\n", "|").split("|")]
    return [",".join([group, *row[:4]]) for row in rows], [row[4] for row in rows]


def write_table(file: Path, lines: list[str]) -> Path:
    file.write_text("\n".join(["group,method,clip_i,clip_t,dino", *lines]) + "\n")
    return file


def test_the_papers_first_table_comes_out(tmp_path):
    lines, ranks = printed(TABLE_1)
    assert table.rank_labels(table.read_methods([write_table(tmp_path / "1.csv", lines)])) == ranks


def test_the_papers_second_table_comes_out_but_for_a_tie(tmp_path):
    tables = {backbone: printed(text, backbone) for backbone, text in TABLE_2.items()}
    file = write_table(tmp_path / "2.csv", [line for lines, _ in tables.values() for line in lines])
    labels = {name: table.rank_labels(rows) for name, rows in table.groups(table.read_methods([file])).items()}
    assert labels["SD1.5"] == tables["SD1.5"][1]
    assert labels["SDXL"] == tables["SDXL"][1]
    assert tables["SD3"][1] == ["2", "3", "1"] and labels["SD3"] == ["2=", "2=", "1"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8))
def test_places_are_those_of_a_race(values):
    assert table.places(values).tolist() == [sorted(values).index(value) + 1 for value in values]


def method(name: str, *means: float, **tags) -> table.Method:
    return table.Method(name, dict(zip(table.METRICS, means, strict=True)), tags=tags)


def test_what_looks_equal_shares_a_place():
    rows = [method("a", 0.5, 0.31234, 0.6), method("b", 0.5, 0.31232, 0.6), method("c", 0.4, 0.2, 0.1)]
    assert table.rank_labels(rows) == ["1=", "1=", "3"]


def test_markdown_and_latex_have_the_same_cells():
    rows = [method("50%_a|b", 0.5, 0.3, -0.06), method("c", 0.4, 0.35, 0.1)]
    lines = table.markdown(rows, intervals=False).splitlines()
    assert lines[2] == r"| 50%_a\|b | **.5000** | .3000 | -.0600 | 1.67 | 2 |"
    assert lines[3] == "| c | .4000 | **.3500** | **.1000** | 1.33 | 1 |"
    assert r"50\%\_a|b & \textbf{.5000} & .3000 & -.0600 & 1.67 & 2 \\" in table.latex(rows, intervals=False)


def test_the_class_columns_stand_beside_the_ranks_and_do_not_change_them(tmp_path, capsys):
    """The method with the worst PRES keeps its first rank; the lowest PRES and the highest DIV are bold."""
    file = tmp_path / "a.csv"
    lines = ["method,clip_i,clip_t,dino,pres,div", "x,.9,.9,.9,.8,.1", "y,.5,.5,.5,.2,.4", "z,.6,.6,.6,,"]
    file.write_text("\n".join(lines) + "\n")
    table.main(table.parse_args([str(file)]))
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "| method | CLIP-I | CLIP-T | DINO | PRES | DIV | average rank | rank |"
    assert shown[2] == "| x | **.9000** | **.9000** | **.9000** | .8000 | .1000 | 1.00 | 1 |"
    assert shown[3] == "| y | .5000 | .5000 | .5000 | **.2000** | **.4000** | 3.00 | 3 |"
    assert shown[4] == "| z | .6000 | .6000 | .6000 |  |  | 2.00 | 2 |"
    table.main(table.parse_args([str(file), "--format=latex"]))
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == r"\begin{tabular}{lrrrrrrr}" and len({line.count("&") for line in shown if "&" in line}) == 1


def test_a_lower_pres_is_a_win(tmp_path):
    rows = [method("a", 0.5, 0.5, 0.5), method("b", 0.4, 0.4, 0.4)]
    for row, pres in zip(rows, (0.2, 0.6), strict=True):
        row.means["pres"] = pres
        row.subjects["s"] = dict(row.means)
    assert table.compare(rows, "b")[0].better["pres"] == "(better on 1 of 1)"


def test_seeds_are_merged_into_a_mean_with_its_spread():
    rows = [method(f"sd15-w0.5-seed{s}", 0.5 + s / 10, 0.3, 0.6, backbone="sd15", w=0.5, seed=s) for s in (0, 1, 2)]
    rows += [method("sd15-w0-seed0", 0.9, 0.2, 0.7, backbone="sd15", w=0, seed=0), method("base", 0.1, 0.4, 0.2)]
    merged = table.merge_seeds(rows)
    assert [row.name for row in merged] == ["sd15-w0.5 (3 seeds)", "sd15-w0-seed0", "base"]
    assert merged[0].means["clip_i"] == pytest.approx(0.6) and merged[0].spreads["clip_i"] == "± .1000"
    assert "**.6000** ± .1000" not in table.markdown(merged, True) and ".6000 ± .1000" in table.markdown(merged, True)


def test_scores_and_printed_numbers_stand_side_by_side(images, tmp_path, capsys):
    for name, method_folder in itertools.product(("moon", "star", "tree"), images.iterdir()):
        shutil.copytree(method_folder / "ball", method_folder / name)  # five subjects have intervals
    score(images, tmp_path / "results")
    others = write_table(tmp_path / "printed.csv", [",others,.5,.3,.6"])
    files = [str(tmp_path / "results" / "scores.json"), str(others)]
    table.main(table.parse_args([*files, "--intervals", f"--output={tmp_path / 'out' / 'table.md'}"]))
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["method", "---", "copies", "noise", "others"]
    assert lines[2].count("[") == 3 and lines[4].count("[") == 0
    capsys.readouterr()
    table.main(table.parse_args([*files, "--methods", "others", "noise", "--format=latex"]))
    printed_rows = [line.split(" & ")[0] for line in capsys.readouterr().out.splitlines() if " & " in line]
    assert printed_rows == ["Method", "others", "noise"]


def write_scores(file: Path, methods: dict[str, dict[str, float]], **tags) -> Path:
    """scores.json of methods given as {method: {subject: score}}; one score is all three metrics."""
    entries = {}
    for name, subjects in methods.items():
        mean = float(np.mean(list(subjects.values())))
        entry = {metric: {"mean": mean, "low": mean - 0.1, "high": mean + 0.1} for metric in evaluate.METRICS}
        of_subjects = {subject: dict.fromkeys(evaluate.METRICS, value) for subject, value in subjects.items()}
        entries[name] = entry | {"tags": tags, "images": len(subjects), "subjects": of_subjects}
    file.write_text(json.dumps({"methods": entries}))
    return file


EASY = {"a": 0.9, "b": 0.9}
HARD = {"c": 0.1, "d": 0.1, "e": 0.1, "f": 0.1}


def test_a_method_with_fewer_subjects_does_not_win_by_them(tmp_path, capsys):
    """The one that has the easy subjects alone has the highest mean, and yet is worse on each of them."""
    methods = {"whole": EASY | HARD, "part": {name: value - 0.1 for name, value in EASY.items()}}
    file = write_scores(tmp_path / "scores.json", methods)
    table.main(table.parse_args([str(file), "--intervals"]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| method | n |")
    assert lines[2] == "| whole | 2 | **.9000** | **.9000** | **.9000** | 1.00 | 1 |"
    assert lines[3] == "| part | 2 † | .8000 | .8000 | .8000 | 2.00 | 2 |"
    assert lines[5] == "† Means and ranks are over the subjects that all have, a, b: part has 2 of 6."
    table.main(table.parse_args([str(file), "--format=latex"]))
    said = capsys.readouterr().out
    assert r"part & 2 $\dagger$ & .8000" in said and "part has 2 of 6" in said


def test_methods_without_a_common_subject_are_not_ranked(tmp_path, capsys):
    file = write_scores(tmp_path / "scores.json", {"one": EASY, "other": HARD})
    with pytest.raises(SystemExit):
        table.parse_args([str(file)])
    assert "no subject has scores of all of one, other" in capsys.readouterr().err


def test_intervals_begin_with_five_subjects(tmp_path, capsys):
    file = write_scores(tmp_path / "scores.json", {"four": HARD})
    table.main(table.parse_args([str(file), "--intervals"]))
    assert "[" not in capsys.readouterr().out
    six = {"six": EASY | HARD, "seven": EASY | HARD | {"g": 0.2}}  # the interval of "seven" is that of its six
    table.main(table.parse_args([str(write_scores(file, six)), "--intervals"]))
    line = capsys.readouterr().out.splitlines()[3].split(" | ")
    scores = np.array([[value] * 3 for value in (EASY | HARD).values()])
    low, high = table.bootstrap(scores, 10_000, seed=0)
    assert line[2] == f"**.3667** [{table.digits(low[0])}, {table.digits(high[0])}]"


def test_wins_against_a_method_are_counted_by_subject(tmp_path, capsys):
    methods = {"start": EASY | HARD, "better": {name: value + 0.1 for name, value in HARD.items()} | EASY}
    file = write_scores(tmp_path / "scores.json", methods)
    table.main(table.parse_args([str(file), "--against=start"]))
    lines = capsys.readouterr().out.splitlines()
    assert "better on" not in lines[2] and lines[3].count("(better on 4 of 6)") == 3
    with pytest.raises(SystemExit):
        table.parse_args([str(file), "--against=nobody"])
    assert "--against: there is no row nobody" in capsys.readouterr().err


def test_seeds_share_a_row_over_common_subjects(tmp_path):
    files = [write_scores(tmp_path / f"{s}.json", {f"m-seed{s}": EASY | HARD if s else EASY}, seed=s) for s in (0, 1)]
    (row,) = table.parse_args([*map(str, files), "--merge_seeds"]).rows
    assert row.name == "m (2 seeds)" and row.means["dino"] == pytest.approx(0.9)
    assert set(row.subjects) == set(EASY)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "method,clip_i\nx,1\n", "needs the columns"),
        ("a.csv", "method,clip_i,clip_t,dino\nx,1,-,2\n", "needs the columns"),
        ("a.csv", "method,clip_i,clip_t,dino\nx,1,1,2\nx,1,1,2\n", "x comes twice"),
        ("a.csv", "method,clip_i,clip_t,dino\nx,1,nan,2\n", "a.csv: clip_t of x is not finite"),
        ("a.csv", "method,clip_i,clip_t,dino\nx,1\n", "needs the columns"),
        ("a.csv", "method,clip_i,clip_t,dino\nx,1,2,\0\n", "needs the columns"),
        ("a.json", "{}", "not a scores.json"),
        ("a.json", '{"methods": {"x": {"tags": [], "subjects": []}}}', "not a scores.json"),
        ("a.json", "[", "not a scores.json"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, capsys, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as exit_:
        table.parse_args([str(tmp_path / name)])
    assert exit_.value.code == 2 and says in capsys.readouterr().err


# --- The report ---------------------------------------------------------------------------------------------------

VOID = {"img", "input", "link", "meta", "br"}


class Page(HTMLParser):
    """The elements of a page: each a dict of its tag, attributes, text and parents, outermost first."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        assert self.open == [], "elements are not closed"

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "text": "", "parents": list(self.open), **dict(attributes)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag: str, **attributes) -> list[dict]:
        """Elements of a kind; an attribute given as True must be there, whatever its value."""

        def matches(element: dict) -> bool:
            wanted = ((name.replace("_", "-"), value) for name, value in attributes.items())
            return all(name in element if value is True else element.get(name) == value for name, value in wanted)

        return [element for element in self.elements if element["tag"] == tag and matches(element)]

    def visible(self, elements: list[dict]) -> list[dict]:
        return [one for one in elements if not any("hidden" in part for part in (one, *one["parents"]))]

    def pictures(self) -> list[dict]:
        """Visible images of methods, not references or plots."""
        return self.visible([one for one in self.all("img") if any("data-method" in p for p in one["parents"])])


@pytest.fixture
def scores(images, tmp_path) -> Path:
    """scores.json as evaluate.py writes it, for the images."""
    interval = {"mean": 0.5, "low": 0.4, "high": 0.6}
    entry = {"tags": {}, "images": 4, **dict.fromkeys(evaluate.METRICS, interval)}
    names = ("ball", "fish", "moon", "star", "tree")  # as many as an interval needs
    entry["subjects"] = {name: dict.fromkeys(evaluate.METRICS, 0.25) for name in names}
    methods = {"copies": entry | {"tags": {"w": 0.0}}, "noise": entry | {"tags": {"w": 0.5}}}
    file = tmp_path / "scores.json"
    file.write_text(json.dumps({"metrics": {"clip_model": "some clip"}, "methods": methods}))
    return file


def report_command(scores: Path, images: Path, output: Path, *more: str) -> list[str]:
    return [str(scores), *more, f"--images_dir={images}", f"--data_dir={DATA}", f"--output={output}"]


def write_report(*arguments) -> Page:
    args = report.parse_args(report_command(*arguments))
    report.main(args)
    return Page(args.output.read_text())


def test_the_page_shows_table_plots_and_grids(scores, images, tmp_path):
    page = write_report(scores, images, tmp_path / "pages" / "report.html", "--intervals")
    assert [row["text"].split()[0] for row in page.all("tr")][:3] == ["Method", "copies", "noise"]
    assert page.all("span", **{"class": "spread"})[0]["text"] == "[.4000, .6000]"
    assert [section["data-subject"] for section in page.all("section", data_subject=True)] == ["ball", "fish"]
    heads = [head["text"] for head in page.all("th", data_prompt=True)]
    assert heads == [
        f"a photo of a {s} {where}" for s in ("ball", "fish") for where in ("on the grass", "in the night sky")
    ]
    rows = page.all("tr", data_method=True)
    assert [row["data-method"] for row in rows] == ["copies", "noise"] * 2 and ".2500" in rows[0]["text"]
    pictures = page.pictures()
    assert [picture["alt"] for picture in pictures] == [heads[i] for i in (0, 1, 0, 1, 2, 3, 2, 3)]
    assert len(page.all("img", alt="reference 5 of fish")) == 1 and "some clip" in page.all("header")[0]["text"]
    plots = [plot["src"] for plot in page.all("img") if plot["src"].startswith("data:image/svg+xml")]
    assert len(plots) == 2 and plots[0] != plots[1]


def test_the_page_shows_what_was_kept_of_the_class(scores, images, tmp_path):
    assert "PRES" not in write_report(scores, images, tmp_path / "a.html").all("table")[0]["text"]
    told = json.loads(scores.read_text())
    told["methods"]["copies"]["pres"] = {"mean": 0.8125, "low": 0.7, "high": 0.9}
    for of_subject in told["methods"]["copies"]["subjects"].values():
        of_subject["pres"] = 0.8125
    scores.write_text(json.dumps(told))
    page = write_report(scores, images, tmp_path / "b.html")
    rows = [row["text"].split() for row in page.all("tr")]
    assert "PRES" in rows[0] and ".8125" in rows[1] and ".8125" not in rows[2]


def test_the_page_tells_how_many_of_the_images_it_shows(scores, images, tmp_path):
    shutil.copy(images / "noise" / "ball" / "0" / "0.jpg", images / "noise" / "ball" / "0" / "1.jpg")
    assert "Shown: 8 of 9 images, 2 subjects" in write_report(scores, images, tmp_path / "a.html").all("header")[0][
        "text"
    ].replace("\n   ", "")


def test_the_page_marks_a_method_with_fewer_subjects(scores, images, tmp_path):
    written = json.loads(scores.read_text())
    written["methods"]["noise"]["subjects"].pop("tree")
    scores.write_text(json.dumps(written))
    page = write_report(scores, images, tmp_path / "report.html")
    rows = [row["text"].split() for row in page.all("tr")]
    assert rows[1][:2] == ["copies", "4"] and rows[2][:3] == ["noise", "4", "†"]
    assert any("noise has 4 of 5" in text["text"] for text in page.all("p"))


def test_the_page_stands_alone(scores, images, tmp_path):
    page = write_report(scores, images, tmp_path / "report.html")
    assert all(element["src"].startswith("data:") for element in page.elements if "src" in element)
    assert not [element for element in page.elements if "href" in element or element["tag"] in ("link", "iframe")]
    assert "url(" not in page.all("style")[0]["text"] and "@import" not in page.all("style")[0]["text"]


def test_the_page_can_be_read_aloud(scores, images, tmp_path):
    page = write_report(scores, images, tmp_path / "report.html")
    assert page.all("html", lang="en") and all(picture["alt"] for picture in page.all("img"))
    controls = [*page.all("select"), *page.all("input")]
    assert len(controls) == 4
    assert all(any(part["tag"] == "label" and part["text"].strip() for part in c["parents"]) for c in controls)
    ids = [element["id"] for element in page.elements if "id" in element]
    named = [element["aria-labelledby"] for element in page.elements if "aria-labelledby" in element]
    assert len(ids) == len(set(ids)) and set(named) <= set(ids)
    assert all(head["scope"] in ("row", "col", "rowgroup") for head in page.all("th"))


def test_links_lead_to_the_files(scores, images, tmp_path):
    renamed = images.rename(tmp_path / "my images #1")
    page = write_report(scores, renamed, tmp_path / "pages" / "report.html", "--link", "--images_per_prompt=2")
    files = [tmp_path / "pages" / unquote(picture["src"]) for picture in page.pictures()]
    assert len(files) == 8 and all(file.is_file() and file.resolve().is_relative_to(renamed) for file in files)
    assert [link["href"] for link in page.all("a")] == [picture["src"] for picture in page.pictures()]


def test_embedded_images_are_small(scores, images, tmp_path):
    Image.effect_noise((900, 600), 80).save(images / "noise" / "ball" / "0" / "0.jpg")
    pictures = write_report(scores, images, tmp_path / "report.html", "--thumbnail=90").pictures()
    sizes = {report.Image.open(io.BytesIO(base64.b64decode(p["src"].split(",")[1]))).size for p in pictures}
    assert sizes == {(64, 64), (64, 80), (90, 60)}  # reduced, never enlarged


def test_names_cannot_become_markup(scores, images, tmp_path):
    name = "<script>alert('&\"')</script>".replace("/", "\u2215")
    (images / "noise").rename(images / name)
    scores.write_text(scores.read_text().replace('"noise"', json.dumps(name)))
    page = write_report(scores, images, tmp_path / "report.html", "--title=<i>a</i>")
    assert len(page.all("script")) == 1 and not page.all("i")
    assert [row["data-method"] for row in page.all("tr", data_method=True)][1] == name


def test_what_was_not_made_leaves_a_gap(scores, images, tmp_path):
    shutil.rmtree(images / "noise" / "fish" / "3")
    shutil.rmtree(images / "noise" / "ball")
    page = write_report(scores, images, tmp_path / "report.html", "--subjects", "fish", "ball")
    assert [section["data-subject"] for section in page.all("section", data_subject=True)] == ["fish", "ball"]
    rows = page.all("tr", data_method=True)
    assert [row["data-method"] for row in rows] == ["copies", "noise", "copies"]
    assert [row["text"].count("no image") for row in rows] == [0, 1, 0]


def test_a_damaged_image_is_named(scores, images, tmp_path):
    file = images / "noise" / "fish" / "3" / "0.jpg"
    file.write_bytes(file.read_bytes()[:1500])
    with pytest.raises(benchmark.UnreadableImage, match="0.jpg is damaged"):
        write_report(scores, images, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_given_figures_and_printed_numbers(scores, images, tmp_path):
    figure = tmp_path / "drift_over_steps.png"
    Image.new("RGB", (4, 4)).save(figure)
    printed_numbers = write_table(tmp_path / "printed.csv", [",others,.5,.3,.6"])
    page = write_report(scores, images, tmp_path / "report.html", str(printed_numbers), f"--figures={figure}")
    assert [caption["text"] for caption in page.all("figcaption")] == ["drift over steps"]
    assert [head["text"].split()[0] for head in page.all("th", scope="row")[:3]] == ["copies", "noise", "others"]
    assert len(page.all("input", name="method")) == 2  # nobody's images are missing, there are only numbers


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--subjects", "star"], "no images of star"),
        (["--methods", "nobody"], "no nobody here"),
        (["--figures", "nowhere.png"], "nowhere.png is not there"),
        (["elsewhere.csv"], "elsewhere.csv is not there"),
        (["--methods", "copies", "--images_per_prompt=0"], "--images_per_prompt must be at least 1"),
        (["--thumbnail=0"], "--thumbnail must be at least 1"),
    ],
)
def test_reports_that_cannot_be_written(scores, images, tmp_path, capsys, more, says):
    with pytest.raises(SystemExit) as exit_:
        report.parse_args(report_command(scores, images, tmp_path / "report.html", *more))
    assert exit_.value.code == 2 and says in capsys.readouterr().err


def test_a_report_without_images(scores, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        report.parse_args(report_command(scores, tmp_path / "nowhere", tmp_path / "report.html"))
    assert exit_.value.code == 2 and "has no images of the methods" in capsys.readouterr().err


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def browse(scores, images, tmp_path):
    """The page as chromium has it after its scripts ran, with a hash in its address and perhaps a script more."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    write_report(scores, images, tmp_path / "report.html")

    def open_page(fragment: str = "", script: str = "", width: int | None = None) -> Page:
        text = (tmp_path / "report.html").read_text()
        opened = tmp_path / "opened.html"
        opened.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
        if width:  # chromium's window is never narrower than 500 pixels, a frame can be; the script reports to it
            listen = "onmessage = (event) => Object.assign(document.body.dataset, event.data)"
            frame = f'<body><script>{listen}</script><iframe src="opened.html" width="{width}" height="3000"></iframe>'
            opened = tmp_path / "frame.html"
            opened.write_text(f"<!doctype html><html>{frame}</body></html>")
        options = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-sync"
        options += " disable-component-update dump-dom virtual-time-budget=2000 window-size=1280,3000"
        command = [CHROMIUM, "--headless", *(f"--{option}" for option in options.split())]
        command += [f"--user-data-dir={tmp_path / 'profile'}", opened.as_uri() + fragment]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        return Page(result.stdout)

    return open_page


def test_the_address_filters_the_page(browse):
    page = browse("#subject=fish&prompt=Photo+night&method=copies")
    assert [picture["alt"] for picture in page.pictures()] == ["a photo of a fish in the night sky"]
    assert len(page.visible(page.all("th", data_prompt=True))) == 1
    assert page.all("output")[0]["text"] == "1 image"
    assert "hidden" not in page.all("form")[0] and "(1)" in page.all("summary")[0]["text"]


def test_the_form_writes_the_address(browse):
    script = """
      const field = document.querySelector("[name=prompt]");
      field.value = "grass";
      field.dispatchEvent(new Event("input", {bubbles: true}));
      addEventListener("hashchange", () => { document.body.dataset.address = location.hash; });
    """
    page = browse("", script)
    assert page.all("body")[0]["data-address"] == "#prompt=grass"
    assert [picture["alt"].split()[-1] for picture in page.pictures()] == ["grass"] * 4
    assert page.all("output")[0]["text"] == "4 images"


def test_a_phone_scrolls_within_the_grid_only(browse, images):
    script = """
      const area = document.querySelector(".grid").parentElement;
      area.scrollLeft = 30;
      const name = area.querySelector("tbody th").getBoundingClientRect().left;
      parent.postMessage({
        width: innerWidth,
        beyond: document.documentElement.scrollWidth - document.documentElement.clientWidth,
        scrolled: area.scrollLeft,
        name: name - area.getBoundingClientRect().left,
      }, "*");
    """
    body = browse(script=script, width=300).all("body")[0]
    assert body["data-width"] == "300" and body["data-beyond"] == "0"
    assert body["data-scrolled"] == "30" and body["data-name"] == "0"
