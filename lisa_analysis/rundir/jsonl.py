"""The JSONL streams of a run directory: bytes in, checked values out.

JSON has no NaN: non-finite numbers are written as the strings "NaN", "Infinity" and "-Infinity",
which every JSON reader accepts and which cast to floating point everywhere.
"""

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import RunDirectoryError
from lisa_analysis.contract.schema import Column, Table

if TYPE_CHECKING:
    import pandas as pd

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_INT_BITS = {"int64": 64, "int32": 32, "int16": 16}
# Steps and tensors index arrays: beyond these a number is damage, not a training run.
MOST_STEPS = 100_000_000
MOST_TENSORS = 10_000_000
MOST_SEGMENTS = 10_000


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
        _check_line(parse_object(text, path, number), table, path, number, extra)
        for number, text in enumerate(whole, 1)
        if text.strip()
    ]
    if not tail.strip():
        return lines, []
    try:
        last = parse_object(tail, path, len(whole) + 1)
    except RunDirectoryError:
        return lines, [f"{path.name} ends in a line that was cut off: it is left out."]
    return [*lines, _check_line(last, table, path, len(whole) + 1, extra)], []


def parse_object(text: bytes, path: Path, line: int | None = None) -> dict[str, Any]:
    """Return a JSON object; `RunDirectoryError` says where the text is none."""
    where = f"{path} line {line}" if line else str(path)
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RunDirectoryError(
            f"{where} is not JSON ({short(str(error))}): restore the file or remove what was "
            "edited."
        ) from None
    if not isinstance(value, dict):
        raise RunDirectoryError(f"{where} is {short(value)}, expected a JSON object.")
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
                f"{path} line {number} has {column.name} = {short(value)}, expected "
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
        return NON_FINITE.get(value)
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:
        return None


def short(value: object) -> str:
    """Value for a message, cut where it is long."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


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
