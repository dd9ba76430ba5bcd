"""When something is recorded, and when what was recorded is written."""

import time


class Cadence:
    """Which optimizer steps are recorded: the first and every n-th.

    Parameters
    ----------
    every
        n.
    completed
        Optimizer steps done so far.

    Attributes
    ----------
    completed : int
        Optimizer steps done; the recorder moves it on.
    """

    def __init__(self, every: int = 1, completed: int = 0) -> None:
        self.every = every
        self.completed = completed

    def due(self, step: int) -> bool:
        """Whether step `step` is recorded."""
        return step == 1 or step % self.every == 0

    @property
    def due_now(self) -> bool:
        """Whether the step in progress is recorded."""
        return self.due(self.completed + 1)


class FlushTimer:
    """Tells when what lies in memory has been there for long enough.

    Parameters
    ----------
    seconds
        The longest time between two flushes.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._flushed_at = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether that time has passed."""
        return time.monotonic() - self._flushed_at >= self._seconds

    def flushed(self) -> None:
        """Begin anew."""
        self._flushed_at = time.monotonic()
