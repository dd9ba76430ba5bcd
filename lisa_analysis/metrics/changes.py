"""Metrics of the weights themselves: their size, and how far training took them in all."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.metrics.log import Measurements
from lisa_analysis.metrics.registry import AtStart, metric
from lisa_analysis.metrics.series import at_the_end, ratio
from lisa_analysis.metrics.weights import change_norm, norm_before

Array = NDArray[np.float64]


@metric(
    "linear",
    "Mean over steps of the norm of the trained tensors, (1/T) Σ_t ‖θ_t‖ (the LISA paper's w(ℓ)); "
    "for LoRA these are the raw A and B.",
    needs=("weight_norm",),
    # From the census before training.
    at_start=AtStart("weights", lambda data, values: data.table.initial.copy()),
)
def weight_norm(data: Measurements) -> NDArray[Any]:
    """The paper's statistic."""
    return data.table["weight_norm"]


@metric(
    "total",
    "‖ΔW‖/‖W_0‖ at the end of the run, with LISA divided by the layer's activations, weighted by "
    "their learning rates, to the power at which this run's changes grew with them (1 directed, ½ "
    "random).",
    needs=(("delta_norm", "weights.change"),),
)
def delta_rel(data: Measurements) -> NDArray[Any]:
    """Relative change of the weights per activation."""
    table = data.table
    if data.has("delta_norm"):
        relative = at_the_end(data, table.final_delta / table.initial_base)
    else:  # the run did not record it; what it left behind tells
        if not data.has("weights.base"):
            raise KeyError(data.lacks("weights.base"))
        relative = at_the_end(data, ratio(change_norm(data), norm_before(data, changed=True)))
    if data.period is None or not len(table.steps):
        return relative
    power = 1.0
    if "delta_norm" in table:
        power = growth_exponent(
            table["delta_norm"], data.exposure(), data.period, table.groups.inside
        )
    exposure = data.exposure(power)
    return relative / np.where(exposure > 0, exposure, 1.0)


@metric(
    "total",
    "√n · ‖W_T − W_0‖ / Σ_t ‖θ_{t+1} − θ_t‖: 1 for a random walk, √n for a straight line, matched "
    "to the median n where layers trained for different numbers of steps; unrecorded steps count "
    "as average ones.",
    needs=("update_norm", "delta_norm"),
)
def directedness(data: Measurements) -> NDArray[Any]:
    """Net movement compared with a random walk of the same steps."""
    update = data.table["update_norm"]
    if not len(update):
        return update
    measured = np.isfinite(update)
    path = np.where(measured, update, 0).sum(axis=0, dtype=np.float64)
    n = data.active_steps[-1].astype(np.float64)
    path *= n / np.maximum(measured.sum(axis=0), 1)
    share = ratio(data.table.final_delta, path) ** 2
    seen = np.isfinite(share[: data.table.groups.inside])
    common = float(np.median(n[: len(seen)][seen])) if seen.any() else 1.0
    # Steps of drift m and spread 1 give share = (m² + 1/n)/(1 + m²); the same m at `common`.
    steps = np.where(n > 1, n, np.nan)
    matched = (share * (common - 1) + 1 - common / steps) / (1 - 1 / steps)
    return at_the_end(data, np.sqrt(np.maximum(matched, 0)))


def growth_exponent(
    relative: NDArray[Any], exposure: NDArray[Any], period: NDArray[np.int64], inside: int
) -> float:
    """Power of the exposure to training with which the layers' change grows, in [½, 1].

    Slope of ln‖ΔW‖ on ln(exposure) within layers, one point per activation (its last recorded
    step); 1, as if every activation went on in the same direction, when no layer came back.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.log(np.asarray(relative[:, :inside], dtype=np.float64))
    change[~np.isfinite(change)] = np.nan
    products = squares = 0.0
    last_row = np.append(np.flatnonzero(np.diff(period)), len(period) - 1)
    for layer in range(inside):
        rows = last_row[np.isfinite(change[last_row, layer])]
        rows = rows[exposure[rows, layer] > 0]
        _, first = np.unique(exposure[rows, layer], return_index=True)
        x, y = np.log(exposure[rows[first], layer]), change[rows[first], layer]
        if len(x) > 1:
            products += float((x - x.mean()) @ (y - y.mean()))
            squares += float((x - x.mean()) @ (x - x.mean()))
    return float(np.clip(products / squares, 0.5, 1.0)) if squares > 0 else 1.0
