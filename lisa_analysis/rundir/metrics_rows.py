"""The rows of all metrics files: filtered, checked, in order, read ahead in bounded memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from operator import and_
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lisa_analysis.contract.errors import RunDirectoryError
from lisa_analysis.contract.schema import METRICS_DIR, METRICS_TABLE, PARAMETERS
from lisa_analysis.rundir.jsonl import MOST_STEPS
from lisa_analysis.rundir.shard_keys import ShardKeys, in_order, look_through
from lisa_analysis.rundir.shards import KEYS, Shard, ShardFile, count_negative

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

Item = TypeVar("Item")
Result = TypeVar("Result")

# A shard up to this size is held whole while its keys are looked through; of a larger one the
# keys are read first, and then the rows.
WHOLE_ROWS = 2**21


@dataclass(frozen=True)
class Wanted:
    """Which rows to read: steps `first` to `last`, of these the `chosen`, of some tensors."""

    first: int
    last: int
    chosen: Sequence[int] | None = None
    param_ids: Sequence[int] | None = None


@dataclass(frozen=True)
class _Part:
    """The rows of one shard, and what there is to say of it."""

    shard: Shard
    keys: ShardKeys
    warnings: Sequence[str]
    batches: Iterable["pa.RecordBatch"]


class MetricsRows:
    """Reads the rows of a run's metrics files; the keys of each file are looked through once.

    Parameters
    ----------
    shards
        The files, in order.
    limits
        Segment -> last step that counts; see `last_valid_steps`.
    tensors
        Gives the numbers of all tensors; asked for with the first row.
    warn
        Takes what was left out, in words.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        limits: Mapping[int, int],
        tensors: Callable[[], "NDArray[np.int32]"],
        warn: Callable[[Sequence[str]], None],
    ) -> None:
        self._shards, self._limits = shards, limits
        self._tensors, self._warn = tensors, warn
        self._seen: dict[Path, ShardKeys] = {}

    def read(self, columns: Sequence[str], wanted: Wanted) -> Iterator["pa.RecordBatch"]:
        """Yield step, tensor and `columns` of the wanted rows, in the order of steps."""
        asked = []
        for shard in self._shards:
            end = min(wanted.last, self._limits.get(shard.segment, wanted.last))
            if shard.first <= end and (shard.end is None or shard.end > wanted.first):
                asked.append((shard, Wanted(wanted.first, end, wanted.chosen, wanted.param_ids)))
        known = None
        for part in _ahead(lambda item: self._load(*item, [*KEYS, *columns]), asked):
            self._seen[part.shard.path] = part.keys
            self._warn(part.keys.warnings)
            self._warn(part.warnings)
            for batch in part.batches if part.keys.in_order else in_order(part.batches):
                known = _mask(self._tensors()) if known is None else known
                _check_keys(batch, part.shard.path, known)
                yield self._without_negative(batch, part.shard)

    def _load(self, shard: Shard, wanted: Wanted, columns: Sequence[str]) -> _Part:
        """Read a shard whole where that gives the keys for nothing; else get ready to."""
        file = ShardFile(shard.path)
        keys = self._seen.get(shard.path)
        filtered = wanted.chosen is not None or wanted.param_ids is not None
        if keys is None and not filtered and file.rows <= WHOLE_ROWS:
            batches = list(file.read(columns))
            keys = look_through(shard, batches)
            condition = _condition(shard, keys, wanted)
            if condition is not None and batches:
                batches = _filtered(batches, condition)
            return _Part(shard, keys, file.warnings, batches)
        if keys is None:
            keys = look_through(shard, file.read(KEYS))
        rows = file.read(columns, _condition(shard, keys, wanted))
        return _Part(shard, keys, file.warnings, rows)

    def _without_negative(self, batch: "pa.RecordBatch", shard: Shard) -> "pa.RecordBatch":
        """Take numbers below zero for not measured where only a sum of squares can stand."""
        import pyarrow as pa
        import pyarrow.compute as pc

        for index, name in enumerate(batch.schema.names):
            if name in KEYS or METRICS_TABLE[name].signed or not _has_sign(batch.column(index)):
                continue
            negative = pc.fill_null(pc.less(batch.column(index), 0), False)
            if not pc.any(negative).as_py():
                continue
            count = count_negative(shard.path, name)
            self._warn(
                [
                    f"{METRICS_DIR}/{shard.path.name} has {count} negative values of {name}, "
                    "which cannot be: they count as not measured."
                ]
            )
            null = pa.scalar(None, batch.schema.field(index).type)
            batch = batch.set_column(
                index, batch.schema.field(index), pc.if_else(negative, null, batch.column(index))
            )
        return batch


def _ahead(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yield the results in order, while another thread works on the next item."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(work, items[0]) if items else None
        for position in range(1, len(items) + 1):
            assert following is not None
            found = following.result()
            following = pool.submit(work, items[position]) if position < len(items) else None
            yield found


def _condition(shard: Shard, keys: ShardKeys, wanted: Wanted) -> Any:
    """Condition on the rows of a shard; None where all of them are wanted."""
    import pyarrow.compute as pc

    parts = []
    if not keys.inside:
        parts.append(shard.holds())
    if wanted.first > keys.first:
        parts.append(pc.field("step") >= wanted.first)
    if wanted.last < keys.last:
        parts.append(pc.field("step") <= wanted.last)
    if wanted.chosen is not None:
        parts.append(pc.field("step").isin(wanted.chosen))
    if wanted.param_ids is not None:
        parts.append(pc.field("param_id").isin(wanted.param_ids))
    return reduce(and_, parts) if parts else None


def _filtered(batches: Sequence["pa.RecordBatch"], condition: Any) -> list["pa.RecordBatch"]:
    import pyarrow as pa

    kept = pa.Table.from_batches(batches).filter(condition).to_batches()
    return [batch for batch in kept if batch.num_rows]


def _mask(tensors: "NDArray[np.int32]") -> "NDArray[np.bool_]":
    """Which numbers, up to the last, are those of tensors."""
    import numpy as np

    known = np.zeros(int(tensors.max()) + 1, dtype=bool)
    known[tensors] = True
    return known


def _check_keys(batch: "pa.RecordBatch", path: Path, known: "NDArray[np.bool_]") -> None:
    """Refuse rows of steps and tensors that cannot be: they index arrays."""
    for name, most in (("step", MOST_STEPS), ("param_id", len(known) - 1)):
        values = batch.column(name).to_numpy()
        least, largest = int(values.min()), int(values.max())
        if least < 0 or largest > most:
            worst = least if least < 0 else largest
            raise RunDirectoryError(
                f"{path} has {name} = {worst}, expected 0 to {most}: restore the file or delete it."
            )
    if not known.all():
        ids = batch.column("param_id").to_numpy()
        if (unknown := ids[~known[ids]]).size:
            raise RunDirectoryError(
                f"{path} has param_id = {unknown[0]}, which {PARAMETERS} does not list: "
                "restore the files."
            )


def _has_sign(column: "pa.Array") -> bool:
    """Whether any value has its sign bit set: a fast no where nothing is negative.

    True as well for −0, for NaN with a sign, and for what lies under a null.
    """
    import numpy as np

    if column.null_count == len(column):
        return False
    if column.type.bit_width != 32:
        return True
    values = np.frombuffer(column.buffers()[1], np.int32)
    return bool(values[column.offset : column.offset + len(column)].min() < 0)
