"""The JSONL streams and the manifest of a run directory: bytes in, checked values out.

JSON has no NaN: non-finite numbers are written as the strings "NaN", "Infinity" and "-Infinity",
which every JSON reader accepts and which cast to floating point everywhere.
"""

import contextlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import RunDirectoryError
from lisa_analysis.contract.schema import SCHEMA_VERSION, STATUSES, Column, Table, parse_version

if TYPE_CHECKING:
    import pandas as pd

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_INT_BITS = {"int64": 64, "int32": 32, "int16": 16}


def read_bytes(path: Path) -> bytes:
    """Return the bytes of `path`; `RunDirectoryError` when it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise RunDirectoryError(
            f"{path} is missing: the folder is not a complete run directory."
        ) from None
    except OSError as error:
        raise RunDirectoryError(
            f"{path} cannot be read ({error.strerror or error}): check its permissions."
        ) from None


def check_version(text: object, where: Path) -> str | None:
    """Compare a file's schema version with this package's.

    Returns
    -------
    str or None
        A warning when the file is of a newer minor version, else None.

    Raises
    ------
    RunDirectoryError
        When the file is of another major version, or states none.
    """
    try:
        major, minor = parse_version(text)  # type: ignore[arg-type]
    except (ValueError, TypeError):
        raise RunDirectoryError(
            f"{where} states the schema version {text!r}, expected one like "
            f"{SCHEMA_VERSION!r}: it was not written by lisa-toolkit, or was edited."
        ) from None
    own_major, own_minor = parse_version(SCHEMA_VERSION)
    if major != own_major:
        raise RunDirectoryError(
            f"{where} has schema version {text}, this lisa_analysis reads {SCHEMA_VERSION}: "
            f"install a lisa-toolkit that reads version {major}."
        )
    if minor > own_minor:
        return (
            f"{where.name} has schema version {text}, newer than {SCHEMA_VERSION}: columns that "
            "this version does not know are ignored."
        )
    return None


# Steps and tensors index arrays: beyond these a number is damage, not a training run.
MOST_STEPS = 100_000_000
MOST_TENSORS = 10_000_000
MOST_SEGMENTS = 10_000

# Entries of run.json that hold named values, where they are there at all.
_OBJECTS = ("model", "lisa", "lora", "result", "recording", "seeds", "hardware", "versions",
            "dataset")  # fmt: skip


def read_manifest(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Read and check run.json; returns it with warnings in words."""
    manifest = _parse_object(read_bytes(path), path)
    warning = check_version(manifest.get("schema_version"), path)
    if manifest.get("status") not in STATUSES:
        raise RunDirectoryError(
            f"{path} has the status {_short(manifest.get('status'))}, expected one of "
            f"{', '.join(STATUSES)}: restore the file."
        )
    for field in ("run_id", "method"):
        if not isinstance(manifest.get(field), str):
            raise RunDirectoryError(
                f"{path} has {field} = {_short(manifest.get(field))}, expected a text: restore it."
            )
    for field in _OBJECTS:
        if not isinstance(manifest.get(field, {}), Mapping | None):
            raise RunDirectoryError(
                f"{path} has {field} = {_short(manifest[field])}, expected an object: restore it."
            )
    _check_layers(manifest.get("layers"), path)
    return manifest, [warning] if warning else []


def _check_layers(layers: object, path: Path) -> None:
    entries = layers if isinstance(layers, list) else [None]
    for index, entry in enumerate(entries):
        if (
            not isinstance(entry, Mapping)
            or entry.get("index") != index
            or isinstance(entry.get("index"), bool)
            or not isinstance(entry.get("name"), str)
            or not isinstance(entry.get("stack", ""), str | None)
        ):
            raise RunDirectoryError(
                f"{path} has a broken layer table at position {index}: expected entries with "
                "index (0, 1, …), name and stack; restore the file."
            )


def read_lines(path: Path, table: Table, *, extra: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """Read one JSONL stream.

    Parameters
    ----------
    path
        File; a missing one is an empty stream.
    table
        Columns with their types; every line is checked against them.
    extra
        Keep fields that the table does not name (events have fields of their own).

    Returns
    -------
    lines, warnings
        The checked lines in file order. A last line that was cut off by a kill is left out, with
        a warning.
    """
    if not path.exists():
        return [], [f"{path.name} is missing: nothing was written to it."]
    raw = read_bytes(path)
    *whole, tail = raw.split(b"\n")
    lines = [
        _check_line(_parse_object(text, path, number), table, path, number, extra)
        for number, text in enumerate(whole, 1)
        if text.strip()
    ]
    if not tail.strip():
        return lines, []
    try:
        last = _parse_object(tail, path, len(whole) + 1)
    except RunDirectoryError:
        return lines, [f"{path.name} ends in a line that was cut off: it is left out."]
    return [*lines, _check_line(last, table, path, len(whole) + 1, extra)], []


def _parse_object(text: bytes, path: Path, line: int | None = None) -> dict[str, Any]:
    where = f"{path} line {line}" if line else str(path)
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RunDirectoryError(
            f"{where} is not JSON ({_short(str(error))}): restore the file or remove what was "
            "edited."
        ) from None
    if not isinstance(value, dict):
        raise RunDirectoryError(f"{where} is {_short(value)}, expected a JSON object.")
    if b"\\ud" in text.lower():
        value = _whole_characters(value)
    return value


def _whole_characters(value: dict[str, Any]) -> dict[str, Any]:
    """Replace halves of surrogate pairs, which JSON can escape and no file or terminal can hold."""
    text = re.sub("[\ud800-\udfff]", "\ufffd", json.dumps(value, ensure_ascii=False))
    result: dict[str, Any] = json.loads(text)
    return result


def _check_line(
    line: dict[str, Any], table: Table, path: Path, number: int, extra: bool
) -> dict[str, Any]:
    checked: dict[str, Any] = dict(line) if extra else {}
    for column in table.columns:
        value = line.get(column.name)
        if value is None:
            if not column.nullable:
                raise RunDirectoryError(
                    f"{path} line {number} has no {column.name!r}: restore the file or remove "
                    "the line."
                )
            checked[column.name] = None
            continue
        converted = _convert(value, column)
        if converted is None:
            raise RunDirectoryError(
                f"{path} line {number} has {column.name} = {_short(value)}, expected "
                f"{column.type}: restore the file or remove the line."
            )
        checked[column.name] = converted
    if not 0 <= checked["step"] <= MOST_STEPS:
        raise RunDirectoryError(
            f"{path} line {number} has step {checked['step']}, expected 0 to {MOST_STEPS:,}: "
            "restore the file."
        )
    if not 0 <= (checked["segment"] or 0) <= MOST_SEGMENTS:
        raise RunDirectoryError(
            f"{path} line {number} has segment {checked['segment']}, expected 0 to "
            f"{MOST_SEGMENTS:,}: restore the file."
        )
    return checked


def usable_events(
    lines: list[dict[str, Any]], n_layers: int, path: Path
) -> tuple[list[dict[str, Any]], list[str]]:
    """Leave out events whose own fields are not what they should be, with a warning each."""
    kept, warnings = [], []
    for line in lines:
        for field in ("inclusion_probabilities", "visits") if line["event"] == "lisa_draw" else ():
            if reason := _broken_list(line, field, n_layers):
                line = {**line, field: None}
                warnings.append(
                    f"{path.name}: the lisa_draw of step {line['step']} {reason}; these are left "
                    "out, the draw counts."
                )
        if reason := _broken_event(line, n_layers):
            warnings.append(
                f"{path.name}: the {line['event']} of step {line['step']} {reason}; left out."
            )
        else:
            kept.append(line)
    return kept, warnings


def _broken_event(line: Mapping[str, Any], n_layers: int) -> str | None:
    if line["event"] == "lisa_draw":
        layers = line.get("layers")
        if not _numbers(layers, int) or not all(0 <= layer < n_layers for layer in layers or ()):
            return f"has layers = {_short(layers)}, expected indices of the {n_layers} layers"
    if line["event"] == "evaluate":
        metrics = line.get("metrics")
        loss = metrics.get("eval_loss") if isinstance(metrics, Mapping) else None
        known = loss is None or loss in _NON_FINITE if isinstance(loss, str | None) else False
        if not isinstance(metrics, Mapping | None) or not (known or _numbers([loss], int | float)):
            return f"has metrics = {_short(metrics)}, expected an object with numbers"
    return None


def _broken_list(line: Mapping[str, Any], field: str, n_layers: int) -> str | None:
    """What is wrong with a list of one number per layer, which a draw may have or lack."""
    values, most = line.get(field), 1 + 1e-6 if field != "visits" else math.inf
    if values is None:
        return None
    whole = isinstance(values, list) and len(values) == n_layers and _numbers(values, int | float)
    if whole and all(0 <= value <= most for value in values):
        return None
    kind = "numbers" if field == "visits" else "probabilities"
    return f"has {field} = {_short(values)}, expected {n_layers} {kind}"


def _numbers(values: object, kind: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, kind)
        and not isinstance(value, bool)
        and (isinstance(value, float) or abs(value) < 2**63)  # arrays hold no longer ones
        for value in values
    )


def _convert(value: object, column: Column) -> Any:
    """Return `value` as the column's type, None when it is of another type."""
    if column.type == "string":
        return value if isinstance(value, str) else None
    if column.type == "bool":
        return value if isinstance(value, bool) else None
    if isinstance(value, bool):
        return None
    if column.type in _INT_BITS:
        limit = 2 ** (_INT_BITS[column.type] - 1)
        return value if isinstance(value, int) and -limit <= value < limit else None
    if isinstance(value, str):
        return _NON_FINITE.get(value)
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:
        return None


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def writer_lives(lock: Path) -> bool:
    """Tell whether a process holds the run's lock."""
    try:
        import fcntl
    except ImportError:  # no advisory locks on this platform: believe the file
        return True
    try:
        with lock.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def lines_frame(lines: list[dict[str, Any]], table: Table) -> "pd.DataFrame":
    """Return the lines as a frame: the columns of the table with their types, then the others."""
    import pandas as pd

    lines = [{**line, "segment": line["segment"] or 0} for line in lines]
    others = list(dict.fromkeys(key for line in lines for key in line if key not in table.names))
    data: dict[str, Any] = {}
    for column in table.columns:
        values = [line[column.name] for line in lines]
        filled = not column.nullable or column.name == "segment"
        numeric = column.type not in ("string", "bool")
        dtype = (column.type if filled else "float64") if numeric else "object"
        data[column.name] = pd.Series(values, dtype=dtype)
    for name in others:
        data[name] = pd.Series([line.get(name) for line in lines], dtype="object")
    return pd.DataFrame(data)
