"""Metrics of gradients: how large they are, what they promise, how steady they are."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.metrics.log import Measurements
from lisa_analysis.metrics.registry import AtStart, metric
from lisa_analysis.statistics.effects import additive_effects

Array = NDArray[np.float64]


def _first_gradient(data: Measurements, values: NDArray[Any]) -> Array:
    """Gradients of the first optimizer step are those of the initial weights."""
    if not len(data.table.steps) or data.table.steps[0] != 1:
        return np.full(values.shape[1], np.nan)
    first = np.asarray(values[0], dtype=np.float64)
    return np.where(np.isfinite(first), first, np.nan)


def _first_pass(data: Measurements, values: NDArray[Any]) -> Array:
    """A measuring pass before training."""
    if not len(values) or data.table.probe_steps[0] != 0:
        return np.full(values.shape[1], np.nan)
    return np.asarray(values[0], dtype=np.float64)


FIRST_GRADIENT = AtStart("gradients", _first_gradient)


@metric(
    "log",
    "Geometric mean over steps of ‖g_t‖/√N, the root mean square of the gradient before clipping.",
    needs=("grad_norm",),
    at_start=FIRST_GRADIENT,
)
def grad_rms(data: Measurements) -> NDArray[Any]:
    """Gradient per element, the closest to published layer probes (GRASS)."""
    return data.table["grad_norm"] / _root(data.table.numel)


@metric(
    "log",
    "Geometric mean over measuring passes of ‖g‖/√N with all layers unfrozen: comparable between "
    "layers however a LISA run drew them (record.probe_every).",
    needs=("probe_grad_norm",),
    at_start=AtStart("gradients", _first_pass),
    rows="probes",
)
def probe_rms(data: Measurements) -> NDArray[Any]:
    """Gradient per element in passes that see all layers, frozen ones too."""
    return data.table.probe / _root(data.all_numel)


@metric(
    "log",
    "Geometric mean over steps of η_t‖g_t‖₁, the first-order loss decrease of a sign-like (Adam) "
    "step; √(2N/π)‖g_t‖ stands in for ‖g_t‖₁ where that was not recorded.",
    needs=(("grad_norm_l1", "grad_norm"),),
    at_start=FIRST_GRADIENT,
)
def l1_descent(data: Measurements) -> NDArray[Any]:
    """First-order loss decrease under Adam's sign-like step."""
    table = data.table
    if "grad_norm_l1" in table:
        norm = table["grad_norm_l1"]
    else:
        norm = table["grad_norm"] * _root(2 * table.numel / np.pi)
    # A step whose rate is 0 says nothing of a layer.
    rate = np.where(data.learning_rate > 0, data.learning_rate, np.nan)
    # A profile compares layers: without a logged rate the common factor is left out.
    if not np.isfinite(rate).any():
        return norm
    return norm * rate[:, None].astype(np.float32)


@metric(
    "log",
    "Geometric mean over steps of Ī/Ū, the running mean of ‖g_t‖ freed from the course that all "
    "layers share, over the running mean of its absolute deviation (decay 0.85 per active step): "
    "steady gradients score high.",
    id="grad_snr",
    needs=("grad_norm",),
)
@dataclass(frozen=True)
class GradSnr:
    """Gradient signal-to-noise from norms alone (after AdaLoRA)."""

    decay: float = 0.85

    def __call__(self, data: Measurements) -> NDArray[Any]:
        """Return one value per recorded step and group."""
        norms = without_common_course(data.table["grad_norm"], data.table.groups.inside)
        result = np.full(norms.shape, np.nan, dtype=np.float32)
        # Averages start at 0; what they lack at each age is known.
        filling = 1 - self.decay ** np.arange(1, len(norms) + 1)
        for column in range(norms.shape[1]):
            rows = np.flatnonzero(np.isfinite(norms[:, column]))
            values, age = norms[rows, column], np.arange(1, len(rows) + 1)
            filled = filling[: len(rows)]
            mean = running_mean(values, self.decay) / filled
            deviation = running_mean(np.abs(values - mean), self.decay) / filled
            # Until both averages have filled up the ratio says when the layer was first seen; a
            # deviation of the size of rounding says nothing.
            ready = (age > 2 / (1 - self.decay) + 1) & (deviation > 1e-6 * mean)
            result[rows[ready], column] = mean[ready] / deviation[ready]
        return result


def without_common_course(norms: NDArray[Any], inside: int) -> Array:
    """Norms divided by what the first `inside` columns share at each step; NaN where not finite.

    A layer that LISA draws rarely would otherwise seem unsteady: all norms have moved on between
    its activations.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        logs: Array = np.log(np.asarray(norms, dtype=np.float64))
    logs[~np.isfinite(logs)] = np.nan
    known = logs[:, :inside]
    if inside > 1 and np.isfinite(known.sum(axis=1)).all():
        # With every layer at every step the effects of the steps are plain means.
        common = known.mean(axis=1)
        common -= common.mean()
    else:
        common = additive_effects(known).common
    logs -= common[:, None]
    return np.exp(logs, out=logs)


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


def _root(values: Array) -> NDArray[np.float32]:
    """Square root, NaN where there is nothing to divide by."""
    return np.sqrt(np.where(values > 0, values, np.nan)).astype(np.float32)
