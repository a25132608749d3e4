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
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from runner import ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, CLIPModel, CLIPProcessor, ViTConfig, ViTModel

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

CLASSES = "subject_name,class\nmug,mug\nbear_toy,stuffed animal\nrex,dog\n\nPrompts\n\n"
OBJECTS = """Object Prompts
prompt_list = [
'a {0} {1} on a shelf'.format(unique_token, class_token),
'a {0} {1} beside a lamp'.format(unique_token, class_token)
]
"""
TWO_LISTS = f"{CLASSES}{OBJECTS}\nLive Subject Prompts\nprompt_list = [\n'a {{0}} {{1}} asleep',\n]\n"


# --- The benchmark's files ----------------------------------------------------------------------------------------


def read_text(folder: Path, text: str) -> benchmark.Benchmark:
    (folder / "prompts_and_classes.txt").write_text(text)
    return benchmark.read_benchmark(folder)


def test_cats_and_dogs_have_the_live_prompts_and_only_subjects_with_references_are_listed(tmp_path):
    read = read_text(tmp_path, TWO_LISTS)
    assert read.classes == {"mug": "mug", "bear_toy": "stuffed animal", "rex": "dog"}
    assert read.prompts("bear_toy") == ["a stuffed animal on a shelf", "a stuffed animal beside a lamp"]
    assert read.prompts("rex") == ["a dog asleep"]
    assert read.prompts("mug", "sks")[0] == "a sks mug on a shelf"
    (tmp_path / "rex").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "rex" / "1.jpg")
    (tmp_path / "rex" / ".2.jpg").write_text("hidden")
    assert read.subjects() == ["rex"]
    assert read.references("rex") == [tmp_path / "rex" / "1.jpg"]


@pytest.mark.parametrize("heading", ["Object Prompts", "Live Subject Prompts", "Prompts"])
def test_one_list_is_for_all_and_nothing_in_it_is_executed(tmp_path, heading):
    code = f"[\n'a {{0}} {{1}}'.format(open({str(tmp_path / 'made')!r}, 'w'), 2)\n]"
    read = read_text(tmp_path, f"{CLASSES}{heading}\nprompt_list = {code}\n")
    assert (read.prompts("rex")[0], read.prompts("mug")[0]) == ("a dog", "a mug")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no table of classes"),
        (CLASSES, "no prompts"),
        (TWO_LISTS.replace("shelf'", "shelf"), "not a Python list"),
        (TWO_LISTS.replace("shelf'", "shelf {2}'"), "no other braces"),
        (TWO_LISTS.replace("mug,mug", "../mug,mug"), "no name for a folder"),
    ],
)
def test_a_text_file_that_cannot_be_understood(tmp_path, text, says):
    with pytest.raises(ValueError, match=says):
        read_text(tmp_path, text)


# --- Scores -------------------------------------------------------------------------------------------------------


def command(images: Path, results: Path, *more: str, data: Path = DATA) -> list[str]:
    models = [f"--clip_model={WORLD / 'clip'}", f"--dino_model={WORLD / 'vit'}", "--num_workers=1", *more]
    return [f"--data_dir={data}", f"--images_dir={images}", f"--output_dir={results}", *models]


def score(*arguments) -> dict:
    """Run evaluate.py in this process; the methods of its scores.json."""
    args = evaluate.parse_args(command(*arguments))
    evaluate.main(args)
    return json.loads((args.output_dir / "scores.json").read_text())["methods"]


@pytest.fixture
def images(tmp_path) -> Path:
    """Two methods on two subjects and two prompts: "copies" of the references, and "noise"."""
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    for subject, index in itertools.product(("ball", "fish"), (0, 3)):
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
def dino_features(files: list[Path]) -> torch.Tensor:
    """Unit CLS features (files, 128) of the world's ViT."""
    vit, processor = ViTModel.from_pretrained(WORLD / "vit"), AutoImageProcessor.from_pretrained(WORLD / "vit")
    pixels = processor(images=[Image.open(file).convert("RGB") for file in files], return_tensors="pt")
    return F.normalize(vit(**pixels).last_hidden_state[:, 0], dim=-1)


@torch.no_grad()
def expected(file: Path, subject: str, prompt: str) -> list[float]:
    """CLIP-I, CLIP-T and DINO of one image."""
    clip, processor = CLIPModel.from_pretrained(WORLD / "clip"), CLIPProcessor.from_pretrained(WORLD / "clip")
    files = [file, *sorted((DATA / subject).glob("*.png"))]
    pictures = [Image.open(path).convert("RGB") for path in files]
    output = clip(**processor(text=[prompt], images=pictures, return_tensors="pt"))
    own, *others = F.normalize(output.image_embeds, dim=-1)
    text = F.normalize(output.text_embeds[0], dim=-1)
    identity, *identities = dino_features(files)
    means = [torch.stack(others) @ own, own @ text, torch.stack(identities) @ identity]
    return [values.mean().item() for values in means]


def test_scores_are_mean_cosines_over_pairs_and_tables_repeat_them(images, tmp_path):
    tags = {"backbone": "sd3", "w": 0.5, "seed": 1}
    (images / "noise" / "manifest.json").write_text(json.dumps({"method": "noise", "tags": tags, "images": []}))
    methods, results = score(images, tmp_path / "results", "--batch_size=3"), tmp_path / "results"
    rows = read_rows(results / "images.csv")
    assert len(rows) == 8
    for row in (rows[1], rows[-1]):
        prompt = f"a photo of a {row['subject']} in the night sky"
        assert (row["prompt_index"], row["prompt"]) == ("3", prompt)
        values = [float(row[metric]) for metric in evaluate.METRICS]
        assert values == pytest.approx(expected(images / row["file"], row["subject"], prompt), abs=2e-5)
    totals, subjects = read_rows(results / "scores.csv"), read_rows(results / "subjects.csv")
    for entry, metric in itertools.product(totals, evaluate.METRICS):
        told = methods[entry["method"]]
        assert (entry["images"], entry["subjects"]) == ("4", "2")
        own = [row for row in rows if row["method"] == entry["method"]]
        assert told[metric]["mean"] == pytest.approx(np.mean([float(row[metric]) for row in own]), abs=2e-6)
        assert [float(entry[metric + end]) for end in ("", "_low", "_high")] == list(told[metric].values())
        assert told[metric]["low"] <= told[metric]["mean"] <= told[metric]["high"]
        for row in (row for row in subjects if row["method"] == entry["method"]):
            values = [float(one[metric]) for one in own if one["subject"] == row["subject"]]
            assert float(row[metric]) == told["subjects"][row["subject"]][metric]
            assert float(row[metric]) == pytest.approx(np.mean(values), abs=1e-6)
    copies, noise = methods["copies"], methods["noise"]
    assert copies["dino"]["mean"] > noise["dino"]["mean"] + 0.2
    assert copies["clip_i"]["mean"] > noise["clip_i"]["mean"] + 0.2
    assert (copies["tags"], noise["tags"]) == ({}, tags)
    assert table.read_methods([results / "scores.csv"])[0].means == {m: copies[m]["mean"] for m in evaluate.METRICS}
    assert json.loads((results / "scores.json").read_text())["metrics"]["clip_model"] == str(WORLD / "clip")


def test_what_is_scored_is_not_scored_again(images, tmp_path, monkeypatch):
    first, scored = score(images, tmp_path / "results"), []
    original = evaluate.score_batch
    monkeypatch.setattr(evaluate, "score_batch", lambda *rest: scored.extend(rest[2]) or original(*rest))
    assert score(images, tmp_path / "results") == first
    assert scored == []
    os.utime(images / "noise" / "fish" / "3" / "0.jpg", ns=(1, 1))
    assert score(images, tmp_path / "results") == first
    assert [picture.file for picture in scored] == ["noise/fish/3/0.jpg"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text((DATA / "prompts_and_classes.txt").read_text().replace("'a photo of", "'one photo of"))
    score(images, tmp_path / "results", "--methods", "copies", f"--prompts_file={prompts}")
    assert [picture.method for picture in scored[1:]] == ["copies"] * 4
    rows = read_rows(tmp_path / "results" / "images.csv")
    assert [row["prompt"].split()[0] for row in rows] == ["one"] * 4 + ["a"] * 4  # "noise" was not asked for


def test_an_interrupted_run_goes_on(images, tmp_path, monkeypatch):
    undisturbed = score(images, tmp_path / "undisturbed")
    original, seen = evaluate.score_batch, []

    def interrupted(*arguments):
        seen.extend(arguments[2])
        if len(seen) == 6:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(evaluate, "score_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score(images, tmp_path / "results", "--batch_size=2")
    part = tmp_path / "results" / "images.part0.csv"
    part.write_text(part.read_text()[:-9])  # the fourth line was half written
    seen.clear()
    assert score(images, tmp_path / "results") == undisturbed
    assert len(seen) == 5
    assert not part.exists()


def test_two_processes_score_as_one(images, tmp_path):
    alone = score(images, tmp_path / "alone")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    arguments = [*launcher, str(FOLDER / "evaluate.py"), *command(images, tmp_path / "two")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("8 images, 8 to score") == 1
    assert json.loads((tmp_path / "two" / "scores.json").read_text())["methods"] == alone
    assert read_rows(tmp_path / "two" / "images.csv") == read_rows(tmp_path / "alone" / "images.csv")


# --- The class after training -------------------------------------------------------------------------------------


def draw_class(images: Path, method: str, subject: str, index: int, *photos: str) -> None:
    """Copies of references as the method's images of a class prompt."""
    folder = images / method / subject / "class" / str(index)
    folder.mkdir(parents=True)
    for number, photo in enumerate(photos):
        shutil.copy(DATA / photo, folder / f"{number}.png")


def test_what_was_kept_of_the_class_is_scored_by_itself(images, tmp_path, capsys):
    """PRES and DIV by hand: "copies" draws the fish where the class is asked for, and its own ball."""
    before = score(images, tmp_path / "before")["copies"]
    for index in (0, 3):
        draw_class(images, "copies", "ball", index, "fish/00.png", "star/00.png", "ball/01.png")
        draw_class(images, "copies", "fish", index, "fish/01.png")
    capsys.readouterr()
    entry = score(images, tmp_path / "results", "--batch_size=2")["copies"]
    assert "note:" not in capsys.readouterr().out
    for name in (*evaluate.METRICS, "images"):  # the images of the class prompts are none of the subject's
        assert entry[name] == before[name]
    drawn = dino_features([DATA / name for name in ("fish/00.png", "star/00.png", "ball/01.png")])
    photos = dino_features(sorted((DATA / "ball").glob("*.png")))
    ball, fish = entry["subjects"]["ball"], entry["subjects"]["fish"]
    assert ball["pres"] == pytest.approx((drawn @ photos.T).mean().item(), abs=2e-6)
    distances = [1 - (drawn[a] @ drawn[b]).item() for a, b in ((0, 1), (0, 2), (1, 2))]
    assert ball["div"] == pytest.approx(np.mean(distances), abs=2e-6)
    assert "div" not in fish and "div" not in entry  # one image differs from nothing
    assert entry["pres"]["mean"] == pytest.approx((ball["pres"] + fish["pres"]) / 2, abs=2e-6)


def test_class_images_made_anew_and_methods_with_other_images(images, tmp_path, capsys):
    draw_class(images, "noise", "ball", 0, "fish/00.png", "star/00.png")
    first = score(images, tmp_path / "results")["noise"]
    assert first["subjects"]["ball"]["div"] > 0.1
    assert "pres" not in first
    assert "noise has no PRES and no DIV, since 1 of its 2 subjects" in capsys.readouterr().out
    file = images / "noise" / "ball" / "class" / "0" / "1.png"
    shutil.copy(DATA / "fish" / "00.png", file)
    os.utime(file, ns=(1, 1))
    same = score(images, tmp_path / "results")["noise"]["subjects"]["ball"]["div"]
    assert same == pytest.approx(0, abs=1e-6)  # the other one is compared anew, too
    for index in ("0", "3"):
        shutil.rmtree(images / "noise" / "ball" / index)
    with pytest.raises(SystemExit):
        evaluate.parse_args(command(images, tmp_path / "results"))
    assert "images of class prompts alone" in capsys.readouterr().err
    shutil.rmtree(images / "noise" / "ball")
    score(images, tmp_path / "results")
    said = capsys.readouterr().out
    assert "4 images of 2 subjects: copies; 2 images of 1 subjects: noise" in said
    assert "an interval over one subject has no width" in said


def test_pictures_start_from_noises_of_their_own():
    keys = itertools.product((0, 1), ("dog", "cat"), (0, 1), (0, 1))  # seed, subject, prompt, number
    assert len({generate.seed_of(*key) for key in keys}) == 16


def test_class_prompts_are_drawn_from_the_same_noise(tmp_path, monkeypatch):
    """The picture of the class prompt is what the base model, which has no other prompt, draws from that seed."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    shutil.copytree(WORLD / "sd3", tmp_path / "ball")

    def draw(method, *more):
        options = [f"--data_dir={DATA}", f"--images_dir={tmp_path}", "--images=1", "--subjects=ball", "--prompts=3"]
        options += ["--num_inference_steps=2", "--resolution=64", "--max_sequence_length=77", f"--method={method}"]
        generate.main(generate.parse_args([*options, *more]))
        return (tmp_path / method / "ball" / "3" / "0.png").read_bytes()

    pipelines = f"--pipelines={tmp_path}/{{subject}}"
    first = draw("own", pipelines)
    assert not (tmp_path / "own" / "ball" / "class").exists()
    assert draw("own", pipelines, "--class_prompts") == first  # goes on from what is there
    drawn = (tmp_path / "own" / "ball" / "class" / "3" / "0.png").read_bytes()
    assert first != drawn == draw("base", f"--pretrained_model_name_or_path={WORLD / 'sd3'}")
    told = json.loads((tmp_path / "own" / "manifest.json").read_text())["images"]
    assert [(one["file"], one["prompt"]) for one in told] == [
        ("ball/3/0.png", "a photo of a sks ball in the night sky"),
        ("ball/class/3/0.png", "a photo of a ball in the night sky"),
    ]


# --- Arithmetic and odd input -------------------------------------------------------------------------------------


def test_intervals_are_those_of_a_mean_over_subjects():
    values = np.random.default_rng(1).normal([0.0, 5.0], [1.0, 2.0], (400, 2))
    low, high = evaluate.bootstrap(values, 4000, seed=0)
    assert np.allclose(high - low, 2 * 1.96 * values.std(0) / 20, rtol=0.08)
    assert np.allclose((high + low) / 2, values.mean(0), atol=0.03)
    assert np.array_equal(low, evaluate.bootstrap(values, 4000, seed=0)[0])
    assert not np.array_equal(low, evaluate.bootstrap(values, 4000, seed=1)[0])


def test_imagenet_preparation_keeps_the_aspect_and_crops_the_centre():
    rows = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 300, 1).repeat(3, 2)
    rows[:, :38] = rows[:, -38:] = 255  # beside the middle 224
    pixels = evaluate.imagenet_pixels(Image.fromarray(rows))
    red = pixels[0] * evaluate.IMAGENET_STD[0] + evaluate.IMAGENET_MEAN[0]
    torch.testing.assert_close(red * 255, torch.arange(16.0, 240.0)[:, None].expand(224, 224))


@pytest.mark.parametrize(
    ("size", "mean", "chosen"),
    [(224, [0.485, 0.456, 0.406], "imagenet"), (224, [0.5, 0.5, 0.5], "model"), (64, [0.485, 0.456, 0.406], "model")],
)
def test_preprocessing_follows_the_model(tmp_path, images, size, mean, chosen):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTModel(ViTConfig(image_size=size, patch_size=32, **shape)).eval()
    model.save_pretrained(tmp_path / "vit")
    # As it stands beside DINO's published weights, in the form of that time.
    processor = {"feature_extractor_type": "ViTFeatureExtractor", "size": size, "image_mean": mean}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    args = evaluate.parse_args(command(images, tmp_path / "results", f"--dino_model={tmp_path / 'vit'}"))
    assert args.dino_preprocessing == chosen
    picture = Image.effect_noise((300, 400), 80).convert("RGB")
    features = evaluate.Dino(args.dino_model, args.dino_preprocessing, torch.device("cpu")).images([picture])
    pixels = AutoImageProcessor.from_pretrained(args.dino_model)(images=picture, return_tensors="pt").pixel_values
    pixels = evaluate.imagenet_pixels(picture)[None] if chosen == "imagenet" else pixels
    with torch.no_grad():
        torch.testing.assert_close(features, F.normalize(model(pixels).last_hidden_state[:, 0], dim=-1))


PICTURE, MANIFEST = "noise/fish/3/0.jpg", "noise/manifest.json"


@pytest.mark.parametrize(
    ("file", "spoilt", "says"),
    [
        (PICTURE, b"P6 100000 100000 255\n", "0.jpg is not an image"),  # it would fill the memory
        (PICTURE, b"nothing", "0.jpg is not an image"),
        (MANIFEST, b'{"tags": {"w": 0.5', "manifest.json is damaged"),
        (MANIFEST, b'{"tags": {"w": NaN}}', "manifest.json is damaged"),
        (MANIFEST, b'["tags"]', "manifest.json is damaged"),
        ("noise/fish", "noise/whale", "no subject of this name"),
        ("noise/fish/3", "noise/fish/12", "fish has prompts 0 to 11"),
        ("noise/fish/3", "noise/fish/beach", "not a prompt's index"),
        ("--methods=nobody", None, "no images in"),
        ("--data_dir=DATA", None, "no references to compare with"),
        ("--prompts_file=nowhere.txt", None, "nowhere.txt is not there"),
        ("--clip_model=/nowhere", None, "--clip_model /nowhere cannot be read"),
        (f"--clip_model={WORLD / 'vit'}", None, "must be a CLIP model"),
        ("--batch_size=0", None, "--batch_size must be at least 1"),
    ],
)
def test_bad_input_gets_one_sentence(images, tmp_path, monkeypatch, capsys, file, spoilt, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DATA" / "ball").mkdir(parents=True)
    shutil.copy(DATA / "prompts_and_classes.txt", "DATA")
    if isinstance(spoilt, bytes):
        (images / file).write_bytes(spoilt)
    elif spoilt:
        (images / file).rename(images / spoilt)
    with pytest.raises(SystemExit, match="2"):
        evaluate.parse_args(command(images, tmp_path / "results", *([] if spoilt else [file])))
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "results").exists()


def test_an_odd_table_of_an_earlier_run_is_named_before_models_are_loaded(images, tmp_path, monkeypatch):
    score(images, tmp_path / "results")
    file = tmp_path / "results" / "images.csv"
    row, text = read_rows(file)[0], file.read_text()
    file.write_bytes(b"\xff" + text.encode())
    monkeypatch.setattr(evaluate, "Clip", None)
    with pytest.raises(ValueError, match="images.csv is damaged"):
        score(images, tmp_path / "results")
    file.write_text(text.replace(row["dino"], "nan"))
    assert row["file"] not in evaluate.known_rows(evaluate.parse_args(command(images, tmp_path / "results")))


def test_a_model_that_gives_no_numbers_is_named(images, tmp_path):
    shutil.copytree(WORLD / "vit", tmp_path / "vit")
    weights = tmp_path / "vit" / "model.safetensors"
    save_file({name: tensor * float("nan") for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(ValueError, match="--dino_model gives no number for copies/ball/0/0.png"):
        score(images, tmp_path / "results", f"--dino_model={tmp_path / 'vit'}")
    assert not (tmp_path / "results" / "scores.json").exists()


def test_a_damaged_image_ends_the_run_with_its_name(images, tmp_path, monkeypatch, capsys):
    file = images / PICTURE
    file.write_bytes(file.read_bytes()[:1500])
    arguments = command(images, tmp_path / "results", "--batch_size=1")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    monkeypatch.syspath_prepend(FOLDER)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(FOLDER / "evaluate.py"), run_name="__main__")
    assert f"{file} is damaged" in capsys.readouterr().err
    file.unlink()
    assert len(evaluate.known_rows(evaluate.parse_args(arguments))) == 7  # those before it are kept


# --- The table ----------------------------------------------------------------------------------------------------

# The paper's printed numbers: method, CLIP-I, CLIP-T, DINO, rank; for SD3 it prints 2, 3, 1, but the two are equal.
TABLES = {
    "Table 1": """Ours .7821 .3059 .6031 1 | DreamBooth (FT) .7751 .3035 .5870 4 | DreamBooth .7302 .3191 .4839 6 |
        SuDe .7791 .3044 .5931 3 | SVDiff .7455 .3162 .5144 5 | Textual Inversion .7579 .2633 .5287 8 |
        Custom Diffusion .6479 .3154 .5568 7 | IP-Adapter .8311 .2646 .6290 2 | BLIP-Diffusion .7016 .2949 .4544 9""",
    "SD1.5": "DreamBooth .7302 .3191 .4839 2 | Beyond-Finetuning .7293 .3212 .4786 3 | Ours .7821 .3059 .6031 1",
    "SDXL": "DreamBooth .7939 .3107 .6586 2 | Beyond-Finetuning .7874 .3140 .6429 3 | Ours .8005 .3154 .6661 1",
    "SD3": "DreamBooth .7465 .3182 .5130 2= | Beyond-Finetuning .7461 .3211 .4997 2= | Ours .7579 .3187 .5679 1",
    "equal as shown": "a .5 .31234 .6 1= | b .5 .31232 .6 1= | c .4 .2 .1 3",
}


def write_table(file: Path, lines: list[str]) -> Path:
    file.write_text("\n".join(["group,method,clip_i,clip_t,dino,pres,div", *lines]) + "\n")
    return file


def write_scores(file: Path, methods: dict[str, dict[str, float]]) -> Path:
    """scores.json of methods given as {method: {subject: score}}; one score is all of its metrics."""
    entries, metrics = {}, (*evaluate.METRICS, "pres")
    for name, subjects in methods.items():
        mean = float(np.mean(list(subjects.values())))
        entry = {metric: {"mean": mean, "low": mean - 0.1, "high": mean + 0.1} for metric in metrics}
        entry["subjects"] = {subject: dict.fromkeys(metrics, value) for subject, value in subjects.items()}
        entries[name] = entry | {"tags": {"seed": name[-1]} if "seed" in name else {}, "images": len(subjects)}
    file.write_text(json.dumps({"metrics": {"clip_model": "some clip"}, "methods": entries}))
    return file


def show(capsys, *arguments) -> list[str]:
    """The lines that table.py prints."""
    table.main(table.parse_args(list(map(str, arguments))))
    return capsys.readouterr().out.splitlines()


def test_the_papers_tables_come_out(tmp_path):
    rows = [(group, row.strip().rsplit(" ", 4)) for group, text in TABLES.items() for row in text.split("|")]
    file = write_table(tmp_path / "printed.csv", [",".join([group, *row[:4]]) for group, row in rows])
    for group, methods in table.groups(table.read_methods([file])).items():
        assert table.rank_labels(methods) == [row[4] for name, row in rows if name == group]


def test_markdown_and_latex_have_the_same_cells_and_the_class_does_not_change_ranks(tmp_path, capsys):
    """The method with the worst PRES keeps its first rank; the lowest PRES and the highest DIV are bold."""
    file = write_table(tmp_path / "a.csv", [",50%_a|b,.9,.9,.9,.8,.1", ",y,.5,.5,.5,.2,.4", ",z,.6,.6,-.06,,"])
    assert show(capsys, file) == [
        "| method | CLIP-I | CLIP-T | DINO | PRES | DIV | average rank | rank |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        r"| 50%_a\|b | **.9000** | **.9000** | **.9000** | .8000 | .1000 | 1.00 | 1 |",
        "| y | .5000 | .5000 | .5000 | **.2000** | **.4000** | 2.67 | 3 |",
        "| z | .6000 | .6000 | -.0600 |  |  | 2.33 | 2 |",
    ]
    output = tmp_path / "out" / "table.tex"
    show(capsys, file, "--format=latex", "--methods", "y", "50%_a|b", f"--output={output}")
    assert output.read_text().splitlines()[:6] == [
        r"\begin{tabular}{lrrrrrrr}",
        r"\toprule",
        r"Method & CLIP-I & CLIP-T & DINO & PRES & DIV & Average rank & Rank \\",
        r"\midrule",
        r"y & .5000 & .5000 & .5000 & \textbf{.2000} & \textbf{.4000} & 2.00 & 2 \\",
        r"50\%\_a|b & \textbf{.9000} & \textbf{.9000} & \textbf{.9000} & .8000 & .1000 & 1.00 & 1 \\",
    ]


EASY = {"a": 0.9, "b": 0.9}
HARD = {"c": 0.1, "d": 0.1, "e": 0.1, "f": 0.1}


@pytest.mark.parametrize(
    ("methods", "flags", "shown"),
    [
        (  # the one that has the easy subjects alone has the highest mean, and yet is worse on each of them
            {"whole": EASY | HARD, "part": dict.fromkeys(EASY, 0.8)},
            [],
            [
                "| whole | 2 | **.9000** | **.9000** | **.9000** | .9000 | 1.00 | 1 |",
                "| part | 2 † | .8000 | .8000 | .8000 | **.8000** | 2.00 | 2 |",
                "† Means and ranks are over the subjects that all have, a, b: part has 2 of 6.",
            ],
        ),
        (  # intervals begin with five subjects
            {"four": HARD},
            ["--intervals"],
            ["| four | 4 | **.1000** | **.1000** | **.1000** | **.1000** | 1.00 | 1 |"],
        ),
        (  # a lower PRES is a win
            {"start": EASY | HARD, "w": dict.fromkeys(HARD, 0.2) | {"a": 0.9, "b": 0.3}},
            ["--against=start"],
            [
                "| start | 6 | **.3667** | **.3667** | **.3667** | .3667 | 1.00 | 1 |",
                f"| w | 6 |{' .3333 (better on 4 of 6) |' * 3} **.3333** (better on 1 of 6) | 2.00 | 2 |",
            ],
        ),
        (
            {"m-seed0": EASY, "m-seed1": dict.fromkeys("abcdef", 0.8), "base": EASY},
            ["--merge_seeds", "--intervals"],
            [
                f"| m (2 seeds) | 2 |{' .8500 ± .0707 |' * 3} **.8500** ± .0707 | 2.00 | 2 |",
                "| base | 2 | **.9000** | **.9000** | **.9000** | .9000 | 1.00 | 1 |",
            ],
        ),
    ],
    ids=["fewer subjects", "no interval", "wins", "seeds"],
)
def test_rows_of_scores(tmp_path, capsys, methods, flags, shown):
    lines = show(capsys, write_scores(tmp_path / "scores.json", methods), *flags)
    assert [line for line in lines[2:] if line] == shown


def test_an_interval_is_that_of_common_subjects_and_printed_numbers_have_none(tmp_path, capsys):
    scores = write_scores(tmp_path / "scores.json", {"six": EASY | HARD, "seven": EASY | HARD | {"g": 0.2}})
    printed = write_table(tmp_path / "printed.csv", [",others,.5,.3,.6"])
    _, _, _, seven, others, *_ = show(capsys, scores, printed, "--intervals")
    low, high = table.bootstrap(np.array([[value] * 4 for value in (EASY | HARD).values()]), 10_000, seed=0)
    assert seven.split(" | ")[2] == f".3667 [{table.digits(low[0])}, {table.digits(high[0])}]"
    assert others == "| others |  | **.5000** | .3000 | **.6000** |  | 1.67 | 1= |"


@pytest.mark.parametrize(
    ("text", "more", "says"),
    [
        ("method,clip_i\nx,1\n", [], "needs the columns"),
        ("method,clip_i,clip_t,dino\nx,1,-,2\n", [], "needs the columns"),
        ("method,clip_i,clip_t,dino\nx,1,2,\0\n", [], "needs the columns"),
        ("method,clip_i,clip_t,dino\nx,1,1,2\nx,1,1,2\n", [], "x comes twice"),
        ("method,clip_i,clip_t,dino\nx,1,nan,2\n", [], "a.csv: clip_t of x is not finite"),
        ("method,clip_i,clip_t,dino\nx,1,1,2\n", ["--against=nobody"], "--against: there is no row nobody"),
        ('{"methods": {"x": {"tags": [], "subjects": []}}}', [], "not a scores.json"),
        ("[", [], "not a scores.json"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, capsys, text, more, says):
    file = tmp_path / ("a.csv" if text.startswith("method") else "a.json")
    file.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        table.parse_args([str(file), *more])
    assert says in capsys.readouterr().err


# --- The report ---------------------------------------------------------------------------------------------------


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
        if tag not in ("img", "input", "link", "meta", "br"):
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag: str, having: str = "", **attributes) -> list[dict]:
        """Elements of a kind with these attributes, and one of this name."""
        found = [one for one in self.elements if one["tag"] == tag and (not having or having in one)]
        return [one for one in found if attributes.items() <= one.items()]

    def visible(self, elements: list[dict]) -> list[dict]:
        return [one for one in elements if not any("hidden" in part for part in (one, *one["parents"]))]

    def pictures(self) -> list[dict]:
        """Visible images of methods, not references or plots."""
        return self.visible([one for one in self.all("img") if any("data-method" in p for p in one["parents"])])


@pytest.fixture
def scores(images, tmp_path) -> Path:
    """scores.json for the images: "noise" lacks a subject, and PRES."""
    subjects = dict.fromkeys(("ball", "fish", "moon", "star", "tree"), 0.25)  # as many as an interval needs
    file = write_scores(tmp_path / "scores.json", {"copies": subjects | {"sun": 0.5}, "noise": subjects})
    told = json.loads(file.read_text())
    for entry, w in zip(told["methods"].values(), (0.0, 0.5), strict=True):
        entry["tags"] = {"w": w}
    del told["methods"]["noise"]["pres"]
    file.write_text(json.dumps(told))
    return file


@pytest.fixture
def write_report(scores, images, tmp_path):
    """Write the page of the scores and images."""

    def write(*more: str, images: Path = images) -> Page:
        output = tmp_path / "pages" / "report.html"
        arguments = [str(scores), *more, f"--images_dir={images}", f"--data_dir={DATA}", f"--output={output}"]
        report.main(report.parse_args(arguments))
        return Page(output.read_text())

    return write


def test_the_page_shows_table_plots_and_grids(images, write_report):
    shutil.copy(images / "noise" / "ball" / "0" / "0.jpg", images / "noise" / "ball" / "0" / "1.jpg")
    page = write_report("--intervals")
    rows = [row["text"].split() for row in page.all("tr")]
    assert "PRES" in rows[0]
    assert rows[1][:2] == ["copies", "5"] and rows[1].count(".2500") == 4
    assert rows[2][:3] == ["noise", "5", "†"] and rows[2].count(".2500") == 3
    assert any("noise has 5 of 6" in text["text"] for text in page.all("p"))
    assert page.all("span", **{"class": "spread"})[0]["text"] == "[.2500, .2500]"
    assert [section["data-subject"] for section in page.all("section", "data-subject")] == ["ball", "fish"]
    heads = [head["text"] for head in page.all("th", "data-prompt")]
    places = ("on the grass", "in the night sky")
    assert heads == [f"a photo of a {subject} {where}" for subject in ("ball", "fish") for where in places]
    rows = page.all("tr", "data-method")
    assert [row["data-method"] for row in rows] == ["copies", "noise"] * 2 and ".2500" in rows[0]["text"]
    assert [picture["alt"] for picture in page.pictures()] == [heads[i] for i in (0, 1, 0, 1, 2, 3, 2, 3)]
    assert len(page.all("img", alt="reference 5 of fish")) == 1
    header = " ".join(page.all("header")[0]["text"].split())
    assert "Shown: 8 of 9 images, 2 subjects" in header and "some clip" in header
    plots = {plot["src"] for plot in page.all("img") if plot["src"].startswith("data:image/svg+xml")}
    assert len(plots) == 2


def test_the_page_stands_alone_and_can_be_read_aloud(write_report):
    page = write_report()
    assert all(element["src"].startswith("data:") for element in page.elements if "src" in element)
    assert not [element for element in page.elements if "href" in element or element["tag"] in ("link", "iframe")]
    assert "url(" not in page.all("style")[0]["text"] and "@import" not in page.all("style")[0]["text"]
    assert page.all("html", lang="en") and all(picture["alt"] for picture in page.all("img"))
    controls = [*page.all("select"), *page.all("input")]
    assert len(controls) == 4
    assert all(any(part["tag"] == "label" and part["text"].strip() for part in c["parents"]) for c in controls)
    ids = [element["id"] for element in page.elements if "id" in element]
    named = [element["aria-labelledby"] for element in page.elements if "aria-labelledby" in element]
    assert len(ids) == len(set(ids)) and set(named) <= set(ids)
    assert all(head["scope"] in ("row", "col", "rowgroup") for head in page.all("th"))


def test_links_lead_to_the_files(images, tmp_path, write_report):
    renamed = images.rename(tmp_path / "my images #1")
    page = write_report("--link", "--images_per_prompt=2", images=renamed)
    files = [tmp_path / "pages" / unquote(picture["src"]) for picture in page.pictures()]
    assert len(files) == 8 and all(file.is_file() and file.resolve().is_relative_to(renamed) for file in files)
    assert [link["href"] for link in page.all("a")] == [picture["src"] for picture in page.pictures()]
    assert all("/my%20images%20%231/" in picture["src"] for picture in page.pictures())


def test_embedded_images_are_small(images, write_report):
    Image.effect_noise((900, 600), 80).save(images / "noise" / "ball" / "0" / "0.jpg")
    pictures = write_report("--thumbnail=90").pictures()
    sizes = {Image.open(io.BytesIO(base64.b64decode(p["src"].split(",")[1]))).size for p in pictures}
    assert sizes == {(64, 64), (64, 80), (90, 60)}  # reduced, never enlarged


def test_names_cannot_become_markup(scores, images, write_report):
    name = "<script>alert('&\"')</script>".replace("/", "\u2215")
    (images / "noise").rename(images / name)
    scores.write_text(scores.read_text().replace('"noise"', json.dumps(name)))
    page = write_report("--title=<i>a</i>")
    assert len(page.all("script")) == 1 and not page.all("i")
    assert [row["data-method"] for row in page.all("tr", "data-method")][1] == name


def test_what_was_not_made_leaves_a_gap_and_printed_numbers_have_no_images(images, tmp_path, write_report):
    shutil.rmtree(images / "noise" / "fish" / "3")
    shutil.rmtree(images / "noise" / "ball")
    Image.new("RGB", (4, 4)).save(tmp_path / "drift_over_steps.png")
    printed = write_table(tmp_path / "printed.csv", [",others,.5,.3,.6"])
    page = write_report(str(printed), "--subjects", "fish", "ball", f"--figures={tmp_path / 'drift_over_steps.png'}")
    assert [section["data-subject"] for section in page.all("section", "data-subject")] == ["fish", "ball"]
    rows = page.all("tr", "data-method")
    assert [row["data-method"] for row in rows] == ["copies", "noise", "copies"]
    assert [row["text"].count("no image") for row in rows] == [0, 1, 0]
    assert [caption["text"] for caption in page.all("figcaption")] == ["drift over steps"]
    assert [head["text"].split()[0] for head in page.all("th", scope="row")[:3]] == ["copies", "noise", "others"]
    assert len(page.all("input", name="method")) == 2


def test_a_damaged_image_is_named(images, tmp_path, write_report):
    file = images / PICTURE
    file.write_bytes(file.read_bytes()[:1500])
    with pytest.raises(benchmark.UnreadableImage, match="0.jpg is damaged"):
        write_report()
    assert not (tmp_path / "pages").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--subjects", "star"], "no images of star"),
        (["--methods", "nobody"], "no nobody here"),
        (["--figures", "nowhere.png"], "nowhere.png is not there"),
        (["elsewhere.csv"], "elsewhere.csv is not there"),
        (["--methods", "copies", "--images_per_prompt=0"], "--images_per_prompt must be at least 1"),
        (["--thumbnail=0"], "--thumbnail must be at least 1"),
        ([], "has no images of the methods"),
    ],
)
def test_reports_that_cannot_be_written(images, write_report, capsys, more, says):
    with pytest.raises(SystemExit, match="2"):
        write_report(*more, images=images if more else images / "nowhere")
    assert says in capsys.readouterr().err


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_address_filters_the_page_and_the_form_writes_it(write_report, tmp_path):
    script = """
      const field = document.querySelector("[name=prompt]");
      document.body.dataset.first = document.querySelector("output").textContent;
      field.value = "Photo night";
      field.dispatchEvent(new Event("input", {bubbles: true}));
      addEventListener("hashchange", () => { document.body.dataset.address = location.hash; });
    """
    write_report()
    page = tmp_path / "pages" / "report.html"
    page.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    options = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-sync"
    options += " disable-component-update dump-dom virtual-time-budget=2000 window-size=1280,3000"
    command = [CHROMIUM, "--headless", *(f"--{option}" for option in options.split())]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"{page.as_uri()}#subject=fish&prompt=grass&method=copies"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    opened = Page(result.stdout)
    (body,) = opened.all("body")
    assert body["data-first"] == opened.all("output")[0]["text"] == "1 image"
    assert body["data-address"] == "#subject=fish&prompt=Photo+night&method=copies"
    assert [picture["alt"] for picture in opened.pictures()] == ["a photo of a fish in the night sky"]
    assert len(opened.visible(opened.all("th", "data-prompt"))) == 1
    assert "hidden" not in opened.all("form")[0] and "(1)" in opened.all("summary")[0]["text"]
