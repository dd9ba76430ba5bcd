"""The Parquet files of a run directory: which shards count, and reading them with filters."""

import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import RunDirectoryError
from lisa_analysis.contract.schema import (
    METRICS_TABLE,
    PARAMETERS_TABLE,
    Column,
    Table,
    parse_shard_name,
)
from lisa_analysis.rundir.jsonl import MOST_SEGMENTS, MOST_TENSORS
from lisa_analysis.rundir.manifest import check_version

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

KEYS = ("step", "param_id")
BATCH_ROWS = 131_072
Steps = slice | Sequence[int]


@dataclass(frozen=True, slots=True)
class Shard:
    """One metrics file: its path, segment and the steps [first, end) that can be in it."""

    path: Path
    segment: int
    first: int
    end: int | None

    def holds(self) -> Any:
        """Return the condition on rows that belong into the shard by its name."""
        import pyarrow.compute as pc

        condition = pc.field("step") >= self.first
        return condition if self.end is None else condition & (pc.field("step") < self.end)


def list_shards(directory: Path) -> tuple[list[Shard], list[str]]:
    """Return the shards below `directory` in the order of segment and step, and warnings."""
    found: list[tuple[int, int, Path]] = []
    warnings: list[str] = []
    if not directory.is_dir():
        return [], [f"{directory.name}/ is missing: no step was recorded."]
    try:
        paths = sorted(directory.iterdir())
    except OSError as error:
        raise RunDirectoryError(
            f"{directory} cannot be listed ({error.strerror or error}): check its permissions."
        ) from None
    for path in paths:
        parsed = parse_shard_name(path.name)
        if parsed and parsed[0] > MOST_SEGMENTS:
            raise RunDirectoryError(
                f"{path} is named as segment {parsed[0]}, expected at most {MOST_SEGMENTS:,}: "
                "restore its name or move it away."
            )
        if parsed:
            found.append((*parsed, path))
        elif path.suffix == ".parquet":
            warnings.append(f"{directory.name}/{path.name} is not named like a shard: ignored.")
    found.sort()
    following = [*found[1:], None][: len(found)]
    return [
        Shard(path, segment, first, after[1] if after and after[0] == segment else None)
        for (segment, first, path), after in zip(found, following, strict=True)
    ], warnings


def last_valid_steps(starts: Mapping[int, int], shards: Iterable[Shard]) -> dict[int, int]:
    """Up to which step each older segment still counts.

    Parameters
    ----------
    starts
        Segment -> step that it continued from (its `resume` event).
    shards
        Used where a segment's `resume` event is missing: it began before its first shard.

    Returns
    -------
    dict
        Segment -> last step that later segments leave standing; a segment without an entry
        counts in full.
    """
    begins = dict(starts)
    for shard in shards:
        if shard.segment and shard.segment not in begins:
            begins[shard.segment] = shard.first - 1
    # Who starts again from nothing takes the census anew as well.
    begins = {segment: start or -1 for segment, start in begins.items()}
    limits: dict[int, int] = {}
    for segment in range(max(begins, default=0)):
        later = [start for number, start in begins.items() if number > segment]
        if later:
            limits[segment] = min(later)
    return limits


def whole_numbers(values: Any, name: str) -> list[int]:
    """Return one whole number or several as a list.

    Raises
    ------
    RunDirectoryError
        For anything else.
    """
    try:
        several = list(values) if isinstance(values, Iterable) else [values]
        # Numbers of a frame with gaps are floats.
        return [int(v) if v % 1 == 0 else operator.index(v) for v in several]
    except TypeError:
        raise RunDirectoryError(
            f"{name} is {values!r}: expected a whole number, a slice or several numbers."
        ) from None


def step_bounds(steps: Steps | None) -> tuple[int, int, list[int] | None]:
    """Return first and last step (both included) and the listed steps, if they were listed."""
    top = 2**62
    if steps is None:
        return 0, top, None
    if isinstance(steps, slice):
        for bound in (steps.start, steps.stop):
            if bound is not None and bound < 0:
                raise RunDirectoryError(
                    f"steps has the negative bound {bound}: steps are counted from 0."
                )
        first = steps.start or 0
        last = top if steps.stop is None else steps.stop - 1
        if steps.step in (None, 1):
            return first, last, None
        if steps.stop is None:
            raise RunDirectoryError("steps has a stride but no end: give slice(start, stop, step).")
        return first, last, list(range(first, steps.stop, steps.step))
    listed = sorted(set(whole_numbers(steps, "steps")))
    return (listed[0], listed[-1], listed) if listed else (0, -1, [])


def arrow_schema(table: Table) -> "pa.Schema":
    """Return the Arrow schema of a table of the contract."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field(column.name, pa.type_for_alias(column.type), nullable=column.nullable)
            for column in table.columns
        ]
    )


class ShardFile:
    """One opened metrics file; every fault of it is a `RunDirectoryError`.

    Attributes
    ----------
    rows : int
        Number of rows.
    warnings : list of str
        A newer schema version, in words.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow.dataset as ds
        import pyarrow.fs as fs

        self.path, self.warnings = path, list[str]()
        with self._in_words():
            # Absolute: Arrow reads a relative path with a colon as an address.
            self._fragment = ds.ParquetFileFormat().make_fragment(
                os.path.abspath(path), fs.LocalFileSystem()
            )
            physical = self._fragment.physical_schema
            check_stored_version(physical, path, self.warnings)
            _require(physical, KEYS, path)
            self._stored = frozenset(physical.names)
            self.rows: int = self._fragment.metadata.num_rows

    def read(self, columns: Sequence[str], condition: Any = None) -> Iterator["pa.RecordBatch"]:
        """Yield the rows that meet `condition` (None: all) in batches, absent columns as null."""
        stored = [name for name in columns if name in self._stored]
        with self._in_words():
            scanner = self._fragment.scanner(
                schema=_nullable_schema(), columns=stored, filter=condition, batch_size=BATCH_ROWS
            )
            for batch in scanner.to_batches():
                if batch.num_rows:
                    if any(batch.column(key).null_count for key in KEYS):
                        raise RunDirectoryError(
                            f"{self.path} has rows without step or param_id: restore the file."
                        )
                    yield batch if len(stored) == len(columns) else _with_nulls(batch, columns)

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except RunDirectoryError:
            raise
        except Exception as error:
            raise _unreadable(self.path, error) from None


def _nullable_schema() -> "pa.Schema":
    return _nullable(METRICS_TABLE.columns)  # to which columns of one's own can be added


@cache
def _nullable(columns: tuple[Column, ...]) -> "pa.Schema":
    import pyarrow as pa

    return pa.schema([pa.field(c.name, pa.type_for_alias(c.type)) for c in columns])


def _with_nulls(batch: "pa.RecordBatch", columns: Sequence[str]) -> "pa.RecordBatch":
    """Add the columns that a file lacks, from one array: reading them as null takes time."""
    import pyarrow as pa

    fields = [_nullable_schema().field(name) for name in columns]
    arrays = [
        batch.column(field.name)
        if field.name in batch.schema.names
        else _nulls(field.type).slice(0, batch.num_rows)
        for field in fields
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields))


@cache
def _nulls(kind: "pa.DataType") -> "pa.Array":
    import pyarrow as pa

    return pa.nulls(BATCH_ROWS, kind)


def count_negative(path: Path, column: str) -> int:
    """Return how many values of a column of a shard are below zero."""
    import pyarrow.compute as pc

    return sum(batch.num_rows for batch in ShardFile(path).read(KEYS, pc.field(column) < 0))


def read_parameters(path: Path, n_layers: int, warnings: list[str]) -> "pd.DataFrame":
    """Read and check parameters.parquet: one row per tensor, by `param_id`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        raise RunDirectoryError(
            f"{path} is missing: without the table of tensors the metrics cannot be read."
        )
    try:
        with path.open("rb") as file:  # Arrow reads a path as an address where it has a colon
            table = pq.ParquetFile(file).read()
        check_stored_version(table.schema, path, warnings)
        _require(table.schema, [c.name for c in PARAMETERS_TABLE.columns if not c.nullable], path)
        schema = arrow_schema(PARAMETERS_TABLE)
        arrays = [
            table.column(field.name).cast(field.type)
            if field.name in table.schema.names
            else pa.nulls(table.num_rows, field.type)
            for field in schema
        ]
        frame = pa.table(arrays, names=schema.names).to_pandas()
        broken = _parameter_fault(frame, n_layers)
    except RunDirectoryError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from None
    if broken:
        raise RunDirectoryError(f"{path} {broken}: restore the file.")
    frame["layer"] = frame["layer"].astype("Int16")
    frame["tied_to"] = frame["tied_to"].astype("Int32")
    return frame.sort_values("param_id", ignore_index=True)


def _parameter_fault(frame: "pd.DataFrame", n_layers: int) -> str | None:
    required = [column.name for column in PARAMETERS_TABLE.columns if not column.nullable]
    if frame[required].isna().any(axis=None):
        return "has empty cells in columns that must be filled"
    if frame.empty:
        return "holds no tensor"
    if frame["param_id"].max() > MOST_TENSORS:
        return f"has a param_id of {frame['param_id'].max()}; they count from 0"
    if (frame["numel"] < 0).any():
        return "has a tensor with a negative number of elements"
    if frame["param_id"].duplicated().any() or (frame["param_id"] < 0).any():
        return "has a param_id that is negative or used twice"
    layer = frame["layer"].dropna()
    if ((layer < 0) | (layer >= n_layers)).any():
        return f"names a layer outside 0 … {n_layers - 1}, the layers of run.json"
    if not frame["tied_to"].dropna().isin(frame["param_id"]).all():
        return "ties a tensor to a param_id that is not in the table"
    return None


def check_stored_version(schema: "pa.Schema", path: Path, warnings: list[str]) -> None:
    """Compare the version that a file states with this package's, see `check_version`."""
    stored = (schema.metadata or {}).get(b"schema_version")
    if stored is None:
        raise RunDirectoryError(
            f"{path} states no schema version in its metadata: it was not written by lisa-toolkit."
        )
    warning = check_version(stored.decode("utf-8", "replace"), path)
    if warning and warning not in warnings:
        warnings.append(warning)


def _require(schema: "pa.Schema", names: Iterable[str], path: Path) -> None:
    missing = [name for name in names if name not in schema.names]
    if missing:
        raise RunDirectoryError(
            f"{path} has no column {', '.join(missing)}: it was not written by lisa-toolkit, or "
            "was edited."
        )


def _unreadable(path: Path, error: Exception) -> RunDirectoryError:
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return RunDirectoryError(
        f"{path} cannot be read as Parquet ({reason}): restore the file, or remove it to read "
        "the rest."
    )
