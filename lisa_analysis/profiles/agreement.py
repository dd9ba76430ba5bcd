"""Whether two profiles rank the layers alike, and whether they differ beyond noise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lisa_analysis import statistics as st
from lisa_analysis.profiles.profile import ImportanceProfile

Array = NDArray[np.float64]

PAIRS = 400
_NAN = float("nan")


@dataclass(frozen=True)
class Agreement:
    """Agreement of two profiles on the layers that both know; NaN or None is unknown.

    Attributes
    ----------
    kendall, kendall_low, kendall_high
        Kendall's τ and its interval, from pairs of bootstrap samples.
    spearman
        Spearman's rank correlation.
    top_overlap
        Jaccard overlap of the top quarters.
    divergence, noise_floor
        Jensen–Shannon divergence of the shares, and what noise alone reaches when both have the
        same true profile.
    beyond_noise
        Whether the divergence is above the floor.
    layers
        Layers that both know; 0 where the two are of different layers.
    """

    kendall: float = _NAN
    kendall_low: float = _NAN
    kendall_high: float = _NAN
    spearman: float = _NAN
    top_overlap: float = _NAN
    divergence: float = _NAN
    noise_floor: float = _NAN
    beyond_noise: bool | None = None
    layers: int = 0


def agree(
    a: ImportanceProfile, b: ImportanceProfile, *, confidence: float = 0.95, seed: int = 0
) -> Agreement:
    """Compare two profiles of the same layers, of any metric and from anywhere.

    Parameters
    ----------
    a, b
        The profiles.
    confidence, seed
        Of the interval and its bootstrap.
    """
    if tuple(a.layers["name"]) != tuple(b.layers["name"]):
        return Agreement()
    known = np.isfinite(a.scores) & np.isfinite(b.scores)
    layers = int(known.sum())
    if layers < 3:
        return Agreement(layers=layers)
    x, y = a.scores[known], b.scores[known]
    kendall = st.kendall_tau(x, y)
    positive = bool((x > 0).any() and (y > 0).any())
    divergence = _NAN
    if positive:
        divergence = float(st.jensen_shannon(np.maximum(x, 0), np.maximum(y, 0)))
    low, high, floor, beyond = _NAN, _NAN, _NAN, None
    if a.samples is not None and b.samples is not None:
        rng = np.random.default_rng(seed)
        rows = rng.integers(0, (len(a.samples), len(b.samples)), size=(PAIRS, 2))
        first, second = a.samples[rows[:, 0]], b.samples[rows[:, 1]]
        low, high = _tau_interval(kendall, first, second, confidence)
        if positive:
            floor = _noise_floor(x, y, first, second, confidence)
            beyond = bool(divergence > floor)
    return Agreement(
        kendall, low, high, st.spearman(x, y), st.top_jaccard(x, y), divergence, floor, beyond,
        layers,
    )  # fmt: skip


def _tau_interval(
    kendall: float, first: Array, second: Array, confidence: float
) -> tuple[float, float]:
    taus = st.kendall_taus(first, second)
    taus = taus[np.isfinite(taus)]
    if not len(taus):
        return _NAN, _NAN
    tail = (1 - confidence) / 2
    low, high = np.quantile(taus, [tail, 1 - tail])
    # Noise lowers τ twice over in the samples: the interval reaches at least the estimate.
    return float(min(low, kendall)), float(max(2 * kendall - low, high).clip(-1, 1))


def _noise_floor(x: Array, y: Array, first: Array, second: Array, confidence: float) -> float:
    """Divergence that noise alone gives when both runs have the same true profile."""
    with np.errstate(divide="ignore", invalid="ignore"):
        middle = np.sqrt(np.maximum(x, 0) / x.sum() * np.maximum(y, 0) / y.sum())
        relative_a, relative_b = first / x, second / y
    null = st.jensen_shannon(
        np.maximum(np.nan_to_num(middle * relative_a), 0),
        np.maximum(np.nan_to_num(middle * relative_b), 0),
    )
    return float(np.quantile(null, confidence))


def shares(profiles: Mapping[str, ImportanceProfile]) -> pd.DataFrame:
    """Shares of the total score, layers by name in the order of first appearance."""
    columns = {}
    for label, profile in profiles.items():
        scores = np.maximum(profile.scores, 0)
        total = np.nansum(scores)
        share = scores / total if total > 0 else np.full(len(scores), np.nan)
        columns[label] = pd.Series(share, index=list(profile.layers["name"]))
    names = list(dict.fromkeys(name for column in columns.values() for name in column.index))
    frame = pd.DataFrame(columns, index=names)
    return frame.rename_axis("name").reset_index()


def concordance(profiles: Sequence[ImportanceProfile]) -> float:
    """Kendall's W of three or more profiles of the same layers, else NaN."""
    tables = [tuple(profile.layers["name"]) for profile in profiles]
    if len(tables) < 3 or len(set(tables)) > 1:
        return _NAN
    scores = np.stack([profile.scores for profile in profiles])
    known = np.isfinite(scores).all(axis=0)
    return st.kendall_w(scores[:, known]) if known.sum() > 2 else _NAN


def agreement_square(pairs: pd.DataFrame) -> pd.DataFrame:
    """Turn one row per pair (``run_a``, ``run_b``, ``kendall``) into a symmetric table."""
    names = list(dict.fromkeys([*pairs["run_a"], *pairs["run_b"]]))
    square = pd.DataFrame(np.eye(len(names)), index=names, columns=names)
    for a, b, value in zip(pairs["run_a"], pairs["run_b"], pairs["kendall"], strict=True):
        square.loc[a, b] = square.loc[b, a] = value
    return square
