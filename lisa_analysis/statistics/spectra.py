"""Figures of one matrix from its singular values: each by its published formula."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def effective_rank(values: Array) -> float:
    """exp(−Σ p ln p) with p = σ/Σσ (Roy & Vetterli 2007); NaN of a matrix of zeros."""
    total = float(values.sum())
    if total <= 0:
        return float("nan")
    share = values[values > 0] / total
    return float(np.exp(-(share * np.log(share)).sum()))


def snr(values: Array, rows: int, columns: int) -> float:
    """Spectrum's SNR: Σσ above the threshold over Σσ up to it, over the largest σ.

    The threshold is σ̂(1 + √β), β the shorter over the longer side, σ̂ the interquartile range of
    the singular values over 1.349.

    Parameters
    ----------
    values
        Singular values.
    rows, columns
        Sides of the matrix.

    Returns
    -------
    float
        NaN where nothing is below the threshold, or the matrix is zero.
    """
    if len(values) < 2 or values.max() <= 0:
        return float("nan")
    high, low = np.quantile(values, [0.75, 0.25])
    threshold = (high - low) / 1.349 * (1 + np.sqrt(min(rows, columns) / max(rows, columns)))
    noise = float(values[values <= threshold].sum())
    if noise <= 0:
        return float("nan")
    return float(values[values > threshold].sum()) / noise / float(values.max())


def alpha_hill(values: Array) -> float:
    """Power-law exponent of the larger half of the eigenvalues σ², by Hill's estimator.

    α = 1 + n/Σ ln(λ_i/λ_min) with λ_min the eigenvalue in the middle, itself counted among the n.
    """
    eigenvalues = np.sort(values[values > 0] ** 2)
    middle = len(eigenvalues) // 2
    tail = eigenvalues[middle:]
    if len(tail) < 2:
        return float("nan")
    spread = float(np.log(tail / tail[0]).sum())
    return 1 + len(tail) / spread if spread > 0 else float("nan")
