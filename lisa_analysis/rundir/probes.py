"""The probes of a run directory: rows per batch and tensor, and per tensor for all batches."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import RunDirectoryError
from lisa_analysis.contract.schema import PROBES_TABLE, parse_shard_name
from lisa_analysis.rundir.shards import arrow_schema, check_stored_version

if TYPE_CHECKING:
    import pandas as pd


def read_probes(
    directory: Path, tensors: Any, warnings: list[str], limits: Mapping[int, int] | None = None
) -> "pd.DataFrame":
    """Read every probe of a run; of a step that was probed twice the newest segment counts.

    Parameters
    ----------
    directory
        The folder `probes`; none is a run without probes.
    tensors
        The param_ids that the run knows.
    warnings
        Takes what is not as it should be and does not matter.
    limits
        Segment -> last step of it that later segments leave standing.
    """
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = arrow_schema(PROBES_TABLE)
    newest: dict[int, Path] = {}
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        parsed = parse_shard_name(path.name)
        if parsed and parsed[1] <= (limits or {}).get(parsed[0], parsed[1]):
            newest[parsed[1]] = path  # sorted by segment, then step
    frames = []
    for path in newest.values():
        try:
            with path.open("rb") as file:  # Arrow reads a path as an address where it has a colon
                table = pq.ParquetFile(file).read()
            check_stored_version(table.schema, path, warnings)
            arrays = [
                table.column(field.name).cast(field.type)
                if field.name in table.schema.names
                else pa.nulls(table.num_rows, field.type)
                for field in schema
            ]
            frame = pa.table(arrays, names=schema.names).to_pandas()
        except RunDirectoryError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise RunDirectoryError(
                f"{path} cannot be read ({reason}): restore it or move it away."
            ) from None
        if fault := _fault(frame, tensors):
            raise RunDirectoryError(f"{path} {fault}: restore the file.")
        frames.append(frame)
    if not frames:
        return pa.table([pa.nulls(0, f.type) for f in schema], names=schema.names).to_pandas()
    return pd.concat(frames, ignore_index=True)


def _fault(frame: "pd.DataFrame", tensors: Any) -> str | None:
    if frame[["step", "param_id"]].isna().any(axis=None):
        return "has rows without step or param_id"
    if not frame["param_id"].isin(tensors).all():
        return "has rows of tensors that are not in the table of parameters"
    batch = frame["batch"].dropna()
    if len(batch) and (batch.min() < 0 or batch.max() > len(frame)):
        return f"numbers a batch {int(batch.min() if batch.min() < 0 else batch.max())}"
    if frame.duplicated(["step", "batch", "param_id"]).any():
        return "has two rows of one step, batch and tensor"
    if (frame["grad_norm"] < 0).any():
        return "has a norm below zero"
    return None
