"""Means over seeds, and their differences, with Student's t."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.statistics.bootstrap import t_quantile

Array = NDArray[np.float64]

MIN_SEEDS = 3
_NAN = float("nan")


@dataclass(frozen=True)
class Mean:
    """Mean of repetitions with its interval; the bounds are NaN below `MIN_SEEDS` of them."""

    value: float
    low: float = _NAN
    high: float = _NAN
    n: int = 0

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} ({self.low:{spec}} … {self.high:{spec}})"


def mean_over(
    values: Sequence[float] | Array, confidence: float = 0.95, *, log: bool = False
) -> Mean:
    """Mean with Student's t interval.

    Parameters
    ----------
    values
        One per repetition; NaN is left out.
    confidence
        Coverage of the interval.
    log
        Average ratios: the geometric mean, with the interval of the logarithms.
    """
    x = np.asarray(values, dtype=np.float64)
    x = x[np.isfinite(x)]
    if not len(x):
        return Mean(_NAN)
    x = np.log(x) if log else x
    half = _NAN
    if len(x) >= MIN_SEEDS:
        t = float(t_quantile(0.5 + confidence / 2, len(x) - 1))
        half = t * float(x.std(ddof=1)) / np.sqrt(len(x))
    bounds = np.array([x.mean(), x.mean() - half, x.mean() + half])
    value, low, high = (np.exp(bounds) if log else bounds).tolist()
    return Mean(value, low, high, len(x))


def mean_difference(
    a: Sequence[float] | Array, b: Sequence[float] | Array, confidence: float = 0.95
) -> Mean:
    """Mean of `a` less that of `b` where nothing pairs them, by Welch's t.

    The bounds are NaN below `MIN_SEEDS` on either side; `n` counts both sides.
    """
    sides = [x[np.isfinite(x)] for x in (np.asarray(a, np.float64), np.asarray(b, np.float64))]
    if not all(len(x) for x in sides):
        return Mean(_NAN)
    value = float(sides[0].mean() - sides[1].mean())
    count = len(sides[0]) + len(sides[1])
    if min(map(len, sides)) < MIN_SEEDS:
        return Mean(value, n=count)
    parts = np.array([x.var(ddof=1) / len(x) for x in sides])
    error = float(parts.sum())
    if error == 0:
        return Mean(value, value, value, count)
    weights = parts**2 / np.array([len(x) - 1 for x in sides])
    half = float(t_quantile(0.5 + confidence / 2, error**2 / weights.sum())) * np.sqrt(error)
    return Mean(value, value - half, value + half, count)
