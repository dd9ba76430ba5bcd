"""Block and cluster bootstrap over time, all layers kept together."""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.statistics.autocorrelation import cluster_sums

Array = NDArray[np.float64]

REPLICATES = 1000
MAX_CLUSTERS = 2000
CHUNK = 250


@dataclass(frozen=True)
class Interval:
    """A value with its confidence bounds; the bounds are None where the data do not allow any."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def sufficient(self) -> bool:
        """Whether there are bounds."""
        return self.low is not None and self.high is not None

    def __str__(self) -> str:
        if not self.sufficient:
            return f"{self.value:.4g} (insufficient data for an interval)"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def block_totals(
    contributions: Array, length: int, rng: np.random.Generator, replicates: int = REPLICATES
) -> Array:
    """Totals over time of circular block bootstrap samples.

    Parameters
    ----------
    contributions
        Shape (n, columns), one row per time; a missing value contributes nothing (NaN).
    length
        Rows per block; the last block of a sample is cut so that it has n rows.
    rng, replicates
        Generator and number of samples.

    Returns
    -------
    ndarray
        Shape (replicates, columns). All columns of a sample use the same rows.
    """
    filled = np.nan_to_num(np.asarray(contributions, dtype=np.float64), posinf=0.0, neginf=0.0)
    n = len(filled)
    length = max(1, min(length, n))
    full, rest = divmod(n, length)
    wrapped = np.concatenate([filled, filled[:length]])
    prefix = np.concatenate([np.zeros((1, filled.shape[1])), np.cumsum(wrapped, axis=0)])
    block_sums = prefix[length : length + n] - prefix[:n]
    totals = np.empty((replicates, filled.shape[1]))
    for first in range(0, replicates, CHUNK):
        rows = min(CHUNK, replicates - first)
        starts = rng.integers(0, n, size=(rows, full)) + n * np.arange(rows)[:, None]
        # How often every block was drawn, times its sum: one matrix product for all columns.
        drawn = np.bincount(starts.ravel(), minlength=rows * n).reshape(rows, n)
        totals[first : first + rows] = drawn.astype(np.float64) @ block_sums
    if rest:
        starts = rng.integers(0, n, size=replicates)
        totals += prefix[starts + rest] - prefix[starts]
    return totals


def cluster_totals(
    contributions: Array,
    clusters: NDArray[np.int64],
    rng: np.random.Generator,
    replicates: int = REPLICATES,
) -> Array:
    """Totals over time of cluster bootstrap samples, shape (replicates, columns).

    Whole clusters (periods) are drawn with replacement, with all the layers that
    were active in them. Beyond 2000 clusters, consecutive ones are drawn together.
    """
    totals, _ = cluster_sums(contributions, clusters)
    if len(totals) > MAX_CLUSTERS:
        merged = np.arange(len(totals)) * MAX_CLUSTERS // len(totals)
        totals, _ = cluster_sums(totals, merged)
    n = len(totals)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=replicates)
    return np.asarray(weights @ totals)


def t_quantile(probability: float, degrees: Array | float) -> Array:
    """Quantile of Student's t for probability > 0.5.

    Exact for 1 and 2 degrees of freedom, else the Cornish–Fisher expansion (Abramowitz & Stegun
    26.7.5), better than 1 % for 3 degrees of freedom at 0.975.
    """
    z = NormalDist().inv_cdf(probability)
    v = np.maximum(np.asarray(degrees, dtype=np.float64), 1.0)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    expanded = z + sum(term / v ** (power + 1) for power, term in enumerate(terms))
    cauchy = np.tan(np.pi * (probability - 0.5))
    alpha = 2 * probability - 1
    two = alpha * np.sqrt(2 / (1 - alpha**2))
    return np.where(v < 1.5, cauchy, np.where(v < 2.5, two, expanded))
