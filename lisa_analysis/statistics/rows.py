"""Series made ready for a fit: zeros set apart, linear quantities levelled, long ones condensed."""

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.statistics.effects import additive_effects

Array = NDArray[np.float64]

# Longer series are averaged over neighbouring steps first: time and memory stay bounded.
MAX_ROWS = 8192
# Share of the values from which layers count as observed together, gaps and all.
TOGETHER = 0.9


def find_zeros(values: NDArray[np.floating]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which layers are zero whenever they were observed, and how often every layer is."""
    is_zero = values == 0
    known = np.isfinite(values)
    zero = known.any(axis=0) & (is_zero | ~known).all(axis=0)
    # A learning rate of 0 says nothing of a layer.
    together = known.sum(axis=1)
    idle = (together > 1) & (is_zero.sum(axis=1) == together)
    return zero, np.where(zero, known.sum(axis=0), is_zero[~idle].sum(axis=0))


def level(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """Divide linear quantities by what all layers share in size at each step.

    A learning rate or the difficulty of a batch moves all layers together: it is no noise of a
    layer, and where layers are observed at different times a plain mean would credit those drawn
    while all of them were large. Sizes are |x|, relative to each layer's own, and the divisor is
    one on average, so that a score stays a mean of what was measured.
    """
    size = np.abs(values).astype(np.float64)
    observed = np.isfinite(size)
    rows = observed.any(axis=1)
    if observed.any(axis=0).sum() < 2:
        return values
    seen = observed[rows][:, observed.any(axis=0)]
    if seen.size and seen.mean() >= TOGETHER:
        common = _common_size(size, observed)
    else:
        with np.errstate(divide="ignore"):
            logs = np.where(size > 0, np.log(size), np.nan)
        common = np.exp(additive_effects(logs).common)
    # Where no layer has any size there is nothing to divide.
    common = np.where(rows & (common > 0), common, np.nan)
    known = np.isfinite(common)
    if not known.any():
        return values
    common = np.where(known, common / common[known].mean(), 1.0)
    return np.asarray(values / common[:, None])


def _common_size(size: Array, observed: NDArray[np.bool_]) -> Array:
    """Mean over layers of every size over the layer's own mean, gaps allowed for in turns."""
    common = np.ones(len(size))
    with np.errstate(invalid="ignore", divide="ignore"):
        for _ in range(1 if observed.all() else 5):
            own = _mean(size / np.where(common > 0, common, np.nan)[:, None], observed, axis=0)
            own = np.where(own > 0, own, np.nan)
            common = _mean(size / own, observed & np.isfinite(own), axis=1)
    return common


def _mean(values: Array, observed: NDArray[np.bool_], axis: int) -> Array:
    observed = observed & np.isfinite(values)
    total = np.where(observed, values, 0.0).sum(axis=axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(total / observed.sum(axis=axis))


def condense(
    series: NDArray[np.floating], clusters: NDArray[np.int64] | None
) -> tuple[NDArray[np.floating], NDArray[np.int64] | None]:
    """Average neighbouring rows (never across a period) down to about MAX_ROWS."""
    n = len(series)
    if n <= MAX_ROWS:
        return series, clusters
    width = -(-n // MAX_ROWS)
    starts = np.arange(n) % width == 0
    if clusters is not None:
        changes = np.concatenate([[True], np.diff(clusters) != 0])
        begin = np.maximum.accumulate(np.where(changes, np.arange(n), 0))
        starts = (np.arange(n) - begin) % width == 0
    rows = np.flatnonzero(starts)
    means = np.empty((len(rows), series.shape[1]))
    # A few thousand rows at a time: the working set stays in the cache, and no copy is made.
    edges = [*rows.tolist(), n]
    for first in range(0, len(rows), 256):
        last = min(first + 256, len(rows))
        block = series[edges[first] : edges[last]]
        known = np.isfinite(block)
        cuts = rows[first:last] - edges[first]
        total = np.add.reduceat(np.where(known, block, 0), cuts, axis=0, dtype=np.float64)
        count = np.add.reduceat(known, cuts, axis=0, dtype=np.int64)
        means[first:last] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return means, None if clusters is None else clusters[rows]
