# SPDX-License-Identifier: Apache-2.0
"""Measure what tiny_experiments.py made: a row of numbers for every training, all tables, figures.

    python tiny_report.py --output_dir outputs/tiny --results_dir outputs/tiny/results

Scores the pictures (evaluate.py, the world's attribute network) and writes, for the backbones that are there,
subjects.csv (tiny_numbers.py), tables.md, whose tables are made of that file alone (tiny_tables.py), and four figures:
answer.png, frontier.png, drift.png (drift against steps) and pictures.jpg (one subject's pictures).
"""

import argparse
import csv
import itertools
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.transforms import Bbox
from PIL import Image, ImageDraw, ImageFont
from tiny_experiments import WORLD, forget_accelerate
from tiny_numbers import BACKBONES, BASE, TITLES, TUNING_SUBJECTS, Found, estimate, read_subjects, write_subjects
from tiny_plan import PRIOR, SAP
from tiny_tables import CURVE, FINETUNED, NAMES, SHARED, STOPPED, TENDENCIES, W0, W1, judge, tables
from tqdm import tqdm

matplotlib.use("Agg")
import evaluate  # noqa: E402  (tiny_experiments has made examples/dreambench importable)
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first: there may be no display)
from benchmark import CLASS_FOLDER, HelpFormatter, load_script, read_benchmark, read_image  # noqa: E402

COLOURS = {"SD1.5": "#1f77b4", "SDXL": "#d97706", "SD3": "#2c8a4b"}


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="folder of tiny_experiments.py")
    add("--results_dir", type=Path, help="gets numbers, tables and figures; OUTPUT_DIR/results by default")
    add("--world", type=Path, default=WORLD, help="folder of pipelines, data and metric models, as there")
    add("--shown", metavar="SUBJECT", help="whose pictures are shown; by default those of the first")
    args = parser.parse_args(arguments)
    args.results_dir = args.results_dir or args.output_dir / "results"
    if not any(args.output_dir.glob("images/*-seed*/manifest.json")):
        parser.error(f"--output_dir: {args.output_dir} has no images of a LoRA; run tiny_experiments.py first")
    args.benchmark = read_benchmark(args.world / "dataset")
    return args


# --- What was measured --------------------------------------------------------------------------------------------


def read_all(args: argparse.Namespace) -> list[Found]:
    """Everything that was measured; pictures are scored if need be."""
    data = {backbone: Found(backbone) for backbone in BACKBONES}
    for method, entry in score(args, args.world / "dataset", args.output_dir / "images").items():
        put_scores(data, entry, ("clip_t", "clip_i", "dino", "pres"))
        tags = entry["tags"]
        found = data[tags["backbone"]]
        for file in (args.output_dir / "loras" / method).glob("*/seconds.json"):  # none where it was stopped early
            seconds = json.loads(file.read_text())
            found.put(tags["run"], tags["steps"], "seconds", (file.parent.name, tags.get("seed", 0)), seconds)
    plain = args.output_dir / "plain"
    read_attributes(args, data, False)
    if any(plain.glob("images/*/manifest.json")):  # --plain_images 0 draws none
        for entry in score(args, plain / "dataset", plain / "images").values():
            put_scores(data, entry, ("div",))
        read_attributes(args, data, True)
    read_drift(args, data)
    return [found for found in data.values() if any(step > 0 for _, step in found.points)]


def put_scores(data: dict[str, Found], entry: dict, metrics: Sequence[str]) -> None:
    """Some metrics of a method's subjects as evaluate.py has them, where it has them."""
    tags = entry["tags"]
    for subject, scores in entry["subjects"].items():
        if tags["run"] == BASE and "pres" in metrics:
            scores = scores | {"pres": scores["dino"]}  # its only pictures are those of the class prompts
        for metric in (metric for metric in metrics if metric in scores):
            pair = (subject, tags.get("seed", 0))
            data[tags["backbone"]].put(tags["run"], tags["steps"], metric, pair, scores[metric])


def read_drift(args: argparse.Namespace, data: dict[str, Found]) -> None:
    columns = {"drift": "same_l2", "drift_class": "class_l2"}
    for file in sorted(args.output_dir.glob("drift/*/*/drift.csv")):
        backbone, subject = file.parts[-3:-1]
        with file.open(newline="") as lines:
            for row in csv.DictReader(lines):
                run, seed = row["label"].removeprefix(f"{backbone}-").rsplit("-seed", 1)
                for metric, column in columns.items():
                    data[backbone].put(run, int(row["step"]), metric, (subject, int(seed)), float(row[column]))


def score(args: argparse.Namespace, data_dir: Path, images_dir: Path) -> dict[str, dict]:
    """evaluate.py's scores of all pictures of a folder."""
    folders = [f"--images_dir={images_dir}", f"--output_dir={images_dir.parent / 'scores'}"]
    models = [f"--clip_model={args.world / 'clip'}", f"--dino_model={args.world / 'vit'}", "--bootstrap_samples=1"]
    forget_accelerate()
    evaluate.main(evaluate.parse_args([f"--data_dir={data_dir}", *folders, *models]))
    return json.loads((images_dir.parent / "scores" / "scores.json").read_text(encoding="utf-8"))["methods"]


def read_attributes(args: argparse.Namespace, data: dict[str, Found], plain: bool) -> None:
    """By the world's attribute network: how many pictures show the prompt's scene; or, of the prompt that names none,
    how many show one of the two that the references were taken in (leak)."""
    sys.path.insert(0, str(WORLD))  # for its train.py, which imports world
    training = load_script(WORLD / "train.py")
    world, network = training.world, training.load_attributes(args.world, "cpu")
    scenes, column = list(world.SCENES), list(world.ATTRIBUTES).index("scene")
    folder = args.output_dir / ("plain/images" if plain else "images")
    for manifest in tqdm(sorted(folder.glob("*/manifest.json")), desc="Attributes"):
        told = json.loads(manifest.read_text(encoding="utf-8"))
        tags, hits = told["tags"], {}
        for one in (one for one in told["images"] if f"/{CLASS_FOLDER}/" not in one["file"]):
            named = [scene for scene in scenes if world.SCENES[scene] in one["prompt"]]
            wanted = world.SUBJECT_SCENES[one["subject"]] if plain else named
            file = manifest.parent / one["file"]
            if wanted and file.is_file():
                pixels = torch.from_numpy(np.array(read_image(file))).permute(2, 0, 1)[None]
                with torch.no_grad():
                    seen = scenes[network(training.to_float(pixels))[column].argmax()]
                hits.setdefault((one["subject"], tags.get("seed", 0)), []).append(seen in wanted)
        for pair, values in hits.items():
            metric = "leak" if plain else "scene"
            data[tags["backbone"]].put(tags["run"], tags["steps"], metric, pair, float(np.mean(values)))


# --- Figures ------------------------------------------------------------------------------------------------------


def draw_answer(file: Path, backbones: list[Found]) -> None:
    """A panel a tendency: the differences with their intervals; on the green side of zero it holds."""
    figure, axes = plt.subplots(2, 4, figsize=(13, 5.2))
    for axis, one in zip(axes.flat, TENDENCIES, strict=False):
        verdicts = [judge(one, found) for found in backbones]
        for number, (found, (_, differences)) in enumerate(zip(backbones, verdicts, strict=True)):
            for shift, estimated in enumerate(differences):
                y = -number - 0.28 * shift + 0.14 * (len(differences) - 1)
                reach = [[estimated.value - estimated.low], [estimated.high - estimated.value]]
                style = {"fmt": "os"[shift], "color": COLOURS[found.name], "capsize": 3, "markersize": 5}
                axis.errorbar(estimated.value, y, xerr=reach, **style)
        axis.axvline(0, color="black", linewidth=0.8)
        left, right = axis.get_xlim()
        axis.axvspan(*((0, right) if one.sign > 0 else (left, 0)), color="#2c8a4b", alpha=0.1, linewidth=0)
        axis.set_xlim(left, right)
        names = [f"{found.name}\n{verdict}" for found, (verdict, _) in zip(backbones, verdicts, strict=True)]
        axis.set_yticks([-n for n in range(len(backbones))], names, fontsize=8)
        axis.set_ylim(-len(backbones) + 0.5, 0.5)
        axis.set_title(textwrap.fill(one.claim, 38), fontsize=8.5)
        axis.set_xlabel(TITLES[one.metric], fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="x", alpha=0.3)
    axes.flat[-1].axis("off")
    axes.flat[-1].text(0, 0.3, LEGEND, fontsize=8.5, va="center")
    save(figure, file)


LEGEND = """Difference of two methods, paired by subject
and seed, with its 95 % interval over subjects.

Green: the side on which the claim holds.

In the first three panels:
circle  w = 0.5 minus w = 0
square  w = 1 minus w = 0.5"""


def save(figure: plt.Figure, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def draw_frontier(file: Path, backbones: list[Found]) -> None:
    """Fidelity against alignment, and against what is left of the class."""
    titles = {"clip_t": "alignment (CLIP-T)", "pres": "the class's likeness to the subject (PRES)"}
    figure, axes = plt.subplots(2, len(backbones), figsize=(4.4 * len(backbones), 8.2), squeeze=False)
    for row, metric in zip(axes, titles, strict=True):
        for axis, found in zip(row, backbones, strict=True):
            labels = draw_points(axis, found, metric)
            axis.set(title=found.name, xlabel=titles[metric], ylabel="fidelity (CLIP-I, DINO)")
            axis.legend(fontsize=7, loc="lower left" if metric == "clip_t" else "lower right")
            axis.margins(x=0.2)  # for labels at both ends
            axis.grid(alpha=0.3)
            figure.tight_layout()
            write_labels(axis, labels)
    save(figure, file)


def draw_points(axis: plt.Axes, found: Found, metric: str) -> list[tuple[str, tuple[float, ...], str]]:
    """Fidelity against a metric, over w, over the steps of w = 0 and for other methods; returns labels of points."""

    def centre(run: str, step: int | None = None) -> tuple[float, ...]:
        return tuple(estimate(found.get(run, one, step)).value for one in (metric, "fidelity"))

    labels = []
    for (run, label), style in zip(STOPPED.items(), ("o--", "v:", "^:"), strict=True):
        if not found.get(run, metric):
            continue
        stops = {0: centre(BASE, 0)}
        stops |= {step: centre(run, step) for step in found.steps(run, metric)}
        colour = "0.35" if run == W0 else "0.65"
        axis.plot(*zip(*stops.values(), strict=True), style, color=colour, markersize=4, linewidth=1, label=label)
        if run == W0:
            labels += [(f"{step} steps" if step else "base", point, colour) for step, point in stops.items()]
    curve = {NAMES[run]: centre(run) for run in CURVE if found.get(run, metric)}
    if curve:
        ends = {"color": COLOURS[found.name], "markersize": 5, "label": "the anchor, over w"}
        axis.plot(*zip(*curve.values(), strict=True), "s-", **ends)
        labels += [(w, point, "black") for w, point in curve.items()]
    shares = {share: centre(run) for run, share in SHARED.items() if found.get(run, metric)}
    if shares:
        ends = {"color": "#7a3fa0", "markersize": 4, "label": "w = 0.5, a share sees the class prompt"}
        axis.plot(*zip(*shares.values(), strict=True), "D-.", **ends)
        labels += [(f"{share:.0%}", point, "#7a3fa0") for share, point in shares.items()]
    marks = {PRIOR: "P", FINETUNED: "X", f"{SAP}-masked": "*", "dco": "d", "dop": "h", "l2": "<"}
    for run in (run for run in marks if found.get(run, metric)):
        axis.plot(*centre(run), marks[run], markersize=7, color="#a02c2c", alpha=0.8, label=NAMES[run])
    return labels


def write_labels(axis: plt.Axes, labels: Sequence[tuple[str, tuple[float, ...], str]]) -> None:
    """Write each of `labels`, (text, point, colour), beside its point: inside, and over no legend, point or label;
    none where there is no such place."""
    taken = [axis.get_legend().get_window_extent()]
    for line in axis.get_lines():
        for across, up in axis.transData.transform(line.get_xydata()):
            taken.append(Bbox.from_extents(across - 4, up - 4, across + 4, up + 4))
    inside = axis.get_window_extent()
    for text, point, colour in labels:
        for across, up in itertools.product((7, -7, 28, -28, 50), (0, -9, 9, -18, 18, -27, 27)):
            side = "left" if across > 0 else "right"
            beside = {"textcoords": "offset points", "ha": side, "va": "center", "fontsize": 7, "color": colour}
            written = axis.annotate(text, point, (across, up), **beside)
            box = written.get_window_extent()
            within = inside.contains(*box.min) and inside.contains(*box.max)
            if within and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            written.remove()


def draw_drift(file: Path, backbones: list[Found]) -> None:
    """Drift against steps, with intervals over subjects."""
    figure, axes = plt.subplots(1, len(backbones), figsize=(4.4 * len(backbones), 3.6), squeeze=False)
    for axis, found in zip(axes[0], backbones, strict=True):
        for run in (W0, SAP, W1, FINETUNED, PRIOR):
            values = {step: estimate(found.get(run, "drift", step)) for step in found.steps(run, "drift")}
            if len(values) > 2:  # two points, the start and the end, are no curve
                (line,) = axis.plot(list(values), [one.value for one in values.values()], "o-", markersize=3)
                line.set_label(NAMES[run])
                ends = [[one.low for one in values.values()], [one.high for one in values.values()]]
                axis.fill_between(list(values), *ends, color=line.get_color(), alpha=0.15, linewidth=0)
                axis.legend(fontsize=8)
        axis.set(title=found.name, xlabel="training step", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("drift: L2 distance to the base's\nprediction on the class prompt, same $z_t$")
    save(figure, file)


def picture_rows(args: argparse.Namespace, found: Found, subject: str) -> list[tuple[str, list[Path]]]:
    """(name, pictures) of each method with the identifier, and of some without it, by the first seed."""
    rows = []
    for run in (BASE, W0, SAP, f"{SAP}-masked", W1, PRIOR):
        seed = ""
        if run != BASE:
            seed = f"-seed{min((seed for _, seed in found.get(run, 'clip_t')), default=0)}"
        folder = args.output_dir / "images" / f"{found.backbone}-{run}{seed}" / subject
        if not folder.is_dir():
            continue
        prompts = sorted(int(one.name) for one in folder.iterdir() if one.name.isdecimal())
        name = f"{found.name}\n{NAMES[run]}".replace(" preserv", "\npreserv")
        rows.append((name, [folder / str(prompt) / "0.png" for prompt in prompts]))
        if run in (W0, SAP, PRIOR) and (folder / CLASS_FOLDER).is_dir():
            files = [folder / CLASS_FOLDER / str(prompt) / "0.png" for prompt in prompts]
            rows.append((f"the class, after\n{NAMES[run]}".replace(" preserv", "\npreserv"), files))
    return rows


def draw_pictures(args: argparse.Namespace, file: Path, backbones: list[Found]) -> None:
    """One subject: its references, and for each backbone a row a method, a column a prompt; below some a row of the
    class, drawn after training without the identifier."""
    edge, margin = 64, 112
    subject = args.shown or min(path.name for path in args.output_dir.glob("images/*-seed*/*") if path.is_dir())
    rows = [("the photos", args.benchmark.references(subject))]
    for found in backbones:
        rows += picture_rows(args, found, subject)
    sheet = Image.new("RGB", (margin + max(len(ones) for _, ones in rows) * edge, len(rows) * edge), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for row, (name, pictures) in enumerate(rows):
        pen.text((4, row * edge + 12), name, "black", font)
        for column, picture in enumerate(pictures):
            if picture.is_file():
                sheet.paste(read_image(picture), (margin + column * edge, row * edge))
    sheet.save(file, quality=88)


def main(args: argparse.Namespace) -> None:
    args.results_dir.mkdir(parents=True, exist_ok=True)
    write_subjects(args.results_dir / "subjects.csv", read_all(args))
    backbones = read_subjects(args.results_dir / "subjects.csv")
    made = tables(backbones)
    text = "\n\n".join(f"## {name}\n\n{one}" for name, one in made.items())
    (args.results_dir / "tables.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    scored = [found.without(TUNING_SUBJECTS) for found in backbones]
    draw_answer(args.results_dir / "answer.png", scored)
    draw_frontier(args.results_dir / "frontier.png", scored)
    draw_drift(args.results_dir / "drift.png", scored)
    draw_pictures(args, args.results_dir / "pictures.jpg", backbones)
    print(f"\n{args.results_dir}: {', '.join(sorted(path.name for path in args.results_dir.iterdir()))}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except ValueError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
