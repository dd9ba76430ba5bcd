"""The two sides of every comparison: what a run's ablation says, and what its metrics say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.layers import plain_name
from lisa_analysis.metrics import METRICS
from lisa_analysis.metrics.ablation import per_example
from lisa_analysis.metrics.log import measurements
from lisa_analysis.metrics.weights import OF_BASE, OF_CHANGES, run_weights
from lisa_analysis.profiles.from_run import importance
from lisa_analysis.profiles.profile import ImportanceProfile
from lisa_analysis.statistics import association
from lisa_analysis.statistics.association import Cells
from lisa_analysis.statistics.estimate import MIN_INDEPENDENT

if TYPE_CHECKING:
    from lisa_analysis.rundir.run import Run

Array = NDArray[np.float64]

# What an ablation can tell a metric by, in the order of the table.
TARGETS = ("ablation_keep", "ablation_reset")
# Layers as wholes; each kind of module in each layer; and layers within each kind.
# Operations of singular values that a comparison takes unasked: a minute or two on one core.
MOST_WORK = 3e11
LEVELS = ("layer", "module", "within kind")
# Where a metric comes from that was handed over as a profile.
GIVEN = "a profile"


@dataclass(frozen=True, eq=False)
class Side:
    """Scores over cells, NaN where unknown, and bootstrap samples of them where there are any."""

    score: Array
    samples: Array | None

    def of(self, rows: NDArray[np.int64]) -> "Side":
        """Return those of some cells."""
        return Side(self.score[rows], None if self.samples is None else self.samples[:, rows])


@dataclass(frozen=True, eq=False)
class Part:
    """One run's target at one level, how reliable its order is, and every metric beside it."""

    level: str
    target: str
    layer_names: tuple[str, ...]
    cells: Cells
    truth: Side
    reliability: float
    metrics: Mapping[tuple[str, str], Side]

    @property
    def stack(self) -> tuple[tuple[str, ...], int, int]:
        """What change places with each other: runs of one model have its layers."""
        return self.layer_names, self.cells.layers, self.cells.kinds


def parts_of(
    run: "Run", lenders: Sequence[tuple[str, Any]], given: Sequence[ImportanceProfile],
    missing: dict[str, str], confidence: float, seed: int,
) -> list[Part]:  # fmt: skip
    """Targets of one run at all levels that it was ablated at, with the metrics beside them."""
    found: list[Part] = []
    for by in ("layer", "module"):
        truths = {t: p for t in TARGETS if (p := _profile(run, t, by, confidence, seed))}
        if not truths:
            continue
        sides = {("", metric): side for metric, side in _sides(run, by, missing, seed).items()}
        for name, lender in lenders:
            lent = _sides(lender, by, missing, seed)
            sides |= {(name, metric): side for metric, side in lent.items()
                      if not _same(side, sides.get(("", metric)))}  # fmt: skip
        names = list(next(iter(truths.values())).layers["name"])
        for one in (p for p in given if p.by == by):
            side = _of_profile(one, names)
            sides[GIVEN, one.metric] = side
            if not np.isfinite(side.score).any():
                missing[one.metric] = (
                    f"the profile given scores none of the run's {by}s: its own are "
                    f"{one.layers['name'].iloc[0]} …, the run's {names[0]} …"
                )
        for target, profile in truths.items():
            rows = per_example(measurements(run, by), target.removeprefix("ablation_"), "held_out")
            found += _levels(run, by, target, profile, rows[:, : len(profile)], sides)
    return found


def _levels(
    run: "Run",
    by: str,
    target: str,
    profile: ImportanceProfile,
    rows: Array,
    sides: Mapping[Any, Side],
) -> list[Part]:
    """Cells of a target that are complete, at each level that they are of."""
    frame = profile.to_frame()
    known = frame["score"].notna().to_numpy()
    if by == "layer":
        where, cells = np.flatnonzero(known), [Cells(int(known.sum()))]
    else:
        where, layers, kinds = _grid(frame, known)
        cells = [Cells(layers, kinds), Cells(layers, kinds, within=True)]
    if cells[0].layers < 3:
        return []
    parts = []
    for cell, level in zip(cells, LEVELS[:1] if by == "layer" else LEVELS[1:], strict=True):
        truth = Side(profile.scores[where], _resampled(rows[:, where]))
        beside = {key: side.of(where) for key, side in sides.items()}
        beside = {key: side for key, side in beside.items() if np.isfinite(side.score).sum() > 2}
        reliability = association.reliability(cell, rows[:, where])
        parts.append(Part(level, target, tuple(run.layer_names), cell, truth, reliability, beside))
    return parts


def _same(lent: Side, own: Side | None) -> bool:
    """Whether a metric of the base (depth, norms, spectra) is that of the run itself."""
    return own is not None and np.array_equal(lent.score, own.score, equal_nan=True)


def _of_profile(profile: ImportanceProfile, names: Sequence[str]) -> Side:
    """Scores of a profile for cells of these names; NaN for those that it does not know."""
    at = {plain_name(name): row for row, name in enumerate(profile.layers["name"])}
    rows = np.array([at.get(plain_name(name), -1) for name in names], dtype=np.int64)
    samples = None if profile.samples is None else profile.samples[:, rows]
    if samples is not None:
        samples = np.where(rows < 0, np.nan, samples)
    return Side(np.where(rows < 0, np.nan, profile.scores[rows]), samples)


def _too_long(run: "Run", name: str) -> str:
    """Why the spectra of all weights are not taken unasked; empty where they may be."""
    what = "change" if name in OF_CHANGES else "base" if name in OF_BASE else None
    if what is None:
        return ""
    try:
        work = run_weights(run).work(what)
    except LisaError:
        return ""  # the metric itself says what is missing
    if work <= MOST_WORK:
        return ""
    return (
        f"{name} takes the singular values of every matrix, about {work / 2e9 / 60:,.0f} minutes: "
        f"call importance(run, {name!r}) first, and it is compared"
    )


def _resampled(rows: Array, replicates: int = 500, seed: int = 0) -> Array | None:
    """Means of bootstrap samples of the examples, shape (replicates, cells); None for too few.

    The same draws for every run: seeds that share their examples stay paired.
    """
    n = len(rows)
    if n < MIN_INDEPENDENT or not np.isfinite(rows).all():
        return None
    mean = rows.mean(axis=0)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=replicates)
    return np.asarray(mean + (drawn @ rows / n - mean) * np.sqrt(n / (n - 1)))


def _grid(frame: pd.DataFrame, known: NDArray[np.bool_]) -> tuple[NDArray[np.int64], int, int]:
    """Rows of the kinds that every ablated layer has, layer by layer, and how many of each."""
    rows = frame.assign(row=np.arange(len(frame)))[known]
    rows = rows.assign(kind=rows["name"].str.rsplit(" ", n=1).str[-1])
    layers = rows["layer"].nunique()
    whole = rows.groupby("kind")["layer"].transform("nunique") == layers
    rows = rows[whole].sort_values(["layer", "kind"])
    return rows["row"].to_numpy(dtype=np.int64), int(layers), int(rows["kind"].nunique())


def _profile(run: "Run", metric: str, by: str, confidence: float, seed: int) -> Any:
    """Return a profile, None where the run does not have it."""
    try:
        profile = importance(run, metric, by=by, confidence=confidence, seed=seed)
    except LisaError:
        return None
    return profile if np.isfinite(profile.scores).any() else None


def _sides(run: "Run", by: str, missing: dict[str, str], seed: int) -> dict[str, Side]:
    """Every metric that a run can give, but its ablation and those that take a second run."""
    found = {}
    for name, metric in METRICS.items():
        if metric.compares or metric.rows == "examples":
            continue
        if why := _too_long(run, name):
            missing.setdefault(name, why)
            continue
        try:
            profile = importance(run, name, by=by, seed=seed)
        except LisaError as error:
            missing.setdefault(name, str(error))
            continue
        if np.isfinite(profile.scores).sum() < 3:
            missing.setdefault(name, profile.statement)
            continue
        found[name] = Side(profile.scores, profile.samples)
    return found
