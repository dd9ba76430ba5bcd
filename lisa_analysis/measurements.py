"""What a metric may look at: the table of norms, learning rates, visits and active steps."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.aggregate import StepTable, step_table
from lisa_analysis.draws import draws, intervals

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Measurements:
    """What a metric may look at.

    Attributes
    ----------
    run
        The run directory.
    table
        Norms per recorded step and group.
    learning_rate
        Shape (n,), NaN where it was not logged.
    visits
        Shape (n, groups): activation intervals of each group up to the step, 1 throughout for a
        group that always trains.
    active_steps
        Shape (n, groups): optimizer steps that trained the group up to the step.
    interval
        Shape (n,): index of the activation interval of every step, or None without LISA.
    all_numel
        Shape (groups,): elements of all tensors of a group, trained or not.
    """

    run: Any
    table: StepTable
    learning_rate: Array
    visits: Array
    active_steps: Array
    interval: NDArray[np.int64] | None
    all_numel: Array


def measurements(run: Any, by: str = "layer") -> Measurements:
    """Read the table of `run` and what else the metrics need."""
    table = step_table(run, by)
    rate = np.full(len(table.steps), np.nan)
    scalars = run.scalars
    if len(scalars) and "learning_rate" in scalars:
        logged = scalars.dropna(subset=["learning_rate"]).drop_duplicates("step", keep="last")
        known = logged.set_index("step")["learning_rate"].sort_index()
        if len(known):
            rate = known.reindex(table.steps, method="nearest").to_numpy(dtype=np.float64)
    interval = intervals(run, table.steps) if draws(run) else None
    visits, active = _exposure(run, table, interval)
    frame = run.parameters
    group = table.groups.of[frame["param_id"].to_numpy(dtype=np.int64)]
    inside = (group >= 0) & (frame["role"] == "base").to_numpy()
    width = len(table.groups.names)
    weights = frame["numel"].to_numpy(dtype=np.float64)[inside]
    elements = np.bincount(group[inside], weights=weights, minlength=width).astype(np.float64)
    return Measurements(run, table, rate, visits, active, interval, elements)


def _exposure(
    run: Any, table: StepTable, interval: NDArray[np.int64] | None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Activation intervals and optimizer steps behind every group at every recorded step."""
    shape = table.trained.shape
    visits: NDArray[Any] = np.ones(shape, dtype=np.float32)
    active: NDArray[Any] = np.repeat(table.steps[:, None].astype(np.float32), shape[1], axis=1)
    drawn = draws(run)
    if interval is None or not drawn or not len(table.steps):
        return visits, active
    chosen = np.zeros((len(drawn), run.n_layers), dtype=np.float32)
    for index, (_, layers) in enumerate(drawn):
        chosen[index, list(layers)] = 1
    starts = np.array([step for step, _ in drawn], dtype=np.int64)
    lengths = np.diff(np.append(starts, max(starts[-1], table.steps[-1])))
    before = np.vstack([np.zeros(run.n_layers), np.cumsum(chosen * lengths[:, None], axis=0)])
    now = np.maximum(interval, 0)
    within = (table.steps - starts[now])[:, None] * chosen[now]
    columns = np.flatnonzero(table.groups.layer >= 0)
    layer = table.groups.layer[columns]
    visits[:, columns] = np.cumsum(chosen, axis=0)[now][:, layer]
    active[:, columns] = (before[now] + within)[:, layer]
    return visits, active
