# SPDX-License-Identifier: Apache-2.0
"""What tiny_experiments.py found, with intervals: tables in Markdown, figures, and a row for every method in a CSV.

    python tiny_report.py --output_dir outputs/tiny --results_dir outputs/tiny/results

Scores the pictures (evaluate.py, the world's attribute network) and answers, for each backbone that is there:

    tendencies.md, answer.png     does what the paper says of w, of its two anchors and of its baselines happen here?
    frontier.md, frontier.png     does the anchor reach what w = 0, stopped early, at a low rate or rank, does not?
    budget.md                     the anchor and prior preservation at equal steps and at equal compute
    masks.md, neighbours.md       masks of the subject; DCO, differential output preservation, L2
    drift.png, pictures.jpg       drift against steps; one subject's pictures
    methods.csv                   all means

A number is a mean over subjects, of means over seeds; brackets are 95 % t intervals over subjects, jackknifed where a
number is not a plain mean. Differences are paired by subject and seed. "Holds" and "does not" need intervals without
zero. Fidelity is the mean of CLIP-I and DINO, alignment is CLIP-T.
"""

import argparse
import csv
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import evaluate
import matplotlib
import numpy as np
import torch
from benchmark import HelpFormatter, load_script, read_benchmark, read_image
from PIL import Image, ImageDraw, ImageFont
from tiny_experiments import EQUAL_COMPUTE, PRIOR, RATE, SAP, TUNING_SUBJECTS, WORLD, forget_accelerate
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first: there may be no display)

BACKBONES = {"sd15": "SD1.5", "sdxl": "SDXL", "sd3": "SD3"}
COLOURS = {"sd15": "#1f77b4", "sdxl": "#d97706", "sd3": "#2c8a4b"}
T975 = (np.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t by degrees of freedom
FIRST_SEED = 0  # the one of the rates
W0, W1, BASE, FINETUNED = "w0-pretrained", "w1-pretrained", "base", "w0.5-finetuned"
CURVE = {W0: 0.0, "w0.25-pretrained": 0.25, SAP: 0.5, "w0.75-pretrained": 0.75, W1: 1.0}
NAMES = {run: f"w = {w:g}" for run, w in CURVE.items()} | {
    BASE: "base model", PRIOR: "prior preservation", FINETUNED: "w = 0.5, finetuned anchor", "dco": "DCO",
    "dop": "output preservation", "l2": "L2 on the LoRA", f"{SAP}-masked": "w = 0.5, masks",
    "w0.25-pretrained-masked": "w = 0.25, masks"}  # fmt: skip
METRICS = {"clip_t": "CLIP-T", "clip_i": "CLIP-I", "dino": "DINO", "drift": "drift", "leak": "leak",
           "scene": "scene right", "hat": "hat there", "seconds": "seconds"}  # fmt: skip

Pairs = dict[tuple[str, int], float]  # (subject, seed) -> a number
Data = dict[tuple[str, str, int], dict[str, Pairs]]  # (backbone, run, step) -> metric -> numbers


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

    def __str__(self) -> str:
        digits = 1 if abs(self.mean) >= 10 else 2 if abs(self.mean) >= 2 else 3
        texts = [f"{number:.{digits}f}".replace("0.", ".", 1) for number in (self.mean, self.low, self.high)]
        return f"{texts[0]} [{texts[1]}, {texts[2]}]" if self.subjects > 1 else texts[0]


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


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="folder of tiny_experiments.py")
    add("--results_dir", type=Path, help="gets tables and figures; OUTPUT_DIR/results by default")
    add("--world", type=Path, default=WORLD, help="folder of pipelines, data and metric models, as there")
    add("--tuning_subjects", nargs="+", default=TUNING_SUBJECTS, help="as there")
    add("--shown", default="fish", metavar="SUBJECT", help="whose pictures are shown")
    args = parser.parse_args(arguments)
    args.results_dir = args.results_dir or args.output_dir / "results"
    if not (args.output_dir / "images").is_dir():
        parser.error(f"--output_dir: {args.output_dir} has no images; run tiny_experiments.py first")
    args.benchmark = read_benchmark(args.world / "dataset")
    return args


# --- Numbers ------------------------------------------------------------------------------------------------------


def read_all(args: argparse.Namespace) -> Data:
    """Everything that was measured; pictures are scored if need be."""
    data: Data = {}
    for method, entry in score(args).items():
        key = place(entry["tags"])
        for subject, scores in entry["subjects"].items():
            pair = (subject, entry["tags"].get("seed", 0))
            for metric, value in (scores | {"fidelity": (scores["clip_i"] + scores["dino"]) / 2}).items():
                put(data, key, metric, pair, value)
        read_seconds(args, data, method, entry["tags"])
    read_attributes(args, data)
    for file in sorted(args.output_dir.glob("drift/*/*/drift.csv")):
        backbone, subject = file.parts[-3:-1]
        with file.open(newline="") as lines:
            for row in csv.DictReader(lines):
                run, seed = row["label"].removeprefix(f"{backbone}-").rsplit("-seed", 1)
                put(data, (backbone, run, int(row["step"])), "drift", (subject, int(seed)), float(row["same_l2"]))
    return data


def put(data: Data, key: tuple[str, str, int], metric: str, pair: tuple[str, int], value: float) -> None:
    data.setdefault(key, {}).setdefault(metric, {})[pair] = value


def place(tags: dict) -> tuple[str, str, int]:
    return tags["backbone"], tags["run"], tags["steps"]


def score(args: argparse.Namespace) -> dict[str, dict]:
    """evaluate.py's scores of all pictures."""
    folders = [f"--images_dir={args.output_dir / 'images'}", f"--output_dir={args.output_dir / 'scores'}"]
    models = [f"--clip_model={args.world / 'clip'}", f"--dino_model={args.world / 'vit'}", "--bootstrap_samples=1"]
    forget_accelerate()
    evaluate.main(evaluate.parse_args([f"--data_dir={args.world / 'dataset'}", *folders, *models]))
    return json.loads((args.output_dir / "scores" / "scores.json").read_text(encoding="utf-8"))["methods"]


def read_seconds(args: argparse.Namespace, data: Data, method: str, tags: dict) -> None:
    """CPU seconds of each training, at its last step."""
    for file in (args.output_dir / "loras" / method).glob("*/seconds.json"):
        put(data, place(tags), "seconds", (file.parent.name, tags["seed"]), json.loads(file.read_text()))


def read_attributes(args: argparse.Namespace, data: Data) -> None:
    """By the world's attribute network: how many pictures show the prompt's scene, and its hat; and of a prompt that
    names no scene, how many show one of the two scenes that the references were taken in (leak)."""
    sys.path.insert(0, str(WORLD))  # for its train.py, which imports world
    training = load_script(WORLD / "train.py")
    world = training.world
    network = training.load_attributes(args.world, "cpu")
    scenes, columns = list(world.SCENES), list(world.ATTRIBUTES)
    for kind in ("images", "plain/images"):
        for manifest in tqdm(sorted((args.output_dir / kind).glob("*/manifest.json")), desc="Attributes"):
            told = json.loads(manifest.read_text(encoding="utf-8"))
            pixels = np.stack([np.asarray(read_image(manifest.parent / one["file"])) for one in told["images"]])
            with torch.no_grad():
                found = network(training.to_float(torch.from_numpy(pixels).permute(0, 3, 1, 2)))
            seen = {name: logits.argmax(1).tolist() for name, logits in zip(columns, found, strict=True)}
            hits: dict[tuple[str, str], list[bool]] = {}
            for one, scene, hat in zip(told["images"], seen["scene"], seen["hat"], strict=True):
                subject, named = one["subject"], [s for s in scenes if world.SCENES[s] in one["prompt"]]
                if kind != "images":
                    hits.setdefault((subject, "leak"), []).append(scenes[scene] in world.SUBJECT_SCENES[subject])
                elif named:
                    hits.setdefault((subject, "scene"), []).append(scenes[scene] == named[0])
                if "with a hat" in one["prompt"]:
                    hits.setdefault((subject, "hat"), []).append(hat == 1)
            for (subject, metric), right in hits.items():
                put(data, place(told["tags"]), metric, (subject, told["tags"].get("seed", 0)), float(np.mean(right)))


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


class Found:
    """The data of one backbone, by run."""

    def __init__(self, data: Data, backbone: str):
        self.backbone = backbone
        self.points = {(run, step): values for (name, run, step), values in data.items() if name == backbone}
        self.last = max(step for _, step in self.points)

    def get(self, run: str, metric: str, step: int | None = None) -> Pairs:
        """The numbers of a run's last step, or of another one; empty where there are none."""
        step = (0 if run == BASE else self.last) if step is None else step
        return self.points.get((run, step), {}).get(metric, {})

    def steps(self, run: str, metric: str) -> list[int]:
        return sorted(step for name, step in self.points if name == run and self.get(run, metric, step))

    def minus(self, one: str, other: str, metric: str) -> Estimate | None:
        return difference(self.get(one, metric), self.get(other, metric))


# --- The answers --------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: list[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join("" if c is None else str(c) for c in row) + " |" for row in rows)])


def judge(tendency: Tendency, found: Found) -> tuple[str, list[Estimate]]:
    """ "holds", "does not", "not sure" or "" where nothing was measured, and the differences."""
    differences = [found.minus(*pair, tendency.metric) for pair in tendency.pairs]
    known = [one for one in differences if one is not None and one.subjects > 1]
    if len(known) < len(differences):
        return "", known
    sides = {one.side() * tendency.sign for one in known}
    return "holds" if sides == {1} else "does not" if -1 in sides else "not sure", known


def tendencies(backbones: list[Found]) -> str:
    rows = []
    for one in TENDENCIES:
        label = {"drift": "drift", "clip_t": "CLIP-T", "fidelity": "fidelity"}[one.metric]
        row = [f"{one.claim} ({label}: {'; '.join(f'{NAMES[a]} - {NAMES[b]}' for a, b in one.pairs)})"]
        for found in backbones:
            verdict, differences = judge(one, found)
            row.append(f"**{verdict}** {'; '.join(map(str, differences))}" if verdict else "not measured")
        rows.append(row)
    counts = [f"{BACKBONES[f.backbone]} {counted(f.get(SAP, 'clip_t'))}" for f in backbones]
    return table(["", *(BACKBONES[f.backbone] for f in backbones)], rows) + f"\n\nn: {'; '.join(counts)}."


def counted(pairs: Pairs) -> str:
    return f"{len(subject_means(pairs))} subjects x {seeds_in(pairs)} seeds"


def path_of(found: Found, run: str) -> list[tuple[str, int]]:
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
    in alignment at its fidelity (along 1)."""
    places = [(point, found.last), *path_of(found, run)]
    if len(places) < 4:
        return None
    columns = [[found.get(name, metric, step) for metric in ("clip_t", "fidelity")] for name, step in places]
    stopped = [columns[0], *columns[2:]]  # the base model has no seed
    pairs = set.intersection(*(set(one[0]) for one in stopped))
    subjects = [subject for subject in subject_means(columns[1][0]) if any(pair[0] == subject for pair in pairs)]
    if not subjects:
        return None
    means = [[subject_means({pair: value for pair, value in one.items() if pair in pairs}) for one in metrics]
             for metrics in stopped]  # fmt: skip
    means.insert(1, [subject_means(one) for one in columns[1]])

    def statistic(chosen: list[str]) -> float:
        points = np.array([[np.mean([metric[s] for s in chosen]) for metric in metrics] for metrics in means])
        return points[0, 1 - along] - best_at(points[1:], points[0, along], along)

    return jackknife(statistic, subjects, len({seed for _, seed in pairs}))


def low_runs(found: Found) -> dict[str, str]:
    """Runs of w = 0 whose early stops are competitors, and their names."""
    runs = {run for run, _ in found.points if run == W0 or run.startswith((f"{W0}-rate", f"{W0}-rank"))}
    names = {run: run.removeprefix(f"{W0}-").replace("rate", "rate ").replace("rank", "rank ") for run in runs}
    return {run: "w = 0 stopped early" if run == W0 else f"the same, {names[run]}" for run in sorted(runs)}


def frontier(backbones: list[Found]) -> str:
    rows = []
    for found in backbones:
        for point, w in CURVE.items():
            for run, name in low_runs(found).items() if w > 0 else ():
                gains = [gain(found, point, run, along) for along in (0, 1)]
                if gains[0] is not None:
                    verdict = {1: "**above**", 0: "not sure", -1: "**below**"}[gains[0].side()]
                    n = f"{gains[0].subjects} x {gains[0].seeds}"
                    cells = ["beyond its end" if np.isnan(one.mean) else one for one in gains]
                    rows.append([BACKBONES[found.backbone], NAMES[point], name, *cells, verdict, n])
    head = ["", "point", "against", "fidelity at equal alignment", "alignment at equal fidelity", "", "n"]
    return table(head, rows)


def rate_runs(found: Found, run: str) -> dict[float, str]:
    """The runs of one method by learning rate."""
    rates = {name: name.removeprefix(f"{run}-rate") for name, _ in found.points if name.startswith(f"{run}-rate")}
    return {RATE: run, **{float(rate): name for name, rate in rates.items()}}


def tuned(found: Found, run: str, tuning: Sequence[str]) -> tuple[float, str]:
    """The best rate on the tuning subjects, and a sentence that says how it was chosen."""
    totals = {}
    for rate, name in sorted(rate_runs(found, run).items()):
        alignment, fidelity = ({p: v for p, v in found.get(name, m).items() if p[0] in tuning and p[1] == FIRST_SEED}
                               for m in ("clip_t", "fidelity"))  # fmt: skip
        if alignment:
            totals[rate] = float(np.mean([alignment[pair] + fidelity[pair] for pair in alignment]))
    if len(totals) < 2:
        return RATE, f"{NAMES[run]} at {RATE:g}, not tuned"
    best = max(totals, key=totals.get)
    shown = ", ".join(f"{total:.3f} at {rate:g}" for rate, total in totals.items())
    return best, f"{NAMES[run]}: {shown}; taken is {best:g}"


def budget(backbones: list[Found], tuning: Sequence[str]) -> str:
    rows, notes = [], []
    for found in backbones:
        (sap_rate, sap_note), (prior_rate, prior_note) = (tuned(found, run, tuning) for run in (SAP, PRIOR))
        notes.append(f"- {BACKBONES[found.backbone]}: {sap_note}. {prior_note}.")
        sap, prior = rate_runs(found, SAP)[sap_rate], rate_runs(found, PRIOR)[prior_rate]
        spent = [found.get(run, "seconds") for run in (SAP, PRIOR)]
        if cost := {pair: spent[1][pair] / spent[0][pair] for pair in spent[0] if pair in spent[1]}:
            notes[-1] += f" Training with prior preservation took {estimate(cost)} times as long."
        for title, step in (("steps", found.last), ("compute", round(EQUAL_COMPUTE * found.last))):
            cells = []
            for metric in ("clip_t", "fidelity", "drift"):
                pairs = [found.get(sap, metric), found.get(prior, metric, step)]
                cells.append(difference(*({p: v for p, v in one.items() if p[0] not in tuning} for one in pairs)))
            if cells[0] is not None:
                n = f"{cells[0].subjects} x {cells[0].seeds}"
                title = f"equal {title}: {found.last} steps, {step} of prior preservation"
                rows.append([BACKBONES[found.backbone], title, *cells, n])
    head = ["", "w = 0.5 - prior preservation", "CLIP-T", "fidelity", "drift", "n"]
    return table(head, rows) + "\n\nRates by CLIP-T + fidelity on the tuning subjects:\n\n" + "\n".join(notes)


def comparison(backbones: list[Found], runs: Sequence[str], against: dict[str, str], metrics: Sequence[str]) -> str:
    """A row a run with its metrics, and what it is beyond another run in alignment, fidelity and leak."""
    rows = []
    for found in backbones:
        for run in (run for run in runs if found.get(run, "clip_t")):
            cells = [estimate(pairs) if (pairs := found.get(run, metric)) else None for metric in metrics]
            other = against.get(run)
            beyond = [found.minus(run, other, metric) if other else None for metric in ("clip_t", "fidelity", "leak")]
            rows.append([BACKBONES[found.backbone], NAMES[run], *cells, *beyond, counted(found.get(run, "clip_t"))])
    others = {NAMES[other] for other in against.values()}
    suffix = f"- {others.pop()}" if len(others) == 1 else "- the same without"
    head = ["", "", *(METRICS[metric] for metric in metrics)]
    return table([*head, *(f"{name} {suffix}" for name in ("CLIP-T", "fidelity", "leak")), "n"], rows)


def masks(backbones: list[Found]) -> str:
    pairs = {f"{run}-masked": run for run in (SAP, "w0.25-pretrained")}
    runs = [BASE, W0, *(one for masked, run in pairs.items() for one in (run, masked))]
    return comparison(backbones, runs, pairs, ("clip_t", "clip_i", "dino", "drift", "leak", "scene"))


def neighbour_rows(backbones: list[Found]) -> str:
    others = [W0, PRIOR, "dco", "dop", "l2"]
    against = dict.fromkeys(others, SAP)
    return comparison(backbones, [SAP, *others], against, ("clip_t", "clip_i", "dino", "drift", "leak", "seconds"))


def write_methods(file: Path, backbones: list[Found]) -> None:
    """A row for each run and step: all metrics with their intervals."""
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        ends = [f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high")]
        writer.writerow(["backbone", "run", "steps", "subjects", "seeds", *ends])
        for found in backbones:
            for run, step in sorted(found.points):
                known = {metric: estimate(pairs) for metric, pairs in found.points[run, step].items()}
                first = next(iter(known.values()))
                cells = [[one.mean, one.low, one.high] if (one := known.get(m)) else [""] * 3 for m in METRICS]
                cells = [f"{cell:.4f}" if cell != "" else "" for row in cells for cell in row]
                writer.writerow([found.backbone, run, step, first.subjects, first.seeds, *cells])


# --- Figures ------------------------------------------------------------------------------------------------------


def draw_answer(file: Path, backbones: list[Found]) -> None:
    """A panel a tendency: the differences with their intervals; on the green side of zero it holds."""
    figure, axes = plt.subplots(2, 4, figsize=(13, 5.2))
    for axis, one in zip(axes.flat, TENDENCIES, strict=False):
        for number, found in enumerate(backbones):
            verdict, differences = judge(one, found)
            for shift, estimated in enumerate(differences):
                y = -number - 0.28 * shift + 0.14 * (len(differences) - 1)
                reach = [[estimated.mean - estimated.low], [estimated.high - estimated.mean]]
                style = {"fmt": "os"[shift], "color": COLOURS[found.backbone], "capsize": 3, "markersize": 5}
                axis.errorbar(estimated.mean, y, xerr=reach, **style)
        axis.axvline(0, color="black", linewidth=0.8)
        left, right = axis.get_xlim()
        axis.axvspan(*((0, right) if one.sign > 0 else (left, 0)), color="#2c8a4b", alpha=0.1, linewidth=0)
        axis.set_xlim(left, right)
        names = [f"{BACKBONES[f.backbone]}\n{judge(one, f)[0] or 'not measured'}" for f in backbones]
        axis.set_yticks([-n for n in range(len(backbones))], names, fontsize=8)
        axis.set_ylim(-len(backbones) + 0.5, 0.5)
        axis.set_title(one.claim.replace("than the", "than\nthe").replace(" than prior", "\nthan prior"), fontsize=8.5)
        axis.set_xlabel({"drift": "drift", "clip_t": "CLIP-T", "fidelity": "fidelity"}[one.metric], fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="x", alpha=0.3)
    axes.flat[-1].axis("off")
    axes.flat[-1].text(0, 0.3, LEGEND, fontsize=8.5, va="center")
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


LEGEND = """Difference of two methods, paired by subject
and seed, with its 95 % interval over subjects.

Green: the side on which the claim holds.

In the first three panels:
circle  w = 0.5 minus w = 0
square  w = 1 minus w = 0.5"""


def centre(found: Found, run: str, step: int | None = None) -> tuple[float, float]:
    return tuple(estimate(found.get(run, metric, step)).mean for metric in ("clip_t", "fidelity"))


def draw_frontier(file: Path, backbones: list[Found]) -> None:
    """Fidelity against alignment: over w, and over the steps of w = 0."""
    figure, axes = plt.subplots(1, len(backbones), figsize=(4.4 * len(backbones), 4.2), squeeze=False)
    for axis, found in zip(axes[0], backbones, strict=True):
        for (run, name), style in zip(low_runs(found).items(), ("o--", "v:", "^:"), strict=False):
            places = path_of(found, run)
            points = np.array([centre(found, *one) for one in places])
            colour = "0.35" if run == W0 else "0.65"
            axis.plot(*points.T, style, color=colour, markersize=4, linewidth=1, label=name)
            for (_, step), point in zip(places, points, strict=True):
                if run == W0:
                    text = f"{step} steps" if step else "base"
                    axis.annotate(text, point, (4, 4), textcoords="offset points", fontsize=7, color=colour)
        curve = [run for run in CURVE if found.get(run, "clip_t")]
        points = np.array([centre(found, run) for run in curve])
        axis.plot(*points.T, "s-", color=COLOURS[found.backbone], markersize=5, label="the anchor, over w")
        for run, point in zip(curve, points, strict=True):
            axis.annotate(NAMES[run][4:], point, (5, -10), textcoords="offset points", fontsize=8)
        marks = {PRIOR: "P", FINETUNED: "X", f"{SAP}-masked": "*", "dco": "d", "dop": "h", "l2": "<"}
        for run, mark in marks.items():
            if found.get(run, "clip_t"):
                axis.plot(*centre(found, run), mark, markersize=7, color="#a02c2c", alpha=0.8, label=NAMES[run])
        axis.set(title=BACKBONES[found.backbone], xlabel="alignment (CLIP-T)", ylabel="fidelity (CLIP-I, DINO)")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def draw_drift(file: Path, backbones: list[Found]) -> None:
    """Drift against steps, with intervals over subjects."""
    figure, axes = plt.subplots(1, len(backbones), figsize=(4.4 * len(backbones), 3.6), squeeze=False)
    for axis, found in zip(axes[0], backbones, strict=True):
        for run in (W0, SAP, W1, FINETUNED, PRIOR):
            steps = found.steps(run, "drift")
            values = [estimate(found.get(run, "drift", step)) for step in steps]
            if values:
                (line,) = axis.plot(steps, [one.mean for one in values], "o-", markersize=3, label=NAMES[run])
                ends = [[one.low for one in values], [one.high for one in values]]
                axis.fill_between(steps, *ends, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set(title=BACKBONES[found.backbone], xlabel="training step", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("drift: L2 distance to the base's\nprediction on the class prompt, same $z_t$")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def draw_pictures(args: argparse.Namespace, file: Path, backbones: list[Found], seed: int = 0) -> None:
    """One subject: its references, and for each backbone a row a method, a column a prompt."""
    edge, margin, subject = 64, 112, args.shown
    columns = len(args.benchmark.templates(subject))
    rows = [(found.backbone, run) for found in backbones for run in (BASE, W0, SAP, f"{SAP}-masked", W1, PRIOR)]
    folders = [args.output_dir / "images" / (f"{b}-{run}" if run == BASE else f"{b}-{run}-seed{seed}") / subject
               for b, run in rows]  # fmt: skip
    rows = [(*row, folder) for row, folder in zip(rows, folders, strict=True) if folder.is_dir()]
    sheet = Image.new("RGB", (margin + columns * edge, (len(rows) + 1) * edge), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    pen.text((4, edge // 2 - 6), "the photos", "black", font)
    for column, photo in enumerate(args.benchmark.references(subject)):
        sheet.paste(read_image(photo), (margin + column * edge, 0))
    for row, (backbone, run, folder) in enumerate(rows, 1):
        name = NAMES[run].replace(" preserv", "\npreserv")
        pen.text((4, row * edge + 12), f"{BACKBONES[backbone]}\n{name}", "black", font)
        for column in range(columns):
            if (picture := folder / str(column) / "0.png").is_file():
                sheet.paste(read_image(picture), (margin + column * edge, row * edge))
    sheet.save(file, quality=88)


def main(args: argparse.Namespace) -> None:
    data = read_all(args)
    backbones = [Found(data, one) for one in BACKBONES if any(key[0] == one and key[1] == W0 for key in data)]
    args.results_dir.mkdir(parents=True, exist_ok=True)
    answers = {"tendencies": tendencies(backbones), "frontier": frontier(backbones), "masks": masks(backbones)}
    answers |= {"budget": budget(backbones, args.tuning_subjects), "neighbours": neighbour_rows(backbones)}
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
