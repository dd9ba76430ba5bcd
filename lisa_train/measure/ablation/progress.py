"""How far an ablation is, and the time left: a bar on a terminal, a few lines elsewhere."""

import sys
import time
from typing import Any, Self

_LINES = 10
_EARLY = 10.0  # seconds after which a first line says how long it will take


class Progress:
    """A bar with the time left, or about ten lines.

    Parameters
    ----------
    total
        What lies ahead, in any unit that time is proportional to.
    what
        A word for it.
    shown
        True shows a bar, false nothing; None a bar on a terminal, and lines elsewhere.
    """

    def __init__(self, total: float, what: str, shown: bool | None) -> None:
        self._total, self._what = max(total, 1e-9), what
        self._lines = shown is None and not sys.stderr.isatty()
        self._bar_shown = bool(shown) if shown is not None else sys.stderr.isatty()
        self._done = 0.0
        self._said, self._told = 0, False
        self._started = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Self:
        from tqdm import tqdm

        self._started = time.monotonic()
        self._bar = tqdm(
            total=round(self._total, 3),
            desc=self._what,
            disable=not self._bar_shown,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} < {remaining}",
            smoothing=0.1,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, amount: float) -> None:
        """Say that so much was done."""
        self._done += amount
        self._bar.update(min(amount, self._total - self._bar.n))
        tenth = int(_LINES * self._done / self._total)
        passed = time.monotonic() - self._started
        early = self._said == 0 and not tenth and passed > _EARLY and not self._told
        if self._lines and (early or self._said < tenth <= _LINES):
            self._said, self._told = tenth, True
            left = passed * (self._total / self._done - 1)
            print(
                f"{self._what} {self._done / self._total:.0%}, {max(left, 0):.0f} s left",
                file=sys.stderr,
                flush=True,
            )
