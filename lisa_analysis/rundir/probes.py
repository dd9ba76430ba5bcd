"""The probes of a run directory: rows per batch and tensor, and per tensor for all batches."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import RunDirectoryError
from lisa_analysis.contract.schema import PROBES_TABLE, parse_shard_name
from lisa_analysis.rundir.small_table import no_rows, read_whole

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

    newest: dict[int, Path] = {}
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        parsed = parse_shard_name(path.name)
        if parsed and parsed[1] <= (limits or {}).get(parsed[0], parsed[1]):
            newest[parsed[1]] = path  # sorted by segment, then step
    frames = []
    for path in newest.values():
        frame = read_whole(path, PROBES_TABLE, warnings, "restore it or move it away")
        if fault := _fault(frame, tensors):
            raise RunDirectoryError(f"{path} {fault}: restore the file.")
        frames.append(frame)
    if not frames:
        return no_rows(PROBES_TABLE)
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
