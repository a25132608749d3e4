# SPDX-License-Identifier: Apache-2.0
"""Numbers of the experiments: a file of all that was measured, intervals over subjects, and gains over a curve.

    python tiny_numbers.py --coverage       # simulate how often the intervals of gains hold what they should

subjects.csv has a row for each backbone, run, number of steps, subject and seed, and a column for each metric, so that
whoever doubts an interval can compute it. Fidelity is the mean of its CLIP-I and DINO.
"""

import argparse
import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

BACKBONES = {"sd15": "SD1.5", "sdxl": "SDXL", "sd3": "SD3"}
BASE = "base"
TUNING_SUBJECTS = ("star2", "fish2")  # on which rates were chosen: not in the tables
METRICS = {
    "clip_t": "CLIP-T",
    "clip_i": "CLIP-I",
    "dino": "DINO",
    "pres": "PRES",  # DINO of the pictures of class prompts
    "div": "DIV",
    "drift": "drift",  # from the base's prediction for the class prompt at the same z_t
    "drift_class": "drift at class latents",  # at z_t^cls, as the paper's Figure 2
    "leak": "leak",
    "scene": "scene right",
    "seconds": "seconds",
}
DERIVED = {"fidelity": "fidelity", "apart": "DINO - PRES"}
TITLES = METRICS | DERIVED
RESAMPLES = 10_000
T975 = (np.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t by degrees of freedom

Pairs = dict[tuple[str, int], float]  # (subject, seed) -> a number


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, and how many (subject, seed) pairs of how many subjects are behind it.

    An end may be infinite: a gain over a curve that never gets so far.
    """

    value: float
    low: float
    high: float
    subjects: int
    pairs: int

    def side(self) -> int:
        """1 or -1 where the interval is above or below zero, else 0; one subject has no interval."""
        if self.subjects < 2:
            return 0
        return int(self.low > 0) - int(self.high < 0)

    def rounded(self, *numbers: float) -> str:
        """The value, or other numbers to as many digits."""
        digits = 3
        if np.isfinite(self.value) and abs(self.value) >= 2:
            digits = 2
        if np.isfinite(self.value) and abs(self.value) >= 10:
            digits = 1
        return ", ".join(shown(number, digits) for number in numbers or [self.value])

    def __str__(self) -> str:
        if self.subjects < 2:
            return self.rounded()
        return f"{self.rounded()} [{self.rounded(self.low, self.high)}]"

    def count(self) -> str:
        return f"{self.pairs} of {self.subjects}"


def shown(number: float, digits: int) -> str:
    """Without the leading zero; infinity in a word."""
    if np.isinf(number):
        return "beyond" if number > 0 else "-beyond"
    return re.sub(r"^(-?)0\.", r"\1.", f"{number:.{digits}f}")


class Found:
    """What was measured of one backbone."""

    def __init__(self, backbone: str):
        self.backbone = backbone
        self.name = BACKBONES[backbone]
        self.points: dict[tuple[str, int], dict[str, Pairs]] = {}  # (run, step) -> metric -> numbers

    def put(self, run: str, step: int, metric: str, pair: tuple[str, int], value: float) -> None:
        self.points.setdefault((run, step), {}).setdefault(metric, {})[pair] = value

    @property
    def last(self) -> int:
        """The last step of every run."""
        return max(step for _, step in self.points)

    def get(self, run: str, metric: str, step: int | None = None) -> Pairs:
        """The numbers of a run's last step, or of another one; empty where there are none."""
        if step is None:
            step = 0 if run == BASE else self.last
        measured = self.points.get((run, step), {})
        if metric == "fidelity" and metric not in measured:
            return combined(measured.get("clip_i", {}), measured.get("dino", {}), 0.5, 0.5)
        if metric == "apart":
            return combined(measured.get("dino", {}), measured.get("pres", {}), 1.0, -1.0)
        return measured.get(metric, {})

    def steps(self, run: str, metric: str) -> list[int]:
        return sorted(step for name, step in self.points if name == run and self.get(run, metric, step))

    def minus(self, one: str, other: str, metric: str) -> Estimate | None:
        return difference(self.get(one, metric), self.get(other, metric))

    def without(self, subjects: Iterable[str]) -> "Found":
        """The same without some subjects."""
        left_out = set(subjects)
        kept = Found(self.backbone)
        for (run, step), metrics in self.points.items():
            for metric, pairs in metrics.items():
                for pair, value in pairs.items():
                    if pair[0] not in left_out:
                        kept.put(run, step, metric, pair, value)
        return kept


def combined(one: Pairs, other: Pairs, share: float, other_share: float) -> Pairs:
    return {pair: share * one[pair] + other_share * other[pair] for pair in one if pair in other}


# --- The file -----------------------------------------------------------------------------------------------------


def write_subjects(file: Path, backbones: Sequence[Found]) -> None:
    """subjects.csv: a row for each backbone, run, steps, subject and seed; the base model has seed 0."""
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(["backbone", "run", "steps", "subject", "seed", *METRICS])
        for found in backbones:
            for (run, step), measured in sorted(found.points.items()):
                for pair in sorted({pair for pairs in measured.values() for pair in pairs}):
                    values = [measured.get(metric, {}).get(pair) for metric in METRICS]
                    cells = ["" if value is None else f"{value:.6g}" for value in values]
                    writer.writerow([found.backbone, run, step, *pair, *cells])


def read_subjects(file: Path) -> list[Found]:
    """What `write_subjects` wrote.

    Raises:
        ValueError: for a file that is no such table.
    """
    found: dict[str, Found] = {}
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                one = found.setdefault(row["backbone"], Found(row["backbone"]))
                for metric in METRICS:
                    if row[metric]:
                        pair = (row["subject"], int(row["seed"]))
                        one.put(row["run"], int(row["steps"]), metric, pair, float(row[metric]))
    except (OSError, csv.Error, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no subjects.csv of tiny_report.py ({error})") from error
    return [found[backbone] for backbone in BACKBONES if backbone in found]


# --- Means over subjects ------------------------------------------------------------------------------------------


def subject_means(pairs: Pairs) -> dict[str, float]:
    """Each subject's mean over its seeds."""
    by_subject: dict[str, list[float]] = {}
    for (subject, _), value in pairs.items():
        by_subject.setdefault(subject, []).append(value)
    return {subject: float(np.mean(values)) for subject, values in by_subject.items()}


def estimate(pairs: Pairs) -> Estimate:
    """The mean over subjects of means over seeds, with Student's interval over the subjects."""
    means = np.array(list(subject_means(pairs).values()))
    value = float(means.mean())
    if len(means) < 2:
        return Estimate(value, value, value, len(means), len(pairs))
    reach = T975[len(means) - 1] * means.std(ddof=1) / np.sqrt(len(means))
    return Estimate(value, float(value - reach), float(value + reach), len(means), len(pairs))


def difference(one: Pairs, other: Pairs) -> Estimate | None:
    """One minus the other, paired by subject and seed; None where they have nothing in common."""
    common = combined(one, other, 1.0, -1.0)
    return estimate(common) if common else None


# --- Gains over a curve -------------------------------------------------------------------------------------------


def densely(points: np.ndarray) -> np.ndarray:
    """A line through points (..., P, 2), with many points on each piece of it: (..., Q, 2)."""
    share = np.linspace(0, 1, 51)[:, None]
    starts = points[..., :-1, None, :]
    ends = points[..., 1:, None, :]
    pieces = starts + share * (ends - starts)
    return pieces.reshape(*points.shape[:-2], -1, 2)


def gains(points: np.ndarray, along: int) -> np.ndarray:
    """How far the first of points (..., P, 2) lies above the line through the others: (...).

    In the other coordinate than `along`, against the best that the line has where it is at least as far as the point
    in `along`; infinite where the line never gets so far.
    """
    line = densely(points[..., 1:, :])
    level = points[..., :1, along]
    heights = np.where(line[..., along] >= level, line[..., 1 - along], -np.inf)
    return points[..., 0, 1 - along] - heights.max(-1)


def stops(found: Found, run: str) -> list[tuple[str, int]]:
    """The points (run, step) of the line of a run that is stopped early: it begins at the base model."""
    return [(BASE, 0), *((run, step) for step in found.steps(run, "clip_t"))]


def gain(found: Found, point: tuple[str, int], line: Sequence[tuple[str, int]], along: int) -> Estimate | None:
    """How far a (run, step) lies above the line through others, the first of which is the base model: in fidelity at
    its alignment (along 0), or in alignment at its fidelity (along 1).

    Of the subjects and seeds that all have. The value is that of the means over all subjects, its interval by a
    bootstrap over subjects, each with all its seeds. None where the line has less than three points.
    """
    places = [point, *line]
    numbers = [[found.get(run, metric, step) for metric in ("clip_t", "fidelity")] for run, step in places]
    trained = [alignment for (run, _), (alignment, _) in zip(places, numbers, strict=True) if run != BASE]
    pairs = set.intersection(*(set(alignment) for alignment in trained))
    subjects = sorted({subject for subject, _ in pairs} & set(subject_means(numbers[1][0])))
    if len(places) < 4 or not subjects:
        return None
    table = np.empty((len(subjects), len(places), 2))
    for place, (run, _) in enumerate(places):
        for metric in (0, 1):
            kept = {pair: value for pair, value in numbers[place][metric].items() if run == BASE or pair in pairs}
            means = subject_means(kept)
            table[:, place, metric] = [means[subject] for subject in subjects]
    low, high = bootstrap_gain(table, along)
    counted = sum(pair[0] in subjects for pair in pairs)
    return Estimate(float(gains(table.mean(0), along)), low, high, len(subjects), counted)


def bootstrap_gain(table: np.ndarray, along: int, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The interval of a gain, from subjects' places (subjects, P, 2): percentiles of resamples of the subjects.

    The percentiles are those that give Student's interval where the statistic is a mean (Hesterberg 2015,
    arXiv 1411.5279, "expanded percentile"): plain ones are too narrow for so few subjects.
    """
    count = len(table)
    if count < 2:
        value = float(gains(table.mean(0), along))
        return value, value
    drawn = np.random.default_rng(0).integers(0, count, (resamples, count))
    weights = np.zeros((resamples, count))
    np.add.at(weights, (np.arange(resamples)[:, None], drawn), 1 / count)
    means = np.einsum("rs,spm->rpm", weights, table)
    values = np.concatenate([gains(part, along) for part in np.array_split(means, 20)])
    tail = NormalDist().cdf(-T975[count - 1] * (count / (count - 1)) ** 0.5)
    low, high = np.quantile(values, (tail, 1 - tail), method="inverted_cdf")
    return float(low), float(high)


def coverage(subjects: int, worlds: int = 200, resamples: int = 1000) -> dict[str, float]:
    """How often the interval of a gain holds the true gain, by simulation: line and point -> share.

    Subjects' places scatter around true ones about as in the experiments: by .022 in alignment and .07 in fidelity for
    all places of a subject together, and by .02 and .04 for each place. The point lies beside a piece of the line, at
    a corner of it, above it, or near its end.
    """
    line = np.array([[0.765, 0.13], [0.76, 0.3], [0.745, 0.55], [0.725, 0.68], [0.70, 0.72]])
    cases = {
        "beside a piece": (0.735, 0.58),
        "at a corner": (0.745, 0.55),
        "above": (0.75, 0.66),
        "near the end": (0.763, 0.2),
    }
    rng = np.random.default_rng(1)
    shares = {}
    for name, point in cases.items():
        truth = np.array([point, *line])
        held = 0
        for _ in range(worlds):
            common = rng.normal(0, (0.022, 0.07), (subjects, 1, 2))
            own = rng.normal(0, (0.02, 0.04), (subjects, len(truth), 2))
            low, high = bootstrap_gain(truth + common + own, 0, resamples)
            held += low <= float(gains(truth, 0)) <= high
        shares[name] = held / worlds
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coverage", action="store_true", required=True, help="simulate the intervals of gains")
    parser.add_argument("--worlds", type=int, default=200, help="simulated experiments of each kind")
    args = parser.parse_args()
    for subjects in (6, 8):
        shares = coverage(subjects, args.worlds)
        print(f"{subjects} subjects: " + ", ".join(f"{name} {share:.3f}" for name, share in shares.items()))


if __name__ == "__main__":
    main()
