"""Tensors -> module kinds -> layers: one streaming pass over the fact table into dense arrays."""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from lisa_analysis.errors import LisaError, suggest
from lisa_analysis.layers import module_of
from lisa_analysis.schema import METRICS_TABLE

Array = NDArray[np.float32]
Ids = NDArray[np.int64]

# Norms of disjoint tensors add as squares, these as they are.
ADDITIVE = ("grad_norm_l1", "descent", "grad_noise")
LEVELS = ("layer", "kind", "module", "tensor")
OUTSIDE = ("embed", "head", "norm", "other")
_KEYS = ("step", "param_id")
MEASURES = tuple(name for name in METRICS_TABLE.names if name not in _KEYS)


@dataclass(frozen=True)
class Grouping:
    """Which row of a profile every tensor belongs to.

    Attributes
    ----------
    level
        ``layer``, ``kind``, ``module`` (a kind within a layer) or ``tensor``.
    names
        Names of the groups inside the stack, then of those outside.
    inside
        How many of them are inside the stack.
    layer
        Layer of every group, −1 where it has none or several.
    of
        Group of every param_id; −1 for a tied duplicate, which has no rows of its own.
    """

    level: str
    names: tuple[str, ...]
    inside: int
    layer: Ids
    of: Ids


def grouping(run: Any, level: str = "layer") -> Grouping:
    """Assign every tensor of `run` to a group at `level`.

    Raises
    ------
    LisaError
        For an unknown level.
    """
    if level not in LEVELS:
        raise LisaError(
            f"profile by {level!r} is unknown: choose one of {', '.join(LEVELS)}."
            f"{suggest(level, LEVELS)}"
        )
    frame = run.parameters
    ids = frame["param_id"].to_numpy(dtype=np.int64)
    layers = frame["layer"].astype("Float64").fillna(-1).to_numpy(dtype=np.int64, na_value=-1)
    kinds, names = frame["kind"].astype(str).tolist(), frame["name"].astype(str).tolist()
    order = {(-1, kind): index for index, kind in enumerate(OUTSIDE)}
    keys: list[tuple[int, str]] = []
    for layer, kind, name in zip(layers.tolist(), kinds, names, strict=True):
        part = {"layer": "", "kind": kind, "module": kind, "tensor": name}[level]
        if layer < 0:
            keys.append((-1, kind if kind in OUTSIDE else "other"))
        else:
            keys.append((0 if level == "kind" else layer, part))
    inside = list(dict.fromkeys(sorted((k for k in keys if k[0] >= 0), key=lambda k: k[0])))
    if level == "layer":
        inside = [(index, "") for index in range(run.n_layers)]
    outside = sorted({k for k in keys if k[0] < 0}, key=lambda k: order[k])
    index_of = {key: index for index, key in enumerate([*inside, *outside])}
    of = np.full(int(ids.max(initial=-1)) + 1, -1, dtype=np.int64)
    of[ids] = [index_of[key] for key in keys]
    if "tied_to" in frame:
        of[ids[frame["tied_to"].notna().to_numpy()]] = -1
    labels = [_label(run, level, key) for key in inside] + [kind for _, kind in outside]
    layer_of = [layer if level != "kind" else -1 for layer, _ in inside] + [-1] * len(outside)
    return Grouping(level, tuple(labels), len(inside), np.array(layer_of, dtype=np.int64), of)


def _label(run: Any, level: str, key: tuple[int, str]) -> str:
    layer, part = key
    if level == "layer":
        return str(run.layer_names[layer])
    return f"{run.layer_names[layer]} {part}" if level == "module" else part


@dataclass(frozen=True)
class StepTable:
    """Every measured quantity per recorded step and group, and the norms before training.

    Attributes
    ----------
    groups
        What the columns of all arrays are.
    steps
        Shape (n,), the recorded optimizer steps, ascending.
    measures
        Column of the schema -> float32 array of shape (n, groups). NaN where nothing was
        measured, inf where any measured value was not finite.
    trained
        Shape (n, groups): whether a tensor of the group was trained at the step.
    numel
        Shape (groups,): elements of the tensors that were ever trained.
    initial, initial_base
        Shape (groups,): ‖θ_0‖ of the tensors that were trained, and of the base weights that
        they adapt (LoRA) or are (otherwise); NaN without a census at step 0.
    final
        Shape (groups,): ‖θ‖ of the trained tensors when they were last measured.
    last
        ``weight_norm`` and ``delta_norm`` -> shape (tensors,), the last measured value by
        param_id.
    ever_trained
        Shape (tensors,), by param_id.
    first_non_finite
        Column -> (step, param_id) of the first value that is not finite.
    rows
        Rows read.
    """

    groups: Grouping
    steps: Ids
    measures: Mapping[str, Array]
    trained: NDArray[np.bool_]
    numel: NDArray[np.float64]
    initial: NDArray[np.float64]
    initial_base: NDArray[np.float64]
    final: NDArray[np.float64]
    last: Mapping[str, NDArray[np.float64]]
    ever_trained: NDArray[np.bool_]
    first_non_finite: Mapping[str, tuple[int, int]]
    rows: int

    def __getitem__(self, column: str) -> Array:
        """Array of one column; `KeyError` says which columns the run has."""
        if column not in self.measures:
            have = ", ".join(self.measures) or "none"
            raise KeyError(f"{column} was not recorded (recorded: {have})")
        return self.measures[column]

    def __contains__(self, column: str) -> bool:
        return column in self.measures


_CACHE: weakref.WeakKeyDictionary[Any, dict[str, tuple[Any, StepTable]]] = (
    weakref.WeakKeyDictionary()
)


def step_table(run: Any, level: str = "layer") -> StepTable:
    """Read the whole fact table of `run` once, shard by shard, summed to `level`.

    Memory is that of the result, (steps × groups) float32 per measured column, plus one batch.
    A run that has finished is read once and remembered for as long as the object lives.
    """
    if run.status == "running":
        return _read(run, level)
    remembered = _CACHE.setdefault(run, {})
    if level not in remembered:
        remembered[level] = (None, _read(run, level))
    return remembered[level][1]


def _read(run: Any, level: str) -> StepTable:
    groups = grouping(run, level)
    reader = _Reader(groups)
    for batch in run.iter_metrics(columns=list(MEASURES)):
        reader.add(batch)
    return reader.table(run)


class _Reader:
    """Accumulates batches; a step cut by the end of a batch is completed by the next one."""

    def __init__(self, groups: Grouping) -> None:
        self.groups = groups
        self.width = len(groups.names)
        self.chunks: list[_Chunk] = []
        self.pending: _Chunk | None = None
        size = len(groups.of)
        self.census = np.full(size, np.nan)
        self.last = {name: np.full(size, np.nan) for name in ("weight_norm", "delta_norm")}
        self.ever_trained = np.zeros(size, dtype=bool)
        self.first_bad: dict[str, tuple[int, int]] = {}
        self.rows = 0

    def add(self, batch: "pa.RecordBatch | pd.DataFrame") -> None:
        """Sum one batch, rows in step order."""
        step, ids, columns = _unpack(batch)
        if not len(step):
            return
        self.rows += len(step)
        if (np.diff(step) < 0).any():
            order = np.argsort(step, kind="stable")
            step, ids = step[order], ids[order]
            columns = {
                n: (v[order], None if m is None else m[order]) for n, (v, m) in columns.items()
            }
        self._note_norms(step, ids, columns)
        trained = _trained_rows(columns, len(step))
        trained &= (step > 0) & (self.groups.of[ids] >= 0)
        self.ever_trained[ids[trained]] = True
        if not trained.all():
            step, ids = step[trained], ids[trained]
            columns = _take(columns, trained)
        if len(step):
            self._push(_sum_batch(step, self.groups.of[ids], columns, self.width))

    def _note_norms(self, step: Ids, ids: Ids, columns: "Columns") -> None:
        for name, (values, measured) in columns.items():
            bad = ~np.isfinite(values)
            if measured is not None:
                bad &= measured
            if name not in self.first_bad and bad.any():
                row = int(np.argmax(bad))
                self.first_bad[name] = (int(step[row]), int(ids[row]))
        for name, last in self.last.items():
            if name in columns:
                values, measured = columns[name]
                keep = np.ones(len(step), dtype=bool) if measured is None else measured
                last[ids[keep]] = values[keep]
        if "weight_norm" in columns and step[0] == 0:
            values, measured = columns["weight_norm"]
            start = step == 0 if measured is None else (step == 0) & measured
            self.census[ids[start]] = values[start]

    def _push(self, chunk: "_Chunk") -> None:
        if self.pending is not None:
            if self.pending.steps[-1] == chunk.steps[0]:
                chunk.absorb(self.pending)
                self.pending = self.pending.head()
            if len(self.pending.steps):
                self.chunks.append(self.pending.finished())
        self.pending = chunk

    def table(self, run: Any) -> StepTable:
        """Join the chunks."""
        if self.pending is not None:
            self.chunks.append(self.pending.finished())
        names = [n for n in MEASURES if any(n in chunk.sums for chunk in self.chunks)]
        measures: dict[str, Array] = {}
        for name in names:
            parts = [chunk.sums.pop(name, None) for chunk in self.chunks]
            measures[name] = np.concatenate(
                [
                    np.full(chunk.trained.shape, np.nan, np.float32) if part is None else part
                    for part, chunk in zip(parts, self.chunks, strict=True)
                ]
            )
            del parts
        empty = np.zeros((0, self.width), dtype=bool)
        elements, initial, base, final = _group_norms(
            run, self.groups, self.ever_trained, self.census, self.last["weight_norm"]
        )
        return StepTable(
            groups=self.groups,
            steps=np.concatenate([np.zeros(0, np.int64), *(chunk.steps for chunk in self.chunks)]),
            measures=measures,
            trained=np.concatenate([empty, *(chunk.trained for chunk in self.chunks)]),
            numel=elements,
            initial=initial,
            initial_base=base,
            final=final,
            last=self.last,
            ever_trained=self.ever_trained,
            first_non_finite=dict(self.first_bad),
            rows=self.rows,
        )


Columns = dict[str, tuple[NDArray[np.float32], NDArray[np.bool_] | None]]


def _take(columns: Columns, rows: NDArray[Any]) -> Columns:
    return {n: (v[rows], None if m is None else m[rows]) for n, (v, m) in columns.items()}


def _unpack(batch: "pa.RecordBatch | pd.DataFrame") -> tuple[Ids, Ids, Columns]:
    """Keys and measured columns as numpy; a column without any measured value is left out."""
    if isinstance(batch, pd.DataFrame):
        batch = pa.RecordBatch.from_pandas(batch, preserve_index=False)
    columns: Columns = {}
    for name in batch.schema.names:
        if name in _KEYS or name not in MEASURES:
            continue
        column = batch.column(name)
        if column.null_count == len(column):
            continue
        measured = None
        if column.null_count:
            measured = column.is_valid().to_numpy(zero_copy_only=False)
        values = column.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
        columns[name] = (values, measured)
    step = batch.column("step").to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
    ids = batch.column("param_id").to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
    return step, ids, columns


def _trained_rows(columns: Columns, size: int) -> NDArray[np.bool_]:
    """Rows of tensors that trained: census rows carry norms of weights and nothing else."""
    trained = np.zeros(size, dtype=bool)
    for name in ("grad_norm", "update_norm", "grad_norm_l1", "descent", "opt_steps"):
        if name in columns:
            measured = columns[name][1]
            if measured is None:
                return np.ones(size, dtype=bool)
            trained |= measured
    return trained


@dataclass
class _Chunk:
    """Sums over the tensors of each group, float64 until `finished`, for a run of steps."""

    steps: Ids
    sums: dict[str, Any]
    counts: dict[str, Any]
    trained: NDArray[np.bool_]

    def absorb(self, before: "_Chunk") -> None:
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

    def head(self) -> "_Chunk":
        """All but the last step."""
        return _Chunk(
            self.steps[:-1],
            {name: value[:-1] for name, value in self.sums.items()},
            {name: value[:-1] for name, value in self.counts.items()},
            self.trained[:-1],
        )

    def finished(self) -> "_Chunk":
        """Norms as float32: NaN where not measured, inf where not finite."""
        result = {}
        for name, total in self.sums.items():
            count = self.counts[name]
            if name == "opt_steps":
                total = total / np.maximum(count, 1)
            elif name not in ADDITIVE:
                total = np.sqrt(total)
            values = np.where(np.isfinite(total), total, np.inf).astype(np.float32)
            values[count == 0] = np.nan
            result[name] = values
        return _Chunk(self.steps, result, {}, self.trained)


def _sum_batch(step: Ids, group: Ids, columns: Columns, width: int) -> _Chunk:
    """Sum the rows of a batch per step and group: squares of norms, plain sums otherwise."""
    first = np.concatenate([[True], step[1:] != step[:-1]])
    steps = step[first]
    key = (np.cumsum(first) - 1) * width + group
    size = len(steps) * width
    shape = (len(steps), width)
    rows = np.bincount(key, minlength=size).reshape(shape)
    sums, counts = {}, {}
    for name, (values, measured) in columns.items():
        where = key if measured is None else key[measured]
        weights = (values if measured is None else values[measured]).astype(np.float64)
        if name not in ADDITIVE and name != "opt_steps":
            np.square(weights, out=weights)
        sums[name] = np.bincount(where, weights=weights, minlength=size).reshape(shape)
        counts[name] = (
            rows if measured is None else np.bincount(where, minlength=size).reshape(shape)
        )
    return _Chunk(steps, sums, counts, rows > 0)


def _group_norms(
    run: Any,
    groups: Grouping,
    trained: NDArray[np.bool_],
    census: NDArray[np.float64],
    last: NDArray[np.float64],
) -> tuple[NDArray[np.float64], ...]:
    """Elements, ‖θ_0‖, ‖θ_0‖ of the adapted base weights and last ‖θ‖ per group."""
    frame = run.parameters
    ids = frame["param_id"].to_numpy(dtype=np.int64)
    group = groups.of[ids]
    kept = group >= 0
    is_trained = trained[ids] & kept
    numel = frame["numel"].to_numpy(dtype=np.float64)
    roles, names = frame["role"].astype(str).tolist(), frame["name"].astype(str).tolist()
    modules = [module_of(name) for name in names]
    adapted = {
        module
        for module, role, t in zip(modules, roles, is_trained, strict=True)
        if t and role != "base"
    }
    is_base = (
        np.array(
            [
                role == "base" and (module in adapted or bool(t))
                for module, role, t in zip(modules, roles, is_trained, strict=True)
            ],
            dtype=bool,
        )
        & kept
    )

    width = len(groups.names)

    def norm(values: NDArray[np.float64], where: NDArray[np.bool_]) -> NDArray[np.float64]:
        squares = np.bincount(group[where], weights=values[ids[where]] ** 2, minlength=width)
        squares[np.bincount(group[where], minlength=width) == 0] = np.nan
        return np.sqrt(squares)

    elements = np.bincount(group[is_trained], weights=numel[is_trained], minlength=width)
    elements = elements.astype(np.float64)
    return elements, norm(census, is_trained), norm(census, is_base), norm(last, is_trained)


def draws(run: Any) -> list[tuple[int, tuple[int, ...]]]:
    """LISA's draws in order, (step, layers); the later of two draws at one step counts."""
    return [(step, layers) for step, layers, _ in draw_events(run)]


def draw_events(run: Any) -> list[tuple[int, tuple[int, ...], NDArray[np.float64] | None]]:
    """LISA's draws with the inclusion probabilities π that were in force, None if not logged."""
    events = run.events
    if not len(events) or "event" not in events or "layers" not in events:
        return []
    found: dict[int, tuple[tuple[int, ...], NDArray[np.float64] | None]] = {}
    chosen = events[events["event"] == "lisa_draw"]
    pis = chosen.get("inclusion_probabilities", None)
    for index, (step, layers) in enumerate(zip(chosen["step"], chosen["layers"], strict=True)):
        pi = None if pis is None else pis.iloc[index]
        usable = pi is not None and np.ndim(pi) == 1
        found[int(step)] = (
            tuple(int(layer) for layer in layers),
            np.asarray(pi, dtype=np.float64) if usable else None,
        )
    return [(step, *found[step]) for step in sorted(found)]


def intervals(run: Any, steps: Ids) -> Ids:
    """Index of the draw that ruled every step (a draw at step d rules d+1 …), −1 before any."""
    starts = np.array([step for step, _ in draws(run)], dtype=np.int64)
    return np.asarray(np.searchsorted(starts, steps, side="left") - 1, dtype=np.int64)
