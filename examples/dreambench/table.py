# SPDX-License-Identifier: Apache-2.0
"""Set methods side by side, with the average-rank column of the paper.

    python table.py results/scores.json                             # Markdown
    python table.py results/scores.json printed.csv --format latex  # beside numbers that others printed
    python table.py results/scores.json --group_by backbone --merge_seeds --intervals

Reads what evaluate.py writes, or CSV with the columns method, clip_i, clip_t, dino and, where wanted, group. Each
metric is ranked over all methods of a group by the four decimals shown, the three ranks are averaged, and the
averages are ranked. Methods that share a place are shown so: 1, 2=, 2=, 4. Where a method lacks subjects or prompts,
all means of its group are over those that all have, and the table says so; it tells, too, where methods have different
numbers of images. n counts subjects.

PRES and DIV, of the images of class prompts, stand where a method has them (CSV: columns pres, div). They tell what
was kept of the class and are not ranked: PRES, likeness of the class to the subject, is better where it is lower.
"""

import argparse
import csv
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from benchmark import HelpFormatter

METRICS = {"clip_i": "CLIP-I", "clip_t": "CLIP-T", "dino": "DINO"}  # those that are ranked
CLASS_METRICS = {"pres": "PRES", "div": "DIV"}
ALL_METRICS = METRICS | CLASS_METRICS
LOWER_IS_BETTER = {"pres"}
FEWEST_SUBJECTS = 5  # of an interval: with fewer, resampling them says nothing
RESAMPLES = 10_000


@dataclass(frozen=True)
class Method:
    """The means of three metrics or of all five, perhaps the spread of each, each subject's scores, and the group that
    it is ranked in.

    `prompts` has of each subject the scores of each prompt, with the number of images, where they are known. `better`
    says of each metric on how many subjects it is better than another method. `had` is the number of subjects before
    those that other methods lack were left out, `left_out` counts the prompts that were, `images` what is compared.
    """

    name: str
    means: dict[str, float]
    spreads: dict[str, str] = field(default_factory=dict)
    group: str = ""
    tags: dict = field(default_factory=dict)
    subjects: dict[str, dict[str, float]] = field(default_factory=dict)
    prompts: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    better: dict[str, str] = field(default_factory=dict)
    had: int = 0
    left_out: int = 0
    images: int = 0


@dataclass(frozen=True)
class Score:
    """A cell: four decimals or nothing, whether no other is better, and what stands behind it."""

    text: str
    best: bool
    spread: str


@dataclass(frozen=True)
class Row:
    """A method as the table shows it, its scores in the order of `columns`; `n` counts subjects where it is known."""

    name: str
    n: str
    scores: list[Score]
    average: str
    rank: str


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--format", choices=FORMATS, default="markdown", help="of the table; latex needs booktabs")
    parser.add_argument("--output", type=Path, help="write to this file instead of the screen")
    add_arguments(parser)
    args = parser.parse_args(arguments)
    try:
        args.rows = rows_to_show(choose(read_methods(args.scores, args.group_by), args.methods), args)
    except ValueError as error:
        parser.error(str(error))
    return args


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which methods stand in the table, and how; the report has the same table."""
    add = parser.add_argument
    named = "method,clip_i,clip_t,dino[,pres,div,group]"
    add(
        "scores",
        nargs="+",
        type=Path,
        help=f"scores.json of evaluate.py, or CSV: {named}",
    )
    add("--methods", nargs="+", metavar="METHOD", help="only these, in this order")
    add("--group_by", metavar="TAG", help="rank within methods that have the same value of this tag, e.g. backbone")
    add(
        "--merge_seeds", action="store_true", help="one row for methods whose tags differ in the seed only: their mean"
    )
    add(
        "--intervals",
        action="store_true",
        help=f"show 95 %% intervals, from {FEWEST_SUBJECTS} subjects on; for merged seeds the standard deviation",
    )
    add(
        "--against",
        metavar="METHOD",
        help="show on how many subjects each method of its group is better than this one",
    )


def rows_to_show(methods: list[Method], args: argparse.Namespace) -> list[Method]:
    """What the options of `add_arguments` make of the methods. `ValueError` for an unknown name."""
    methods = [method for members in groups(methods).values() for method in on_common_images(members)]
    rows = merge_seeds(methods) if args.merge_seeds else methods
    return compare(rows, args.against) if args.against else rows


def read_methods(files: Sequence[Path], group_by: str | None = None) -> list[Method]:
    """Methods of several files in order. `ValueError`, one sentence, for a file or a name that cannot be used."""
    methods: list[Method] = []
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is not there: evaluate.py writes it")
        found = read_csv(file) if file.suffix == ".csv" else read_json(file)
        check_finite(file, found)
        methods += found
    if group_by:
        methods = [replace(method, group=str(method.tags.get(group_by, method.group))) for method in methods]
    names = [(method.group, method.name) for method in methods]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"the method {twice[1]} comes twice; give one of them another name or group")
    return methods


def read_json(file: Path) -> list[Method]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))["methods"]
        return [json_method(name, entry) for name, entry in entries.items()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a scores.json of evaluate.py") from error


def json_method(name: str, entry: dict) -> Method:
    """A method of scores.json. `KeyError` where one of the three metrics is not there."""
    known = [*METRICS, *(metric for metric in CLASS_METRICS if metric in entry)]
    subjects = {
        subject: {metric: float(scores[metric]) for metric in known} for subject, scores in entry["subjects"].items()
    }
    means = {metric: float(entry[metric]["mean"]) for metric in known}
    spreads = {metric: bounds(entry[metric]["low"], entry[metric]["high"], subjects) for metric in known}
    prompts = dict(entry.get("prompts", {}))
    return Method(name, means, spreads, tags=dict(entry["tags"]), subjects=subjects, prompts=prompts)


def bounds(low: float, high: float, subjects: Sequence) -> str:
    """An interval as the table shows it; nothing where the subjects are too few for one."""
    return f"[{digits(low)}, {digits(high)}]" if len(subjects) >= FEWEST_SUBJECTS else ""


def check_finite(file: Path, methods: Sequence[Method]) -> None:
    """Raise `ValueError` for a score that is no number: it could be sorted anywhere."""
    for method in methods:
        for scores in (method.means, *method.subjects.values()):
            odd = [metric for metric, value in scores.items() if not math.isfinite(value)]
            if odd:
                raise ValueError(f"{file}: {odd[0]} of {method.name} is not finite; score it again")


def read_csv(file: Path) -> list[Method]:
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
        return [csv_method(row) for row in rows]
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} needs the columns method, clip_i, clip_t, dino with a number a method") from error


def csv_method(row: dict[str, str]) -> Method:
    """A method of a CSV; `KeyError` where one of the three metrics is not there."""
    known = [*METRICS, *(metric for metric in CLASS_METRICS if row.get(metric))]
    return Method(row["method"], {metric: float(row[metric]) for metric in known}, group=row.get("group") or "")


def on_common_images(methods: list[Method]) -> list[Method]:
    """A group's methods with their means over the subjects that all of them have, and of these over the prompts that
    all have images of; methods whose subjects, or prompts, are not known stay.

    Raises:
        ValueError: if nothing is common, so that nothing can be compared.
    """
    known = [method for method in methods if method.subjects]
    common = [name for name in known[0].subjects if all(name in m.subjects for m in known)] if known else []
    with_prompts = [method for method in known if method.prompts]
    prompts = {}
    for name in common:
        own = [method.prompts[name] for method in with_prompts]
        prompts[name] = [index for index in (own[0] if own else ()) if all(index in one for one in own)]
    if with_prompts:
        common = [name for name in common if prompts[name]]
    if known and not common:
        raise ValueError(f"no subject has scores of all of {', '.join(m.name for m in known)}: choose --methods")
    return [restrict(method, common, prompts) if method.subjects else method for method in methods]


def restrict(method: Method, subjects: Sequence[str], prompts: dict[str, list[str]]) -> Method:
    """The method on a part of its subjects and of their prompts, with means and intervals of its own."""
    kept = {}
    left_out = 0
    images = 0
    for name in subjects:
        kept[name] = dict(method.subjects[name])
        own = method.prompts.get(name, {})
        compared = [own[index] for index in prompts[name] if index in own]
        images += sum(prompt["images"] for prompt in compared)
        if len(compared) < len(own):
            left_out += len(own) - len(compared)
            weights = [prompt["images"] for prompt in compared]
            for metric in METRICS:
                kept[name][metric] = float(np.average([prompt[metric] for prompt in compared], weights=weights))
    had = {"had": len(method.subjects), "left_out": left_out, "images": images}
    if kept == method.subjects:
        return replace(method, **had)
    scores = np.array([[one[metric] for metric in method.means] for one in kept.values()])
    low, high = bootstrap(scores, RESAMPLES, seed=0)
    means = dict(zip(method.means, scores.mean(0).tolist(), strict=True))
    spreads = {metric: bounds(low[i], high[i], kept) for i, metric in enumerate(method.means)}
    return replace(method, means=means, spreads=spreads, subjects=kept, **had)


def bootstrap(table: np.ndarray, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """2.5 and 97.5 % quantiles of column means of (subjects, metrics), the rows drawn anew with replacement.

    The seed gives the same draws for every method with as many subjects. One subject gives an interval of width 0,
    which says nothing.
    """
    drawn = np.random.default_rng(seed).integers(0, len(table), (samples, len(table)))
    return tuple(np.quantile(table[drawn].mean(1), (0.025, 0.975), axis=0))


def compare(rows: list[Method], name: str) -> list[Method]:
    """Count for each metric the subjects on which a method is better than the method `name` of the same group."""
    if all(row.name != name for row in rows):
        raise ValueError(f"--against: there is no row {name}; there are {', '.join(row.name for row in rows)}")
    compared = []
    for row in rows:
        other = next((one for one in rows if one.name == name and one.group == row.group), row)
        common = [subject for subject in row.subjects if subject in other.subjects]
        shared = [metric for metric in row.means if metric in other.means]
        wins = {m: sum(beats(m, row.subjects[one][m], other.subjects[one][m]) for one in common) for m in shared}
        better = {metric: f"(better on {count} of {len(common)})" for metric, count in wins.items()}
        compared.append(replace(row, better=better if common and other is not row else {}))
    return compared


def beats(metric: str, one: float, other: float) -> bool:
    """Whether a score is better than another one."""
    return one < other if metric in LOWER_IS_BETTER else one > other


def notes(methods: Sequence[Method]) -> list[str]:
    """What a reader must know: means that are not over all subjects, different images, methods that no group has."""
    lines = []
    grouped = groups(methods)
    for group, members in grouped.items():
        where = f" of {group}" if group else ""
        most = max(method.had for method in members)
        fewer = [f"{method.name} has {method.had} of {most}" for method in members if 0 < method.had < most]
        if any(method.had > len(method.subjects) for method in members):
            common = next(method.subjects for method in members if method.subjects)
            lack = "; ".join(fewer) or "methods have different ones"
            lines.append(f"† Means and ranks{where} are over the subjects that all have, {', '.join(common)}: {lack}.")
        more = [f"{method.name} has {method.left_out} more" for method in members if method.left_out]
        if more:
            lines.append(f"† Scores{where} are over the prompts that all have images of: {'; '.join(more)}.")
        images = {method.name: method.images for method in members if method.images}
        if len(set(images.values())) > 1:
            counts = ", ".join(f"{name} {count}" for name, count in images.items())
            lines.append(f"† The methods{where} have different numbers of images: {counts}.")
    if "" in grouped and len(grouped) > 1:
        names = ", ".join(method.name for method in grouped[""])
        advice = "give it a manifest.json with the tag, or a CSV the column group"
        lines.append(f"† In no group, and ranked there among themselves: {names}; {advice}.")
    return lines


def merge_seeds(methods: Sequence[Method]) -> list[Method]:
    """One row for methods of a group whose tags differ in "seed" only: means, with standard deviations as spread."""
    merged: dict[tuple, list[Method]] = {}
    for method in methods:
        same = {name: value for name, value in method.tags.items() if name != "seed"}
        alone = method.name if "seed" not in method.tags else re.sub(r"[-_]?seed[-_]?\d+", "", method.name)
        merged.setdefault((method.group, alone, json.dumps(same, sort_keys=True)), []).append(method)
    rows = []
    for (group, name, tags), runs in merged.items():
        if len(runs) == 1:
            rows.append(runs[0])
            continue
        known = [metric for metric in ALL_METRICS if all(metric in run.means for run in runs)]
        values = {metric: np.array([run.means[metric] for run in runs]) for metric in known}
        means = {metric: float(column.mean()) for metric, column in values.items()}
        spreads = {metric: f"± {digits(column.std(ddof=1))}" for metric, column in values.items()}
        subjects, had = mean_subjects(runs)
        name = f"{name} ({len(runs)} seeds)"
        left_out = max(run.left_out for run in runs)
        images = sum(run.images for run in runs)
        more = {"had": had, "left_out": left_out, "images": images}
        rows.append(Method(name, means, spreads, group, json.loads(tags), subjects, **more))
    return rows


def mean_subjects(runs: Sequence[Method]) -> tuple[dict[str, dict[str, float]], int]:
    """Each subject's scores averaged over runs, which have the same subjects, and the fewest that a run had."""
    known = [metric for metric in ALL_METRICS if all(metric in run.means for run in runs)]
    subjects = {
        subject: {metric: float(np.mean([run.subjects[subject][metric] for run in runs])) for metric in known}
        for subject in runs[0].subjects
    }
    return subjects, min(run.had for run in runs)


def choose(methods: list[Method], names: Sequence[str] | None) -> list[Method]:
    """The named methods in the order of the names; all without names."""
    unknown = set(names or ()) - {method.name for method in methods}
    if unknown:
        known = ", ".join(method.name for method in methods)
        raise ValueError(f"--methods: no {', '.join(sorted(unknown))} here; there are {known}")
    return [method for name in names for method in methods if method.name == name] if names else methods


def groups(methods: Sequence[Method]) -> dict[str, list[Method]]:
    """Methods by group, in order of first appearance."""
    found: dict[str, list[Method]] = {}
    for method in methods:
        found.setdefault(method.group, []).append(method)
    return found


def printed(method: Method, metric: str) -> float:
    """The score to the four decimals that are shown: what looks equal shares a place, and is bold together."""
    return round(method.means[metric], 4)


def places(values: Sequence[float]) -> np.ndarray:
    """1 for the smallest; equal values share the smallest of their places, as in a race: 1, 2, 2, 4."""
    values = np.asarray(values)
    return 1 + (values[None, :] < values[:, None]).sum(1)


def average_ranks(methods: Sequence[Method]) -> np.ndarray:
    """Mean over the metrics of each method's place among the methods, the highest score being first; (methods,)."""
    ranks = [places([-printed(method, metric) for method in methods]) for metric in METRICS]
    return np.sum(ranks, axis=0) / len(METRICS)  # a sum of whole numbers: equal averages are exactly equal


def rank_labels(methods: Sequence[Method]) -> list[str]:
    """The places of the average ranks, those that are shared with "="."""
    final = places(average_ranks(methods)).tolist()
    return [f"{place}=" if final.count(place) > 1 else str(place) for place in final]


def digits(value: float) -> str:
    """Four decimals without the leading zero, as the paper prints them: .7821."""
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.4f}")


def behind(method: Method, metric: str, intervals: bool) -> str:
    """What stands behind a score: its spread, if that is asked for, and the comparison with another method."""
    return f"{method.spreads.get(metric, '') * intervals} {method.better.get(metric, '')}".strip()


def columns(methods: Sequence[Method]) -> dict[str, str]:
    """The metrics that the table shows, with their titles: the three, and those of the class that a method has."""
    known = {metric for method in methods for metric in method.means}
    return {metric: title for metric, title in ALL_METRICS.items() if metric in known}


def best_printed(methods: Sequence[Method], metric: str) -> float | None:
    """The best score of a metric as it is shown; None where no method has one."""
    values = [printed(method, metric) for method in methods if metric in method.means]
    if not values:
        return None
    return min(values) if metric in LOWER_IS_BETTER else max(values)


def score_of(method: Method, metric: str, best: float | None, intervals: bool) -> Score:
    if metric not in method.means:
        return Score("", False, "")
    text = digits(method.means[metric])
    return Score(text, printed(method, metric) == best, behind(method, metric, intervals))


def table_rows(methods: Sequence[Method], intervals: bool, shown: Sequence[str]) -> list[Row]:
    """A group's rows with the metrics `shown`, the best of each metric and those that `notes` speaks of marked."""
    most = max(method.had for method in methods)
    most_images = max(method.images for method in methods)
    best = {metric: best_printed(methods, metric) for metric in shown}
    rows = []
    for method, average, label in zip(methods, average_ranks(methods), rank_labels(methods), strict=True):
        scores = [score_of(method, metric, best[metric], intervals) for metric in shown]
        n = str(len(method.subjects) or "")
        if 0 < method.had < most or method.left_out or 0 < method.images < most_images:
            n += " †"
        rows.append(Row(method.name, n, scores, f"{average:.2f}", label))
    return rows


def texts(row: Row, bold: str, with_n: bool) -> list[str]:
    """The cells of a row after its name; the best score goes into the braces of `bold`."""
    scores = [f"{bold.format(s.text) if s.best else s.text} {s.spread}".strip() for s in row.scores]
    return [*[row.n] * with_n, *scores, row.average, row.rank]


def counts_subjects(methods: Sequence[Method]) -> bool:
    """Whether the table needs its column n: printed numbers of others do not tell it."""
    return any(method.subjects for method in methods)


def markdown(methods: Sequence[Method], intervals: bool) -> str:
    grouped, with_n, shown = groups(methods), counts_subjects(methods), columns(methods)
    head = ["method", *["n"] * with_n, *shown.values(), "average rank", "rank"]
    lines = [["group", *head]] if len(grouped) > 1 else [head]
    lines.append(["---" if name in ("group", "method") else "---:" for name in lines[0]])
    for group, members in grouped.items():
        for row in table_rows(members, intervals, list(shown)):
            line = [row.name.replace("|", "\\|"), *texts(row, "**{}**", with_n)]
            lines.append([group, *line] if len(grouped) > 1 else line)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([table, *notes(methods)]) + "\n"


def latex(methods: Sequence[Method], intervals: bool) -> str:
    grouped, with_n, shown = groups(methods), counts_subjects(methods), columns(methods)
    width = 2 + with_n + len(shown)  # of the columns after the name
    lines = [rf"\begin{{tabular}}{{l{'r' * width}}}", r"\toprule"]
    lines.append(" & ".join(["Method", *["$n$"] * with_n, *shown.values(), "Average rank", "Rank"]) + r" \\")
    for group, members in grouped.items():
        lines.append(r"\midrule")
        if len(grouped) > 1:
            lines += [rf"\multicolumn{{{1 + width}}}{{l}}{{\textit{{{escape(group)}}}}} \\"]
        for row in table_rows(members, intervals, list(shown)):
            line = [escape(row.name), *texts(row, r"\textbf{{{}}}", with_n)]
            lines.append(" & ".join(line).replace("±", r"$\pm$").replace("†", r"$\dagger$") + r" \\")
    remarks = [escape(note).replace("†", r"$\dagger$") for note in notes(methods)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *remarks]) + "\n"


def escape(text: str) -> str:
    """Text that LaTeX prints as it is."""
    text = re.sub(r"[\\{}]", lambda match: r"\textbackslash{}" if match[0] == "\\" else "\\" + match[0], text)
    return re.sub(r"[&%$#_]", r"\\\g<0>", text).replace("~", r"\textasciitilde{}").replace("^", r"\textasciicircum{}")


FORMATS = {"markdown": markdown, "latex": latex}


def main(args: argparse.Namespace) -> None:
    text = FORMATS[args.format](args.rows, args.intervals)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main(parse_args())
