"""How many independent observations a correlated series is worth."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MAX_RHO = 0.999
MAX_BLOCKS = 1000


def block_length(n: int, rho: float) -> int:
    """Block length of the circular block bootstrap of an AR(1) mean, in observations.

    b = (6)^{1/3} (ρ/(1 − ρ²))^{2/3} n^{1/3} (Politis & White 2004 with Patton's correction),
    at least n/1000 because more than a thousand blocks cost time and add nothing, and at most
    n/4 so that there is something to resample.
    """
    if n < 4:
        return 1
    rho = float(np.clip(np.nan_to_num(rho), 0.0, MAX_RHO))
    optimal = (6 * n) ** (1 / 3) * (rho / (1 - rho**2)) ** (2 / 3)
    return int(np.clip(np.ceil(max(optimal, n / MAX_BLOCKS)), 1, max(n // 4, 1)))


def intraclass_correlation(residuals: Array, clusters: NDArray[np.int64]) -> float:
    """Share of the residual variance that observations of one cluster have in common.

    One-way analysis of variance pooled over the columns: (MSB − MSW)/(MSB + (m − 1) MSW) with
    m the adjusted mean cluster size; a cluster is one column in one period.

    Parameters
    ----------
    residuals
        Shape (n, layers); NaN where not observed.
    clusters
        Shape (n,), the period of every row.

    Returns
    -------
    float
        In [0, 1]; 1 when it cannot be estimated (fewer than two clusters in every column), which
        counts every period as a single observation.
    """
    totals, counts = cluster_sums(residuals, clusters)
    columns = (counts > 0).sum(axis=0) >= 2
    totals, counts = totals[:, columns], counts[:, columns]
    n, groups = counts.sum(), (counts > 0).sum()
    layers = totals.shape[1]
    if layers == 0 or n <= groups or groups <= layers:
        return 1.0
    column_mean = totals.sum(axis=0) / counts.sum(axis=0)
    means = totals / np.maximum(counts, 1)
    between = float((counts * (means - column_mean) ** 2).sum())
    values = np.asarray(residuals, dtype=np.float64)[:, columns]
    total = float(np.nansum((values - column_mean) ** 2))
    ms_between = between / (groups - layers)
    ms_within = max(total - between, 0.0) / (n - groups)
    size = (n - float((counts**2).sum(axis=0) @ (1 / counts.sum(axis=0)))) / (groups - layers)
    scale = ms_between + (size - 1) * ms_within
    if scale <= 0:
        return 1.0
    return float(np.clip((ms_between - ms_within) / scale, 0.0, 1.0))


def cluster_sums(values: Array, clusters: NDArray[np.int64]) -> tuple[Array, Array]:
    """Sums and counts of the finite `values` per cluster and column, each (clusters, columns).

    Clusters are numbered in order of first appearance of their label when sorted.
    """
    values = np.asarray(values, dtype=np.float64)
    labels, index = np.unique(clusters, return_inverse=True)
    columns = values.shape[1]
    observed = np.isfinite(values)
    key = (index[:, None] * columns + np.arange(columns))[observed]
    size = len(labels) * columns
    totals = np.bincount(key, weights=values[observed], minlength=size)
    counts = np.bincount(key, minlength=size).astype(np.float64)
    shape = (len(labels), columns)
    return np.asarray(totals, np.float64).reshape(shape), counts.reshape(shape)
