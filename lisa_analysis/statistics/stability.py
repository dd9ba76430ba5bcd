"""Whether a ranking of layers would come out the same again."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def ranks(values: Array) -> Array:
    """Ranks from 1, ties sharing their mean rank."""
    values = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], dtype=np.float64)


def pearson(a: Array, b: Array) -> float:
    """Linear correlation; NaN when either side does not vary."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else float("nan")


def spearman(a: Array, b: Array) -> float:
    """Correlation of the ranks; NaN when either side does not vary."""
    return pearson(ranks(a), ranks(b))


def kendall_tau(a: Array, b: Array) -> float:
    """Kendall's τ_b of two rankings; O(layers²), NaN when either side does not vary."""
    return float(kendall_taus(np.asarray(a)[None], np.asarray(b))[0])


def kendall_taus(a: Array, b: Array) -> Array:
    """Kendall's τ_b of every row of `a`, shape (samples, layers), with `b` or its same row."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    first, second = np.triu_indices(a.shape[-1], k=1)
    x = np.sign(a[..., first] - a[..., second])
    y = np.sign(b[..., first] - b[..., second])
    scale = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(scale > 0, (x * y).sum(axis=-1) / scale, np.nan))


def kendall_w(profiles: Array) -> float:
    """Kendall's coefficient of concordance W of several profiles, shape (runs, layers).

    12 S / (m² (n³ − n) − m T) with the usual correction T for ties; 1 is perfect agreement.
    """
    table = np.stack([ranks(row) for row in np.asarray(profiles, dtype=np.float64)])
    runs, layers = table.shape
    spread = float(((table.sum(axis=0) - runs * (layers + 1) / 2) ** 2).sum())
    ties = 0.0
    for row in table:
        counts = np.unique(row, return_counts=True)[1].astype(np.float64)
        ties += float((counts**3 - counts).sum())
    scale = runs**2 * (layers**3 - layers) - runs * ties
    return 12 * spread / scale if scale > 0 else float("nan")


def jensen_shannon(p: Array, q: Array) -> Array:
    """Jensen–Shannon divergence in nats between non-negative profiles of shape (..., layers).

    Profiles are normalised to sum to one; 0 for equal ones, ln 2 for disjoint ones, NaN where one
    is 0 in all layers and has no shares.
    """
    p, q = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        p, q = p / p.sum(axis=-1, keepdims=True), q / q.sum(axis=-1, keepdims=True)
        middle = (p + q) / 2
        left = np.where(p > 0, p * np.log(p / middle), 0.0)
        right = np.where(q > 0, q * np.log(q / middle), 0.0)
    shares = np.isfinite(p).all(axis=-1) & np.isfinite(q).all(axis=-1)
    found = np.maximum((left + right).sum(axis=-1) / 2, 0.0)
    return np.asarray(np.where(shares, found, np.nan))


def spearman_brown(half: float) -> float:
    """Reliability of the whole series from the correlation of its halves, 2r/(1 + r)."""
    return 2 * half / (1 + half) if half > 0 else max(half, 0.0)


def top_jaccard(a: Array, b: Array) -> float:
    """Overlap |A∩B|/|A∪B| of the top quarters (rounded up) of two profiles."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    size = -(-len(a) // 4)
    first, second = set(np.argsort(-a)[:size].tolist()), set(np.argsort(-b)[:size].tolist())
    return len(first & second) / len(first | second)


def page_hinkley(series: Array, *, tolerance: float = 0.5, threshold: float = 25.0) -> int | None:
    """First index at which the mean of a standardised series has moved, else None.

    Two-sided Page–Hinkley test (Page 1954): the cumulated deviation from the running mean, less
    `tolerance` per observation, exceeds `threshold` above its minimum. Both are in standard
    deviations of independent observations; a correlated series must be averaged over blocks first.
    """
    series = np.asarray(series, dtype=np.float64)
    running = np.cumsum(series) / np.arange(1, len(series) + 1)
    for sign in (1.0, -1.0):
        total = np.cumsum(sign * (series - running) - tolerance)
        alarm = total - np.minimum.accumulate(total) > threshold
        if alarm.any():
            return int(np.argmax(alarm))
    return None
