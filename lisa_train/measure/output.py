"""From what was measured to the disk: when it is written, and what trackers are shown of it."""

import numpy as np

from lisa_train.measure.buffers import MetricBuffer
from lisa_train.measure.cadence import FlushTimer
from lisa_train.measure.disk.writer import RunWriter, SilentWriter
from lisa_train.measure.recording_time import RecordingTime
from lisa_train.measure.scalar_lines import ScalarLines
from lisa_train.model.tensor_table import TensorTable

# Rows that may lie on the device before they are written, however long the flush window is.
MAX_BUFFERED_ROWS = 100_000


class Output:
    """Writes what waits; rows of the newest step are held back until the next one begins.

    A census of the same step completes them, and what is written is never rewritten.

    Parameters
    ----------
    buffer, lines
        What waits.
    writer
        Where it goes.
    time
        Settles what a line says of the time of recording, before it is written.
    seconds
        Longest time between two flushes.
    groups
        Numbers of the tensors of each group that trackers are shown, see `tensor_groups`.

    Attributes
    ----------
    aggregates : dict
        Norms of the groups at the newest step that is written.
    written : int
        The last step whose rows are complete on the disk; -1 before any.
    """

    def __init__(
        self,
        buffer: MetricBuffer,
        lines: ScalarLines,
        writer: RunWriter | SilentWriter,
        time: RecordingTime,
        seconds: float,
        groups: dict[str, np.ndarray],
    ) -> None:
        self.aggregates: dict[str, float] = {}
        self.written = -1
        self._buffer = buffer
        self._lines = lines
        self._writer = writer
        self._time = time
        self._timer = FlushTimer(seconds)
        self._groups = groups

    @property
    def due(self) -> bool:
        """Whether something has waited for long enough, or enough of it waits."""
        return self._timer.due or self._buffer.rows >= MAX_BUFFERED_ROWS

    def write(self, step: int, *, everything: bool) -> None:
        """Put on the disk what was measured before `step`, or (`everything`) in it as well."""
        for rows in self._buffer.take(None if everything else step):
            self.aggregates = aggregates(rows, self._groups) or self.aggregates
            self._writer.write_metrics(rows)
        if everything:
            self.written = step
        self._time.settle()
        if not self._lines.unmerged:
            self._time.written()
        for line in self._lines.take():
            self._writer.scalars(line)
        self._timer.flushed()
        self._writer.flush()


def tensor_groups(table: TensorTable, n_layers: int) -> dict[str, np.ndarray]:
    """Numbers of the tensors of each group that trackers are shown: thirds of the layers, rest."""
    groups: dict[str, list[int]] = {}
    thirds = ("first", "middle", "last")
    for row in table.rows:
        if row["layer"] is None:
            outside = ("embed", "head", "norm", "prompt")
            name = row["kind"] if row["kind"] in outside else "other"
        else:
            name = f"layers_{thirds[3 * row['layer'] // max(1, n_layers)]}"
        groups.setdefault(name, []).append(row["param_id"])
    return {name: np.array(ids) for name, ids in groups.items()}


def aggregates(rows: dict[str, np.ndarray], groups: dict[str, np.ndarray]) -> dict[str, float]:
    """Norms of a few groups of tensors at one step, for trackers; empty for a census."""
    found: dict[str, float] = {}
    for column in ("grad_norm", "update_norm"):
        if column not in rows:
            continue
        values = np.ma.asarray(rows[column])
        for name, ids in groups.items():
            members = values[np.isin(rows["param_id"], ids)].compressed().astype(np.float64)
            if len(members):
                found[f"{column}/{name}"] = float(np.sqrt((members**2).sum()))
    return found
