# SPDX-License-Identifier: Apache-2.0
"""CLIP-I and DINO against CLIP-T over the anchor's weight, and with both anchors: Figures 5 and 6 of the SAP paper.

    python tradeoff.py --scores results/scores.json --output_dir tradeoff

Reads what examples/dreambench/evaluate.py wrote. A method's tags (manifest.json) say what it is:

    {"backbone": "sd15", "w": 0.5, "anchor": "pretrained", "seed": 0}    a point of the curve over w
    {"backbone": "sd15", "w": 0.5, "anchor": "finetuned", "seed": 0}     the finetuned anchor
    {"backbone": "sd15"}  or  {"backbone": "sd15", "seed": 0}            anything else: a single, named point

Methods that differ in the seed alone are one point. Names of the last kind may end in -seedN, and "label" in the tags
replaces them. Writes tradeoff.png (Figure 5), anchors.png (Figure 6), tradeoff.csv and differences.csv.
"""

import argparse
import csv
import dataclasses
import json
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first: there may be no display)

FEWEST_SUBJECTS = 5  # of an interval that is drawn: with fewer, resampling them says nothing
METRICS = {"clip_t": "CLIP-T", "clip_i": "CLIP-I", "dino": "DINO"}
BACKBONES = {"sd15": "SD1.5", "sdxl": "SDXL", "sd3": "SD3"}
TENSION = (
    "The paper says that growing w raises CLIP-T and lowers CLIP-I and DINO; yet on SD1.5 its tables have its method\n"
    "above DreamBooth in CLIP-I and DINO, and below it in CLIP-T. So that row is not simply w = 0."
)


class UsageError(ValueError):
    """Bad input, said in one sentence."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default of a flag where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        empty = action.default is None or action.default is False
        return action.help if empty else super()._get_help_string(action)


def path(text: str) -> Path:
    """A flag's value as a path, in which "~" is the home folder."""
    return Path(text).expanduser()


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line and the scores; what is wrong with them ends it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--scores", type=path, nargs="+", required=True, metavar="FILE", help="scores.json of evaluate.py, or several")
    add("--output_dir", type=path, required=True, metavar="FOLDER", help="gets two CSV and two PNG files")
    add("--anchor_weight", type=float, default=0.5, metavar="W", help="w at which Figure 6 compares the anchors")
    add("--bootstrap_samples", type=int, default=10_000, metavar="N", help="draws of the 95 %% intervals")
    add("--seed", type=int, default=0, help="of those draws")
    args = parser.parse_args(arguments)
    try:
        if args.bootstrap_samples < 1:
            raise UsageError(f"--bootstrap_samples is {args.bootstrap_samples}; it must be at least 1.")
        args.points = collect(read_methods(args.scores))
    except UsageError as error:
        parser.error(str(error))
    return args


# --------------------------------------------------------------------------------------------------------------- input


def read_methods(files: list[Path]) -> dict[str, dict]:
    """The methods of all files; they must have been scored by the same models."""
    methods, models = {}, None
    for file in files:
        try:
            scores = json.loads(file.read_text(encoding="utf-8"))
            found, measured_by = scores["methods"], scores.get("metrics")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"--scores: {file} is no scores.json of evaluate.py ({error!r}).") from error
        try:
            json.dumps(found, allow_nan=False)
        except ValueError as error:
            raise UsageError(f"--scores: {file} has a score that is not finite; score it again.") from error
        if models is not None and measured_by != models:
            raise UsageError(f"--scores: {file} was scored by other models than {files[0]}; score both alike.")
        if twice := sorted(methods.keys() & found.keys()):
            raise UsageError(f"--scores: {twice[0]} is in two files; give it once.")
        methods, models = methods | found, measured_by
    return methods


@dataclasses.dataclass
class Point:
    """One place in the figures: the methods that differ in the seed alone."""

    backbone: str
    kind: str  # "curve", "anchor" (not the pretrained one) or "reference"
    label: str
    w: float | None = None
    anchor: str | None = None
    methods: list[dict] = dataclasses.field(default_factory=list)

    def table(self, metric: str, subjects: list[str]) -> np.ndarray:
        """Scores (seeds, subjects), nan where a method has no such subject."""
        rows = [[one["subjects"].get(name, {}).get(metric, np.nan) for name in subjects] for one in self.methods]
        return np.array(rows, dtype=float)

    def subjects(self) -> list[str]:
        return sorted(set().union(*(one["subjects"] for one in self.methods)))

    def seeds(self) -> list:
        return [one["tags"].get("seed") for one in self.methods]


def collect(methods: dict[str, dict]) -> list[Point]:
    """Methods -> points, by backbone, then the curve by w, then the others.

    Raises:
        UsageError: where no method has a weight, or two methods are the same point and seed.
    """
    points: dict[tuple, Point] = {}
    for name, method in methods.items():
        if not method.get("subjects"):
            raise UsageError(f"--scores: {name} has no scores of subjects; score it with evaluate.py.")
        point = point_of(name, method.setdefault("tags", {}))
        point = points.setdefault((point.backbone, point.kind, point.label), point)
        if method["tags"].get("seed") in point.seeds():
            raise UsageError(f"--scores: {name} has the same tags as another method; give each its own seed.")
        point.methods.append(method)
    if not any(point.kind == "curve" for point in points.values()):
        raise UsageError('--scores: no method has a weight; tags such as {"w": 0.5} in its manifest.json are needed.')
    kinds = ["curve", "anchor", "reference"]
    return sorted(points.values(), key=lambda one: (order(one.backbone), kinds.index(one.kind), one.w or 0, one.label))


def order(backbone: str) -> tuple[int, str]:
    """SD1.5, SDXL, SD3 as in the paper, then others."""
    return (list(BACKBONES).index(backbone) if backbone in BACKBONES else len(BACKBONES)), backbone


def point_of(name: str, tags: dict) -> Point:
    """An empty point at the place that the tags say."""
    backbone, w, anchor = str(tags.get("backbone", "")), tags.get("w"), tags.get("anchor", "pretrained")
    if w is None or "label" in tags:
        return Point(backbone, "reference", tags.get("label") or re.sub(r"[-_]?seed\d+$", "", name))
    if w == 0 or anchor == "pretrained":  # without weight there is no anchor
        return Point(backbone, "curve", f"w = {w:g}", float(w), "pretrained")
    return Point(backbone, "anchor", f"{anchor} anchor, w = {w:g}", float(w), anchor)


# ---------------------------------------------------------------------------------------------------------- statistics


def interval(table: np.ndarray, samples: int, seed: int) -> tuple[float, float, float]:
    """Mean of a table (seeds, subjects) and its 95 % bootstrap interval.

    Seeds and subjects are drawn with replacement, each on its own, since a subject's scores are alike for all seeds
    (the pigeonhole bootstrap of Owen, Annals of Applied Statistics 2007). Missing cells (nan) are left out. With one
    subject and one seed nothing varies: the interval is the mean.
    """
    generator = np.random.default_rng(seed)
    rows, columns = (generator.integers(0, size, (samples, size)) for size in table.shape)
    drawn = table[rows[:, :, None], columns[:, None, :]].reshape(samples, -1)
    drawn = drawn[~np.isnan(drawn).all(1)]
    low, high = np.quantile(np.nanmean(drawn, axis=1), (0.025, 0.975))
    return float(np.nanmean(table)), float(low), float(high)


def point_row(args: argparse.Namespace, point: Point) -> dict:
    """A row of tradeoff.csv."""
    row = {"backbone": point.backbone, "kind": point.kind, "label": point.label, "w": point.w, "anchor": point.anchor}
    subjects = point.subjects()
    row |= {"seeds": len(point.methods), "subjects": len(subjects)}
    for metric in METRICS:
        numbers = interval(point.table(metric, subjects), args.bootstrap_samples, args.seed)
        row |= dict(zip((metric, f"{metric}_low", f"{metric}_high"), numbers, strict=True))
    return row


def difference_rows(args: argparse.Namespace) -> list[dict]:
    """differences.csv: every other point of a backbone minus its w = 0, and pretrained minus finetuned anchor.

    Paired: over the subjects that both have, seed by seed where both have the same seeds, else between the seeds'
    means. What a subject adds to both drops out, so this interval, and not whether two points' intervals overlap,
    tells whether they differ. `_better` counts the subjects on which the point is above the other.
    """
    rows = []
    for point in args.points:
        pairs = [one for one in args.points if one.backbone == point.backbone]
        start = [one for one in pairs if one.kind == "curve" and one.w == 0 and one is not point]
        tuned = [one for one in pairs if one.kind == "anchor" and one.w == point.w and point.kind == "curve"]
        for other in start + tuned:
            subjects = sorted(set(point.subjects()) & set(other.subjects()))
            if subjects:
                rows.append(difference_row(args, point, other, subjects))
    return rows


def difference_row(args: argparse.Namespace, point: Point, other: Point, subjects: list[str]) -> dict:
    seeds = [seed for seed in point.seeds() if seed in other.seeds()]
    paired = len(seeds) == len(point.methods) == len(other.methods)
    row = {"backbone": point.backbone, "point": point.label, "minus": other.label, "subjects": len(subjects)}
    row["paired_seeds"] = len(seeds) if paired else 0
    for metric in METRICS:
        one, two = point.table(metric, subjects), other.table(metric, subjects)
        if paired:
            difference = one - two[[other.seeds().index(seed) for seed in point.seeds()]]
        else:
            difference = np.nanmean(one, axis=0, keepdims=True) - np.nanmean(two, axis=0, keepdims=True)
        numbers = interval(difference, args.bootstrap_samples, args.seed)
        row |= dict(zip((metric, f"{metric}_low", f"{metric}_high"), numbers, strict=True))
        row[f"{metric}_better"] = int((np.nanmean(difference, axis=0) > 0).sum())
    return row


def write_csv(file: Path, rows: list[dict]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, rows[0].keys())
        table.writeheader()
        for row in rows:
            table.writerow({k: f"{value:.6f}" if isinstance(value, float) else value for k, value in row.items()})


# ------------------------------------------------------------------------------------------------------------- figures


def draw_trade_off(args: argparse.Namespace, rows: list[dict]) -> None:
    """tradeoff.png: a row of panels a backbone; CLIP-I and DINO against CLIP-T."""
    backbones = list(dict.fromkeys(row["backbone"] for row in rows))
    figure, axes = plt.subplots(len(backbones), 2, figsize=(11, 4.1 * len(backbones) + 0.4), squeeze=False)
    for line, backbone in zip(axes, backbones, strict=True):
        own = [row for row in rows if row["backbone"] == backbone]
        for axis, metric in zip(line, ("clip_i", "dino"), strict=True):
            draw_panel(axis, own, metric)
            axis.set_title(f"{BACKBONES.get(backbone, backbone)}  {METRICS[metric]} against CLIP-T".strip())
        line[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8, frameon=False)
    figure.text(
        0.01,
        0.005,
        f"Lines: 95 % bootstrap over seeds and subjects, from {FEWEST_SUBJECTS} subjects on. {TENSION}",
        fontsize=7,
        color="0.35",
    )
    figure.tight_layout(rect=(0, 0.4 / figure.get_figheight(), 1, 1))
    figure.savefig(args.output_dir / "tradeoff.png", dpi=130)
    plt.close(figure)


def draw_panel(axis, rows: list[dict], metric: str) -> None:
    """The curve over w, each point with its weight, and the other methods as single points."""
    curve = [row for row in rows if row["kind"] == "curve"]
    axis.plot([row["clip_t"] for row in curve], [row[metric] for row in curve], color="C0", zorder=2, label="over w")
    others = [row for row in rows if row["kind"] != "curve"]
    for row in curve:
        axis.plot(row["clip_t"], row[metric], "o", color="C0", zorder=3)
        position, text = (row["clip_t"], row[metric]), row["label"] if row is curve[0] else f"{row['w']:g}"
        axis.annotate(text, position, (6, 6), textcoords="offset points", fontsize=8, color="C0", zorder=4)
    for number, row in enumerate(others):
        style = {"color": f"C{1 + number % 9}", "marker": "sD^vP*Xph"[number % 9]}
        axis.plot(row["clip_t"], row[metric], linestyle="none", markersize=8, label=row["label"], zorder=3, **style)
    colours = [(row, "C0") for row in curve] + [(row, f"C{1 + n % 9}") for n, row in enumerate(others)]
    for row, color in [pair for pair in colours if pair[0]["subjects"] >= FEWEST_SUBJECTS]:
        ends = ([row[f"{name}_low"], row[f"{name}_high"]] for name in ("clip_t", metric))
        across, along = ends
        axis.plot(across, [row[metric]] * 2, color=color, alpha=0.35, linewidth=1, zorder=1)
        axis.plot([row["clip_t"]] * 2, along, color=color, alpha=0.35, linewidth=1, zorder=1)
    axis.set(xlabel="CLIP-T (text alignment)", ylabel=METRICS[metric])
    axis.locator_params(nbins=5)  # more labels would overlap
    axis.grid(alpha=0.3)


def draw_anchors(args: argparse.Namespace, rows: list[dict]) -> bool:
    """anchors.png: CLIP-T with the pretrained and the finetuned anchor, for backbones that have both at one w."""
    at_weight = [row for row in rows if row["w"] == args.anchor_weight]
    tuned = {row["backbone"]: row for row in at_weight if row["kind"] == "anchor"}
    plain = {row["backbone"]: row for row in at_weight if row["kind"] == "curve" and row["backbone"] in tuned}
    if not plain:
        return False
    figure, axis = plt.subplots(figsize=(2.6 + 1.7 * len(plain), 4))
    for shift, label, bars in ((-0.2, "pretrained anchor", plain), (0.2, "finetuned anchor", tuned)):
        ends = np.array([[bars[name][f"clip_t{end}"] for name in plain] for end in ("", "_low", "_high")])
        places = np.arange(len(plain)) + shift
        errors = np.clip([ends[0] - ends[1], ends[2] - ends[0]], 0, None)
        axis.bar(places, ends[0], 0.38, yerr=errors, capsize=4, label=label, ecolor="0.3")
        for place, (mean, _, high) in zip(places, ends.T, strict=True):
            axis.annotate(f"{mean:.4f}", (place, high), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    shown = [row[f"clip_t_{end}"] for row in [*plain.values(), *tuned.values()] for end in ("low", "high")]
    margin = max(max(shown) - min(shown), 1e-3)
    axis.set_ylim(max(0, min(shown) - margin), max(shown) + 0.6 * margin)
    axis.set_xticks(range(len(plain)), [BACKBONES.get(name, name) for name in plain])
    axis.set(
        ylabel="CLIP-T (the axis does not start at 0)", title=f"Text alignment by anchor, w = {args.anchor_weight:g}"
    )
    axis.legend(fontsize=8, loc="upper center", ncols=2, frameon=False)
    figure.tight_layout()
    figure.savefig(args.output_dir / "anchors.png", dpi=130)
    plt.close(figure)
    return True


def main(args: argparse.Namespace) -> None:
    """Write both tables and both figures."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows = [point_row(args, point) for point in args.points]
    written = ["tradeoff.csv", "tradeoff.png"]
    write_csv(args.output_dir / "tradeoff.csv", rows)
    draw_trade_off(args, rows)
    if differences := difference_rows(args):
        write_csv(args.output_dir / "differences.csv", differences)
        written.append("differences.csv")
    if draw_anchors(args, rows):
        written.append("anchors.png")
    else:
        print(f"no Figure 6: no backbone has both anchors at w = {args.anchor_weight:g}", file=sys.stderr)
    print("\n".join(str(args.output_dir / name) for name in written))


if __name__ == "__main__":
    main(parse_args())
