"""Long series thinned for drawing and for tables, so that no extreme is lost."""

from dataclasses import dataclass

import numpy as np

MAX_POINTS = 400


@dataclass(frozen=True)
class Series:
    """A line thinned for drawing: bin means with the smallest and largest value of each bin."""

    x: np.ndarray
    low: np.ndarray
    middle: np.ndarray
    high: np.ndarray
    group: int

    def __len__(self) -> int:
        return len(self.x)


def thin(x: np.ndarray, y: np.ndarray, most: int = MAX_POINTS) -> Series:
    """Average neighbouring points until at most `most` are left, keeping each group's extremes.

    Missing and non-finite values are left out; `group` is the largest number of points that
    share one place (1 = the line is as recorded).
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    keep = np.isfinite(y)
    x, y = x[keep], y[keep]
    if len(x) <= most:
        return Series(x, y, y, y, 1)
    starts = np.linspace(0, len(x), most, endpoint=False).astype(int)
    counts = np.diff([*starts, len(x)])
    return Series(
        np.add.reduceat(x, starts) / counts,
        np.minimum.reduceat(y, starts),
        np.add.reduceat(y, starts) / counts,
        np.maximum.reduceat(y, starts),
        int(counts.max()),
    )
