"""The seeds behind a profile over seeds: each by itself, spread within and between, agreement."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import combinations
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lisa_analysis import statistics as st
from lisa_analysis.profiles.profile import ImportanceProfile
from lisa_analysis.statistics.over_seeds import SeedMeans

Array = NDArray[np.float64]

_NAN = float("nan")
# From here on what one run states for itself is not what a second seed shows.
_MORE = 1.5


@dataclass(frozen=True, eq=False)
class Seeds:
    """The seeds behind a profile, each for itself.

    Attributes
    ----------
    runs
        What the seeds are called.
    scores
        One row per layer: layer, name, and one column per seed with its own score.
    spread
        One row per layer: layer, name, seeds that know it, and standard deviations of its score
        beside the other layers': `total` between seeds as they came out; `within`, what a run
        states for itself; `between`, what is left of `total` when `within` is taken off. Of
        logarithms (0.05 is 5 %), or over the layer's size for metrics on a linear scale.
    ratio
        Total over within, all layers together: how much more seeds differ than one run says. NaN
        where no run has intervals.
    kendall, kendall_low, kendall_high
        Kendall's τ between the rankings of two seeds: mean, smallest and largest.
    statement
        The same in words.
    """

    runs: tuple[str, ...]
    scores: pd.DataFrame = field(repr=False)
    spread: pd.DataFrame = field(repr=False)
    ratio: float
    kendall: float
    kendall_low: float
    kendall_high: float
    statement: str

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values; frames as lists of rows."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {
            "scores": self.scores.to_dict("records"),
            "spread": self.spread.to_dict("records"),
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Seeds":
        """Read what `to_dict` gave and JSON kept: unknown numbers are None there."""
        numbers = [
            _NAN if record[name] is None else float(record[name])
            for name in ("ratio", "kendall", "kendall_low", "kendall_high")
        ]
        frames = [_read_frame(record[name]) for name in ("scores", "spread")]
        return cls(
            tuple(record["runs"]), frames[0], frames[1], numbers[0], numbers[1], numbers[2],
            numbers[3], record["statement"],
        )  # fmt: skip


def _read_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows)
    kinds = {str(c): "float64" for c in frame if c not in ("layer", "name")}
    kinds["layer"] = "Int64"
    if "seeds" in frame:
        kinds["seeds"] = "int64"
    return frame.astype(kinds)


def each_seed(
    profiles: Sequence[ImportanceProfile], names: Sequence[str], means: SeedMeans, log: bool
) -> Seeds:
    """Tell what differs within runs from what differs between them."""
    places = profiles[0].layers[["layer", "name"]]
    table = np.stack([p.scores for p in profiles])
    stated = np.stack([_stated(profile, log) for profile in profiles])
    size = np.ones(table.shape[1]) if log else np.abs(means.effect)
    with np.errstate(invalid="ignore", divide="ignore"):
        squares = np.where(np.isfinite(stated), stated**2, 0.0).sum(axis=0)
        within = np.sqrt(squares / np.isfinite(stated).sum(axis=0)) / size
        total = means.total / size
        between = np.sqrt(np.maximum(total**2 - within**2, 0.0))
        both = np.isfinite(within) & np.isfinite(total)
        ratio = rms(total[both]) / rms(within[both])
    taus = []
    for a, b in combinations(table, 2):
        known = np.isfinite(a) & np.isfinite(b)
        taus.append(st.kendall_tau(a[known], b[known]) if known.sum() > 2 else _NAN)
    agree = [tau for tau in taus if np.isfinite(tau)] or [_NAN]
    spread = places.assign(seeds=means.seeds, within=within, between=between, total=total)
    found = Seeds(
        tuple(names), places.assign(**dict(zip(names, table, strict=True))), spread, ratio,
        float(np.mean(agree)), min(agree), max(agree), "",
    )  # fmt: skip
    return _said(found, int(np.isfinite(taus).sum()))


def _said(seeds: Seeds, pairs: int) -> Seeds:
    """Add the words; `pairs` of seeds have a τ, of layers that both know."""
    within, total = (
        rms(seeds.spread[name].to_numpy(dtype=np.float64)) for name in ("within", "total")
    )
    words = []
    if np.isfinite(total):
        text = f"A layer's score differs between seeds by {total:.1%}"
        if np.isfinite(seeds.ratio):
            text += f", where one run states {within:.1%} for itself"
            if seeds.ratio > _MORE:
                text += ": the interval of a single run speaks of its own seed only"
            elif seeds.ratio < 1 / _MORE:
                text += ": it cannot know that other seeds take the same slow course"
        words.append(text + ".")
    if np.isfinite(seeds.kendall):
        # No interval, which is written with dots everywhere: the pairs themselves.
        reach = (
            f" on average ({seeds.kendall_low:.2f} to {seeds.kendall_high:.2f} over {pairs} pairs)"
        )
        words.append(
            f"Rankings of two seeds agree with τ = {seeds.kendall:.2f}{reach if pairs > 1 else ''}."
        )
    return replace(seeds, statement=" ".join(words))


def rms(values: Array) -> float:
    """Root mean square of what is known; NaN without anything."""
    known = values[np.isfinite(values)]
    return float(np.sqrt((known**2).mean())) if len(known) else _NAN


def _stated(profile: ImportanceProfile, log: bool) -> Array:
    """Standard error that a profile states for each of its layers, from its interval."""
    frame = profile.layers
    low, high = (frame[name].to_numpy(dtype=np.float64) for name in ("low", "high"))
    with np.errstate(invalid="ignore", divide="ignore"):
        width = np.log(high / low) if log else high - low
    reach = NormalDist().inv_cdf(0.5 + profile.confidence / 2)
    return np.where(np.isfinite(width), width / (2 * reach), np.nan)
