"""RunWriter: writes a run directory so that a kill at any moment leaves it readable."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lisa_analysis.contract.errors import suggest
from lisa_analysis.contract.schema import (
    EVENT_FIELDS,
    EVENTS,
    LOCK,
    MANIFEST,
    METRICS_DIR,
    METRICS_TABLE,
    PROBES_DIR,
    PROBES_TABLE,
    SCALARS,
    SCALARS_TABLE,
    shard_name,
)
from lisa_train.measure.disk.encoding import (
    as_json,
    fact_table,
    write_parquet,
)
from lisa_train.measure.disk.run_file import begun, continued, now, one_sentence, segments
from lisa_train.measure.disk.storage import (
    LineFile,
    RunLock,
    UnwritableError,
    describe_os_error,
    replace_file,
)
from lisa_train.measure.stops import undisturbed

# Rows that wait for a disk that refuses them; beyond it the oldest are given up.
MAX_WAITING_ROWS = 1_000_000


class RunWriter:
    """Writes one run directory.

    Rows and lines are collected and reach the disk together in `flush`: one immutable Parquet
    shard, and whole JSONL lines. What was flushed is never touched again.

    Parameters
    ----------
    run_dir
        Folder to write; made if absent.
    manifest
        Entries of run.json (`lisa_analysis.contract.schema.MANIFEST_FIELDS`); version, status,
        times and segment are filled in here.
    parameters
        One mapping per tensor with the columns of `lisa_analysis.contract.schema.PARAMETERS_TABLE`.
    config_yaml
        Content of config.yaml, if there is any.
    resume
        Continue the run that the directory holds in a new segment.
    step
        With `resume`: completed optimizer steps that the run continues from; what an earlier
        segment recorded beyond it no longer counts.
    checkpoint
        With `resume`: the checkpoint that it continues from.
    parts
        How a step of this segment is put together (processes, batch, accumulation, device).
    resumed
        With `resume`: further fields of the event (`lisa_analysis.contract.schema.EVENT_FIELDS`).

    Raises
    ------
    RunDirectoryError
        When the directory holds a run already (without `resume`), is being written by another
        process, does not fit the model (with `resume`), or cannot be written.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        manifest: Mapping[str, Any],
        parameters: Sequence[Mapping[str, Any]],
        config_yaml: str | None = None,
        resume: bool = False,
        step: int = 0,
        checkpoint: str | None = None,
        parts: Mapping[str, Any] | None = None,
        resumed: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(run_dir)
        self.closed = False
        self._rows: list[dict[str, np.ndarray]] = []
        self._scalar_lines: list[str] = []
        self._event_lines: list[str] = []
        self.lost_rows = 0
        try:
            (self.path / METRICS_DIR).mkdir(parents=True, exist_ok=True)
            self._lock = RunLock(self.path / LOCK)
        except OSError as error:
            raise describe_os_error(self.path, error) from error
        try:
            self._open(dict(manifest), parameters, config_yaml, resume, (step, parts))
            if resume:
                self._begin_segment(step, checkpoint, resumed)
        except OSError as error:
            self._lock.release()
            raise describe_os_error(self.path, error) from error
        except BaseException:
            self._lock.release()
            raise

    def _open(
        self,
        manifest: dict[str, Any],
        parameters: Sequence[Mapping[str, Any]],
        config_yaml: str | None,
        resume: bool,
        begins: tuple[int, Mapping[str, Any] | None],
    ) -> None:
        if resume:
            self.manifest = continued(self.path, manifest, parameters)
        else:
            self.manifest = begun(self.path, manifest, parameters, config_yaml)
        self.segment: int = self.manifest["segment"]
        self._add_segment(*begins)
        for leftover in (self.path / METRICS_DIR).glob("*.tmp"):
            leftover.unlink()  # of a kill in the middle of a flush
        self._scalars = LineFile(self.path / SCALARS)
        self._events = LineFile(self.path / EVENTS)
        self._save_manifest(status="running")

    def begin_segment(
        self, step: int, checkpoint: str | None = None, *, parts: Mapping[str, Any] | None = None
    ) -> None:
        """Start a new segment: training goes on from `step`, what was recorded beyond is void."""
        self.flush()
        self.segment += 1
        self._add_segment(step, parts)
        self._save_manifest(status="running", segment=self.segment)
        self._begin_segment(step, checkpoint)

    def _begin_segment(
        self, step: int, checkpoint: str | None, resumed: Mapping[str, Any] | None = None
    ) -> None:
        # `segment` is a column of the stream as well as the event's own field.
        self.event("resume", step, checkpoint=checkpoint, **(resumed or {}))
        self.flush()

    def _add_segment(self, step: int, parts: Mapping[str, Any] | None) -> None:
        """Say in run.json how the steps of the segment that begins are put together."""
        self.manifest["segments"] = segments(self.manifest, self.segment, step, parts)

    def write_metrics(self, columns: Mapping[str, np.ndarray]) -> None:
        """Add rows to the metrics.

        Parameters
        ----------
        columns
            `step`, `param_id` and measured columns, arrays of one length. Masked entries of a
            masked array are null (not measured). All rows of a step belong between two flushes.
        """
        for name in columns:
            if name not in METRICS_TABLE.names:
                raise ValueError(f"no metrics column {name!r}.{suggest(name, METRICS_TABLE.names)}")
        self._rows.append({name: np.ma.asarray(array) for name, array in columns.items()})

    def write_probe(self, step: int, columns: Mapping[str, np.ndarray]) -> None:
        """Write what a probe after `step` optimizer steps measured, at once and whole.

        Parameters
        ----------
        step
            Completed optimizer steps.
        columns
            The other columns of `lisa_analysis.contract.schema.PROBES_TABLE`, arrays of one
            length; masked entries are null.

        Raises
        ------
        RunDirectoryError
            When the disk refuses.
        """
        rows = {"step": np.full(len(columns["param_id"]), step), **columns}
        table = fact_table([rows], PROBES_TABLE)
        ordered = table.sort_by([("param_id", "ascending"), ("batch", "ascending")])
        folder = self.path / PROBES_DIR
        try:
            folder.mkdir(exist_ok=True)
            write_parquet(folder / shard_name(self.segment, step), ordered)
        except OSError as error:
            raise describe_os_error(self.path, error) from error

    def scalars(self, line: Mapping[str, Any]) -> None:
        """Add one line to the scalars; None is left out, NaN is kept."""
        for name in line:
            if name not in SCALARS_TABLE.names:
                raise ValueError(f"no scalar {name!r}.{suggest(name, SCALARS_TABLE.names)}")
        self._scalar_lines.append(self._line(line))

    def event(self, name: str, step: int, **fields: Any) -> None:
        """Add one event. After `close` it is written at once (a last evaluation, for example)."""
        if name not in EVENT_FIELDS:
            raise ValueError(f"no event {name!r}.{suggest(name, EVENT_FIELDS)}")
        line = {"event": name, "step": int(step), "time": round(time.time(), 3), **fields}
        self._event_lines.append(self._line(line))
        if self.closed:
            with undisturbed():
                self._flush_lines()

    def _line(self, fields: Mapping[str, Any]) -> str:
        line = {key: as_json(value) for key, value in fields.items() if value is not None}
        if self.segment:
            line["segment"] = self.segment
        return json.dumps(line, allow_nan=False, separators=(",", ":"), ensure_ascii=False)

    @property
    def waiting_rows(self) -> int:
        """Number of metrics rows that are not on the disk yet."""
        return sum(len(rows["step"]) for rows in self._rows)

    def flush(self) -> None:
        """Put everything collected on the disk.

        Raises
        ------
        RunDirectoryError
            When the disk refuses. What was flushed before is untouched; what was collected
            stays and is tried again by the next flush.
        """
        # Between the disk's "done" and the note of it a signal would have rows written twice.
        with undisturbed():
            try:
                if self._rows:
                    self._write_shard()
                self._flush_lines()
            except OSError as error:
                self._give_up_oldest()
                raise describe_os_error(self.path, error) from error

    def _write_shard(self) -> None:
        table = fact_table(self._rows)
        first = int(table["step"][0].as_py())
        path = self.path / METRICS_DIR / shard_name(self.segment, first)
        if path.exists():
            raise FileExistsError(17, f"{path.name} exists: a step was flushed twice")
        ordered = table.sort_by([("param_id", "ascending"), ("step", "ascending")])
        write_parquet(path, ordered)
        self._rows.clear()

    def _flush_lines(self) -> None:
        for file, lines in ((self._scalars, self._scalar_lines), (self._events, self._event_lines)):
            if lines:
                file.append(lines)
                lines.clear()

    def _give_up_oldest(self) -> None:
        excess = self.waiting_rows - MAX_WAITING_ROWS
        while excess > 0:
            rows = len(self._rows.pop(0)["step"])
            excess -= rows
            self.lost_rows += rows

    def update_manifest(self, **fields: Any) -> None:
        """Change entries of run.json and rewrite it in one move."""
        try:
            self._save_manifest(**fields)
        except OSError as error:
            raise describe_os_error(self.path / MANIFEST, error) from error

    def _save_manifest(self, **fields: Any) -> None:
        self.manifest.update(fields)
        self.manifest["updated"] = now()
        text = json.dumps(as_json(self.manifest), indent=2, ensure_ascii=False, allow_nan=False)
        replace_file(self.path / MANIFEST, lambda path: path.write_text(text + "\n", "utf-8"))

    def close(self, status: str = "finished", **fields: Any) -> None:
        """Flush, state how the run ended in run.json, and give the directory free."""
        if self.closed:
            return
        problem: Exception | None = None
        try:
            try:
                self.flush()
            except UnwritableError:
                raise
            except Exception as error:  # rows that no disk refused: run.json says that they lack
                problem, status = error, "failed"
                fields.setdefault("error", one_sentence(error))
            self.update_manifest(status=status, **fields)
        finally:
            self.closed = True
            self._lock.release()
        if problem is not None:
            raise problem


class SilentWriter:
    """Takes what a `RunWriter` takes and writes nothing: of every process but the first."""

    def __init__(self, segment: int = 0) -> None:
        self.segment = segment
        self.closed = False
        self.lost_rows = 0

    def write_metrics(self, columns: Mapping[str, np.ndarray]) -> None:
        """Take rows."""

    def write_probe(self, step: int, columns: Mapping[str, np.ndarray]) -> None:
        """Take what a probe measured."""

    def scalars(self, line: Mapping[str, Any]) -> None:
        """Take a line."""

    def event(self, name: str, step: int, **fields: Any) -> None:
        """Take an event."""

    def flush(self) -> None:
        """Do nothing."""

    def begin_segment(
        self, step: int, checkpoint: str | None = None, *, parts: Mapping[str, Any] | None = None
    ) -> None:
        """Count a segment."""
        self.segment += 1

    def update_manifest(self, **fields: Any) -> None:
        """Do nothing."""

    def close(self, status: str = "finished", **fields: Any) -> None:
        """Mark the writer as closed."""
        self.closed = True
