"""The keys of a metrics file, step and tensor: what of them cannot be, and rows put in order."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lisa_analysis.rundir.shards import Shard, read_shard

if TYPE_CHECKING:
    import pyarrow as pa

_KEYS = ("step", "param_id")


@dataclass(frozen=True)
class ShardKeys:
    """What looking through the keys of a shard brought.

    Attributes
    ----------
    in_order : bool
        Every row is of a later step than the one before it, or of the same step and a later
        tensor: as it was written. Else rows may stand twice.
    warnings : tuple of str
        What is left out.
    """

    in_order: bool
    warnings: tuple[str, ...]


def read_keys(shard: Shard) -> ShardKeys:
    """Look through the steps and tensors of a shard."""
    import numpy as np
    import pyarrow.compute as pc

    outside, extremes = 0, []
    ordered, last = True, None
    parts = []
    for batch in read_shard(shard.path, list(_KEYS), pc.scalar(True), []):
        step, tensor = (batch.column(name).to_numpy() for name in _KEYS)
        inside = step >= shard.first
        if shard.end is not None:
            inside &= step < shard.end
        if not inside.all():
            outside += int((~inside).sum())
            extremes += [int(step[~inside].min()), int(step[~inside].max())]
            step, tensor = step[inside], tensor[inside]
        if len(step):
            later = (np.diff(step) > 0) | ((np.diff(step) == 0) & (np.diff(tensor) > 0))
            first = (int(step[0]), int(tensor[0]))
            ordered &= bool(later.all()) and (last is None or first > last)
            last = (int(step[-1]), int(tensor[-1]))
            parts.append(np.column_stack([step, tensor]))
    name = f"{shard.path.parent.name}/{shard.path.name}"
    warnings = []
    if outside:
        until = "" if shard.end is None else f" to {shard.end - 1}"
        warnings.append(
            f"{name} has {outside} rows of steps {min(extremes)} to {max(extremes)}, but by its "
            f"name holds steps {shard.first}{until or ' on'}: they are left out."
        )
    if not ordered:
        keys = np.concatenate(parts)
        if repeated := len(keys) - len(np.unique(keys, axis=0)):
            warnings.append(
                f"{name} has {repeated} rows of a step and tensor that it holds already: of each "
                "the first row counts."
            )
    return ShardKeys(ordered, tuple(warnings))


def in_order(batches: Iterable["pa.RecordBatch"]) -> Iterator["pa.RecordBatch"]:
    """Yield the rows of a shard in the order of steps and tensors, of each only the first."""
    import numpy as np
    import pyarrow as pa

    table = pa.Table.from_batches(found) if (found := list(batches)) else None
    if table is None:
        return
    step, tensor = (table.column(name).to_numpy() for name in _KEYS)
    order = np.lexsort((tensor, step))  # stable: the first of equal rows stays the first
    step, tensor = step[order], tensor[order]
    new = np.append(True, (np.diff(step) != 0) | (np.diff(tensor) != 0))
    yield from table.take(pa.array(order[new])).combine_chunks().to_batches()
