"""Tensors -> module kinds -> layers: one streaming pass over the fact table into dense arrays."""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lisa_analysis.contract.errors import LisaError, suggest
from lisa_analysis.contract.layers import module_of
from lisa_analysis.contract.schema import METRICS_TABLE
from lisa_analysis.metrics.layer_sums import PROBE, Accumulator

if TYPE_CHECKING:
    from lisa_analysis.rundir.run import Run

Array = NDArray[np.float32]
Ids = NDArray[np.int64]

LEVELS = ("layer", "kind", "module", "tensor")
OUTSIDE = ("embed", "head", "norm", "prompt", "other")


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


def grouping(run: "Run", level: str = "layer") -> Grouping:
    """Assign every tensor of `run` to a group at `level`.

    Raises
    ------
    LisaError
        For an unknown level.
    """
    if level not in LEVELS:
        raise LisaError(
            f"profile by {level!r} is unknown: choose one of {', '.join(LEVELS)}."
            f"{suggest(str(level), LEVELS)}"
        )
    frame = run.parameters
    ids = frame["param_id"].to_numpy(dtype=np.int64)
    layers = np.asarray(frame["layer"].astype("Float64").fillna(-1), dtype=np.int64)
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


def _label(run: "Run", level: str, key: tuple[int, str]) -> str:
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
    probe_steps, probe
        Steps of measuring passes, shape (m,), and ‖g‖ in them, shape (m, groups): gradients of
        frozen groups too.
    numel
        Shape (groups,): elements of the tensors that were ever trained.
    initial, initial_base
        Shape (groups,): ‖θ_0‖ of the tensors that were trained, and of the base weights that
        they adapt (LoRA; biases beside them are not adapted) or are (otherwise); NaN without a
        census at step 0.
    final
        Shape (groups,): ‖θ‖ of the trained tensors when they were last measured.
    final_delta
        Shape (groups,): ‖W − W_0‖ when it was last measured (LoRA: of the product).
    initial_merged, final_merged
        Shape (groups,): norm of the base tensors that changed, weights with their adapters (LoRA)
        and what trains beside them, at step 0 and in the last census after it; both of the same
        tensors, NaN where no adapted weight was measured after step 0.
    last
        ``weight_norm``, ``delta_norm``, ``merged_norm`` -> shape (tensors,), the last measured
        value by param_id.
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
    probe_steps: Ids
    probe: Array
    numel: NDArray[np.float64]
    initial: NDArray[np.float64]
    initial_base: NDArray[np.float64]
    final: NDArray[np.float64]
    final_delta: NDArray[np.float64]
    initial_merged: NDArray[np.float64]
    final_merged: NDArray[np.float64]
    last: Mapping[str, NDArray[np.float64]]
    ever_trained: NDArray[np.bool_]
    first_non_finite: Mapping[str, tuple[int, int]]
    rows: int

    def __getitem__(self, column: str) -> Array:
        """Array of one column; `KeyError` says which columns the run has."""
        if column not in self.measures:
            have = ", ".join(self.measures) or "nothing of a training step"
            raise KeyError(f"{column} was not recorded (recorded: {have})")
        return self.measures[column]

    def __contains__(self, column: str) -> bool:
        return column in self.measures

    def to_frame(self, column: str) -> pd.DataFrame:
        """One column as a frame: rows ``step``, columns named by `Grouping.level`.

        Layers go by their index, everything else by its name. NaN where a group did not train,
        inf where something measured was not finite.
        """
        groups = self.groups
        indices = groups.layer[: groups.inside].tolist()
        inside = indices if groups.level == "layer" else groups.names[: groups.inside]
        return pd.DataFrame(
            self[column],
            index=pd.Index(self.steps, name="step"),
            columns=pd.Index([*inside, *groups.names[groups.inside :]], name=groups.level),
        )


_CACHE: weakref.WeakKeyDictionary[Any, dict[str, StepTable]] = weakref.WeakKeyDictionary()


def step_table(run: "Run", level: str = "layer") -> StepTable:
    """Read the whole fact table of `run` once, shard by shard, summed to `level`.

    Memory is that of the result, (steps × groups) float32 per measured column, plus one batch.
    A run that has finished is read once and remembered for as long as the object lives.
    """
    if run.status == "running" or level not in LEVELS:  # an unknown one is refused there
        return _read(run, level)
    remembered = _CACHE.setdefault(run, {})
    if level not in remembered:
        remembered[level] = _read(run, level)
    return remembered[level]


def _read(run: "Run", level: str) -> StepTable:
    groups = grouping(run, level)
    sums = Accumulator(groups.of, len(groups.names))
    for batch in run.iter_metrics(columns=METRICS_TABLE.measured):
        sums.add(batch)
    chunks, probes = sums.steps.finish(), sums.probes.finish()
    measures: dict[str, Array] = {}
    for name in [n for n in METRICS_TABLE.measured if any(n in chunk.sums for chunk in chunks)]:
        # Popped one column at a time: the table is never in memory twice.
        parts = [chunk.sums.pop(name, None) for chunk in chunks]
        measures[name] = np.concatenate(
            [
                np.full(chunk.trained.shape, np.nan, np.float32) if part is None else part
                for part, chunk in zip(parts, chunks, strict=True)
            ]
        )
        del parts
    norms = _group_norms(run, groups, sums)
    width = len(groups.names)
    empty, nothing = np.zeros((0, width), dtype=bool), np.zeros((0, width), dtype=np.float32)
    return StepTable(
        groups=groups,
        steps=np.concatenate([np.zeros(0, np.int64), *(chunk.steps for chunk in chunks)]),
        measures=measures,
        trained=np.concatenate([empty, *(chunk.trained for chunk in chunks)]),
        probe_steps=np.concatenate([np.zeros(0, np.int64), *(chunk.steps for chunk in probes)]),
        probe=np.concatenate([nothing, *(chunk.sums[PROBE] for chunk in probes)]),
        **norms,
        last=sums.last,
        ever_trained=sums.ever_trained,
        first_non_finite=dict(sums.first_bad),
        rows=sums.rows,
    )


def _group_norms(run: "Run", groups: Grouping, sums: Accumulator) -> dict[str, NDArray[np.float64]]:
    """Elements and norms of single tensors before and after training, summed per group."""
    frame = run.parameters
    ids = frame["param_id"].to_numpy(dtype=np.int64)
    group = groups.of[ids]
    trained = sums.ever_trained[ids] & (group >= 0)
    adapted = _adapted(frame, trained)
    own = (frame["role"] == "base").to_numpy()
    base = own & (trained | adapted) & (group >= 0)
    # Of an adapter with a frozen B (MiCA) the change stands on that row too.
    moved = (trained | (adapted & ~own)) & (group >= 0)
    width = len(groups.names)

    def total(values: NDArray[np.float64], where: NDArray[np.bool_]) -> NDArray[np.float64]:
        # Without any row bincount gives integers, which hold no NaN.
        found = np.bincount(group[where], weights=values[where], minlength=width)
        return found.astype(np.float64)

    def norm(values: NDArray[np.float64], where: NDArray[np.bool_]) -> NDArray[np.float64]:
        squares = total(values[ids] ** 2, where)
        squares[np.bincount(group[where], minlength=width) == 0] = np.nan
        return np.sqrt(squares)

    delta = sums.last["delta_norm"]
    start, end = _start_of_weights(frame, sums), _end_of_weights(frame, sums, base & trained)
    both = base & np.isfinite(start[ids]) & np.isfinite(end[ids])
    return {
        "numel": total(frame["numel"].to_numpy(dtype=np.float64), trained),
        "initial": norm(sums.census, trained),
        "initial_base": norm(start, base),
        "final": norm(sums.last["weight_norm"], trained),
        "final_delta": norm(delta, moved & ~np.isnan(delta[ids])),
        "initial_merged": norm(start, both),
        "final_merged": norm(end, both),
    }


def _adapted(frame: pd.DataFrame, trained: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Tensors of the modules that have an adapter that trains, without biases: none adapts them."""
    base = (frame["role"] == "base").to_numpy()
    names = frame["name"].astype(str).tolist()
    modules = [module_of(name) for name in names]
    adapted = {module for module, t in zip(modules, trained & ~base, strict=True) if t}
    return np.array(
        [module in adapted and not _is_bias(name)
         for module, name in zip(modules, names, strict=True)],
        dtype=bool,
    )  # fmt: skip


def _is_bias(name: str) -> bool:
    return name.endswith((".bias", "_bias"))


def _start_of_weights(frame: pd.DataFrame, sums: Accumulator) -> NDArray[np.float64]:
    """‖W_0‖ by param_id: with LoRA of W and what its adapter adds, where that was measured.

    PiSSA and others move a part of W into the adapter: what they leave is no measure of it.
    """
    if not np.isfinite(sums.merged).any():
        return sums.census
    start = sums.census.copy()
    columns = [frame[name].tolist() for name in ("param_id", "name", "role")]
    merged = {
        module_of(str(name)): sums.merged[param_id]
        for param_id, name, _ in zip(*columns, strict=True)
        if np.isfinite(sums.merged[param_id])
    }
    for param_id, name, role in zip(*columns, strict=True):
        if role == "base" and str(name).endswith(".weight") and module_of(str(name)) in merged:
            start[param_id] = merged[module_of(str(name))]
    return start


def _end_of_weights(
    frame: pd.DataFrame, sums: Accumulator, trained: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """‖W_T‖ by param_id with what its adapter adds; NaN where that was not measured after step 0.

    Of a base tensor that trains itself (a bias, a norm) it is the last norm.
    """
    end = np.full(len(sums.census), np.nan)
    merged = sums.last["merged_norm"]
    if not np.isfinite(merged).any():
        return end
    ids = frame["param_id"].to_numpy(dtype=np.int64)
    end[ids[trained]] = sums.last["weight_norm"][ids[trained]]
    weights: dict[str, list[int]] = {}
    adapters: dict[str, list[int]] = {}
    for param_id, name, role in zip(ids, frame["name"].astype(str), frame["role"], strict=True):
        if role == "base" and not _is_bias(name):
            weights.setdefault(module_of(name), []).append(param_id)
        elif np.isfinite(merged[param_id]):
            adapters.setdefault(module_of(name), []).append(param_id)
    for module, rows in adapters.items():
        # Of a module with several weights (fused experts) all or none are known.
        if len(rows) == len(weights.get(module, ())):
            end[weights[module]] = merged[rows]
    return end
