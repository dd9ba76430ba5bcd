"""Seeds as repetitions: a mean and its t interval (numpy)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lisa_analysis import statistics as st

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Mean:
    """Mean over seeds with its interval; the interval is NaN below three seeds."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} ({self.low:{spec}} … {self.high:{spec}})"


def mean_over_seeds(values: Sequence[float] | NDArray[np.float64], *, log: bool = False) -> Mean:
    """Mean with Student's t interval; `log` averages ratios, geometrically."""
    x = np.asarray(values, dtype=np.float64)
    x = np.log(x) if log else x
    half = float("nan")
    if len(x) > 2:
        half = float(st.t_quantile(0.5 + CONFIDENCE / 2, len(x) - 1) * x.std(ddof=1))
        half /= np.sqrt(len(x))
    bounds = np.array([x.mean(), x.mean() - half, x.mean() + half])
    return Mean(*(np.exp(bounds) if log else bounds).tolist())
