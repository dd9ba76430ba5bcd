"""What a metric may look at: the table of norms, learning rates, visits and active steps."""

import weakref
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.metrics.layer_sums import PROBE
from lisa_analysis.metrics.step_tables import StepTable, step_table
from lisa_analysis.rundir.events import draws, learning_rates, ruling_draws
from lisa_analysis.rundir.parts import drawn_share

if TYPE_CHECKING:
    from lisa_analysis.rundir.run import Run

Array = NDArray[np.float64]

# Settings that record a column which is off by default.
_HOW = {
    "delta_norm": "for weights, record.base_delta",
    PROBE: "record.probe_every",
    "probes": "lisa-train --config probe, lisa_train.probe, or record.probe_batches",
    "ablation": "lisa-ablate RUN_DIR, or lisa_train.ablate",
    "grad_noise": "record.grad_noise, with gradient accumulation or several processes",
    "micro_batches": "record.grad_noise of this version, with gradient accumulation",
}


@dataclass(frozen=True, eq=False)
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
        Shape (n, groups): periods of each group up to the step, 1 throughout for a
        group that always trains.
    active_steps
        Shape (n, groups): optimizer steps that trained the group up to the step.
    period
        Shape (n,): index of the period of every step, or None without LISA.
    all_numel
        Shape (groups,): elements of all tensors of a group, trained or not.
    rates
        Shape (steps + 1,): learning rate of every optimizer step, recorded or not; None where it
        was not logged.
    """

    run: "Run"
    table: StepTable = field(repr=False)
    learning_rate: Array = field(repr=False)
    visits: Array = field(repr=False)
    active_steps: Array = field(repr=False)
    period: NDArray[np.int64] | None = field(repr=False)
    all_numel: Array = field(repr=False)
    rates: Array | None = field(repr=False)

    def has(self, column: str) -> bool:
        """Whether the run recorded a column."""
        if column == "probes":
            return not self.run.probes.empty
        if column.startswith("weights."):
            return self._weights(column) == ""
        if column == "ablation":
            return not self.run.ablation.empty
        if column == "micro_batches":
            return bool((self.micro_batches > 1).any())
        if column == PROBE:
            return len(self.table.probe_steps) > 0
        if column == "delta_norm":
            # A census alone measures it as well.
            return not bool(np.isnan(self.table.final_delta).all())
        return column in self.table

    @property
    def micro_batches(self) -> Array:
        """Micro-batches of every recorded step, shape (n,); NaN where they were not counted."""
        counted = self.run.scalars.set_index("step")["micro_batches"]
        found = (
            counted.reindex(self.table.steps)
            .astype("Float64")
            .to_numpy(np.float64, na_value=np.nan)
        )
        return np.asarray(found)

    def lacks(self, column: str) -> str:
        """Say that a column was not recorded, and what was."""
        if column.startswith("weights."):
            return self._weights(column)
        hint = _HOW.get(column) or f"recorded: {', '.join(self.table.measures) or 'nothing'}"
        return f"{column} was not recorded ({hint})"

    def _weights(self, column: str) -> str:
        """Why weights on disk do not have what a metric needs; empty where they do."""
        from lisa_analysis.metrics.weights import run_weights

        try:
            found = run_weights(self.run).of.values()
        except LisaError as error:
            return str(error).rstrip(".")
        part = {"base": "before", "change": "change", "adapter": "factors"}[column[8:]]
        if any(getattr(change, part) is not None for change in found):
            return ""
        return {
            "before": "the weights before are not known (lisa_analysis.load(…, base=…), or --base)",
            "change": "no weights after training are there, or none before that they could be "
            "compared with",
            "factors": "there is no LoRA adapter",
        }[part]

    def exposure(self, power: float = 1.0) -> NDArray[Any]:
        """Training behind every group at every recorded step, shape (n, groups).

        The steps that trained it, weighted by their learning rates, to the power with which
        change grows with them: (Σ lr^(1/p))^p, Σ lr for a directed change (p = 1) and √Σ lr² for
        a random one (p = ½). The unit is an average period, so that it is `visits`^p where all
        periods weigh the same; a layer drawn late in a decaying schedule has less.
        """
        drawn = draws(self.run)
        if self.period is None or self.rates is None or not self.rates[1:].any():
            result: NDArray[Any] = self.visits**power
            return result
        weights = (self.rates / self.rates[1:].max()) ** (1 / power)
        spent = np.cumsum(np.append(0.0, weights[1:]))
        exposure = self.visits.copy()
        columns = np.flatnonzero(self.table.groups.layer >= 0)
        share = _share(self.run, self.table, columns)
        exposure[:, columns] = _behind(self.run, self.table, self.period, spent, share)
        exposure[:, columns] /= spent[-1] / len(drawn)
        return exposure**power


# What the metrics need of a run that has finished, by level: a report asks for it dozens of times.
# Without the run itself, which would keep its own entry alive.
_CACHE: weakref.WeakKeyDictionary[Any, dict[str, tuple[Any, ...]]] = weakref.WeakKeyDictionary()


def measurements(run: "Run", by: str = "layer") -> Measurements:
    """Read the table of `run` and what else the metrics need.

    Of a run that has finished it is made once and remembered for as long as the object lives.
    """
    table = step_table(run, by)
    if run.status == "running":
        return Measurements(run, *_around(run, table))
    remembered = _CACHE.setdefault(run, {})
    if by not in remembered:
        remembered[by] = _around(run, table)
        for array in remembered[by]:
            if isinstance(array, np.ndarray):
                array.flags.writeable = False
    return Measurements(run, *remembered[by])


def _around(run: "Run", table: StepTable) -> tuple[Any, ...]:
    """Return what `Measurements` holds beside the run, in its order."""
    rates = learning_rates(run, np.arange(_last_step(run, table) + 1))
    rate = np.full(len(table.steps), np.nan) if rates is None else rates[table.steps]
    period = ruling_draws(run, table.steps) if draws(run) else None
    visits, active, table = _visits(run, table, period)
    frame = run.parameters
    group = table.groups.of[frame["param_id"].to_numpy(dtype=np.int64)]
    inside = (group >= 0) & (frame["role"] == "base").to_numpy()
    width = len(table.groups.names)
    weights = frame["numel"].to_numpy(dtype=np.float64)[inside]
    elements = np.bincount(group[inside], weights=weights, minlength=width).astype(np.float64)
    return table, rate, visits, active, period, elements, rates


def _visits(
    run: "Run", table: StepTable, period: NDArray[np.int64] | None
) -> tuple[NDArray[Any], NDArray[Any], StepTable]:
    """Periods and optimizer steps behind every group at every recorded step.

    And the table without what was measured of a group while only a part of it trained.
    """
    shape = table.trained.shape
    visits: NDArray[Any] = np.broadcast_to(np.float32(1), shape)
    active: NDArray[Any] = np.broadcast_to(table.steps[:, None].astype(np.float32), shape)
    if period is None or not len(table.steps):
        return visits, active, table
    visits, active = visits.copy(), active.copy()
    columns = np.flatnonzero(table.groups.layer >= 0)
    share = _share(run, table, columns)
    visits[:, columns] = np.cumsum(share, axis=0)[np.maximum(period, 0)]
    count = np.arange(_last_step(run, table) + 1, dtype=np.float64)
    active[:, columns] = _behind(run, table, period, count, share)
    ruling = share[np.maximum(period, 0)]
    partly = np.zeros(shape, dtype=bool)
    partly[:, columns] = (ruling > 0) & (ruling < 1 - 1e-9) & (period >= 0)[:, None]
    if partly.any():
        kept = {name: np.where(partly, np.nan, held) for name, held in table.measures.items()}
        table = replace(table, measures=kept)
    return visits, active, table


def _share(run: "Run", table: StepTable, columns: NDArray[np.int64]) -> NDArray[np.float64]:
    """Share of every group in `columns` that each draw took, see `drawn_share`."""
    place = np.full(len(table.groups.names) + 1, -1, dtype=np.int64)
    place[columns] = np.arange(columns.size)
    return drawn_share(run, table.groups.layer[columns], place[table.groups.of])


def _last_step(run: "Run", table: StepTable) -> int:
    """Last step that was recorded or drawn for."""
    return int(max([0, *table.steps[-1:], *(step for step, _ in draws(run)[-1:])]))


def _behind(
    run: "Run",
    table: StepTable,
    period: NDArray[np.int64],
    total: NDArray[Any],
    drawn: NDArray[np.float64],
) -> NDArray[Any]:
    """Sum over the steps that trained each group up to each recorded step, shape (n, groups).

    `total` is the sum over all steps up to each, of whatever is summed; `drawn` the share of each
    group that every draw took.
    """
    now = np.maximum(period, 0)
    starts = np.array([step for step, _ in draws(run)], dtype=np.int64)
    ends = np.append(starts[1:], _last_step(run, table))
    whole = np.cumsum(drawn * (total[ends] - total[starts])[:, None], axis=0)
    before = np.vstack([np.zeros(drawn.shape[1]), whole])
    within = (total[table.steps] - total[starts[now]])[:, None] * drawn[now]
    result: NDArray[Any] = before[now] + within
    return result
