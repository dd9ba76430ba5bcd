"""Memory that the kernel says a process holds: a witness that knows nothing of tensors. Linux."""

import re
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Resident:
    """Peak of the resident set above what the process held when this was made."""

    def __init__(self) -> None:
        self._start = _read("VmRSS")

    def restart(self) -> None:
        """Forget the peak so far; where the kernel does not allow it, the peak is of all."""
        try:
            _CLEAR.write_text("5")
        except OSError:
            return

    def peak(self) -> int | None:
        """Bytes; None where there is no such file."""
        now = _read("VmHWM")
        return None if now is None or self._start is None else now - self._start


def _read(name: str) -> int | None:
    if not _STATUS.exists():
        return None
    found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.M)
    return int(found[1]) * 1024 if found else None
