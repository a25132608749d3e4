# SPDX-License-Identifier: Apache-2.0
"""What tiny_experiments.py found, with intervals: tables in Markdown, figures, and a row for every method in a CSV.

    python tiny_report.py --output_dir outputs/tiny --results_dir outputs/tiny/results

Scores the pictures (evaluate.py, the world's attribute network) and answers, for each backbone that is there:

    run.md                        what was run, of all that tiny_experiments.py can
    tendencies.md, answer.png     does what the paper says of w, of its two anchors and of its baselines happen here?
    frontier.md, frontier.png     does the anchor reach what w = 0, stopped early, at a low rate or rank, does not?
    budget.md                     the anchor and prior preservation at equal steps and at equal compute
    masks.md, neighbours.md       masks of the subject; DCO, differential output preservation, L2
    drift.png, pictures.jpg       drift against steps; one subject's pictures
    methods.csv                   all means

A number is a mean over subjects, of means over seeds; n is how many (subjects x seeds). Brackets are 95 % t intervals
over subjects, jackknifed where a number is not a plain mean. Differences are paired by subject and seed. "Holds" and
"does not" need intervals without zero. Fidelity is the mean of CLIP-I and DINO, alignment is CLIP-T.
"""

import argparse
import csv
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tiny_experiments import EQUAL_COMPUTE, PRIOR, RANK, RATE, SAP, WORLD, at_rate, forget_accelerate, planned
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "dreambench"))
import evaluate  # noqa: E402
from benchmark import HelpFormatter, load_script, read_benchmark, read_image  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first: there may be no display)

BACKBONES = {"sd15": "SD1.5", "sdxl": "SDXL", "sd3": "SD3"}
COLOURS = {"SD1.5": "#1f77b4", "SDXL": "#d97706", "SD3": "#2c8a4b"}
T975 = (np.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t by degrees of freedom
W0, W1, BASE, FINETUNED = "w0-pretrained", "w1-pretrained", "base", "w0.5-finetuned"
CURVE = {W0: 0.0, "w0.25-pretrained": 0.25, SAP: 0.5, "w0.75-pretrained": 0.75, W1: 1.0}
MASKED = {f"{run}-masked": run for run in (SAP, "w0.25-pretrained")}
NAMES = {run: f"w = {w:g}" for run, w in CURVE.items()} | {
    BASE: "base model", PRIOR: "prior preservation", FINETUNED: "w = 0.5, finetuned anchor", "dco": "DCO",
    "dop": "output preservation", "l2": "L2 on the LoRA", f"{SAP}-masked": "w = 0.5, masks",
    "w0.25-pretrained-masked": "w = 0.25, masks"}  # fmt: skip
STOPPED = {W0: "w = 0 stopped early", at_rate(W0, RATE / 4): f"rate {RATE / 4:g}, stopped early",
           f"{W0}-rank{RANK // 8}": f"rank {RANK // 8}, stopped early"}  # fmt: skip
METRICS = {"clip_t": "CLIP-T", "clip_i": "CLIP-I", "dino": "DINO", "fidelity": "fidelity", "drift": "drift",
           "leak": "leak", "scene": "scene right", "seconds": "seconds"}  # fmt: skip

Pairs = dict[tuple[str, int], float]  # (subject, seed) -> a number


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, and the subjects and seeds behind it."""

    mean: float
    low: float
    high: float
    subjects: int
    seeds: int

    def side(self) -> int:
        """1 or -1 where the interval is above or below zero, else 0."""
        return int(self.low > 0) - int(self.high < 0)

    def rounded(self, *numbers: float) -> str:
        """The mean, or other numbers to as many digits."""
        digits = 1 if abs(self.mean) >= 10 else 2 if abs(self.mean) >= 2 else 3
        texts = [f"{number:.{digits}f}" for number in numbers or [self.mean]]
        return ", ".join(re.sub(r"^(-?)0\.", r"\1.", text) for text in texts)

    def __str__(self) -> str:
        return self.rounded() + (f" [{self.rounded(self.low, self.high)}]" if self.subjects > 1 else "")


@dataclass(frozen=True)
class Tendency:
    """A claim: the first run of each pair is above (sign 1) or below (-1) the second in a metric."""

    claim: str
    metric: str
    sign: int
    pairs: tuple[tuple[str, str], ...]


TENDENCIES = (
    Tendency("drift falls with w", "drift", -1, ((SAP, W0), (W1, SAP))),
    Tendency("text alignment rises with w", "clip_t", 1, ((SAP, W0), (W1, SAP))),
    Tendency("fidelity falls with w", "fidelity", -1, ((SAP, W0), (W1, SAP))),
    Tendency("the pretrained anchor aligns better than the finetuned one", "clip_t", 1, ((SAP, FINETUNED),)),
    Tendency("w = 0.5 drifts less than prior preservation", "drift", -1, ((SAP, PRIOR),)),
    Tendency("w = 0.5 is above w = 0 in fidelity", "fidelity", 1, ((SAP, W0),)),
    Tendency("w = 0.5 is above prior preservation in fidelity", "fidelity", 1, ((SAP, PRIOR),)),
)


class Found:
    """What was measured of one backbone."""

    def __init__(self, backbone: str):
        self.backbone, self.name = backbone, BACKBONES[backbone]
        self.points: dict[tuple[str, int], dict[str, Pairs]] = {}  # (run, step) -> metric -> numbers

    def put(self, run: str, step: int, metric: str, pair: tuple[str, int], value: float) -> None:
        self.points.setdefault((run, step), {}).setdefault(metric, {})[pair] = value

    @property
    def last(self) -> int:
        """The last step of every run."""
        return max(step for _, step in self.points)

    def get(self, run: str, metric: str, step: int | None = None) -> Pairs:
        """The numbers of a run's last step, or of another one; empty where there are none."""
        step = (0 if run == BASE else self.last) if step is None else step
        return self.points.get((run, step), {}).get(metric, {})

    def steps(self, run: str, metric: str) -> list[int]:
        return sorted(step for name, step in self.points if name == run and self.get(run, metric, step))

    def minus(self, one: str, other: str, metric: str) -> Estimate | None:
        return difference(self.get(one, metric), self.get(other, metric))


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="folder of tiny_experiments.py")
    add("--results_dir", type=Path, help="gets tables and figures; OUTPUT_DIR/results by default")
    add("--world", type=Path, default=WORLD, help="folder of pipelines, data and metric models, as there")
    add("--shown", metavar="SUBJECT", help="whose pictures are shown; by default those of the first")
    args = parser.parse_args(arguments)
    args.results_dir = args.results_dir or args.output_dir / "results"
    if not any(args.output_dir.glob("images/*-seed*/manifest.json")):
        parser.error(f"--output_dir: {args.output_dir} has no images of a LoRA; run tiny_experiments.py first")
    args.benchmark = read_benchmark(args.world / "dataset")
    return args


# --- Numbers ------------------------------------------------------------------------------------------------------


def read_all(args: argparse.Namespace) -> list[Found]:
    """Everything that was measured; pictures are scored if need be."""
    data = {backbone: Found(backbone) for backbone in BACKBONES}
    for method, entry in score(args).items():
        tags = entry["tags"]
        found, place, seed = data[tags["backbone"]], (tags["run"], tags["steps"]), tags.get("seed", 0)
        for subject, scores in entry["subjects"].items():
            for metric, value in (scores | {"fidelity": (scores["clip_i"] + scores["dino"]) / 2}).items():
                found.put(*place, metric, (subject, seed), value)
        for file in (args.output_dir / "loras" / method).glob("*/seconds.json"):  # none where it was stopped early
            found.put(*place, "seconds", (file.parent.name, seed), json.loads(file.read_text()))
    for plain in (False, True):
        read_attributes(args, data, plain)
    for file in sorted(args.output_dir.glob("drift/*/*/drift.csv")):
        backbone, subject = file.parts[-3:-1]
        with file.open(newline="") as lines:
            for row in csv.DictReader(lines):
                run, seed = row["label"].removeprefix(f"{backbone}-").rsplit("-seed", 1)
                data[backbone].put(run, int(row["step"]), "drift", (subject, int(seed)), float(row["same_l2"]))
    return [found for found in data.values() if any(step > 0 for _, step in found.points)]


def score(args: argparse.Namespace) -> dict[str, dict]:
    """evaluate.py's scores of all pictures."""
    folders = [f"--images_dir={args.output_dir / 'images'}", f"--output_dir={args.output_dir / 'scores'}"]
    models = [f"--clip_model={args.world / 'clip'}", f"--dino_model={args.world / 'vit'}", "--bootstrap_samples=1"]
    forget_accelerate()
    evaluate.main(evaluate.parse_args([f"--data_dir={args.world / 'dataset'}", *folders, *models]))
    return json.loads((args.output_dir / "scores" / "scores.json").read_text(encoding="utf-8"))["methods"]


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
        for one in told["images"]:
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


# --- Intervals ----------------------------------------------------------------------------------------------------


def subject_means(pairs: Pairs) -> dict[str, float]:
    subjects = dict.fromkeys(subject for subject, _ in pairs)
    return {one: float(np.mean([value for (s, _), value in pairs.items() if s == one])) for one in subjects}


def jackknife(statistic: Callable[[list[str]], float], subjects: list[str], seeds: int) -> Estimate:
    """A statistic of some subjects, with a t interval over them: for a mean this is the usual one."""
    n, whole = len(subjects), statistic(subjects)
    if n < 2:
        return Estimate(whole, whole, whole, n, seeds)
    without = np.array([statistic([one for one in subjects if one != left]) for left in subjects])
    pseudo = n * whole - (n - 1) * without
    reach = T975[n - 1] * pseudo.std(ddof=1) / np.sqrt(n)
    return Estimate(float(pseudo.mean()), float(pseudo.mean() - reach), float(pseudo.mean() + reach), n, seeds)


def estimate(pairs: Pairs) -> Estimate:
    """The mean over subjects of means over seeds."""
    means = subject_means(pairs)
    return jackknife(lambda chosen: float(np.mean([means[one] for one in chosen])), list(means), seeds_in(pairs))


def seeds_in(pairs: Pairs) -> int:
    return len({seed for _, seed in pairs})


def difference(one: Pairs, other: Pairs) -> Estimate | None:
    """One minus the other, paired by subject and seed; None where they have nothing in common."""
    common = {pair: one[pair] - other[pair] for pair in one if pair in other}
    return estimate(common) if common else None


# --- The answers --------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: list[Sequence[object]]) -> str:
    if not rows:
        return "Not run."
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join("" if c is None else str(c) for c in row) + " |" for row in rows)])


def counted(pairs: Pairs) -> str:
    return f"{len(subject_means(pairs))} x {seeds_in(pairs)}" if pairs else "not run"


def what_was_run(args: argparse.Namespace, backbones: list[Found]) -> str:
    """A row a run, a column a backbone."""
    found = {one.backbone: one for one in backbones}
    best = {backbone: rates_of(args, one)["best"] for backbone, one in found.items()}
    rows = []
    for part, runs in planned().items():
        for run in runs:
            cells = [counted(found[b].get(run.name, "clip_t") if b in found else {}) for b in BACKBONES]
            rows.append([part, run.name, *cells])
    for method in (SAP, PRIOR):
        names = {b: at_rate(method, rates[method]) for b, rates in best.items() if rates}
        cells = [counted(found[b].get(names[b], "clip_t") if b in names else {}) for b in BACKBONES]
        rows.append(["budget", f"{method} at its best rate", *cells])
    steps = ", ".join(f"{one.last} steps on {one.name}" for one in backbones)
    return table(["part", "run", *BACKBONES.values()], rows) + f"\n\nSubjects x seeds of {steps}."


def judge(tendency: Tendency, found: Found) -> tuple[str, list[Estimate]]:
    """A verdict, and the differences that were measured; one subject alone has no interval and proves nothing."""
    differences = [found.minus(*pair, tendency.metric) for pair in tendency.pairs]
    known = [one for one in differences if one is not None]
    if len(known) < len(differences):
        return "not run", known
    sides = {one.side() * tendency.sign if one.subjects > 1 else 0 for one in known}
    return "holds" if sides == {1} else "does not" if -1 in sides else "not sure", known


def tendencies(backbones: list[Found]) -> str:
    rows = []
    for one in TENDENCIES:
        pairs = "; ".join(f"{NAMES[a]} - {NAMES[b]}" for a, b in one.pairs)
        row = [f"{one.claim} ({METRICS[one.metric]}: {pairs})"]
        for verdict, differences in (judge(one, found) for found in backbones):
            row.append(f"**{verdict}** {'; '.join(map(str, differences))}")
        rows.append(row)
    return table(["", *(found.name for found in backbones)], rows)


def places_of(found: Found, run: str) -> list[tuple[str, int]]:
    """The points of a run that is stopped early: the base model, then its steps."""
    return [(BASE, 0), *((run, step) for step in found.steps(run, "clip_t"))]


def densely(points: np.ndarray) -> np.ndarray:
    """A line through points (P, 2), with many points on each piece of it."""
    share = np.linspace(0, 1, 51)[:, None]
    return np.concatenate([a + share * (b - a) for a, b in zip(points[:-1], points[1:], strict=True)])


def best_at(points: np.ndarray, level: float, along: int) -> float:
    """The best of one coordinate on the line through `points` (P, 2) where the other one, `along`, is at least
    `level`; nan where it never is."""
    line = densely(points)
    reached = line[line[:, along] >= level, 1 - along]
    return float(reached.max()) if len(reached) else np.nan


def gain(found: Found, point: str, run: str, along: int) -> Estimate | None:
    """How far a point lies above the line of a run that is stopped early: in fidelity at its alignment (along 0), or
    in alignment at its fidelity (along 1). Of the subjects and seeds that all have; the base model has no seed."""
    places = [(point, found.last), *places_of(found, run)]
    numbers = [[found.get(name, metric, step) for metric in ("clip_t", "fidelity")] for name, step in places]
    pairs = set.intersection(*(set(alignment) for alignment, _ in (numbers[0], *numbers[2:])))
    subjects = sorted({subject for subject, _ in pairs} & set(subject_means(numbers[1][0])))
    if len(places) < 4 or not subjects:
        return None
    means = [
        [subject_means({p: v for p, v in one.items() if name == BASE or p in pairs}) for one in both]
        for (name, _), both in zip(places, numbers, strict=True)
    ]

    def statistic(chosen: list[str]) -> float:
        points = np.array([[np.mean([metric[s] for s in chosen]) for metric in both] for both in means])
        return points[0, 1 - along] - best_at(points[1:], points[0, along], along)

    return jackknife(statistic, subjects, len({seed for _, seed in pairs}))


def frontier(backbones: list[Found]) -> str:
    """A row a point of the anchor: how far it lies above the lines of w = 0 that is stopped early, as it is, at a low
    rate and at a low rank."""
    kinds, rows = [(W0, 0), (W0, 1), *((run, 0) for run in STOPPED if run != W0)], []
    for found in backbones:
        for point in [*(point for point, w in CURVE.items() if w > 0), *MASKED]:
            gains = [gain(found, point, *kind) for kind in kinds]
            if gains[0] is not None:
                sizes = dict.fromkeys(f"{one.subjects} x {one.seeds}" for one in gains if one is not None)
                rows.append([found.name, NAMES[point], *map(marked, gains), "; ".join(sizes)])
    titles = [f"{STOPPED[run]}: {('fidelity', 'alignment')[along]}" for run, along in kinds]
    return table(["", "", *titles, "n"], rows)


def marked(one: Estimate | None) -> str:
    """In bold where the interval is without zero; a point of more fidelity than a whole line has none beside it."""
    if one is None or np.isnan(one.mean):
        return "not run" if one is None else "beyond its end"
    return f"**{one}**" if one.side() else str(one)


def rates_of(args: argparse.Namespace, found: Found) -> dict:
    """What tiny_experiments.py found of the rates; without best ones where it did not look."""
    file = args.output_dir / f"rates-{found.backbone}.json"
    return json.loads(file.read_text()) if file.is_file() else {"tuning_subjects": [], "best": {}, "totals": {}}


def budget(args: argparse.Namespace, backbones: list[Found]) -> str:
    """The anchor minus prior preservation, each at its best rate, on the subjects no rate was chosen on."""
    rows, notes = [], []
    for found in backbones:
        rates = rates_of(args, found)
        sap, prior = (at_rate(run, rates["best"].get(run, RATE)) for run in (SAP, PRIOR))
        shown = [f"{NAMES[run]} " + ", ".join(f"{total:.3f} at {rate}" for rate, total in totals.items())
                 + f", taken is {rates['best'][run]:g}" for run, totals in rates["totals"].items()]  # fmt: skip
        notes.append(f"- {found.name}: {'; '.join(shown) or f'not tuned, {RATE:g} for both'}.")
        spent = [found.get(run, "seconds") for run in (SAP, PRIOR)]
        if cost := {pair: spent[1][pair] / spent[0][pair] for pair in spent[0] if pair in spent[1]}:
            notes[-1] += f" Training with prior preservation took {estimate(cost)} times as long."
        for title, step in (("steps", found.last), ("compute", round(EQUAL_COMPUTE * found.last))):
            cells = []
            for metric in ("clip_t", "fidelity", "drift"):
                pairs = [found.get(sap, metric), found.get(prior, metric, step)]
                scored = [{p: v for p, v in one.items() if p[0] not in rates["tuning_subjects"]} for one in pairs]
                cells.append(difference(*scored))
            if cells[0] is not None:
                title = f"equal {title}: {found.last} steps, {step} of prior preservation"
                rows.append([found.name, title, *cells, f"{cells[0].subjects} x {cells[0].seeds}"])
    head = ["", "w = 0.5 - prior preservation", "CLIP-T", "fidelity", "drift", "n"]
    return table(head, rows) + "\n\nRates by CLIP-T + fidelity on the tuning subjects:\n\n" + "\n".join(notes)


def masks(backbones: list[Found]) -> str:
    """How often the references' scenes leak with and without masks, and what masks change beside that."""
    rows = []
    for found in backbones:
        for masked, run in MASKED.items():
            if found.get(masked, "leak"):
                leaks = [found.get(one, "leak") for one in (BASE, W0, run, masked)]
                more = [marked(found.minus(masked, run, metric)) for metric in ("leak", "clip_t", "fidelity")]
                leaks = [estimate(one).rounded() if one else None for one in leaks]
                rows.append([found.name, NAMES[run], *leaks, *more, counted(found.get(masked, "leak"))])
    head = ["", "", "leak: base model", "w = 0", "this w", "with masks", "masks' change of leak", "of CLIP-T"]
    return table([*head, "of fidelity", "n"], rows)


def neighbour_rows(backbones: list[Found]) -> str:
    """The neighbours and the baselines beside w = 0.5, and what each is beyond it."""
    rows = []
    for found in backbones:
        for run in (SAP, W0, PRIOR, "dco", "dop", "l2"):
            if found.get(run, "clip_t"):
                values = [found.get(run, metric) for metric in ("drift", "leak", "seconds")]
                values = [estimate(one).rounded() if one else None for one in values]
                beyond = [marked(found.minus(run, SAP, m)) if run != SAP else None for m in ("clip_t", "fidelity")]
                rows.append([found.name, NAMES[run], *beyond, *values, counted(found.get(run, "clip_t"))])
    head = ["", "", "CLIP-T beyond w = 0.5", "fidelity beyond w = 0.5", "drift", "leak", "seconds", "n"]
    return table(head, rows)


def write_methods(file: Path, backbones: list[Found]) -> None:
    """A row for each run and step: all metrics with their intervals."""
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        ends = [f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high")]
        writer.writerow(["backbone", "run", "steps", "subjects", "seeds", *ends])
        for found in backbones:
            for run, step in sorted(found.points):
                cells = []
                for pairs in (found.get(run, metric, step) for metric in METRICS):
                    one = estimate(pairs) if pairs else None
                    cells += ["", "", ""] if one is None else [f"{x:.4f}" for x in (one.mean, one.low, one.high)]
                measured = next(iter(found.points[run, step].values()))
                writer.writerow([found.backbone, run, step, len(subject_means(measured)), seeds_in(measured), *cells])


# --- Figures ------------------------------------------------------------------------------------------------------


def draw_answer(file: Path, backbones: list[Found]) -> None:
    """A panel a tendency: the differences with their intervals; on the green side of zero it holds."""
    figure, axes = plt.subplots(2, 4, figsize=(13, 5.2))
    for axis, one in zip(axes.flat, TENDENCIES, strict=False):
        verdicts = [judge(one, found) for found in backbones]
        for number, (found, (_, differences)) in enumerate(zip(backbones, verdicts, strict=True)):
            for shift, estimated in enumerate(differences):
                y = -number - 0.28 * shift + 0.14 * (len(differences) - 1)
                reach = [[estimated.mean - estimated.low], [estimated.high - estimated.mean]]
                style = {"fmt": "os"[shift], "color": COLOURS[found.name], "capsize": 3, "markersize": 5}
                axis.errorbar(estimated.mean, y, xerr=reach, **style)
        axis.axvline(0, color="black", linewidth=0.8)
        left, right = axis.get_xlim()
        axis.axvspan(*((0, right) if one.sign > 0 else (left, 0)), color="#2c8a4b", alpha=0.1, linewidth=0)
        axis.set_xlim(left, right)
        names = [f"{found.name}\n{verdict}" for found, (verdict, _) in zip(backbones, verdicts, strict=True)]
        axis.set_yticks([-n for n in range(len(backbones))], names, fontsize=8)
        axis.set_ylim(-len(backbones) + 0.5, 0.5)
        axis.set_title(one.claim.replace("than the", "than\nthe").replace(" than prior", "\nthan prior"), fontsize=8.5)
        axis.set_xlabel(METRICS[one.metric], fontsize=8)
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


def centre(found: Found, run: str, step: int | None = None) -> tuple[float, ...]:
    return tuple(estimate(found.get(run, metric, step)).mean for metric in ("clip_t", "fidelity"))


def draw_frontier(file: Path, backbones: list[Found]) -> None:
    """Fidelity against alignment: over w, and over the steps of w = 0."""
    figure, axes = plt.subplots(1, len(backbones), figsize=(4.4 * len(backbones), 4.2), squeeze=False)
    for axis, found in zip(axes[0], backbones, strict=True):
        for (run, label), style in zip(STOPPED.items(), ("o--", "v:", "^:"), strict=True):
            if not found.get(run, "clip_t"):
                continue
            stops = {step: centre(found, name, step) for name, step in places_of(found, run)}
            colour = "0.35" if run == W0 else "0.65"
            axis.plot(*zip(*stops.values(), strict=True), style, color=colour, markersize=4, linewidth=1, label=label)
            for step, point in stops.items() if run == W0 else ():
                text = f"{step} steps" if step else "base"
                axis.annotate(text, point, (4, 4), textcoords="offset points", fontsize=7, color=colour)
        curve = {NAMES[run][4:]: centre(found, run) for run in CURVE if found.get(run, "clip_t")}
        if curve:
            ends = {"color": COLOURS[found.name], "markersize": 5, "label": "the anchor, over w"}
            axis.plot(*zip(*curve.values(), strict=True), "s-", **ends)
        for w, point in curve.items():
            axis.annotate(w, point, (5, -10), textcoords="offset points", fontsize=8)
        marks = {PRIOR: "P", FINETUNED: "X", f"{SAP}-masked": "*", "dco": "d", "dop": "h", "l2": "<"}
        for run in (run for run in marks if found.get(run, "clip_t")):
            axis.plot(*centre(found, run), marks[run], markersize=7, color="#a02c2c", alpha=0.8, label=NAMES[run])
        axis.set(title=found.name, xlabel="alignment (CLIP-T)", ylabel="fidelity (CLIP-I, DINO)")
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    save(figure, file)


def draw_drift(file: Path, backbones: list[Found]) -> None:
    """Drift against steps, with intervals over subjects."""
    figure, axes = plt.subplots(1, len(backbones), figsize=(4.4 * len(backbones), 3.6), squeeze=False)
    for axis, found in zip(axes[0], backbones, strict=True):
        for run in (W0, SAP, W1, FINETUNED, PRIOR):
            values = {step: estimate(found.get(run, "drift", step)) for step in found.steps(run, "drift")}
            if len(values) > 2:  # two points, the start and the end, are no curve
                (line,) = axis.plot(list(values), [one.mean for one in values.values()], "o-", markersize=3)
                line.set_label(NAMES[run])
                ends = [[one.low for one in values.values()], [one.high for one in values.values()]]
                axis.fill_between(list(values), *ends, color=line.get_color(), alpha=0.15, linewidth=0)
                axis.legend(fontsize=8)
        axis.set(title=found.name, xlabel="training step", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("drift: L2 distance to the base's\nprediction on the class prompt, same $z_t$")
    save(figure, file)


def draw_pictures(args: argparse.Namespace, file: Path, backbones: list[Found]) -> None:
    """One subject: its references, and for each backbone a row a method, a column a prompt, of the first seed."""
    edge, margin = 64, 112
    subject = args.shown or min(path.name for path in args.output_dir.glob("images/*-seed*/*") if path.is_dir())
    rows = [("the photos", args.benchmark.references(subject))]
    for found in backbones:
        for run in (BASE, W0, SAP, f"{SAP}-masked", W1, PRIOR):
            seed = "" if run == BASE else f"-seed{min((seed for _, seed in found.get(run, 'clip_t')), default=0)}"
            folder = args.output_dir / "images" / f"{found.backbone}-{run}{seed}" / subject
            pictures = [folder / str(column) / "0.png" for column in range(len(args.benchmark.templates(subject)))]
            if folder.is_dir():
                rows.append((f"{found.name}\n{NAMES[run]}".replace(" preserv", "\npreserv"), pictures))
    sheet = Image.new("RGB", (margin + max(len(ones) for _, ones in rows) * edge, len(rows) * edge), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for row, (name, pictures) in enumerate(rows):
        pen.text((4, row * edge + 12), name, "black", font)
        for column, picture in enumerate(pictures):
            if picture.is_file():
                sheet.paste(read_image(picture), (margin + column * edge, row * edge))
    sheet.save(file, quality=88)


def main(args: argparse.Namespace) -> None:
    backbones = read_all(args)
    args.results_dir.mkdir(parents=True, exist_ok=True)
    answers = {
        "run": what_was_run(args, backbones),
        "tendencies": tendencies(backbones),
        "frontier": frontier(backbones),
        "budget": budget(args, backbones),
        "masks": masks(backbones),
        "neighbours": neighbour_rows(backbones),
    }
    for name, text in answers.items():
        (args.results_dir / f"{name}.md").write_text(text + "\n", encoding="utf-8")
        print(f"\n## {name}\n\n{text}")
    write_methods(args.results_dir / "methods.csv", backbones)
    draw_answer(args.results_dir / "answer.png", backbones)
    draw_frontier(args.results_dir / "frontier.png", backbones)
    draw_drift(args.results_dir / "drift.png", backbones)
    draw_pictures(args, args.results_dir / "pictures.jpg", backbones)
    print(f"\n{args.results_dir}: {', '.join(sorted(path.name for path in args.results_dir.iterdir()))}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except ValueError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
