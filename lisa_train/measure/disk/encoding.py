"""Values as Arrow and JSON hold them: null apart from NaN, NaN apart from nothing."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lisa_analysis.contract.schema import METRICS_TABLE, PARAMETERS_TABLE, Table
from lisa_analysis.rundir.shards import arrow_schema

if TYPE_CHECKING:
    import pyarrow as pa


_DROPPED = np.uint32(6)


def parameter_table(parameters: Sequence[Mapping[str, Any]]) -> "pa.Table":
    """Return the parameters table; absent columns are null."""
    import pyarrow as pa

    rows = [{name: row.get(name) for name in PARAMETERS_TABLE.names} for row in parameters]
    return pa.Table.from_pylist(rows, schema=arrow_schema(PARAMETERS_TABLE))


def fact_table(rows: list[dict[str, np.ndarray]], table: Table = METRICS_TABLE) -> "pa.Table":
    """Join collected rows of metrics or probes into one Arrow table; absent columns are null.

    Every column of the schema is there, all null where nothing was measured, so that tools that
    read `metrics/*.parquet` at once find the same columns in every file.
    """
    import pyarrow as pa

    schema = arrow_schema(table)
    arrays = []
    for name in table.names:
        kind = schema.field(name).type
        parts = [
            np.ma.masked_all(len(block["step"]), kind.to_pandas_dtype())
            if name not in block
            else block[name]
            for block in rows
        ]
        joined = np.ma.concatenate(parts)
        mask = np.ma.getmaskarray(joined)
        values = joined.data if kind != pa.float32() else round_bits(joined.data)
        arrays.append(
            pa.array(values, type=kind, mask=mask if mask.any() else None, from_pandas=False)
        )
    joined_rows = pa.table(arrays, schema=schema)
    return joined_rows.sort_by([("step", "ascending"), ("param_id", "ascending")])


def round_bits(values: np.ndarray) -> np.ndarray:
    """Round fp32 numbers to 18 significant bits (relative 4e-6); NaN and infinities stay.

    The bits that are dropped are beyond what a norm is good for and do not compress: they are a
    quarter of the log. Equal numbers stay equal.
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    odd = (bits >> _DROPPED) & 1
    rounded = (bits + (1 << (_DROPPED - 1)) - 1 + odd) >> _DROPPED << _DROPPED
    return np.where(np.isfinite(values), rounded.astype(np.uint32).view(np.float32), values)


def plain(value: Any) -> Any:
    """Return `value` as JSON can hold it: plain numbers, non-finite ones as text."""
    if isinstance(value, Mapping):
        return {as_utf8(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, int | float | bool):
        return value
    return as_utf8(os.fsdecode(value) if isinstance(value, os.PathLike) else str(value))


def as_utf8(text: str) -> str:
    r"""Return `text` with bytes that are no UTF-8 (in a path, say) spelled out: ``\udcff``."""
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")
