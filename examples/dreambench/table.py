# SPDX-License-Identifier: Apache-2.0
"""Set methods side by side, with the average-rank column of the paper.

    python table.py results/scores.json                             # Markdown
    python table.py results/scores.json printed.csv --format latex  # beside numbers that others printed
    python table.py results/scores.json --group_by backbone --merge_seeds --intervals

Reads what evaluate.py writes, or CSV with the columns method, clip_i, clip_t, dino and, where wanted, group. Each
metric is ranked over all methods of a group by the four decimals shown, the three ranks are averaged, and the
averages are ranked. Methods that share a place are shown so: 1, 2=, 2=, 4.
"""

import argparse
import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

METRICS = {"clip_i": "CLIP-I", "clip_t": "CLIP-T", "dino": "DINO"}


@dataclass(frozen=True)
class Method:
    """The three means, perhaps the spread of each, each subject's scores, and the group it is ranked in."""

    name: str
    means: dict[str, float]
    spreads: dict[str, str] = field(default_factory=dict)
    group: str = ""
    tags: dict = field(default_factory=dict)
    subjects: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """A cell: four decimals, whether no other is higher, and what stands behind it."""

    text: str
    best: bool
    spread: str


@dataclass(frozen=True)
class Row:
    """A method as the table shows it, its scores in the order of METRICS."""

    name: str
    scores: list[Score]
    average: str
    rank: str


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=FORMATS, default="markdown", help="of the table; latex needs booktabs")
    parser.add_argument("--output", type=Path, help="write to this file instead of the screen")
    add_arguments(parser)
    args = parser.parse_args(arguments)
    try:
        methods = choose(read_methods(args.scores, args.group_by), args.methods)
    except ValueError as error:
        parser.error(str(error))
    args.rows = merge_seeds(methods) if args.merge_seeds else methods
    return args


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which methods stand in the table, and how; the report has the same table."""
    add = parser.add_argument
    add("scores", nargs="+", type=Path, help="scores.json of evaluate.py, or CSV: method,clip_i,clip_t,dino[,group]")
    add("--methods", nargs="+", metavar="METHOD", help="only these, in this order")
    add("--group_by", metavar="TAG", help="rank within methods that have the same value of this tag, e.g. backbone")
    add(
        "--merge_seeds", action="store_true", help="one row for methods whose tags differ in the seed only: their mean"
    )
    add("--intervals", action="store_true", help="show 95 %% intervals; for merged seeds the standard deviation")


def read_methods(files: Sequence[Path], group_by: str | None = None) -> list[Method]:
    """Methods of several files in order. `ValueError`, one sentence, for a file or a name that cannot be used."""
    methods: list[Method] = []
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is not there: evaluate.py writes it")
        methods += read_csv(file) if file.suffix == ".csv" else read_json(file)
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
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a scores.json of evaluate.py") from error
    return [
        Method(
            name,
            {metric: entry[metric]["mean"] for metric in METRICS},
            {metric: f"[{digits(entry[metric]['low'])}, {digits(entry[metric]['high'])}]" for metric in METRICS},
            tags=entry["tags"],
            subjects=entry["subjects"],
        )
        for name, entry in entries.items()
    ]


def read_csv(file: Path) -> list[Method]:
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    try:
        return [
            Method(row["method"], {metric: float(row[metric]) for metric in METRICS}, group=row.get("group") or "")
            for row in rows
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} needs the columns method, clip_i, clip_t, dino with a number a method") from error


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
        values = {metric: np.array([run.means[metric] for run in runs]) for metric in METRICS}
        means = {metric: float(column.mean()) for metric, column in values.items()}
        spreads = {metric: f"± {digits(column.std(ddof=1))}" for metric, column in values.items()}
        rows.append(Method(f"{name} ({len(runs)} seeds)", means, spreads, group, json.loads(tags)))
    return rows


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


def table_rows(methods: Sequence[Method], intervals: bool) -> list[Row]:
    """A group's rows, with the best of each metric marked."""
    best = {metric: max(printed(method, metric) for method in methods) for metric in METRICS}
    rows = []
    for method, average, label in zip(methods, average_ranks(methods), rank_labels(methods), strict=True):
        scores = [
            Score(digits(value), printed(method, metric) == best[metric], method.spreads.get(metric, "") * intervals)
            for metric, value in method.means.items()
        ]
        rows.append(Row(method.name, scores, f"{average:.2f}", label))
    return rows


def texts(row: Row, bold: str) -> list[str]:
    """The cells of a row after its name; the best score goes into the braces of `bold`."""
    scores = [f"{bold.format(s.text) if s.best else s.text} {s.spread}".rstrip() for s in row.scores]
    return [*scores, row.average, row.rank]


def markdown(methods: Sequence[Method], intervals: bool) -> str:
    grouped = groups(methods)
    head = ["method", *METRICS.values(), "average rank", "rank"]
    lines = [["group", *head]] if len(grouped) > 1 else [head]
    lines.append(["---" if name in ("group", "method") else "---:" for name in lines[0]])
    for group, members in grouped.items():
        for row in table_rows(members, intervals):
            line = [row.name.replace("|", "\\|"), *texts(row, "**{}**")]
            lines.append([group, *line] if len(grouped) > 1 else line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def latex(methods: Sequence[Method], intervals: bool) -> str:
    grouped = groups(methods)
    lines = [r"\begin{tabular}{lrrrrr}", r"\toprule"]
    lines.append(" & ".join(["Method", *METRICS.values(), "Average rank", "Rank"]) + r" \\")
    for group, members in grouped.items():
        lines.append(r"\midrule")
        if len(grouped) > 1:
            lines += [rf"\multicolumn{{6}}{{l}}{{\textit{{{escape(group)}}}}} \\"]
        for row in table_rows(members, intervals):
            line = [escape(row.name), *texts(row, r"\textbf{{{}}}")]
            lines.append(" & ".join(line).replace("±", r"$\pm$") + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


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
