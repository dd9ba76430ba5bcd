"""The time that recording takes: every moment counts once, in the line of one step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class RecordingTime:
    """Adds up the time spent recording and shares it out among the lines of the scalars.

    What is recorded before a step is finished (the opening of the run, gradients, a flush) belongs
    to its line; so does what follows it (a measuring pass, a census) until the line is written or
    the next step begins. Whatever a line counts, its `step_seconds` holds as well.

    Parameters
    ----------
    began
        When the opening of the run began (`time.perf_counter`), which lasts until `opened` is
        called; None when there is none.

    Attributes
    ----------
    total : float
        Seconds spent recording so far.
    """

    def __init__(self, began: float | None = None) -> None:
        self.total = 0.0
        self._depth = 0 if began is None else 1
        self._entered = began or 0.0
        # Times of recording that no line has counted yet, each from when to when.
        self._open: list[tuple[float, float]] = []
        self._line: dict[str, Any] | None = None
        self._in_step = False
        self._finished_at = time.perf_counter() if began is None else began

    def opened(self) -> None:
        """End the opening."""
        self._depth -= 1
        self._add(self._entered, time.perf_counter())

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of a block; of one inside another it counts already."""
        if not self._depth:
            self._entered = time.perf_counter()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._add(self._entered, time.perf_counter())

    def begin_step(self) -> None:
        """Say that a step records something: what came before it belongs to the last one."""
        if not self._in_step:
            self.settle()
            self._in_step, self._line = True, None

    def finish_step(self, line: dict[str, Any], called: float) -> None:
        """Give a step's line its times.

        Parameters
        ----------
        line
            The line. A `step_seconds` in it is what the loop measured until `called`; without one
            it is the time since the last line.
        called
            When the loop said that the step is done.
        """
        self._cut()
        if line.get("step_seconds") is None:
            line["step_seconds"] = time.perf_counter() - self._finished_at
        else:
            # What the loop's clock did not see: before the step, and from this call on.
            began = called - float(line["step_seconds"])
            seen = sum(max(0.0, min(b, called) - max(a, began)) for a, b in self._open)
            line["step_seconds"] += self._uncounted() - seen
        line["recorder_seconds"] = self._uncounted()
        self._open = []
        self._line, self._in_step = line, False
        self._finished_at = time.perf_counter()

    def settle(self) -> None:
        """Add to the newest line what was recorded since; call it before lines are written."""
        self._cut()
        if self._line is None:
            return
        seconds = self._uncounted()
        self._line["recorder_seconds"] += seconds
        self._line["step_seconds"] += seconds
        self._finished_at += seconds
        self._open = []

    def written(self) -> None:
        """Say that the newest line has been written."""
        self._line = None

    def _cut(self) -> None:
        """End the time that is running, and begin another."""
        if self._depth:
            now = time.perf_counter()
            self._add(self._entered, now)
            self._entered = now

    def _add(self, start: float, end: float) -> None:
        self.total += end - start
        self._open.append((start, end))

    def _uncounted(self) -> float:
        return sum(end - start for start, end in self._open)
