"""Scores with intervals -> weights -> inclusion probabilities with an exact sum (numpy only)."""

import math

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.contract.errors import ProbabilitiesError

Array = NDArray[np.float64]


def safe_scores(low: Array, high: Array) -> Array:
    """Scores inside their intervals that make the sampling safest against being wrong.

    c_i = clip(m, low_i, high_i) with m = ‖c‖²/‖c‖₁: never worse than uniform sampling for any
    truth inside the intervals (Stich, Raj & Jaggi, NeurIPS 2017). A missing bound is 0 or ∞.
    """
    low = np.maximum(np.nan_to_num(low, nan=0.0), 0.0)
    high = np.maximum(np.nan_to_num(high, nan=np.inf), low)
    bounds = np.concatenate([low[low > 0], high[np.isfinite(high)]])
    if not len(bounds) or bounds.max() <= 0:
        return np.ones(len(low))
    left, right = 0.0, float(bounds.max())
    while True:
        middle = (left + right) / 2
        if middle in (left, right):
            break
        clipped = np.clip(middle, low, high)
        if (clipped * (clipped - middle)).sum() > 0:
            left = middle
        else:
            right = middle
    return np.clip(right, low, high)


def inclusion_probabilities(
    weights: Array, k: int, *, floor: float = 0.0, cap: float = math.inf
) -> Array:
    """π = clip(λ·w, floor·k/L, min(1, cap·k/L)) with λ such that Σπ = k.

    Raises
    ------
    ProbabilitiesError
        When no λ gives Σπ = k, or a layer could never be drawn.
    """
    weights = np.asarray(weights, dtype=np.float64)
    n = len(weights)
    lower, upper = min(1.0, floor * k / n), min(1.0, cap * k / n)
    if (weights < 0).any() or not np.isfinite(weights).all():
        raise ProbabilitiesError("weights of layers must be finite and not negative.")
    if not 1 <= k <= n or n * lower > k * (1 + 1e-12) or n * upper < k * (1 - 1e-12):
        raise ProbabilitiesError(
            f"no probabilities between {lower:.4g} and {upper:.4g} for {n} layers sum to {k}: "
            "choose floor ≤ 1 ≤ cap and at most as many activated layers as there are."
        )
    if lower <= 0 and not (weights > 0).all():
        raise ProbabilitiesError(
            f"layer {int(np.argmin(weights))} would never be drawn: use a floor or a mix above 0."
        )
    positive = weights[weights > 0]
    if not len(positive) or upper - lower < 1e-15:
        return np.full(n, k / n)
    left, right = 0.0, upper / float(positive.min())
    while True:
        scale = (left + right) / 2
        if scale in (left, right):
            break
        if np.clip(scale * weights, lower, upper).sum() < k:
            left = scale
        else:
            right = scale
    pi = np.clip(right * weights, lower, upper)
    free = (pi > lower) & (pi < upper)
    # Exact by construction: what the bounds leave is shared in proportion to the weights.
    for _ in range(4):
        if free.any():
            rest = k - math.fsum(pi[~free])
            pi[free] = np.clip(weights[free] * rest / math.fsum(weights[free]), lower, upper)
    return pi
