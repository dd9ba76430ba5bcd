"""Scores pulled towards what all layers share, by how little is known of each (numpy only)."""

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def shrunk_scores(score: Array, low: Array, high: Array, confidence: float = 0.95) -> Array:
    """Empirical Bayes means of scores with intervals, in the order of the scores.

    Layers are taken to be drawn about a common level with a variance τ² that their scores show
    beyond their errors (Paule & Mandel 1982); a score then keeps the share τ²/(τ² + error²) of its
    distance from that level. Sampling with π in proportion to s has the expected variance Σ s²/π
    that is least in the mean over such layers, where a bound on the worst case (`safe_scores`)
    gives up most of what there is to gain, see docs/statistics.md.

    Parameters
    ----------
    score
        Shape (n,), finite.
    low, high
        Shape (n,): bounds of each score by itself at `confidence`; NaN or infinite is open, and
        the other side is taken for both. A score without any is taken as certain.
    confidence
        Coverage of the bounds.

    Returns
    -------
    ndarray
        Shape (n,), not negative; on logarithms where all scores and bounds are positive. A layer
        whose whole interval is below zero has 0, and so has one that is exactly 0. A higher score
        never has a smaller value than a lower one, equal ones have the same (isotonic regression).
    """
    score = np.asarray(score, dtype=np.float64)
    low, high = (np.asarray(bound, dtype=np.float64) for bound in (low, high))
    with np.errstate(invalid="ignore"):
        nothing = (score == 0) | (high < 0)
    found = np.zeros(len(score))
    kept = ~nothing
    if not kept.any():
        return found
    x, bottom, top = score[kept], low[kept], high[kept]
    bottom = np.where(np.isfinite(bottom), bottom, np.nan)
    top = np.where(np.isfinite(top), top, np.nan)
    log = bool((x > 0).all() and (np.nan_to_num(bottom, nan=1.0) > 0).all())
    if log:
        x, bottom, top = np.log(x), np.log(bottom), np.log(top)
    sides = np.stack([x - bottom, top - x])
    open_side = np.isnan(sides)
    width = np.where(open_side, 0.0, sides).sum(axis=0) / np.maximum((~open_side).sum(axis=0), 1)
    error = np.maximum(width, 0.0) / NormalDist().inv_cdf(0.5 + confidence / 2)
    mean = in_order(x, pulled(x, error))
    found[kept] = np.exp(mean) if log else np.maximum(mean, 0.0)
    return found


def pulled(x: Array, error: Array) -> Array:
    """Empirical Bayes means of values with standard errors, shape (n,)."""
    if len(x) < 2 or not (error > 0).any():
        return np.array(x)
    between = _between(x, error)
    if between == 0.0:
        # No spread beyond the errors: one level for all, of the certain ones where there are any.
        certain = error == 0
        weight = certain.astype(np.float64) if certain.any() else 1 / error**2
        return np.full(len(x), float(np.average(x, weights=weight)))
    level = float(np.average(x, weights=1 / (between + error**2)))
    return np.asarray(level + between / (between + error**2) * (x - level))


def _between(x: Array, error: Array) -> float:
    """Variance between layers τ² at which Σ (x − m)²/(τ² + error²) is n − 1, by bisection."""
    squared = error**2

    def excess(variance: float) -> float:
        weight = 1 / (variance + squared)
        away = x - (x * weight).sum() / weight.sum()
        return float(weight @ away**2) - (len(x) - 1)

    left, right = 0.0, float(len(x) * x.var())
    least = 1e-12 * right
    if right == 0.0 or excess(least) <= 0:
        return 0.0
    left = least
    for _ in range(100):
        middle = (left + right) / 2
        if excess(middle) > 0:
            left = middle
        else:
            right = middle
    return right


def in_order(values: Array, means: Array) -> Array:
    """Means that never fall where `values` rise: pool adjacent violators, ties together."""
    rank = np.argsort(values, kind="stable")
    if (np.diff(values[rank]) > 0).all() and (np.diff(means[rank]) >= 0).all():
        return np.array(means)
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    totals = np.bincount(place, weights=means)
    blocks: list[tuple[float, int, int]] = []
    for total, count in zip(totals.tolist(), counts.tolist(), strict=True):
        block = (total, count, 1)
        while blocks and blocks[-1][0] * block[1] >= block[0] * blocks[-1][1]:
            before = blocks.pop()
            block = (before[0] + block[0], before[1] + block[1], before[2] + block[2])
        blocks.append(block)
    levels = np.concatenate([np.full(groups, total / count) for total, count, groups in blocks])
    return np.asarray(levels[place])
