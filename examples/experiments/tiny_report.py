# SPDX-License-Identifier: Apache-2.0
"""What tiny_experiments.py found, with intervals: a row of numbers for every training, tables in Markdown, figures.

    python tiny_report.py --output_dir outputs/tiny --results_dir outputs/tiny/results     # scores, then all
    python tiny_report.py --results_dir ../results --page ../RESULTS.md                    # tables of subjects.csv

The first command scores the pictures (evaluate.py, the world's attribute network) and writes, for the backbones that
are there, subjects.csv (see tiny_numbers.py), figures, and tables.md with these tables, all of them from subjects.csv:

    run          what was run, of all that tiny_experiments.py can
    class        what is left of the class: the prompt without the identifier
    tendencies   does what the paper says of w, of its two anchors and of its baselines happen here?
    frontier     does the anchor reach what w = 0, stopped early, at a low rate or rank, does not?
    budget       the anchor and prior preservation at equal steps and at equal compute
    masks        masks of the subject
    neighbours   DCO, differential output preservation, L2 on the LoRA

The second one puts the tables into a page, each between the lines <!-- NAME --> and <!-- end of NAME -->; a table
earlier_frontier is made of the means in earlier_methods.csv.

A number is a mean over subjects, of means over seeds; the last column counts trainings and subjects. The subjects on
which rates were chosen are in no table. Brackets are 95 % t intervals over subjects, in the frontier those of a
bootstrap. Differences are paired by subject and seed. "Holds" and "does not" need intervals without zero. Fidelity is
the mean of CLIP-I and DINO, alignment is CLIP-T.
"""

import argparse
import csv
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tiny_experiments import EQUAL_COMPUTE, PRIOR, RANK, RATE, RATES, SAP, WORLD, at_rate, forget_accelerate, planned
from tiny_numbers import (
    BACKBONES,
    BASE,
    TITLES,
    TUNING_SUBJECTS,
    Estimate,
    Found,
    Pairs,
    difference,
    estimate,
    gain,
    read_subjects,
    subject_means,
    write_subjects,
)
from tqdm import tqdm

matplotlib.use("Agg")
import evaluate  # noqa: E402  (tiny_experiments has made examples/dreambench importable)
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first: there may be no display)
from benchmark import CLASS_FOLDER, HelpFormatter, load_script, read_benchmark, read_image  # noqa: E402

COLOURS = {"SD1.5": "#1f77b4", "SDXL": "#d97706", "SD3": "#2c8a4b"}
W0, W1, FINETUNED = "w0-pretrained", "w1-pretrained", "w0.5-finetuned"
CURVE = {W0: 0.0, "w0.25-pretrained": 0.25, SAP: 0.5, "w0.75-pretrained": 0.75, W1: 1.0}
MASKED = {f"{run}-masked": run for run in (SAP, "w0.25-pretrained")}
NAMES = {run: f"w = {w:g}" for run, w in CURVE.items()} | {
    BASE: "base model", PRIOR: "prior preservation", FINETUNED: "w = 0.5, finetuned anchor", "dco": "DCO",
    "dop": "output preservation", "l2": "L2 on the LoRA", f"{SAP}-masked": "w = 0.5, masks",
    "w0.25-pretrained-masked": "w = 0.25, masks"}  # fmt: skip
STOPPED = {W0: "w = 0 stopped early", at_rate(W0, RATE / 4): f"rate {RATE / 4:g}, stopped early",
           f"{W0}-rank{RANK // 8}": f"rank {RANK // 8}, stopped early"}  # fmt: skip
COUNT = "trainings of subjects"
APART = 0.2  # DINO between pictures with and without the identifier, from which on a model tells the two prompts apart


@dataclass(frozen=True)
class Tendency:
    """A claim: the first run of each pair is above (sign 1) or below (-1) the second in a metric.

    With `of_identifiers` it can only be judged where a prompt with the identifier gives something else than without.
    """

    claim: str
    metric: str
    sign: int
    pairs: tuple[tuple[str, str], ...]
    of_identifiers: bool = False


TENDENCIES = (
    Tendency("drift falls with w", "drift", -1, ((SAP, W0), (W1, SAP))),
    Tendency("text alignment rises with w", "clip_t", 1, ((SAP, W0), (W1, SAP))),
    Tendency("fidelity falls with w", "fidelity", -1, ((SAP, W0), (W1, SAP))),
    Tendency("the pretrained anchor aligns better than the finetuned one", "clip_t", 1, ((SAP, FINETUNED),), True),
    Tendency("w = 0.5 drifts less than prior preservation, as Figure 2 has it", "drift_class", -1, ((SAP, PRIOR),)),
    Tendency("w = 0.5 is above w = 0 in fidelity, as Table 2 has it", "fidelity", 1, ((SAP, W0),)),
    Tendency("w = 0.5 is above prior preservation in fidelity", "fidelity", 1, ((SAP, PRIOR),), True),
)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, help="folder of tiny_experiments.py; without it RESULTS_DIR/subjects.csv is read")
    add("--results_dir", type=Path, help="gets or has subjects.csv; OUTPUT_DIR/results by default")
    add("--page", type=Path, help="Markdown file whose tables are written anew")
    add("--world", type=Path, default=WORLD, help="folder of pipelines, data and metric models, as there")
    add("--shown", metavar="SUBJECT", help="whose pictures are shown; by default those of the first")
    args = parser.parse_args(arguments)
    if args.output_dir is None and args.results_dir is None:
        parser.error("give --output_dir, to score what tiny_experiments.py made, or --results_dir with a subjects.csv")
    args.results_dir = args.results_dir or args.output_dir / "results"
    if args.output_dir and not any(args.output_dir.glob("images/*-seed*/manifest.json")):
        parser.error(f"--output_dir: {args.output_dir} has no images of a LoRA; run tiny_experiments.py first")
    if args.page and not args.page.is_file():
        parser.error(f"--page: {args.page} is not there")
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


# --- The tables ---------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: list[Sequence[object]]) -> str:
    if not rows:
        return "Not run."
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join("" if c is None else str(c) for c in row) + " |" for row in rows)])


def counted(pairs: Pairs) -> str:
    """How many trainings, and of how many subjects."""
    return f"{len(pairs)} of {len(subject_means(pairs))}" if pairs else "not run"


def cell(pairs: Pairs) -> str | None:
    return str(estimate(pairs)) if pairs else None


def mean_cell(pairs: Pairs) -> str | None:
    """Without the interval."""
    return estimate(pairs).rounded() if pairs else None


def what_was_run(backbones: list[Found]) -> str:
    """A row a run, a column a backbone."""
    found = {one.backbone: one for one in backbones}
    best = {backbone: rates_of(one)[0] for backbone, one in found.items()}
    rows = []
    for part, runs in planned().items():
        for run in runs:
            cells = [counted(found[b].get(run.name, "clip_t") if b in found else {}) for b in BACKBONES]
            rows.append([part, run.name, *cells])
    for method in (SAP, PRIOR):
        names = {backbone: at_rate(method, rates[method]) for backbone, rates in best.items() if rates}
        cells = [counted(found[b].get(names[b], "clip_t") if b in names else {}) for b in BACKBONES]
        rows.append(["budget", f"{method} at its best rate", *cells])
    steps = ", ".join(f"{one.last} steps on {one.name}" for one in backbones)
    return table(["part", "run", *BACKBONES.values()], rows) + f"\n\nTrainings of subjects: {steps}."


def class_rows(backbones: list[Found]) -> str:
    """What a prompt without the identifier gives after training, beside what one with it gives."""
    rows = []
    for found in backbones:
        for run in (BASE, W0, SAP, W1, FINETUNED, PRIOR):
            for step in found.steps(run, "pres"):
                name = NAMES[run]
                if run != BASE and step != found.last:
                    name += f", {step} steps"
                metrics = ("clip_t", "fidelity", "dino", "pres", "apart")
                cells = [cell(found.get(run, metric, step)) for metric in metrics]
                div = cell(found.get(run, "div", step))
                rows.append([found.name, name, *cells, div, counted(found.get(run, "pres", step))])
    head = ["", "", "CLIP-T", "fidelity", "DINO", "PRES", "DINO - PRES", "DIV", COUNT]
    return table(head, rows)


def tells_apart(found: Found) -> bool:
    """Whether the pipeline can learn a subject without its class: w = 0, at its best stop, and prior preservation keep
    the two prompts apart by APART, on average over subjects."""
    for run in (W0, PRIOR):
        means = [estimate(found.get(run, "apart", step)).value for step in found.steps(run, "apart")]
        if max(means, default=0.0) < APART:
            return False
    return True


def judge(tendency: Tendency, found: Found) -> tuple[str, list[Estimate]]:
    """A verdict, and the differences that were measured; one subject alone has no interval and proves nothing."""
    differences = [found.minus(*pair, tendency.metric) for pair in tendency.pairs]
    known = [one for one in differences if one is not None]
    if len(known) < len(differences):
        return "not run", known
    if tendency.of_identifiers and not tells_apart(found):
        return "untestable here", known
    sides = {one.side() * tendency.sign for one in known}
    if sides == {1}:
        return "holds", known
    return "does not" if -1 in sides else "not sure", known


def tendencies(backbones: list[Found]) -> str:
    rows = []
    for one in TENDENCIES:
        pairs = "; ".join(f"{NAMES[a]} - {NAMES[b]}" for a, b in one.pairs)
        row = [f"{one.claim} ({TITLES[one.metric]}: {pairs})"]
        for verdict, differences in (judge(one, found) for found in backbones):
            row.append(f"**{verdict}** {'; '.join(map(str, differences))}")
        rows.append(row)
    return table(["", *(found.name for found in backbones)], rows)


def frontier(backbones: list[Found], counts: bool = True) -> str:
    """A row a point of the anchor, stopped early too where that was drawn: how far it lies above the lines of w = 0
    that is stopped early, as it is, at a low rate and at a low rank. Below: how many intervals are without zero.

    Without `counts`, for means whose subjects are not known, there is no column that counts them.
    """
    kinds = [(W0, 0), (W0, 1), *((run, 0) for run in STOPPED if run != W0)]
    rows = []
    sides = []
    for found in backbones:
        for run in [*(run for run, w in CURVE.items() if w > 0), *MASKED]:
            for step in found.steps(run, "clip_t"):
                known = [gain(found, (run, step), *kind) for kind in kinds]
                if known[0] is None:
                    continue
                name = NAMES[run]
                if step != found.last:
                    name += f", {step} steps"
                sides += [one.side() for one in known if one is not None and one.subjects > 1]
                rows.append([found.name, name, *map(marked, known), *[known[0].count()] * counts])
    titles = [f"{STOPPED[run]}: {('fidelity', 'alignment')[along]}" for run, along in kinds]
    text = table(["", "", *titles, *[COUNT] * counts], rows)
    if sides:
        text += f"\n\nOf {len(sides)} intervals {sides.count(1)} are above zero and {sides.count(-1)} below; "
        text += f"chance alone would put about {len(sides) / 20:.0f} on one side or the other."
    return text


def marked(one: Estimate | None) -> str:
    """In bold where the interval is without zero."""
    if one is None:
        return "not run"
    return f"**{one}**" if one.side() else str(one)


def rates_of(found: Found) -> tuple[dict[str, float], dict[str, dict[float, float]]]:
    """The best rate of both methods, and CLIP-T + fidelity on the tuning subjects at each; empty where some lack."""
    totals: dict[str, dict[float, float]] = {SAP: {}, PRIOR: {}}
    for name, by_rate in totals.items():
        for rate in RATES:
            metrics = [found.get(at_rate(name, rate), metric) for metric in ("clip_t", "fidelity")]
            of_tuning = [[v for (subject, _), v in one.items() if subject in TUNING_SUBJECTS] for one in metrics]
            if not all(of_tuning):
                return {}, {}
            by_rate[rate] = float(sum(np.mean(values) for values in of_tuning))
    return {name: max(by_rate, key=by_rate.get) for name, by_rate in totals.items()}, totals


def rates_text(best: dict[str, float], totals: dict[str, dict[float, float]]) -> str:
    """What was found of the rates, in words."""
    texts = []
    for run, by_rate in totals.items():
        tried = ", ".join(f"{total:.3f} at {rate:g}" for rate, total in by_rate.items())
        texts.append(f"{NAMES[run]} {tried}, taken is {best[run]:g}")
    return "; ".join(texts) or f"not tuned, {RATE:g} for both"


def budget(backbones: list[Found]) -> str:
    """The anchor minus prior preservation, each at its best rate, on the subjects no rate was chosen on."""
    rows, notes = [], []
    for whole in backbones:
        best, totals = rates_of(whole)
        found = whole.without(TUNING_SUBJECTS)
        sap, prior = (at_rate(run, best.get(run, RATE)) for run in (SAP, PRIOR))
        notes.append(f"- {found.name}: {rates_text(best, totals)}.")
        spent = [found.get(run, "seconds") for run in (SAP, PRIOR)]
        if cost := {pair: spent[1][pair] / spent[0][pair] for pair in spent[0] if pair in spent[1]}:
            notes[-1] += f" Training with prior preservation took {estimate(cost)} times as long."
        for title, step in (("steps", found.last), ("compute", round(EQUAL_COMPUTE * found.last))):
            metrics = ("clip_t", "fidelity", "pres", "drift")
            cells = [difference(found.get(sap, metric), found.get(prior, metric, step)) for metric in metrics]
            if cells[0] is not None:
                title = f"equal {title}: {found.last} steps, {step} of prior preservation"
                rows.append([found.name, title, *cells, cells[0].count()])
    head = ["", "w = 0.5 - prior preservation", "CLIP-T", "fidelity", "PRES", "drift", COUNT]
    return table(head, rows) + "\n\nRates by CLIP-T + fidelity on the tuning subjects:\n\n" + "\n".join(notes)


def masks(backbones: list[Found]) -> str:
    """How often the references' scenes leak with and without masks, and what masks change beside that."""
    rows = []
    for found in backbones:
        for masked, run in MASKED.items():
            if found.get(masked, "leak"):
                leaks = [mean_cell(found.get(one, "leak")) for one in (BASE, W0, run, masked)]
                more = [marked(found.minus(masked, run, metric)) for metric in ("leak", "clip_t", "fidelity")]
                rows.append([found.name, NAMES[run], *leaks, *more, counted(found.get(masked, "leak"))])
    head = ["", "", "leak: base model", "w = 0", "this w", "with masks", "masks' change of leak", "of CLIP-T"]
    return table([*head, "of fidelity", COUNT], rows)


def neighbour_rows(backbones: list[Found]) -> str:
    """The neighbours and the baselines beside w = 0.5, and what each is beyond it."""
    rows = []
    for found in backbones:
        for run in (SAP, W0, PRIOR, "dco", "dop", "l2"):
            if found.get(run, "clip_t"):
                values = [mean_cell(found.get(run, metric)) for metric in ("pres", "drift", "leak", "seconds")]
                beyond = [marked(found.minus(run, SAP, m)) if run != SAP else None for m in ("clip_t", "fidelity")]
                rows.append([found.name, NAMES[run], *beyond, *values, counted(found.get(run, "clip_t"))])
    head = ["", "", "CLIP-T beyond w = 0.5", "fidelity beyond w = 0.5", "PRES", "drift", "leak", "seconds", COUNT]
    return table(head, rows)


def read_means(file: Path) -> list[Found]:
    """Runs of which only means over subjects are known, as one subject: columns backbone, run, steps and metrics."""
    found: dict[str, Found] = {}
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            one = found.setdefault(row["backbone"], Found(row["backbone"]))
            for metric in ("clip_t", "fidelity"):
                if row[metric]:
                    one.put(row["run"], int(row["steps"]), metric, ("mean", 0), float(row[metric]))
    return list(found.values())


def tables(backbones: list[Found], earlier: Path) -> dict[str, str]:
    """All tables by name; that of earlier means only where there are such."""
    scored = [found.without(TUNING_SUBJECTS) for found in backbones]
    made = {
        "run": what_was_run(backbones),
        "class": class_rows(scored),
        "tendencies": tendencies(scored),
        "frontier": frontier(scored),
        "budget": budget(backbones),
        "masks": masks(scored),
        "neighbours": neighbour_rows(scored),
    }
    if earlier.is_file():
        made["earlier_frontier"] = frontier(read_means(earlier), counts=False)
    return made


def filled(page: str, made: dict[str, str]) -> str:
    """The page with its tables written anew.

    Raises:
        ValueError: for a table that has a beginning and no end.
    """
    for name, text in made.items():
        first, last = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        if first not in page:
            continue
        before, _, rest = page.partition(first)
        _, end, after = rest.partition(last)
        if not end:
            raise ValueError(f"--page: the table {name} has no line {last.strip()}")
        page = before + first + text + last + after
    return page


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


def centre(found: Found, run: str, step: int | None = None) -> tuple[float, ...]:
    return tuple(estimate(found.get(run, metric, step)).value for metric in ("clip_t", "fidelity"))


def draw_frontier(file: Path, backbones: list[Found]) -> None:
    """Fidelity against alignment: over w, and over the steps of w = 0."""
    figure, axes = plt.subplots(1, len(backbones), figsize=(4.4 * len(backbones), 4.2), squeeze=False)
    for axis, found in zip(axes[0], backbones, strict=True):
        for (run, label), style in zip(STOPPED.items(), ("o--", "v:", "^:"), strict=True):
            if not found.get(run, "clip_t"):
                continue
            stops = {0: centre(found, BASE, 0)}
            stops |= {step: centre(found, run, step) for step in found.steps(run, "clip_t")}
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
    prompts = range(len(args.benchmark.templates(subject)))
    rows = []
    for run in (BASE, W0, SAP, f"{SAP}-masked", W1, PRIOR):
        seed = ""
        if run != BASE:
            seed = f"-seed{min((seed for _, seed in found.get(run, 'clip_t')), default=0)}"
        folder = args.output_dir / "images" / f"{found.backbone}-{run}{seed}" / subject
        if not folder.is_dir():
            continue
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
    subjects_file = args.results_dir / "subjects.csv"
    if args.output_dir:
        write_subjects(subjects_file, read_all(args))
    backbones = read_subjects(subjects_file)
    made = tables(backbones, args.results_dir / "earlier_methods.csv")
    if args.page:
        args.page.write_text(filled(args.page.read_text(encoding="utf-8"), made), encoding="utf-8")
    if args.output_dir:
        text = "\n\n".join(f"## {name}\n\n{made_table}" for name, made_table in made.items())
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
