"""Values as Arrow and JSON hold them: null apart from NaN, NaN apart from nothing."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lisa_analysis.contract.schema import (
    METRICS_TABLE,
    PARAMETERS_TABLE,
    SCHEMA_VERSION,
    Table,
)
from lisa_analysis.rundir.shards import arrow_schema
from lisa_train.measure.disk.storage import replace_file

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


def write_parquet(path: Path, table: "pa.Table", metadata: Mapping[str, str] | None = None) -> None:
    """Write a table as one file, whole or not at all; `metadata` beside the schema's version."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    floats = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    others = [name for name in table.schema.names if name not in floats]
    table = table.replace_schema_metadata(None)

    def write(temporary: Path) -> None:
        # Arrow opens no path that is not UTF-8; Python does.
        with (
            temporary.open("wb") as sink,
            pq.ParquetWriter(
                sink,
                table.schema,
                compression="zstd",
                compression_level=9,
                use_dictionary=others,
                # Exponents compress well once they lie side by side.
                use_byte_stream_split=floats,
                # The types are Parquet's own; the Arrow schema would be half of a small shard.
                store_schema=False,
                write_statistics=[name for name in ("step", "param_id") if name in others],
            ) as file,
        ):
            file.write_table(table)
            file.add_key_value_metadata({"schema_version": SCHEMA_VERSION, **(metadata or {})})

    replace_file(path, write)


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


def as_json(value: Any) -> Any:
    """Return `value` as JSON can hold it: plain numbers, non-finite ones as text."""
    if isinstance(value, Mapping):
        return {as_utf8(str(key)): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [as_json(item) for item in value]
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
