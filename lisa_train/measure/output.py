"""From what was measured to the disk: when it is written, and what trackers are shown of it."""

import numpy as np

from lisa_train.measure.buffers import MetricBuffer
from lisa_train.measure.cadence import FlushTimer
from lisa_train.measure.disk.writer import RunWriter, SilentWriter
from lisa_train.measure.recording_time import RecordingTime
from lisa_train.measure.scalar_lines import ScalarLines
from lisa_train.measure.watching import Watching
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
    watching
        Gets what is written.

    Attributes
    ----------
    aggregates : dict
        Norms of the groups at the newest step that is written.
    aggregated : int
        That step.
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
        watching: Watching,
    ) -> None:
        self.aggregates: dict[str, float] = {}
        self.aggregated = 0
        self.written = -1
        self._buffer = buffer
        self._lines = lines
        self._writer = writer
        self._time = time
        self._timer = FlushTimer(seconds)
        self._groups = groups
        self._watching = watching

    @property
    def due(self) -> bool:
        """Whether something has waited for long enough, or enough of it waits."""
        return self._timer.due or self._buffer.rows >= MAX_BUFFERED_ROWS

    def write(self, step: int, *, everything: bool) -> None:
        """Put on the disk what was measured before `step`, or (`everything`) in it as well."""
        for rows in self._buffer.take(None if everything else step):
            if shown := aggregates(rows, self._groups):
                self.aggregates, self.aggregated = shown, int(rows["step"][0])
            self._writer.write_metrics(rows)
            self._watching.rows(rows)
        if everything:
            self.written = step
        self._time.settle()
        if not self._lines.unmerged:
            self._time.written()
        for line in self._lines.take():
            self._writer.scalars(line)
            self._watching.line(line)
        self._timer.flushed()
        self._writer.flush()


def tensor_groups(
    table: TensorTable, n_layers: int, *, layers: bool = False
) -> dict[str, np.ndarray]:
    """Numbers of the tensors of each group that trackers are shown.

    These are thirds of the layers, or each of the `layers`, named so that they sort (`layer_07`),
    and what lies outside the stack by its kind.
    """
    groups: dict[str, list[int]] = {}
    thirds = ("first", "middle", "last")
    digits = len(str(max(0, n_layers - 1)))
    for row in table.rows:
        if row["layer"] is None:
            outside = ("embed", "head", "norm", "prompt")
            name = row["kind"] if row["kind"] in outside else "other"
        elif layers:
            name = f"layer_{row['layer']:0{digits}d}"
        else:
            name = f"layers_{thirds[3 * row['layer'] // max(1, n_layers)]}"
        groups.setdefault(name, []).append(row["param_id"])
    return {name: np.array(ids) for name, ids in groups.items()}


def aggregates(rows: dict[str, np.ndarray], groups: dict[str, np.ndarray]) -> dict[str, float]:
    """Norms of groups of tensors at one step, for trackers; empty for a census.

    Of each single layer it also says whether it trained at the step (`trained/layer_07`, 1 or 0).
    """
    found: dict[str, float] = {}
    for column in ("grad_norm", "update_norm"):
        if column not in rows:
            continue
        values = np.ma.asarray(rows[column])
        for name, ids in groups.items():
            members = values[np.isin(rows["param_id"], ids)].compressed().astype(np.float64)
            if len(members):
                found[f"{column}/{name}"] = float(np.sqrt((members**2).sum()))
    if found:
        single = [name for name in groups if name.startswith("layer_")]
        trained = {key.split("/")[1] for key in found}
        found |= {f"trained/{name}": float(name in trained) for name in single}
    return found
