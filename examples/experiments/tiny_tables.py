# SPDX-License-Identifier: Apache-2.0
"""The tables of the experiments, from subjects.csv alone; written anew into a page, between their marks.

    python tiny_tables.py --results_dir ../results --page ../RESULTS.md

    run          what was run, of all that tiny_experiments.py can
    class        what is left of the class: the prompt without the identifier
    tendencies   does what the paper says of w, of its two anchors and of its baselines happen here?
    frontier     does the anchor reach what w = 0, stopped early, at a low rate or rank, does not?
    budget       the anchor and prior preservation at equal steps and at equal compute
    masks        masks of the subject
    neighbours   DCO, differential output preservation, L2 on the LoRA
    offers       samples that see the class prompt, and anchors whose weight follows the noise, against w = 0.5

A table stands between the lines <!-- NAME --> and <!-- end of NAME -->. A number is a mean over subjects, of means
over seeds; the last column counts trainings and subjects. The subjects on which rates were chosen are in no table
but that of the offers, none of which has a rate of its own.
Brackets are 95 % t intervals over subjects, in the frontier those of a bootstrap. Differences are paired by subject
and seed. "Holds" and "does not" need intervals without zero. Fidelity is the mean of CLIP-I and DINO, alignment is
CLIP-T.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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
    stops,
    subject_means,
)
from tiny_plan import EQUAL_COMPUTE, PRIOR, RANK, RATE, RATES, SAP, SHARES, at_rate, planned

W0, W1, FINETUNED = "w0-pretrained", "w1-pretrained", "w0.5-finetuned"
CURVE = {W0: 0.0, "w0.25-pretrained": 0.25, SAP: 0.5, "w0.75-pretrained": 0.75, W1: 1.0}
MASKED = {f"{run}-masked": run for run in (SAP, "w0.25-pretrained")}
NAMES = {run: f"w = {w:g}" for run, w in CURVE.items()} | {
    BASE: "base model", PRIOR: "prior preservation", FINETUNED: "w = 0.5, finetuned anchor", "dco": "DCO",
    "dop": "output preservation", "l2": "L2 on the LoRA", f"{SAP}-masked": "w = 0.5, masks",
    "w0.25-pretrained-masked": "w = 0.25, masks", "rising": "weight rises with the noise",
    "falling": "weight falls with the noise"}  # fmt: skip
SHARED = {f"share{share:g}": share for share in SHARES}  # with w = 0.5
SHARED_W1 = {f"share{share:g}-w1": share for share in SHARES}
NAMES |= {run: f"{share:.0%} of samples see the class prompt" for run, share in (SHARED | SHARED_W1).items()}
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
    """A row a run, a column a backbone; below, the runs that no backbone has."""
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
    missing = [f"{part}: {name}" for part, name, *cells in rows if set(cells) == {"not run"}]
    there = [row for row in rows if set(row[2:]) != {"not run"}]
    text = table(["part", "run", *BACKBONES.values()], there) + f"\n\nTrainings of subjects: {steps}."
    return text + (f" Not run: {', '.join(missing)}." if missing else "")


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


def frontier(backbones: list[Found]) -> str:
    """A row a point of the anchor, stopped early too where that was drawn: how far it lies above the lines of w = 0
    that is stopped early, as it is, at a low rate and at a low rank. Below: how many intervals are without zero.
    """
    kinds = [(W0, 0), (W0, 1), *((run, 0) for run in STOPPED if run != W0)]
    rows = []
    sides = []
    for found in backbones:
        for run in [*(run for run, w in CURVE.items() if w > 0), *MASKED]:
            for step in found.steps(run, "clip_t"):
                known = [gain(found, (run, step), stops(found, rival), along) for rival, along in kinds]
                if known[0] is None:
                    continue
                name = NAMES[run]
                if step != found.last:
                    name += f", {step} steps"
                sides += [one.side() for one in known if one is not None and one.subjects > 1]
                rows.append([found.name, name, *map(marked, known), known[0].count()])
    titles = [f"{STOPPED[run]}: {('fidelity', 'alignment')[along]}" for run, along in kinds]
    text = table(["", "", *titles, COUNT], rows)
    if sides:
        text += f"\n\nOf {len(sides)} intervals {sides.count(1)} are above zero and {sides.count(-1)} below; "
        text += f"chance alone would put about {len(sides) / 20:.1f} on one side or the other."
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


def offers(backbones: list[Found]) -> str:
    """What each change of the anchor does to the anchor of the same w, and how far it lies above the line of w.

    The way to the base is how much of what that anchor added to the base's PRES is gone.
    """
    rows = []
    for found in backbones:
        curve = [(run, found.last) for run in reversed(CURVE) if found.get(run, "clip_t")]
        changed = dict.fromkeys([*SHARED, "rising", "falling", W1], SAP) | dict.fromkeys(SHARED_W1, W1)
        for run, plain in changed.items():
            if found.get(run, "clip_t") and found.get(plain, "pres"):
                beyond = [marked(found.minus(run, plain, metric)) for metric in ("clip_t", "fidelity", "pres")]
                kept = found.get(plain, "pres")
                pairs = found.get(run, "pres").keys() & kept.keys()
                added = {pair: kept[pair] - found.get(BASE, "pres")[pair[0], 0] for pair in pairs}
                way = -found.minus(run, plain, "pres").value / estimate(added).value
                above = [None, None]
                if run not in CURVE:
                    line = [(BASE, 0), *curve]
                    above = [marked(gain(found, (run, found.last), line, along)) for along in (0, 1)]
                start = [found.name, NAMES[plain], NAMES[run]]
                rows.append([*start, *beyond, f"{way:.0%}", *above, counted(found.get(run, "clip_t"))])
    head = [
        "",
        "beyond",
        "",
        "CLIP-T",
        "fidelity",
        "PRES",
        "PRES's way to the base",
        "fidelity above the line of w",
    ]
    return table([*head, "alignment above the line of w", COUNT], rows)


def tables(backbones: list[Found]) -> dict[str, str]:
    """All tables by name."""
    scored = [found.without(TUNING_SUBJECTS) for found in backbones]
    return {
        "run": what_was_run(backbones),
        "class": class_rows(scored),
        "tendencies": tendencies(scored),
        "frontier": frontier(scored),
        "budget": budget(backbones),
        "masks": masks(scored),
        "neighbours": neighbour_rows(scored),
        "offers": offers(backbones),
    }


def filled(page: str, made: dict[str, str]) -> str:
    """The page with its tables written anew.

    Raises:
        ValueError: for a table that has a beginning and no end.
    """
    for name, text in made.items():
        first = f"<!-- {name} -->\n"
        last = f"<!-- end of {name} -->"
        if first not in page:
            continue
        before, _, rest = page.partition(first)
        _, end, after = rest.partition(last)
        if not end:
            raise ValueError(f"--page: the table {name} has no line {last}")
        page = f"{before}{first}{text}\n{last}{after}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results_dir", type=Path, required=True, help="has subjects.csv of tiny_report.py")
    parser.add_argument("--page", type=Path, required=True, help="Markdown file whose tables are written anew")
    args = parser.parse_args()
    try:
        made = tables(read_subjects(args.results_dir / "subjects.csv"))
        if not args.page.is_file():
            raise ValueError(f"--page: {args.page} is not there")
        page = filled(args.page.read_text(encoding="utf-8"), made)
    except ValueError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    args.page.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
