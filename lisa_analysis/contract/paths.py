"""A path that somebody gave, or one sentence (stdlib only)."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lisa_analysis.contract.errors import LisaError


def as_path(value: Any, asked_by: str) -> Path:
    """Return `value` as a path.

    Raises
    ------
    LisaError
        For anything but a string or a path.
    """
    if isinstance(value, str | os.PathLike):
        return Path(os.fspath(value))
    raise LisaError(f"{asked_by} takes a path, got a {type(value).__name__}.")


def to_write(value: Any, asked_by: str) -> Path:
    """Return `value` as the path of a file that can be written.

    Raises
    ------
    LisaError
        For anything but a string or a path, for a folder, and where the file's folder is missing.
    """
    path = as_path(value, asked_by)
    if path.is_dir():
        raise LisaError(f"cannot write {path}, a folder: give the name of a file in it.")
    if not path.parent.is_dir():
        raise LisaError(f"cannot write {path}, there is no folder {path.parent}: make it.")
    return path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path with the same ending, and put the file in the place of `path` after.

    What stood there stays whole until then: a full disk or a stop leaves no half of a file.
    """
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file():  # a pipe, /dev/stdout
        yield path
        return
    temporary = path.with_name(f".{path.stem}-{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def cache_dir() -> Path:
    """`$LISA_CACHE`, or `lisa-toolkit` in the user's cache folder; created when missing."""
    base = os.environ.get("LISA_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(base) if base else home / "lisa-toolkit"
    path.mkdir(parents=True, exist_ok=True)
    return path
