"""Files that survive a kill: whole or absent, whole lines or none, one writer at a time."""

import contextlib
import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lisa_analysis.contract.errors import RunDirectoryError

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind
    fcntl = None  # type: ignore[assignment]

_LOCK_PATIENCE = 1.0
# Windows moves no file into the place of one that somebody reads; readers hold it for an instant.
_READERS_HOLD = os.name == "nt"
_held: "weakref.WeakSet[RunLock]" = weakref.WeakSet()


class UnwritableError(RunDirectoryError):
    """The disk or another process refuses a run directory that was rightly chosen."""


class HeldError(UnwritableError):
    """Another process is writing the run directory."""


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a temporary file, then put it in the place of `path` in one move.

    Whoever opens `path` sees the old content, or the whole new one, at any kill and power cut.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with temporary.open("r+b") as handle:  # Windows syncs only what may be written
            os.fsync(handle.fileno())
        _move(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def _move(source: Path, target: Path) -> None:
    """`os.replace`, tried again where readers can stand in the way."""
    deadline = time.monotonic() + _LOCK_PATIENCE
    while True:
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if not _READERS_HOLD or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def sync_directory(path: Path) -> None:
    """Make the renames inside `path` durable, where the platform can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class LineFile:
    """A JSONL file that grows by whole lines.

    A line that a kill cut off is removed when the file is opened again, and a write that failed
    half-way (full disk) is taken back, so that the lines before it stay readable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()
        content = path.read_bytes()
        self._size = content.rfind(b"\n") + 1
        if self._size != len(content):
            os.truncate(path, self._size)

    def append(self, lines: list[str]) -> None:
        """Append the lines and wait until they are on the disk; `OSError` leaves none of them."""
        data = "".join(f"{line}\n" for line in lines).encode()
        try:
            with self.path.open("ab", buffering=0) as handle:
                written = 0
                while written < len(data):
                    written += handle.write(data[written:])
                os.fsync(handle.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self.path, self._size)
            raise
        self._size += len(data)


class RunLock:
    """An advisory lock that the kernel drops when the process ends, however it ends."""

    def __init__(self, path: Path) -> None:
        # Windows has no O_CLOEXEC; Python leaves no descriptor to a child anywhere.
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
        self._descriptor: int | None = os.open(path, flags, 0o644)
        if fcntl is None:
            return
        deadline = time.monotonic() + _LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # A reader that asks whether the run lives holds the lock for an instant.
                if time.monotonic() > deadline:
                    self.release()
                    raise HeldError(
                        f"{path.parent} is being written by another process: wait for it to "
                        "end, or choose another run directory."
                    ) from None
                time.sleep(0.02)
            except OSError:
                break  # a network disk without locks: go on without the protection
        _held.add(self)

    def release(self) -> None:
        """Drop the lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _drop_in_child() -> None:
    # A data-loading worker inherits the descriptor and would keep the lock after a kill of the
    # training process; closing its copy leaves the parent's lock alone.
    for lock in list(_held):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_in_child)


def describe_os_error(path: Path, error: Exception) -> UnwritableError:
    """Turn a failed write into one sentence."""
    reason: Any = getattr(error, "strerror", None) or error
    return UnwritableError(
        f"{path} cannot be written ({reason}): free space or check its permissions; what was "
        "recorded before is kept."
    )
