"""Where other people's logs are, and what each kind holds: (name, step, value), one by one."""

import json
import math
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.rundir.jsonl import NON_FINITE
from lisa_analysis.rundir.logs import event_files

STATE = "trainer_state.json"
_SQLITE = b"SQLite format 3\x00"


@dataclass
class Logged:
    """What a log holds.

    Attributes
    ----------
    kind
        ``trainer_state.json``, ``TensorBoard`` or ``trackio``.
    values
        (name as it was logged, step, value), in the order of the log.
    finished
        Whether the log says that training came to its end; None where it does not say.
    remarks
        What was left out, in sentences.
    name
        What the run is called, if the log says so.
    """

    kind: str
    values: list[tuple[str, int, float]]
    finished: bool | None = None
    remarks: list[str] = field(default_factory=list)
    name: str | None = None


def is_log(path: Path) -> bool:
    """Whether a path is a log that `read_log` reads, or a folder with one."""
    return _state(path) is not None or bool(_event_files(path)) or _is_database(path)


def read_log(path: Path) -> Logged:
    """Read a log.

    Raises
    ------
    LisaError
        When it cannot be read, or holds no number at all.
    """
    try:
        if (state := _state(path)) is not None:
            found = _trainer_state(state)
        elif files := _event_files(path):
            found = _tensorboard(files)
        else:
            found = _trackio(path)
    except (OSError, ValueError, KeyError, TypeError, sqlite3.Error) as error:
        if isinstance(error, LisaError):
            raise
        raise LisaError(f"{path} cannot be read as a log ({error}): restore the file.") from None
    if not found.values:
        raise LisaError(f"{path} is a log of {found.kind} without any number: nothing to analyse.")
    return found


# ------------------------------------------------------------------ trainer_state.json


def _state(path: Path) -> Path | None:
    """The file of a Trainer: itself, in a folder, or in the newest checkpoint of a folder."""
    if path.is_file():
        return path if path.name == STATE else None
    if (path / STATE).is_file():
        return path / STATE
    found = [
        (int(file.parent.name.rpartition("-")[2]), file)
        for file in path.glob(f"checkpoint-*/{STATE}")
        if file.parent.name.rpartition("-")[2].isdecimal()
    ]
    return max(found)[1] if found else None


def _trainer_state(path: Path) -> Logged:
    state = json.loads(path.read_text(encoding="utf-8"))
    values = []
    for line in state["log_history"]:
        step = int(line["step"])
        for name, value in line.items():
            if name != "step" and (number := _number(value)) is not None:
                values.append((str(name), step, number))
    done, most = state.get("global_step"), state.get("max_steps")
    return Logged(STATE, values, finished=None if not most else done == most)


def _number(value: Any) -> float | None:
    """A value as a number; None for a text, a list or a truth."""
    if isinstance(value, str):
        return NON_FINITE.get(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


# ------------------------------------------------------------------ TensorBoard


def _event_files(path: Path) -> list[Path]:
    """Event files of one run: a file, a folder's, or those of `runs/NAME` below it (the newest)."""
    if path.is_file():
        return [path] if "tfevents" in path.name else []
    for pattern in ("*tfevents*", "runs/*/*tfevents*", "*/*tfevents*"):
        if found := sorted(path.glob(pattern)):
            newest = max(found, key=lambda file: _written(file)).parent
            return [file for file in found if file.parent == newest]
    return []


def _written(file: Path) -> tuple[int, str]:
    """The time in the name of an event file, then the name."""
    stamp = re.search(r"tfevents\.(\d+)", file.name)
    return int(stamp[1]) if stamp else 0, file.name


def _tensorboard(files: list[Path]) -> Logged:
    values = [one for file in sorted(files, key=_written) for one in event_files.scalars(file)]
    return Logged("TensorBoard", values, name=files[0].parent.name)


# ------------------------------------------------------------------ trackio


def _is_database(path: Path) -> bool:
    if path.suffix != ".db" or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_SQLITE)) == _SQLITE


def _trackio(path: Path) -> Logged:
    """The newest run of a trackio project; its database is opened for reading alone."""
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as base:
        columns = {row[1] for row in base.execute("PRAGMA table_info(metrics)")}
        if not {"run_name", "step", "metrics"} <= columns:
            raise LisaError(f"{path} is no project of trackio: it has no table of metrics.")
        runs = [row[0] for row in base.execute(
            "SELECT run_name FROM metrics GROUP BY run_name ORDER BY MAX(id) DESC"
        )]  # fmt: skip
        rows = base.execute(
            "SELECT step, metrics FROM metrics WHERE run_name = ? ORDER BY id", (runs or [""])[:1]
        ).fetchall()
    values = [one for step, text in rows for one in _trackio_line(int(step), text)]
    remarks = []
    if len(runs) > 1:
        remarks.append(
            f"{path.name} holds {len(runs)} runs; this is the newest, {runs[0]}, of them: "
            f"{', '.join(runs[1:6])}{' and others' if len(runs) > 6 else ''} are left out."
        )
    return Logged("trackio", values, remarks=remarks, name=runs[0] if runs else None)


def _trackio_line(step: int, text: str) -> Iterator[tuple[str, int, float]]:
    """The numbers of a line; transformers logs the optimizer step beside trackio's own count."""
    line = json.loads(text)
    own = _number(line.get("train/global_step"))
    step = step if own is None or not math.isfinite(own) else int(own)
    for name, value in line.items():
        if name != "train/global_step" and (number := _number(value)) is not None:
            yield str(name), step, number
