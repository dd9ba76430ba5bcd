"""Variances of many layers from few repetitions each: pulled towards what all layers show."""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Level, over all layers together, at which a layer's variance is called another than the others'.
DEPARTS = 0.05


@dataclass(frozen=True)
class Moderated:
    """Variances of layers, and how well they are known.

    Attributes
    ----------
    variance
        Shape (layers,): moderated variance; NaN where no layer has any.
    degrees
        Shape (layers,): degrees of freedom of Student's t with `variance`; inf when all layers
        have one variance, and never more than all layers together have.
    prior, prior_degrees
        What the layers have in common, and how many observations of a layer it is worth.
    departs
        Shape (layers,): whether a layer varies so much more than the others that it keeps its
        own variance and degrees.
    """

    variance: Array
    degrees: Array
    prior: float
    prior_degrees: float
    departs: NDArray[np.bool_]


def moderated_variance(variance: Array, degrees: Array) -> Moderated:
    """Moderate the variances of layers by empirical Bayes.

    The variances are taken to be drawn from a scaled inverse χ² with d₀ degrees of freedom about
    s₀², both estimated from the mean and the spread of their logarithms; a layer then has
    (d₀ s₀² + d s²)/(d₀ + d) with d₀ + d degrees (Smyth 2004, "Linear models and empirical Bayes
    methods"). With three repetitions the layers' own variances have two degrees of freedom each,
    which alone would tell almost nothing.

    Parameters
    ----------
    variance
        Shape (layers,): variance of one observation of each layer, NaN where unknown.
    degrees
        Shape (layers,): degrees of freedom of each; 0 where there is one observation.

    Returns
    -------
    Moderated
        A layer without a variance of its own has that of the others. One whose variance is
        larger than what the others lead to expect (F at 5 % for all layers together) takes no
        part in what they have in common, and keeps its own.
    """
    variance = np.asarray(variance, dtype=np.float64)
    degrees = np.where(np.isfinite(variance), np.asarray(degrees, dtype=np.float64), 0.0)
    usable = degrees > 0
    if not usable.any():
        nothing = np.full(len(variance), np.nan)
        return Moderated(nothing, np.zeros(len(variance)), float("nan"), 0.0, ~usable & usable)
    variance = np.where(usable, variance, 0.0)
    departs = np.zeros(len(variance), dtype=bool)
    prior, worth = _prior(variance[usable], degrees[usable])
    for _ in range(int(usable.sum()) // 4):
        # The largest for its degrees is judged by the others alone, or it would hide itself.
        left = np.flatnonzero(usable & ~departs)
        top = int(left[np.argmax(variance[left] / chi2_over_df(0.95, degrees[left]))])
        others = left[left != top]
        common, known = _prior(variance[others], degrees[others])
        if not _beyond(float(variance[top]), common, float(degrees[top]), known, len(left)):
            break
        departs[top], prior, worth = True, common, known
    together = float(degrees.sum())
    if np.isinf(worth):
        shared, df = np.full(len(variance), prior), np.full(len(variance), together)
    else:
        shared = (worth * prior + degrees * variance) / (worth + degrees)
        df = np.minimum(worth + degrees, together)
    return Moderated(
        np.where(departs, variance, shared), np.where(departs, degrees, df), prior, worth, departs
    )


def _prior(variance: Array, degrees: Array) -> tuple[float, float]:
    """Common variance s₀² and its degrees of freedom d₀ (inf: all layers have the same)."""
    # An exact zero would have no logarithm (Smyth's limma puts the same floor).
    floored = np.maximum(variance, 1e-5 * float(np.median(variance)))
    if not floored.any():
        return 0.0, float("inf")
    logs = np.log(np.where(floored > 0, floored, floored[floored > 0].min()))
    half = degrees / 2
    excess = logs - digamma(half) + np.log(half)
    spread = float(excess.var(ddof=1)) if len(excess) > 1 else 0.0
    spread -= float(trigamma(half).mean())
    if spread <= 0:
        return float(np.average(variance, weights=degrees)), float("inf")
    worth = 2 * inverse_trigamma(spread)
    half_worth = np.array([worth / 2])
    return float(np.exp(excess.mean() + digamma(half_worth)[0] - np.log(worth / 2))), worth


def _beyond(variance: float, prior: float, degrees: float, worth: float, looks: int) -> bool:
    """Whether s²/s₀² is beyond F(d, d₀) at `DEPARTS` over all looks, by Paulson's cube root."""
    if prior <= 0:
        return variance > 0
    root = (variance / prior) ** (1 / 3)
    own, common = 2 / (9 * degrees), 0.0 if np.isinf(worth) else 2 / (9 * worth)
    z = ((1 - common) * root - (1 - own)) / np.sqrt(common * root**2 + own)
    return bool(z > NormalDist().inv_cdf(1 - DEPARTS / looks))


def chi2_over_df(probability: float, degrees: Array) -> Array:
    """Quantile of χ²/d by Wilson and Hilferty's cube, within some per cent from d = 1 on."""
    z = NormalDist().inv_cdf(probability)
    part = 2 / (9 * degrees)
    return np.asarray(np.maximum(1 - part + z * np.sqrt(part), 0.0) ** 3)


def digamma(x: Array) -> Array:
    """ψ(x) for x > 0, by recurrence and the asymptotic series."""
    x = np.asarray(x, dtype=np.float64).copy()
    total = np.zeros_like(x)
    while (small := x < 8).any():
        total[small] -= 1 / x[small]
        x[small] += 1
    square = 1 / x**2
    series = square * (1 / 12 - square * (1 / 120 - square * (1 / 252 - square / 240)))
    return np.asarray(total + np.log(x) - 1 / (2 * x) - series)


def trigamma(x: Array) -> Array:
    """ψ′(x) for x > 0, by recurrence and the asymptotic series."""
    x = np.asarray(x, dtype=np.float64).copy()
    total = np.zeros_like(x)
    while (small := x < 8).any():
        total[small] += 1 / x[small] ** 2
        x[small] += 1
    square = 1 / x**2
    series = square * (1 / 6 - square * (1 / 30 - square * (1 / 42 - square / 30)))
    return np.asarray(total + 1 / x + square / 2 + series / x)


def inverse_trigamma(value: float) -> float:
    """Solve ψ′(x) = value for value > 0, by bisection of log x (ψ′ falls)."""
    low, high = -20.0, 20.0
    for _ in range(80):
        middle = (low + high) / 2
        if float(trigamma(np.array([np.exp(middle)]))[0]) > value:
            low = middle
        else:
            high = middle
    return float(np.exp((low + high) / 2))
