"""The columns of the metrics: which were asked for, and what in them is not finite."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from lisa_analysis.contract.errors import RunDirectoryError, suggest
from lisa_analysis.contract.schema import METRICS_TABLE
from lisa_analysis.rundir.shards import KEYS

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


def asked_columns(columns: Sequence[str] | None) -> list[str]:
    """Return the names of the columns that were asked for, without the keys; None asks for all.

    Raises
    ------
    RunDirectoryError
        For a name that no column of the metrics has.
    """
    known = METRICS_TABLE.measured
    if columns is None:
        return list(known)
    if not isinstance(columns, Iterable):
        raise RunDirectoryError(
            f"columns is {columns!r}: expected names of metrics columns, as {known[0]!r}."
        )
    names = [columns] if isinstance(columns, str) else list(columns)
    for name in names:
        if name not in METRICS_TABLE.names:
            raise RunDirectoryError(
                f"The metrics have no column {name!r}: there are {', '.join(known)}."
                f"{suggest(name, known)}"
            )
    return [name for name in dict.fromkeys(names) if name not in KEYS]


def non_finite_values(
    read: Callable[[Sequence[str]], "Iterable[pa.RecordBatch]"],
) -> "pd.DataFrame":
    """Return what is NaN or infinite in the rows that `read` yields of columns; see `Run`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    found = []
    names = [name for name in METRICS_TABLE.measured if METRICS_TABLE[name].type == "float32"]
    for batch in read(names):
        for name in names:
            mask = pc.invert(pc.is_finite(batch.column(name)))
            rows = batch.filter(pc.fill_null(mask, False))
            if rows.num_rows:
                label = pa.array([name] * rows.num_rows)
                found.append(
                    pa.table(
                        [
                            rows.column("step"),
                            rows.column("param_id"),
                            label,
                            rows.column(name),
                        ],
                        names=["step", "param_id", "column", "value"],
                    )
                )
    schema = pa.schema(
        [("step", "int64"), ("param_id", "int32"), ("column", "string"), ("value", "float32")]
    )
    table = pa.concat_tables(found) if found else schema.empty_table()
    return table.sort_by([(key, "ascending") for key in KEYS]).to_pandas()


def empty_schema(names: Sequence[str]) -> "pa.Schema":
    """Schema of the rows when there are none."""
    import pyarrow as pa

    return pa.schema(
        [(name, pa.type_for_alias(METRICS_TABLE[name].type)) for name in (*KEYS, *names)]
    )
