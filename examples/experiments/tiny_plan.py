# SPDX-License-Identifier: Apache-2.0
"""The runs of the experiments: what tiny_experiments.py trains, and how its runs are called."""

from collections.abc import Sequence
from dataclasses import dataclass, field

RATE, RANK = 2e-3, 16
RATES = (RATE / 2, RATE, RATE * 2)  # of which `best_rates` takes one
EARLY = (0.125, 0.25, 0.5)  # shares of the steps at which a run is drawn too, as if it had been stopped there
EQUAL_COMPUTE = 0.75  # share of the steps at which prior preservation has cost what the anchor costs in all of them
SHARES = (0.1, 0.25, 0.5)  # of samples that see the class prompt
SEEDS = (0, 1, 2)
SAP, PRIOR = "w0.5-pretrained", "prior"  # the two that are compared at equal budget


@dataclass(frozen=True)
class Run:
    """One way to train: its name without backbone and seed, the script's flags, and who trains so."""

    name: str
    flags: tuple[str, ...]
    seeds: int | None = None  # as many of --seeds; None: all
    subjects: str = "all"  # or "tuning", or "scored": the others
    early: tuple[float, ...] = ()  # shares of the steps at which pictures are drawn, before the last one
    kept: tuple[float, ...] = ()  # shares at which drift is measured, before the last one; `early` among them
    plain: bool = False  # whether the prompt without a scene is drawn
    masked: bool = False
    method: str = "sap"
    tags: dict = field(default_factory=dict)


def at_rate(name: str, rate: float) -> str:
    """The name of a run at a learning rate."""
    return name if rate == RATE else f"{name}-rate{rate:g}"


def anchored(w: float, source: str = "pretrained", rate: float = RATE, rank: int = RANK, **options) -> Run:
    """A run of the training script itself. Only the points of the paper's figures have no label of their own."""
    more = f"-rank{rank}" * (rank != RANK) + "-masked" * options.get("masked", False)
    name = at_rate(f"w{w:g}-{source}", rate) + more
    label = {} if name == f"w{w:g}-{source}" else {"label": name}
    tags = {"w": w, "anchor": source, "rate": rate, "rank": rank} | label
    flags = (f"--anchor_weight={w:g}", f"--anchor_source={source}", f"--learning_rate={rate:g}", f"--rank={rank}")
    return Run(name, flags, tags=tags, **options)


def neighbour(method: str, rate: float = RATE, strength: float | None = None, weight: float = 0.5, **options) -> Run:
    """A run of neighbours.py; `weight` is w of those that change the anchor."""
    name = at_rate(method, rate)
    flags = (f"--learning_rate={rate:g}", f"--rank={RANK}", f"--weight={weight:g}")
    if strength is not None:
        name += f"{strength:g}"
        flags += (f"--strength={strength:g}",)
    if weight != 0.5:
        name += f"-w{weight:g}"
    tags = {"rate": rate, "rank": RANK, "label": name}
    return Run(name, flags, method=method, tags=tags, **options)


def planned(early: Sequence[float] = EARLY) -> dict[str, list[Run]]:
    """The runs of each part, but for the budget's, which depend on those of the rates; `early` are the stops."""
    early = tuple(early)
    rates = [{"rate": rate, "seeds": 1, "subjects": "tuning"} for rate in RATES if rate != RATE]
    return {
        "core": [
            anchored(0, early=early, kept=early, plain=True),
            anchored(0.5, early=early, kept=early, plain=True),
            anchored(1, early=early, kept=early, plain=True),
            anchored(0.5, "finetuned", plain=True),
            neighbour(PRIOR, early=(EQUAL_COMPUTE,), kept=(0.25, 0.5, EQUAL_COMPUTE), plain=True),
        ],
        "curve": [
            anchored(0.25, plain=True),
            anchored(0.75),
        ],
        "masks": [anchored(w, masked=True, plain=True) for w in (0.5, 0.25)],
        "frontier": [
            anchored(0, rate=RATE / 4, early=early, kept=early),
            anchored(0, rank=RANK // 8, early=early, kept=early),
        ],
        "rates": [run for rate in rates for run in (anchored(0.5, **rate), neighbour(PRIOR, **rate))],
        "neighbours": [neighbour(method, seeds=1, plain=True) for method in ("dco", "dop", "l2")],
        "offers": [
            *(neighbour("share", strength=share) for share in SHARES),
            *(neighbour("share", strength=share, weight=1) for share in SHARES),
            neighbour("rising"),
            neighbour("falling"),
        ],
    }
