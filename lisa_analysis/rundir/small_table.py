"""A small table of a run directory, read whole: probes, ablations."""

from pathlib import Path
from typing import TYPE_CHECKING

from lisa_analysis.contract.errors import RunDirectoryError
from lisa_analysis.contract.schema import Table
from lisa_analysis.rundir.shards import arrow_schema, check_stored_version

if TYPE_CHECKING:
    import pandas as pd


def no_rows(table: Table) -> "pd.DataFrame":
    """Return the columns of a table, in their types, without a row."""
    import pyarrow as pa

    schema = arrow_schema(table)
    return pa.table([pa.nulls(0, f.type) for f in schema], names=schema.names).to_pandas()


def read_whole(path: Path, table: Table, warnings: list[str], advice: str) -> "pd.DataFrame":
    """Read a file of `table`; a column that it lacks is null.

    Parameters
    ----------
    path
        The file.
    table
        Its columns and their types.
    warnings
        Takes what is not as it should be and does not matter.
    advice
        What to do about a file that cannot be read.

    Raises
    ------
    RunDirectoryError
        When the file cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = arrow_schema(table)
    try:
        with path.open("rb") as file:  # Arrow reads a path as an address where it has a colon
            stored = pq.ParquetFile(file).read()
        check_stored_version(stored.schema, path, warnings)
        arrays = [
            stored.column(field.name).cast(field.type)
            if field.name in stored.schema.names
            else pa.nulls(stored.num_rows, field.type)
            for field in schema
        ]
        return pa.table(arrays, names=schema.names).to_pandas()
    except RunDirectoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise RunDirectoryError(f"{path} cannot be read ({reason}): {advice}.") from None
