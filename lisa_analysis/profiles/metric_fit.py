"""A metric asked of a run: its values, and the fits of layers and of what lies outside them."""

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.layers import stacks_of
from lisa_analysis.metrics.log import Measurements
from lisa_analysis.metrics.registry import Metric
from lisa_analysis.metrics.series import last_known
from lisa_analysis.metrics.step_tables import Grouping
from lisa_analysis.profiles.thresholds import Thresholds
from lisa_analysis.statistics.estimate import fit_series
from lisa_analysis.statistics.fit import Fit


def evaluate(chosen: Metric, data: Measurements) -> NDArray[np.floating]:
    """Call the metric; a missing column or a wrong shape is a sentence, not a traceback."""
    try:
        values = chosen(data)
    except KeyError as error:
        raise LisaError(
            f"importance metric {chosen.id!r} cannot be computed for run {data.run.run_id}: "
            f"{error.args[0]}; choose another metric or record the column."
        ) from None
    expected = (data.table.trained.shape, data.table.probe.shape)
    # The state at the end is a single look.
    one_look = chosen.scale == "total" and values.shape == (1, expected[0][1])
    if not chosen.independent and not one_look and values.shape not in expected:
        raise LisaError(
            f"importance metric {chosen.id!r} returned an array of shape {values.shape}: expected "
            f"(recorded steps, groups) = {data.table.trained.shape}."
        )
    if chosen.scale == "log" and (values < 0).any():
        raise LisaError(
            f"importance metric {chosen.id!r} has values below zero, which have no logarithm: give "
            "it the scale 'linear'."
        )
    return values


def fit_groups(
    chosen: Metric,
    data: Measurements,
    values: NDArray[np.floating],
    by: str,
    confidence: float,
    limits: Thresholds,
    seed: int,
) -> tuple[Fit, list[Fit], NDArray[np.int64], NDArray[np.int64] | None, np.random.Generator]:
    """Fit of the layers, of each group outside, the steps behind them, and the generator."""
    steps = {"steps": data.table.steps, "probes": data.table.probe_steps}.get(
        chosen.rows, np.arange(len(values))
    )
    period = data.period if chosen.rows == "steps" else None
    rng = np.random.default_rng(seed)
    log = chosen.scale == "log"
    total = chosen.scale == "total"
    if total:
        # The state at the end of a run is one observation: it has no interval of its own.
        values = last_known(values)[None, :]

    def fitted(columns: slice, clusters: NDArray[np.int64] | None) -> Fit:
        return fit_series(
            values[:, columns], log=log, clusters=None if total else clusters,
            confidence=confidence, rng=rng, remove_common=log,
            min_effective=limits.min_effective, min_visits=limits.min_visits,
            independent=chosen.independent, levelled=chosen.levels, stacks=stacks[columns],
        )  # fmt: skip

    inside, stacks = data.table.groups.inside, stacks_in(data.table.groups, by)
    fit = fitted(slice(0, inside), period)
    outside = [fitted(slice(column, column + 1), None) for column in range(inside, values.shape[1])]
    return fit, outside, steps, period, rng


def stacks_in(groups: Grouping, by: str) -> tuple[str, ...]:
    """The stack of every layer; empty where the rows are parts of layers."""
    return stacks_of(groups.names[: groups.inside]) if by == "layer" else ()
