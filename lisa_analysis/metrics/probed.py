"""Metrics of what gradients agree on: over a probe's batches, or a step's micro-batches."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.contract.errors import LisaError
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
def grad_signal(data: Measurements, step: int | None = None) -> NDArray[Any]:
    """Gradient that the data agree on, per element; of the newest probe, or of that of a step."""
    numel = data.all_numel

    def root(signal: Array, noise: Array) -> Array:
        return _root(np.maximum(signal, 0.0) / np.where(numel > 0, numel, np.nan))

    return _pseudo_values(*_by_batch(data, step), root)


@metric(
    "linear",
    "‖E g‖²/tr Σ of one batch at fixed weights: how much of a batch's gradient the data agree on "
    "(base weights).",
    needs=("probes",),
    rows="batches",
)
def signal_to_noise(data: Measurements, step: int | None = None) -> NDArray[Any]:
    """Signal over noise of one batch; of the newest probe, or of that of a step."""

    def ratio(signal: Array, noise: Array) -> Array:
        return np.maximum(signal, 0.0) / np.where(noise > 0, noise, np.nan)

    return _pseudo_values(*_by_batch(data, step), ratio)


@metric(
    "linear",
    "√(E‖E g_t‖²/N) over optimizer steps with accumulation: the root mean square of the gradient "
    "that the micro-batches of a step agree on, ‖g_t‖² less the tr Σ/M that the noise of M "
    "micro-batches leaves in their mean; unbiased at every step, the root taken over all of them "
    "(record.grad_noise).",
    needs=("grad_norm", "grad_noise", "micro_batches"),
    levels=False,
)
def step_signal(data: Measurements) -> NDArray[Any]:
    """Gradient that the micro-batches of a step agree on, per element."""
    table = data.table
    counts = data.micro_batches[:, None]
    square = np.square(table["grad_norm"].astype(np.float64))
    with np.errstate(invalid="ignore", divide="ignore"):
        signal = (square - table["grad_noise"] / counts) / table.numel
    # A single micro-batch has no noise that could be taken off.
    signal[np.broadcast_to(~(counts > 1), signal.shape)] = np.nan
    return _pseudo_root(signal)


def _pseudo_root(values: Array) -> Array:
    """Jackknife pseudo-values of the root of each column's mean; NaN stays what it is.

    Single values may lie below zero, where they have no root: their mean is what has one. The
    pseudo-values go up and down in time with the values, whose mean root they have as their mean.
    """
    known = np.isfinite(values)
    n = known.sum(axis=0)
    total = np.where(known, values, 0.0).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        whole = _root(np.maximum(total / n, 0.0))
        without = _root(np.maximum((total - values) / (n - 1), 0.0))
        found: Array = n * whole - (n - 1) * without
    found[~known] = np.nan
    found[:, n < MIN_BATCHES] = np.nan
    return found


def _by_batch(data: Measurements, step: int | None) -> tuple[Array, Array]:
    """‖g_b‖² and ⟨g_b, mean of the others⟩ of one probe, each of shape (batches, groups)."""
    frame = data.run.probes
    steps = sorted(int(found) for found in frame["step"].unique())
    step = steps[-1] if step is None else step
    if step not in steps:
        raise LisaError(
            f"run {data.run.run_id} has no probe of step {step}: it was probed after "
            f"{', '.join(map(str, steps))} optimizer steps."
        )
    frame = frame[(frame["step"] == step) & frame["batch"].notna()]
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
