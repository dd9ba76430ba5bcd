"""Arithmetic on series of norms, shape (steps, groups), with gaps (numpy only)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.statistics.effects import additive_effects

Array = NDArray[np.float64]


def growth_exponent(
    relative: NDArray[Any], exposure: NDArray[Any], interval: NDArray[np.int64], inside: int
) -> float:
    """Power of the exposure to training with which the layers' change grows, in [½, 1].

    Slope of ln‖ΔW‖ on ln(exposure) within layers, one point per activation (its last recorded
    step); 1, as if every activation went on in the same direction, when no layer came back.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.log(np.asarray(relative[:, :inside], dtype=np.float64))
    change[~np.isfinite(change)] = np.nan
    products = squares = 0.0
    last_row = np.append(np.flatnonzero(np.diff(interval)), len(interval) - 1)
    for layer in range(inside):
        rows = last_row[np.isfinite(change[last_row, layer])]
        rows = rows[exposure[rows, layer] > 0]
        _, first = np.unique(exposure[rows, layer], return_index=True)
        x, y = np.log(exposure[rows[first], layer]), change[rows[first], layer]
        if len(x) > 1:
            products += float((x - x.mean()) @ (y - y.mean()))
            squares += float((x - x.mean()) @ (x - x.mean()))
    return float(np.clip(products / squares, 0.5, 1.0)) if squares > 0 else 1.0


def without_common_course(norms: NDArray[Any], inside: int) -> Array:
    """Norms divided by what the first `inside` columns share at each step; NaN where not finite.

    A layer that LISA draws rarely would otherwise seem unsteady: all norms have moved on between
    its activations.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(np.asarray(norms, dtype=np.float64))
    logs[~np.isfinite(logs)] = np.nan
    common = additive_effects(logs[:, :inside]).common
    return np.asarray(np.exp(logs - common[:, None]))


def running_mean(values: Array, decay: float, start: Array | None = None) -> Array:
    """Exponential moving average y_t = decay·y_{t−1} + (1 − decay)·x_t; y_0 is `start` or 0."""
    inputs = (1 - decay) * values
    if start is not None:
        inputs[:1] = start
    return _recurrence(inputs, decay)


def _recurrence(inputs: Array, factor: float, block: int = 64) -> Array:
    """y_t = factor·y_{t−1} + inputs_t, in blocks: few long vector operations, not n short ones."""
    n = len(inputs)
    if n <= block:
        total = inputs.copy()
        for t in range(1, n):
            total[t] += factor * total[t - 1]
        return total
    parts = np.concatenate([inputs, np.zeros(-n % block)]).reshape(-1, block)
    for t in range(1, block):
        parts[:, t] += factor * parts[:, t - 1]
    carry = _recurrence(parts[:, -1], factor**block, block)
    parts[1:] += carry[:-1, None] * factor ** np.arange(1, block + 1)
    return parts.ravel()[:n]


def last_known(values: NDArray[Any]) -> Array:
    """Last finite value of every column, NaN for a column without any."""
    finite = np.isfinite(values)
    row = len(values) - 1 - np.argmax(finite[::-1], axis=0) if len(values) else 0
    picked = np.asarray(values, dtype=np.float64)[row, np.arange(values.shape[1])]
    return np.where(finite.any(axis=0), picked, np.nan)


def mean_over_steps(values: NDArray[Any]) -> Array:
    """Mean of the finite values of every column, NaN for a column without any."""
    finite = np.isfinite(values)
    total = np.where(finite, values, 0.0).sum(axis=0, dtype=np.float64)
    return np.where(finite.any(axis=0), total / np.maximum(finite.sum(axis=0), 1), np.nan)


def root(values: Array) -> NDArray[np.float32]:
    """Square root, NaN where there is nothing to divide by."""
    return np.sqrt(np.where(values > 0, values, np.nan)).astype(np.float32)


def ratio(above: NDArray[Any], below: NDArray[Any]) -> NDArray[Any]:
    """Quotient, NaN where the divisor is zero or unknown."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below > 0, above / below, np.nan)
