"""Arithmetic on series of norms, shape (steps, groups), with gaps (numpy only)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.metrics.log import Measurements

Array = NDArray[np.float64]


def last_known(values: NDArray[Any]) -> Array:
    """Last finite value of every column, NaN for a column without any."""
    finite = np.isfinite(values)
    row = len(values) - 1 - np.argmax(finite[::-1], axis=0) if len(values) else 0
    picked = np.asarray(values, dtype=np.float64)[row, np.arange(values.shape[1])]
    return np.where(finite.any(axis=0), picked, np.nan)


def ratio(above: NDArray[Any], below: NDArray[Any]) -> NDArray[Any]:
    """Quotient, NaN where the divisor is zero or unknown."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below > 0, above / below, np.nan)


def at_the_end(data: Measurements, values: Array) -> NDArray[Any]:
    """Values of the end of the run as a series that knows nothing before it, of one row or more."""
    rows, width = data.table.trained.shape
    series = np.full((max(rows, 1), width), np.nan, dtype=np.float32)
    series[-1:] = values
    return series
