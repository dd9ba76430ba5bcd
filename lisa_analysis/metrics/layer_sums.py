"""Batches of the fact table -> sums per step and group: the inner loop of the analysis.

Every value of a run passes through here once, so rows are first summed over runs of equal
(step, group) with `reduceat`, which costs about a nanosecond each, and only the sums are scattered.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from lisa_analysis.contract.schema import METRICS_TABLE

Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]
# Column -> values and which of them were measured (None: all).
Columns = dict[str, tuple[NDArray[np.float32], Mask | None]]

# A measuring pass has gradients of frozen tensors as well: it is summed apart.
PROBE = "probe_grad_norm"


class Accumulator:
    """Sums batches; a step cut by the end of a batch is completed by the next one.

    Parameters
    ----------
    group_of
        Shape (tensors,), group of every param_id; −1 leaves a tensor out.
    width
        Number of groups.
    """

    def __init__(self, group_of: Ids, width: int) -> None:
        self.group_of, self.width = group_of, width
        self.steps, self.probes = Chain(), Chain()
        self._scratch = Scratch()
        size = len(group_of)
        self.complete = bool((group_of >= 0).all())
        self.census = np.full(size, np.nan)
        self.merged = np.full(size, np.nan)
        self.last = {
            name: np.full(size, np.nan) for name in ("weight_norm", "delta_norm", "merged_norm")
        }
        self.ever_trained = np.zeros(size, dtype=bool)
        self.first_bad: dict[str, tuple[int, int]] = {}
        self.rows = 0

    def add(self, batch: "pa.RecordBatch | pd.DataFrame") -> None:
        """Sum one batch."""
        step, ids, columns = unpack(batch)
        if not len(step):
            return
        self.rows += len(step)
        if (step[1:] < step[:-1]).any():
            order = np.argsort(step, kind="stable")
            step, ids, columns = step[order], ids[order], _take(columns, order)
        # As 64 bits from the start: else numpy converts them every time it looks something up.
        wide = self._scratch("ids", len(ids), np.int64)
        np.copyto(wide, ids)
        ids = wide
        self._note(step, ids, columns)
        trained = _trained_rows(columns, len(step))
        group = self._scratch("group", len(ids), np.int64)
        np.take(self.group_of, ids, out=group, mode="clip")
        self._probe(step, group, columns)
        if step[0] == 0 or not self.complete:
            kept = (step > 0) & (group >= 0)
            trained = kept if trained is None else trained & kept
        if trained is not None and not trained.all():
            step, ids, group = step[trained], ids[trained], group[trained]
            columns = _take(columns, trained)
        if len(step):
            if not self.ever_trained.all():
                self.ever_trained[ids] = True
            columns.pop(PROBE, None)
            self.steps.push(sum_batch(step, group, columns, self.width, self._scratch))

    def _probe(self, step: Ids, group: Ids, columns: Columns) -> None:
        """Sum the gradients of a measuring pass, which frozen tensors have too."""
        if PROBE not in columns:
            return
        values, measured = columns[PROBE]
        rows = group >= 0 if measured is None else measured & (group >= 0)
        if rows.any():
            part: Columns = {PROBE: (values[rows], None)}
            self.probes.push(sum_batch(step[rows], group[rows], part, self.width))

    def _note(self, step: Ids, ids: Ids, columns: Columns) -> None:
        """Remember the first non-finite value of a column, and the norms of single tensors."""
        for name, (values, measured) in columns.items():
            if name in self.first_bad:
                continue
            # One pass that stops at nothing is cheaper than a mask: NaN and inf survive a sum.
            with np.errstate(over="ignore", invalid="ignore"):  # then the mask decides
                if measured is None and np.isfinite(np.dot(values, values)):
                    continue
            bad = ~np.isfinite(values) if measured is None else measured & ~np.isfinite(values)
            if bad.any():
                row = int(np.argmax(bad))
                self.first_bad[name] = (int(step[row]), int(ids[row]))
        # The last row of a tensor counts: where the last two steps hold them all (the batch may
        # end within a step), these will do.
        start = int(np.searchsorted(step, step[-1]))
        final = slice(int(np.searchsorted(step, step[max(start - 1, 0)])), None)
        present = np.zeros(len(self.group_of), dtype=bool)
        present[ids[final]] = True
        complete = bool(present.all() or present.take(ids).all())
        for name, last in self.last.items():
            if name in columns:
                values, measured = columns[name]
                if name == "merged_norm":  # of censuses: that of the start says nothing of later
                    measured = step > 0 if measured is None else measured & (step > 0)
                if measured is not None:
                    last[ids[measured]] = values[measured]
                elif complete:
                    last[ids[final]] = values[final]
                else:
                    last[ids] = values
        if step[0] == 0:
            for name, first in (("weight_norm", self.census), ("merged_norm", self.merged)):
                if name in columns:
                    values, measured = columns[name]
                    start = step == 0 if measured is None else (step == 0) & measured
                    first[ids[start]] = values[start]


class Chain:
    """Chunks in the order of steps; the last one waits for the rest of its last step."""

    def __init__(self) -> None:
        self._done: list[Chunk] = []
        self._pending: Chunk | None = None

    def push(self, chunk: "Chunk") -> None:
        """Append; the two parts of a step that a batch cut are added."""
        if self._pending is not None:
            if self._pending.steps[-1] == chunk.steps[0]:
                chunk.absorb(self._pending)
                self._pending = self._pending.head()
            if len(self._pending.steps):
                self._done.append(self._pending.finished())
        self._pending = chunk

    def finish(self) -> "list[Chunk]":
        """All chunks, as norms."""
        if self._pending is not None:
            self._done.append(self._pending.finished())
            self._pending = None
        return self._done


@dataclass
class Chunk:
    """Sums over the tensors of each group, float64 until `finished`, for some steps in order."""

    steps: Ids
    sums: dict[str, Any]
    counts: dict[str, Any]
    trained: Mask

    def absorb(self, before: "Chunk") -> None:
        """Add the rows of the first step that `before` held as its last."""
        self.trained[0] |= before.trained[-1]
        for name in before.sums:
            if name not in self.sums:
                self.sums[name] = np.zeros(self.trained.shape)
                self.counts[name] = np.zeros(self.trained.shape)
            # Columns without nulls share one array of counts.
            self.counts[name] = self.counts[name].copy()
            self.sums[name][0] += before.sums[name][-1]
            self.counts[name][0] += before.counts[name][-1]

    def head(self) -> "Chunk":
        """All but the last step."""
        return Chunk(
            self.steps[:-1],
            {name: value[:-1] for name, value in self.sums.items()},
            {name: value[:-1] for name, value in self.counts.items()},
            self.trained[:-1],
        )

    def finished(self) -> "Chunk":
        """Norms as float32: NaN where not measured, inf where not finite."""
        result = {}
        for name, total in self.sums.items():
            count = self.counts[name]
            adds = METRICS_TABLE[name].adds
            if adds == "copies":
                total = total / np.maximum(count, 1)
            elif adds == "squares":
                total = np.sqrt(total)
            values = total.astype(np.float32)
            values[~np.isfinite(total)] = np.inf
            values[count == 0] = np.nan
            result[name] = values
        return Chunk(self.steps, result, {}, self.trained)


class Scratch:
    """Arrays that are filled anew for every batch: fresh memory costs more than what is done in it.

    Whoever asks for a name takes it from whoever had it before.
    """

    def __init__(self) -> None:
        self._arrays: dict[str, NDArray[Any]] = {}

    def __call__(self, name: str, size: int, dtype: Any) -> NDArray[Any]:
        """Return an array of `size` with whatever is in it."""
        if len(self._arrays.get(name, ())) < size:
            self._arrays[name] = np.empty(size, dtype=dtype)
        return self._arrays[name][:size]


def unpack(batch: "pa.RecordBatch | pd.DataFrame") -> tuple[Ids, Ids, Columns]:
    """Keys and measured columns as numpy; a column without any measured value is left out."""
    if isinstance(batch, pd.DataFrame):
        batch = pa.RecordBatch.from_pandas(batch, preserve_index=False)
    columns: Columns = {}
    known = set(METRICS_TABLE.measured)
    for name in batch.schema.names:
        if name not in known:
            continue
        column = batch.column(name)
        if column.null_count == len(column):
            continue
        measured = None
        if column.null_count:
            measured = column.is_valid().to_numpy(zero_copy_only=False)
        values = column.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
        columns[name] = (values, measured)
    step = batch.column("step").to_numpy(zero_copy_only=False)
    ids = batch.column("param_id").to_numpy(zero_copy_only=False)
    return step, ids, columns


def sum_batch(
    step: Ids, group: Ids, columns: Columns, width: int, scratch: "Scratch | None" = None
) -> Chunk:
    """Sum the rows of a batch per step and group: squares of norms, plain sums otherwise."""
    scratch = Scratch() if scratch is None else scratch
    new_step = scratch("new step", len(step), np.bool_)
    new_run = scratch("new run", len(step), np.bool_)
    new_step[0] = new_run[0] = True
    np.not_equal(step[1:], step[:-1], out=new_step[1:])
    np.not_equal(group[1:], group[:-1], out=new_run[1:])
    new_run |= new_step
    starts = np.flatnonzero(new_run)
    steps = step[new_step].astype(np.int64)
    key = (np.cumsum(new_step[starts]) - 1) * width + group[starts]
    size, shape = len(steps) * width, (len(steps), width)
    # Every group once at every step, in order: the sums over runs are the table already.
    whole = len(key) == size and bool((key[1:] > key[:-1]).all())

    def scatter(per_run: NDArray[Any]) -> NDArray[np.float64]:
        totals = per_run if whole else np.bincount(key, weights=per_run, minlength=size)
        return np.asarray(totals, dtype=np.float64).reshape(shape)

    rows = scatter(np.diff(starts, append=len(step)))
    sums, counts = {}, {}
    for name, (values, measured) in columns.items():
        summed = scratch("summed", len(values), np.float64)
        np.copyto(summed, values)
        if measured is not None:
            summed[~measured] = 0.0
        if METRICS_TABLE[name].adds == "squares":
            summed *= summed
        sums[name] = scatter(np.add.reduceat(summed, starts))
        counts[name] = (
            rows if measured is None else scatter(np.add.reduceat(measured, starts, dtype=np.int64))
        )
    return Chunk(steps, sums, counts, rows > 0)


def _take(columns: Columns, rows: NDArray[Any]) -> Columns:
    return {n: (v[rows], None if m is None else m[rows]) for n, (v, m) in columns.items()}


def _trained_rows(columns: Columns, size: int) -> Mask | None:
    """Rows of tensors that trained (None: all): census rows hold norms of weights, no more."""
    trained = np.zeros(size, dtype=bool)
    for name, (_, measured) in columns.items():
        if METRICS_TABLE[name].of_training:
            if measured is None:
                return None
            trained |= measured
    return trained
