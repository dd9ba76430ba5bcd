"""Metrics of a probe: gradients of independent batches at fixed weights."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.metrics.log import Measurements
from lisa_analysis.metrics.registry import metric
from lisa_analysis.statistics.signal import MIN_BATCHES

Array = NDArray[np.float64]


@metric(
    "linear",
    "√(‖E g‖²/N) over batches at fixed weights: the root mean square of the gradient that the data "
    "agree on, with what a small batch makes up taken off (base weights).",
    needs=("probes",),
    rows="batches",
)
def grad_signal(data: Measurements) -> NDArray[Any]:
    """Gradient that the data agree on, per element."""
    numel = data.all_numel

    def root(signal: Array, noise: Array) -> Array:
        return _root(np.maximum(signal, 0.0) / np.where(numel > 0, numel, np.nan))

    return _pseudo_values(*_by_batch(data), root)


@metric(
    "linear",
    "‖E g‖²/tr Σ of one batch at fixed weights: how much of a batch's gradient the data agree on "
    "(base weights).",
    needs=("probes",),
    rows="batches",
)
def signal_to_noise(data: Measurements) -> NDArray[Any]:
    """Signal over noise of one batch."""

    def ratio(signal: Array, noise: Array) -> Array:
        return np.maximum(signal, 0.0) / np.where(noise > 0, noise, np.nan)

    return _pseudo_values(*_by_batch(data), ratio)


def _by_batch(data: Measurements) -> tuple[Array, Array]:
    """‖g_b‖² and ⟨g_b, mean of the others⟩ of the newest probe, each of shape (batches, groups)."""
    frame = data.run.probes
    frame = frame[(frame["step"] == frame["step"].max()) & frame["batch"].notna()]
    base = data.run.parameters.set_index("param_id")["role"] == "base"
    frame = frame[frame["param_id"].map(base).to_numpy(dtype=bool)]
    group = data.table.groups.of[frame["param_id"].to_numpy(dtype=np.int64)]
    batch = frame["batch"].to_numpy(dtype=np.int64)
    shape = (int(batch.max(initial=-1)) + 1, len(data.table.groups.names))
    known = group >= 0
    cell = batch[known] * shape[1] + group[known]

    def total(values: Any) -> Array:
        summed = np.bincount(cell, weights=values[known], minlength=shape[0] * shape[1])
        found: Array = summed.astype(np.float64).reshape(shape)
        found[:, np.bincount(group[known], minlength=shape[1]) == 0] = np.nan
        return found

    return (
        total(frame["grad_norm"].to_numpy(dtype=np.float64) ** 2),
        total(frame["signal"].to_numpy(dtype=np.float64)),
    )


def _pseudo_values(squares: Array, agreement: Array, function: Any) -> Array:
    """Jackknife pseudo-values of a function of signal and noise, shape (batches, groups).

    They are as good as independent repetitions whose mean is the function's value (Efron & Stein
    1981), free of most of its bias.
    """
    n = len(squares)
    if n < MIN_BATCHES:
        return np.full(squares.shape, np.nan)
    signal, square = agreement.mean(axis=0), squares.mean(axis=0)
    # Leaving one batch out, see `lisa_analysis.statistics.signal`.
    signals = (n * signal - 2 * agreement) / (n - 2)
    noises = (n * square - squares) / (n - 1) - signals
    with np.errstate(invalid="ignore", divide="ignore"):
        whole = function(signal, square - signal)
        without = function(signals, noises)
    return np.asarray(n * whole - (n - 1) * without)


def _root(values: Array) -> Array:
    return np.sqrt(values)
