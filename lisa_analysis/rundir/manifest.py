"""run.json, the manifest of a run directory: checked; and whether its writer still lives."""

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lisa_analysis.contract.errors import RunDirectoryError
from lisa_analysis.contract.schema import (
    MANIFEST,
    METRICS_DIR,
    SCALARS,
    SCHEMA_VERSION,
    STATUSES,
    parse_version,
)
from lisa_analysis.rundir.jsonl import parse_object, read_bytes, short

# Entries of run.json that hold named values, where they are there at all.
_OBJECTS = ("model", "lisa", "lora", "peft", "select", "result", "recording", "seeds", "hardware",
            "versions", "dataset")  # fmt: skip


def read_manifest(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Read and check run.json; returns it with warnings in words."""
    manifest = parse_object(read_bytes(path), path)
    warning = check_version(manifest.get("schema_version"), path)
    if manifest.get("status") not in STATUSES:
        raise RunDirectoryError(
            f"{path} has the status {short(manifest.get('status'))}, expected one of "
            f"{', '.join(STATUSES)}: restore the file."
        )
    for field in ("run_id", "method"):
        if not isinstance(manifest.get(field), str):
            raise RunDirectoryError(
                f"{path} has {field} = {short(manifest.get(field))}, expected a text: restore it."
            )
    for field in _OBJECTS:
        if not isinstance(manifest.get(field, {}), Mapping | None):
            raise RunDirectoryError(
                f"{path} has {field} = {short(manifest[field])}, expected an object: restore it."
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


def next_flush(path: Path, manifest: Mapping[str, Any]) -> str | None:
    """Say when a run that is being written will show its first step; None once it has.

    Parameters
    ----------
    path
        The run directory, whose writer lives.
    manifest
        Its run.json.
    """
    try:
        if (path / SCALARS).exists() and (path / SCALARS).stat().st_size:
            return None
        files = [path / MANIFEST, *(path / METRICS_DIR).glob("*.parquet")]
        written = max(file.stat().st_mtime for file in files)
    except OSError:
        return None
    every = (manifest.get("recording") or {}).get("flush_seconds")
    if isinstance(every, bool) or not isinstance(every, int | float):
        return "nothing flushed yet: look again once the run has made some steps"
    left = every - (time.time() - written)
    if left <= 0:
        return "nothing flushed yet: the next flush comes with the next step"
    return f"nothing flushed yet: the next flush is in {max(1, round(left))} s"
