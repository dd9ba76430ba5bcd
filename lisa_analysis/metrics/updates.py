"""Metrics of single updates: how far a step moved a layer, and what that did to the loss."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.metrics.log import Measurements
from lisa_analysis.metrics.registry import metric
from lisa_analysis.metrics.series import ratio


@metric(
    "log",
    "Geometric mean over steps of ‖θ_{t+1} − θ_t‖, the step as realised in the stored precision.",
    needs=("update_norm",),
)
def update_norm(data: Measurements) -> NDArray[Any]:
    """Size of the realised step."""
    return _of_moving_steps(data, "update_norm")


@metric(
    "log",
    "Geometric mean over steps of ‖θ_{t+1} − θ_t‖/‖θ_{t+1}‖; under Adam close to lr·√N/‖θ‖, so "
    "mostly a statement about ‖θ‖.",
    needs=("update_norm", "weight_norm"),
)
def update_ratio(data: Measurements) -> NDArray[Any]:
    """Relative size of the realised step (LARS, LAMB)."""
    return ratio(_of_moving_steps(data, "update_norm"), data.table["weight_norm"])


@metric(
    "linear",
    "Mean over steps of −⟨g_t, θ_{t+1} − θ_t⟩, the loss decrease that the realised step predicts; "
    "negative where a layer moved against its gradient.",
    needs=("descent",),
    below_zero="moved against the loss",
)
def descent(data: Measurements) -> NDArray[Any]:
    """Measured first-order loss decrease; may be negative."""
    return _of_moving_steps(data, "descent")


def _of_moving_steps(data: Measurements, column: str) -> NDArray[Any]:
    """Return a column without the zeros of steps whose learning rate is 0.

    The first step of a warm-up moves no layer and says nothing of any. A layer that moved all the
    same (groups may have rates of their own; one is logged) keeps its value, and so do all layers
    of a run whose rate was never above 0.
    """
    values = data.table[column]
    still = np.flatnonzero(data.learning_rate == 0)
    if len(still) == len(values) or not (values[still] == 0).any():  # nothing to copy the table for
        return values
    moved = values.copy()
    moved[still] = np.where(values[still] == 0, np.float32(np.nan), values[still])
    return moved
