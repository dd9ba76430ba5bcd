"""Metrics that compare a run with another one of the same model."""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.metrics.log import Measurements
from lisa_analysis.metrics.registry import metric
from lisa_analysis.metrics.series import at_the_end
from lisa_analysis.metrics.step_tables import StepTable, step_table

Array = NDArray[np.float64]


@metric(
    "linear",
    "w_LoRA(ℓ)/w_FT(ℓ), the LISA paper's p(ℓ) as printed: mean raw adapter norm of this run over "
    "mean weight norm of the full fine-tuning run given as reference.",
    needs=("weight_norm",),
    compares=True,
)
def lisa_ratio(data: Measurements, reference: Any) -> NDArray[Any]:
    """The paper's sampling statistic from a LoRA and a full fine-tuning run, as printed."""
    other = _partner(data, reference)
    with np.errstate(invalid="ignore"):
        full = _mean_over_steps(other["weight_norm"])
    return data.table["weight_norm"] / full.astype(np.float32)


@metric(
    "total",
    "‖(α/r)(BA − B_0A_0)‖/‖ΔW_FT‖ at the end of both runs: what the adapters changed over "
    "what full fine-tuning, given as reference, changed.",
    needs=("delta_norm",),
    compares=True,
)
def lisa_delta_ratio(data: Measurements, reference: Any) -> NDArray[Any]:
    """The repaired form of the paper's statistic."""
    other = _partner(data, reference)
    if np.isnan(other.final_delta).all():
        raise KeyError(f"delta_norm was not recorded in {reference.run_id}")
    return at_the_end(data, data.table.final_delta / other.final_delta)


def _partner(data: Measurements, reference: Any) -> StepTable:
    """Table of the other run, its columns in the order of this run's groups."""
    own = data.table.groups
    other = step_table(reference, own.level)
    if other.groups.names[: other.groups.inside] != own.names[: own.inside]:
        raise LisaError(
            f"runs {data.run.run_id} and {reference.run_id} have different layers "
            f"({own.inside} and {other.groups.inside}): compare runs of one model."
        )
    order = [
        other.groups.names.index(name) if name in other.groups.names else -1 for name in own.names
    ]
    reordered = {
        column: np.where(np.array(order) >= 0, values[:, order], np.nan)
        for column, values in other.measures.items()
    }
    delta = np.where(np.array(order) >= 0, other.final_delta[order], np.nan)
    return dataclasses.replace(other, groups=own, measures=reordered, final_delta=delta)


def _mean_over_steps(values: NDArray[Any]) -> Array:
    """Mean of the finite values of every column, NaN for a column without any."""
    finite = np.isfinite(values)
    total = np.where(finite, values, 0.0).sum(axis=0, dtype=np.float64)
    return np.where(finite.any(axis=0), total / np.maximum(finite.sum(axis=0), 1), np.nan)
