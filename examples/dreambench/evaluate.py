# SPDX-License-Identifier: Apache-2.0
"""Score generated images by CLIP-I, CLIP-T and DINO, whatever method made them.

    python evaluate.py --data_dir dreambench --images_dir images --output_dir results
    accelerate launch evaluate.py --data_dir dreambench --images_dir images --output_dir results    # several GPUs

Images are read from IMAGES/METHOD/SUBJECT/PROMPT_INDEX/*.png (jpg, webp), the index counting the subject's prompts
from 0. Writes scores.json, and as tables scores.csv (a row a method), subjects.csv and images.csv. Images that
images.csv already has are not scored again, unless they, their references, the prompt or the models have changed.

CLIP-I and DINO are the mean cosine of an image with its subject's references, CLIP-T its cosine with the prompt, the
token dropped and the class kept. A subject's score is the mean over its images, a method's the mean over subjects.

Images of the class prompts, IMAGES/METHOD/SUBJECT/class/PROMPT_INDEX/*.png (generate.py --class_prompts), tell what a
model has kept of the class. PRES is their mean cosine with the subject's references by DINO (lower is better: "a dog"
has not become this dog), DIV the mean distance, 1 - cosine by DINO, of the images of one class prompt to each other
(higher is better). PRES is that of DreamBooth (arXiv 2208.12242, section 4.3), whose DIV takes LPIPS between images of
the subject.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from benchmark import CLASS_FOLDER, Benchmark, HelpFormatter, check_image, image_files, read_benchmark, read_image
from PIL import Image
from table import FEWEST_SUBJECTS, bootstrap, bounds
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel
from transformers.utils.logging import disable_progress_bar

METRICS = ("clip_i", "clip_t", "dino")
CLASS_METRICS = ("pres", "div")  # of the images of class prompts
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Picture:
    """A generated image: where it stands, what it should show. `key` changes with all that its scores depend on.

    `of` is "subject" or, for an image of a class prompt, "class".
    """

    file: str
    method: str
    subject: str
    of: str
    prompt_index: int
    prompt: str
    key: str


Rows = list[dict[str, str]]
IMAGE_COLUMNS = ["file", "method", "subject", "of", "prompt_index", "prompt", *METRICS, "div", "key"]


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--images_dir", type=Path, required=True, help="METHOD/SUBJECT/PROMPT_INDEX/*.png below this")
    add("--data_dir", type=Path, required=True, help="DreamBench: a folder of references a subject")
    add("--prompts_file", type=Path, help="prompts and classes; DATA_DIR/prompts_and_classes.txt by default")
    add("--output_dir", type=Path, required=True, help="where scores.json and the tables go")
    add("--methods", nargs="+", metavar="METHOD", help="folders of IMAGES_DIR to score; all by default")
    add("--clip_model", default="openai/clip-vit-base-patch32", help="CLIP for CLIP-I and CLIP-T; a name or a folder")
    add("--dino_model", default="facebook/dino-vits16", help="ViT whose CLS feature is compared; a name or a folder")
    add(
        "--dino_preprocessing",
        choices=("auto", "imagenet", "model"),
        default="auto",
        help="imagenet: short side to 256 bicubic, centre crop of 224, ImageNet's mean and deviation; model: its own "
        "image processor; auto: imagenet for a model of 224 pixels with ImageNet's mean, else model",
    )
    add("--batch_size", type=int, default=32, help="images in one forward")
    add("--num_workers", type=int, default=4, help="threads that read images")
    add("--bootstrap_samples", type=int, default=10000, help="resamples of the subjects for the 95 %% intervals")
    add("--seed", type=int, default=0, help="of the resampling")
    args = parser.parse_args(arguments)
    for name in ("batch_size", "num_workers", "bootstrap_samples"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    try:
        args.benchmark = read_benchmark(args.data_dir, args.prompts_file)
        check_models(args)
        args.pictures = find_pictures(args)
        args.tags = {method: read_tags(args.images_dir / method) for method in {one.method for one in args.pictures}}
    except ValueError as error:
        parser.error(str(error))
    return args


def check_models(args: argparse.Namespace) -> None:
    """Both models exist and are of the right kind; settles --dino_preprocessing auto."""
    configs = {}
    for flag in ("clip_model", "dino_model"):
        try:
            configs[flag] = AutoConfig.from_pretrained(getattr(args, flag))
            processor = AutoImageProcessor.from_pretrained(getattr(args, flag), backend="pil")
        except OSError as error:
            raise ValueError(f"--{flag} {getattr(args, flag)} cannot be read: {error}") from error
    if configs["clip_model"].model_type != "clip":
        raise ValueError(f"--clip_model must be a CLIP model, {args.clip_model} is {configs['clip_model'].model_type}")
    if args.dino_preprocessing == "auto":
        size = getattr(configs["dino_model"], "image_size", None)
        imagenet = size == 224 and np.allclose(processor.image_mean, IMAGENET_MEAN)
        args.dino_preprocessing = "imagenet" if imagenet else "model"


# --- What there is to score ---------------------------------------------------------------------------------------


def find_pictures(args: argparse.Namespace) -> list[Picture]:
    """Every image of the methods asked for. `ValueError`, one sentence, for what cannot be scored."""
    methods = args.methods or [folder.name for folder in subfolders(args.images_dir)]
    pictures = []
    for method in methods:
        found = list(method_pictures(args, args.images_dir / method))
        if not found:
            raise ValueError(f"--images_dir: no images in {args.images_dir / method}/SUBJECT/PROMPT_INDEX/")
        pictures += found
    if not pictures:
        raise ValueError(f"--images_dir: no images in {args.images_dir}/METHOD/SUBJECT/PROMPT_INDEX/")
    return pictures


def method_pictures(args: argparse.Namespace, folder: Path) -> Iterator[Picture]:
    """The images of METHOD/SUBJECT/PROMPT_INDEX/ in order."""
    benchmark: Benchmark = args.benchmark
    models = [model_state(args.clip_model), model_state(args.dino_model), args.dino_preprocessing]
    for subject in subfolders(folder):
        if subject.name not in benchmark.classes:
            raise ValueError(f"{subject}: the prompts file has no subject of this name")
        references = benchmark.references(subject.name)
        if not references:
            raise ValueError(f"{subject}: no references to compare with in {benchmark.folder / subject.name}")
        basis = [*models, *map(file_state, references)]
        own = [index for index in subfolders(subject) if index.name != CLASS_FOLDER]
        if (subject / CLASS_FOLDER).is_dir() and not own:
            raise ValueError(f"{subject} has images of class prompts alone: make those of its own prompts, too")
        for index in own:
            yield from prompt_pictures(args, subject.name, "subject", index, basis)
        for index in subfolders(subject / CLASS_FOLDER):
            yield from prompt_pictures(args, subject.name, "class", index, basis)


def prompt_pictures(
    args: argparse.Namespace, subject: str, of: str, folder: Path, basis: Sequence[str]
) -> Iterator[Picture]:
    """The images of one prompt; `basis` is what all scores of the subject depend on."""
    prompts = args.benchmark.prompts(subject)
    if not folder.name.isdecimal() or int(folder.name) >= len(prompts):
        raise ValueError(f"{folder}: not a prompt's index, {subject} has prompts 0 to {len(prompts) - 1}")
    prompt = prompts[int(folder.name)]
    files = image_files(folder)
    for file in files:
        check_image(file)
        looked_at = files if of == "class" else [file]  # DIV compares an image with the others of its prompt
        states = map(file_state, looked_at)
        key = hashlib.sha256("\n".join([*basis, prompt, file.name, *states]).encode()).hexdigest()[:16]
        name = file.relative_to(args.images_dir).as_posix()
        method = file.relative_to(args.images_dir).parts[0]
        yield Picture(name, method, subject, of, int(folder.name), prompt, key)


def subfolders(folder: Path) -> list[Path]:
    """Folders in a folder by name, numbers by value; none where there is no such folder."""
    if not folder.is_dir():
        return []
    found = [item for item in folder.iterdir() if item.is_dir() and not item.name.startswith(".")]
    return sorted(found, key=lambda item: (int(item.name) if item.name.isdecimal() else -1, item.name))


def file_state(file: Path) -> str:
    """What changes when a file is written anew."""
    state = file.stat()
    return f"{file.name} {state.st_size} {state.st_mtime_ns}"


def model_state(name: str) -> str:
    """A model's name, or for a local folder what changes when its weights do."""
    return " ".join([name, *map(file_state, sorted(Path(name).glob("*.safetensors")))])


# --- Embeddings ---------------------------------------------------------------------------------------------------


class Clip:
    """Unit image and text embeddings of a CLIP model, (batch, dim) float32."""

    def __init__(self, name: str, device: torch.device):
        self.model = CLIPModel.from_pretrained(name, dtype=torch.float32).to(device).eval()
        self.processor = AutoImageProcessor.from_pretrained(name, backend="pil")
        self.tokenizer = AutoTokenizer.from_pretrained(name)

    @torch.no_grad()
    def images(self, images: list[Image.Image]) -> torch.Tensor:
        pixels = self.processor(images=images, return_tensors="pt").pixel_values.to(self.model.device)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=-1)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.model.device)
        return F.normalize(self.model.text_projection(self.model.text_model(**tokens).pooler_output), dim=-1)


class Dino:
    """Unit CLS features of a vision transformer, (batch, dim) float32."""

    def __init__(self, name: str, preprocessing: str, device: torch.device):
        config = AutoConfig.from_pretrained(name)
        options = {"add_pooling_layer": False} if config.model_type == "vit" else {}  # DINO's has no pooler
        self.model = AutoModel.from_pretrained(name, dtype=torch.float32, **options).to(device).eval()
        self.processor = AutoImageProcessor.from_pretrained(name, backend="pil")
        self.preprocessing = preprocessing

    @torch.no_grad()
    def images(self, images: list[Image.Image]) -> torch.Tensor:
        if self.preprocessing == "imagenet":
            pixels = torch.stack([imagenet_pixels(image) for image in images])
        else:
            pixels = self.processor(images=images, return_tensors="pt").pixel_values
        return F.normalize(self.model(pixels.to(self.model.device)).last_hidden_state[:, 0], dim=-1)


def imagenet_pixels(image: Image.Image) -> torch.Tensor:
    """(3, 224, 224): short side to 256 bicubic, centre crop, ImageNet's mean and deviation.

    As papers that report DINO scores prepare images. The processor that comes with facebook/dino-vits16 instead
    squeezes the whole picture to 224 x 224, bilinear.
    """
    scale = 256 / min(image.size)
    width, height = (max(256, int(side * scale)) for side in image.size)
    left, top = round((width - 224) / 2), round((height - 224) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized.crop((left, top, left + 224, top + 224)), dtype=np.float32) / 255
    return torch.from_numpy((pixels - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)).permute(2, 0, 1)


# --- Scoring ------------------------------------------------------------------------------------------------------


def score(args: argparse.Namespace, todo: list[Picture], accelerator: Accelerator) -> Rows:
    """Rows of images.csv for this process's share, written to a file of its own as they come."""
    if not todo:
        return []
    clip = Clip(args.clip_model, accelerator.device)
    dino = Dino(args.dino_model, args.dino_preprocessing, accelerator.device)
    rows = []
    with (
        ThreadPoolExecutor(args.num_workers) as pool,
        part_file(args, accelerator).open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, IMAGE_COLUMNS)
        writer.writeheader()
        references = {
            subject: reference_means(clip, dino, list(pool.map(read_image, args.benchmark.references(subject))))
            for subject in {picture.subject: None for picture in todo}
        }
        progress = tqdm(total=len(todo), desc="scoring", unit="image", disable=not accelerator.is_main_process)
        for batch in batches(todo, args.batch_size):
            images = list(pool.map(read_image, [args.images_dir / picture.file for picture in batch]))
            scored = score_batch(clip, dino, batch, images, references)
            writer.writerows(scored)
            file.flush()
            rows += scored
            progress.update(len(batch))
        progress.close()
    return rows


def units(pictures: list[Picture]) -> list[list[Picture]]:
    """What is scored at once: each image of a subject by itself, but those of a class prompt, whose DIV compares them,
    together."""
    together: dict[str, list[Picture]] = {}
    for picture in pictures:
        name = picture.file.rsplit("/", 1)[0] if picture.of == "class" else picture.file
        together.setdefault(name, []).append(picture)
    return list(together.values())


def batches(pictures: list[Picture], size: int) -> Iterator[list[Picture]]:
    """At most `size` images at a time, or one unit that is larger."""
    batch: list[Picture] = []
    for unit in units(pictures):
        if batch and len(batch) + len(unit) > size:
            yield batch
            batch = []
        batch = batch + unit
    if batch:
        yield batch


def reference_means(clip: Clip, dino: Dino, images: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of the references' unit embeddings: a product with one is the mean cosine with them all."""
    return clip.images(images).mean(0), dino.images(images).mean(0)


def score_batch(clip: Clip, dino: Dino, batch: list[Picture], images: list[Image.Image], references: dict) -> Rows:
    prompts = list({picture.prompt: None for picture in batch})
    texts = dict(zip(prompts, clip.texts(prompts), strict=True))
    clip_images, dino_images = clip.images(images), dino.images(images)
    values = {
        "clip_i": (clip_images * torch.stack([references[picture.subject][0] for picture in batch])).sum(-1),
        "clip_t": (clip_images * torch.stack([texts[picture.prompt] for picture in batch])).sum(-1),
        "dino": (dino_images * torch.stack([references[picture.subject][1] for picture in batch])).sum(-1),
    }
    odd = [metric for metric, column in values.items() if not column.isfinite().all()]
    if odd:
        flag = "--dino_model" if odd == ["dino"] else "--clip_model"
        raise ValueError(f"{flag} gives no number for {batch[0].file} or one after it: get the model again")
    columns = {metric: [f"{value:.6f}" for value in column.tolist()] for metric, column in values.items()}
    columns["div"] = diversity(batch, dino_images)
    return [asdict(one) | {name: column[i] for name, column in columns.items()} for i, one in enumerate(batch)]


def diversity(batch: list[Picture], features: torch.Tensor) -> list[str]:
    """1 minus the mean cosine of each class image with the others of its prompt; nothing where there is no other.

    features: (batch, dim), unit length.
    """
    column = [""] * len(batch)
    places = {picture.file: place for place, picture in enumerate(batch)}
    for unit in units([picture for picture in batch if picture.of == "class"]):
        own = [places[picture.file] for picture in unit]
        if len(own) < 2:
            continue
        cosines = features[own] @ features[own].T
        others = (cosines.sum(1) - cosines.diagonal()) / (len(own) - 1)
        for place, cosine in zip(own, others.tolist(), strict=True):
            column[place] = f"{1 - cosine:.6f}"
    return column


def part_file(args: argparse.Namespace, accelerator: Accelerator) -> Path:
    return args.output_dir / f"images.part{accelerator.process_index}.csv"


def known_rows(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Rows of images.csv and of the parts that an interrupted run left, by file. Half-written lines are dropped.

    Raises:
        ValueError: for a file that is no table.
    """
    rows = {}
    for file in (args.output_dir / "images.csv", *sorted(args.output_dir.glob("images.part*.csv"))):
        if file.is_file():
            try:
                with file.open(newline="", encoding="utf-8") as lines:
                    reader = csv.DictReader(lines)
                    rows |= {
                        row["file"]: row for row in reader if reader.fieldnames == IMAGE_COLUMNS and is_whole(row)
                    }
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(f"{file} is damaged ({error}): remove it, its images are scored again") from error
    return rows


def is_whole(row: dict) -> bool:
    """Whether a line of images.csv was written to its end, and its scores are numbers."""
    try:
        return len(row["key"] or "") == 16 and all(math.isfinite(float(row[metric])) for metric in METRICS)
    except (TypeError, ValueError):
        return False


def gather_parts(args: argparse.Namespace) -> None:
    """Take what an interrupted run has left into images.csv."""
    rows = known_rows(args)
    if rows:
        write_csv(args.output_dir / "images.csv", IMAGE_COLUMNS, rows.values())
    remove_parts(args)


def remove_parts(args: argparse.Namespace) -> None:
    for file in args.output_dir.glob("images.part*.csv"):
        file.unlink()


def write_csv(file: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    """Written beside its name, then renamed: what was there stays until the new one is whole."""
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, file)


# --- Means and intervals ------------------------------------------------------------------------------------------


def summarise(args: argparse.Namespace, rows: Rows) -> dict:
    """scores.json: each method's mean and interval of each metric, its subjects' and their prompts' means, its tags.

    PRES and DIV stand where all subjects of the method have them.
    """
    methods = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        names = dict.fromkeys(row["subject"] for row in own)
        subjects = {name: subject_scores([row for row in own if row["subject"] == name]) for name in names}
        metrics = [m for m in (*METRICS, *CLASS_METRICS) if all(m in scores for scores in subjects.values())]
        table = np.array([[scores[metric] for metric in metrics] for scores in subjects.values()])
        low, high = bootstrap(table, args.bootstrap_samples, args.seed)
        columns = zip(metrics, *(row.round(6).tolist() for row in (table.mean(0), low, high)), strict=True)
        summary = {name: dict(zip(("mean", "low", "high"), numbers, strict=True)) for name, *numbers in columns}
        images = sum(row["of"] == "subject" for row in own)
        methods[method] = {"tags": args.tags[method], "images": images, **summary}
        methods[method]["subjects"] = subjects
        methods[method]["prompts"] = {name: prompt_scores(own, name) for name in names}
    models = {name: getattr(args, name) for name in ("clip_model", "dino_model", "dino_preprocessing")}
    intervals = {"bootstrap_samples": args.bootstrap_samples, "seed": args.seed}
    return {"metrics": models, "intervals": intervals, "methods": methods}


def subject_scores(rows: Rows) -> dict[str, float]:
    """The means over a subject's images, and PRES and DIV over those of its class prompts where there are such."""
    of_subject = [row for row in rows if row["of"] == "subject"]
    of_class = [row for row in rows if row["of"] == "class"]
    columns = {metric: [float(row[metric]) for row in of_subject] for metric in METRICS}
    columns["pres"] = [float(row["dino"]) for row in of_class]
    columns["div"] = [float(row["div"]) for row in of_class if row["div"]]
    return {metric: round(float(np.mean(values)), 6) for metric, values in columns.items() if values}


def prompt_scores(rows: Rows, subject: str) -> dict[str, dict[str, float]]:
    """Of each prompt of a subject the means over its images, and how many these are: table.py compares what two
    methods have in common."""
    by_prompt: dict[str, Rows] = {}
    for row in rows:
        if row["subject"] == subject and row["of"] == "subject":
            by_prompt.setdefault(str(row["prompt_index"]), []).append(row)
    scores = {}
    for index, own in by_prompt.items():
        scores[index] = {"images": len(own)}
        for metric in METRICS:
            scores[index][metric] = round(float(np.mean([float(row[metric]) for row in own])), 6)
    return scores


def read_tags(folder: Path) -> dict:
    """What the method's manifest.json says about it, if there is one. `ValueError` where it cannot be read."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return {}
    try:
        tags = dict(json.loads(manifest.read_text(encoding="utf-8")).get("tags", {}))
        json.dumps(tags, allow_nan=False)
    except (ValueError, TypeError, AttributeError) as error:
        wanted = '{"tags": {"backbone": "sd15"}}'
        raise ValueError(f"{manifest} is damaged ({error}): mend it, such as {wanted}, or remove it") from error
    return tags


def write_scores(args: argparse.Namespace, scores: dict) -> None:
    metrics = (*METRICS, *CLASS_METRICS)
    spread = [f"{metric}{end}" for metric in metrics for end in ("", "_low", "_high")]
    totals, subjects = [], []
    for method, entry in scores["methods"].items():
        row = {"method": method, "subjects": len(entry["subjects"]), "images": entry["images"]}
        for metric in (metric for metric in metrics if metric in entry):
            for column, end in zip(("", "_low", "_high"), ("mean", "low", "high"), strict=True):
                row[metric + column] = f"{entry[metric][end]:.6f}"
        totals.append(row)
        subjects += [{"method": method, "subject": name} | means for name, means in entry["subjects"].items()]
    write_csv(args.output_dir / "scores.csv", ["method", "subjects", "images", *spread], totals)
    write_csv(args.output_dir / "subjects.csv", ["method", "subject", *metrics], subjects)
    temporary = args.output_dir / ".scores.json.tmp"
    temporary.write_text(json.dumps(scores, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, args.output_dir / "scores.json")


def notes(pictures: list[Picture], methods: dict) -> Iterator[str]:
    """What a reader of the scores should know about the images they come from."""
    counts = {method: Counter() for method in methods}
    for picture in pictures:
        if picture.of == "subject":
            counts[picture.method][picture.subject, picture.prompt_index] += 1
    if len({frozenset(count.items()) for count in counts.values()}) > 1:
        sizes: dict[str, list[str]] = {}
        for method, count in counts.items():
            size = f"{count.total()} images of {len(methods[method]['subjects'])} subjects"
            sizes.setdefault(size, []).append(method)
        sets = "; ".join(f"{size}: {', '.join(names)}" for size, names in sizes.items())
        yield f"the methods differ in subjects, prompts or number of images, so compare with care: {sets}"
    if any(len(entry["subjects"]) == 1 for entry in methods.values()):
        yield "an interval over one subject has no width and says nothing"
    for method, entry in methods.items():
        having = sum("pres" in scores for scores in entry["subjects"].values())
        if 0 < having < len(entry["subjects"]):
            lack = f"{having} of its {len(entry['subjects'])} subjects have images of class prompts"
            yield f"{method} has no PRES and no DIV, since {lack}: make the others by generate.py --class_prompts"


def print_scores(scores: dict) -> None:
    width = max(len("method"), *map(len, scores["methods"]))
    entries = scores["methods"].values()
    metrics = [metric for metric in (*METRICS, *CLASS_METRICS) if any(metric in entry for entry in entries)]
    print(f"\nMeans over n subjects, with 95 % intervals from {FEWEST_SUBJECTS} subjects on")
    print(f"{'method':<{width}}{'n':>4}" + "".join(f"{metric:>24}" for metric in metrics))
    for method, entry in scores["methods"].items():
        subjects = entry["subjects"]
        cells = []
        for metric in metrics:
            if metric in entry:
                interval = bounds(entry[metric]["low"], entry[metric]["high"], subjects)
                cells.append(f"{entry[metric]['mean']:.4f} {interval}".rstrip())
            else:
                cells.append("")
        print(f"{method:<{width}}{len(subjects):>4}" + "".join(f"{cell:>24}" for cell in cells))


def main(args: argparse.Namespace) -> None:
    """Score what is new, on all processes; the first one writes."""
    disable_progress_bar()  # of the loading of weights, a line a model and process
    accelerator = Accelerator()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        gather_parts(args)
    accelerator.wait_for_everyone()
    known = known_rows(args)
    accelerator.wait_for_everyone()  # all have read before one begins to write
    keys = {file: row["key"] for file, row in known.items()}
    todo = [unit for unit in units(args.pictures) if any(keys.get(one.file) != one.key for one in unit)]
    accelerator.print(f"{len(args.pictures)} images, {sum(map(len, todo))} to score")
    share = [picture for unit in todo[accelerator.process_index :: accelerator.num_processes] for picture in unit]
    scored = gather_object(score(args, share, accelerator))
    if not accelerator.is_main_process:
        return
    known |= {row["file"]: row for row in scored}
    rows = [known[picture.file] for picture in args.pictures]
    others = [row for row in known.values() if args.methods and row["method"] not in args.methods]
    write_csv(args.output_dir / "images.csv", IMAGE_COLUMNS, [*rows, *others])
    remove_parts(args)
    scores = summarise(args, rows)
    write_scores(args, scores)
    print_scores(scores)
    for note in notes(args.pictures, scores["methods"]):
        print(f"note: {note}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except ValueError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
