"""The keys of a metrics file, step and tensor: what of them cannot be, and rows put in order."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lisa_analysis.rundir.shards import KEYS, Shard

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    Keys = tuple[NDArray[np.int64], NDArray[np.int32]]


@dataclass(frozen=True)
class ShardKeys:
    """What looking through the keys of a shard brought.

    Attributes
    ----------
    in_order : bool
        Every row is of a later step than the one before it, or of the same step and a later
        tensor: as it was written. Else rows may stand twice.
    inside : bool
        No row is of a step that the shard cannot hold by its name.
    first, last : int
        Smallest and largest step among those that it can hold.
    warnings : tuple of str
        What is left out.
    """

    in_order: bool
    inside: bool
    first: int
    last: int
    warnings: tuple[str, ...] = ()


def look_through(shard: Shard, batches: Iterable["pa.RecordBatch"]) -> ShardKeys:
    """Look through the steps and tensors of all rows of a shard, in the order of the file."""
    parts = [
        (batch.column("step").to_numpy(), batch.column("param_id").to_numpy()) for batch in batches
    ]
    return _as_written(shard, parts) or _damaged(shard, parts)


def _as_written(shard: Shard, parts: "Sequence[Keys]") -> ShardKeys | None:
    """Keys of a shard without fault; None when something is wrong with it."""
    import numpy as np

    last: tuple[int, int] | None = None
    first = None
    for step, tensor in parts:
        if not len(step):
            continue
        # The step never falls, and rises wherever the tensor does not.
        turns = np.flatnonzero(tensor[1:] <= tensor[:-1])
        if (step[1:] < step[:-1]).any() or (step[turns + 1] == step[turns]).any():
            return None
        start = (int(step[0]), int(tensor[0]))
        if last is not None and start <= last:
            return None
        first = start[0] if first is None else first
        last = (int(step[-1]), int(tensor[-1]))
    if first is None or last is None:
        return ShardKeys(True, True, 0, -1)
    if first < shard.first or (shard.end is not None and last[0] >= shard.end):
        return None
    return ShardKeys(True, True, first, last[0])


def _damaged(shard: Shard, parts: "Sequence[Keys]") -> ShardKeys:
    """Keys of any shard, with what is left out of it in words; slower."""
    import numpy as np

    step = np.concatenate([part[0] for part in parts])
    tensor = np.concatenate([part[1] for part in parts])
    inside = step >= shard.first
    if shard.end is not None:
        inside &= step < shard.end
    name = f"{shard.path.parent.name}/{shard.path.name}"
    warnings = []
    if outside := int((~inside).sum()):
        until = "" if shard.end is None else f" to {shard.end - 1}"
        warnings.append(
            f"{name} has {outside} rows of steps {step[~inside].min()} to {step[~inside].max()}, "
            f"but by its name holds steps {shard.first}{until or ' on'}: they are left out."
        )
        step, tensor = step[inside], tensor[inside]
    ordered = bool(((np.diff(step) > 0) | ((np.diff(step) == 0) & (np.diff(tensor) > 0))).all())
    if not ordered:
        keys = np.column_stack([step, tensor])
        if repeated := len(keys) - len(np.unique(keys, axis=0)):
            warnings.append(
                f"{name} has {repeated} rows of a step and tensor that it holds already: of each "
                "the first row counts."
            )
    first, last = (int(step.min()), int(step.max())) if len(step) else (0, -1)
    return ShardKeys(ordered, not outside, first, last, tuple(warnings))


def in_order(batches: Iterable["pa.RecordBatch"]) -> Iterator["pa.RecordBatch"]:
    """Yield the rows of a shard in the order of steps and tensors, of each only the first."""
    import numpy as np
    import pyarrow as pa

    table = pa.Table.from_batches(found) if (found := list(batches)) else None
    if table is None:
        return
    step, tensor = (table.column(name).to_numpy() for name in KEYS)
    order = np.lexsort((tensor, step))  # stable: the first of equal rows stays the first
    step, tensor = step[order], tensor[order]
    new = np.append(True, (np.diff(step) != 0) | (np.diff(tensor) != 0))
    yield from table.take(pa.array(order[new])).combine_chunks().to_batches()
