"""Kendall's τ of two noisy rankings: of the measurements, and of what they measure (numpy)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.statistics.stability import kendall_tau, kendall_taus

Array = NDArray[np.float64]

PAIRS = 400
# Below this share of variance that is not noise, taking the noise off is a guess.
MIN_RELIABILITY = 0.6
# Layers further than this many standard deviations from the middle are no part of the bulk.
_BULK = 2.5
_NAN = float("nan")


@dataclass(frozen=True)
class NoisyTau:
    """Kendall's τ between two measured profiles; NaN is unknown.

    Attributes
    ----------
    measured, measured_low, measured_high
        τ of the two measurements, and an interval for its mean over repetitions of both: noise
        lowers it, so that two measurements of one profile do not reach 1.
    true, true_low, true_high
        τ of the profiles behind them, with what noise takes away given back.
    reliability
        √ of the product of what a repetition of each would reach, on the scale of sin(π τ / 2);
        `true` is `measured` over it on that scale.
    """

    measured: float
    measured_low: float = _NAN
    measured_high: float = _NAN
    true: float = _NAN
    true_low: float = _NAN
    true_high: float = _NAN
    reliability: float = _NAN


def noisy_tau(
    a: Array,
    b: Array,
    noise_a: Array,
    noise_b: Array,
    confidence: float,
    rng: np.random.Generator,
    *,
    measured: float | None = None,
) -> NoisyTau:
    """Estimate both, with intervals from resampled noise.

    Parameters
    ----------
    a, b
        Shape (layers,): the measurements.
    noise_a, noise_b
        Shape (samples, layers): deviations of resampled measurements from them, on their scale.
    confidence, rng
        Of the intervals and their resampling.
    measured
        τ of the two where some layers have no noise to resample, and `a` and `b` lack them.

    Returns
    -------
    NoisyTau
        For a profile T measured twice with independent noise, τ is below 1; how far is found by
        adding resampled noise to the profile shrunk to the spread that is not noise. With
        s = sin(π τ / 2), which is the correlation for Gaussian values (Greiner 1909), the true s is
        s_ab / √(s_aa′ s_bb′): Spearman's correction for attenuation. Intervals are the spread of s
        over resampled pairs about its own middle, for resampling adds noise a second time and
        lowers τ twice. `true` is unknown where less than `MIN_RELIABILITY` of a variance is real.
    """
    measured = kendall_tau(a, b) if measured is None else measured
    if not np.isfinite(measured):
        return NoisyTau(measured)
    rows = rng.integers(0, (len(noise_a), len(noise_a), len(noise_b), len(noise_b)), (PAIRS, 4))
    first, again = noise_a[rows[:, 0]], noise_a[rows[:, 1]]
    second, anew = noise_b[rows[:, 2]], noise_b[rows[:, 3]]
    taus = kendall_taus(a + first, b + second)
    taus = taus[np.isfinite(taus)]
    if not len(taus):
        return NoisyTau(measured)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.clip(measured + np.quantile(taus, tails) - taus.mean(), -1, 1).tolist()
    shrunk = [_shrunk(x, noise) for x, noise in ((a, noise_a), (b, noise_b))]
    if min(share for _, share in shrunk) < MIN_RELIABILITY:
        return NoisyTau(measured, low, high)
    repeats = [
        float(_sine(float(np.nanmean(kendall_taus(middle + one, middle + other)))))
        for (middle, _), one, other in zip(shrunk, (first, second), (again, anew), strict=True)
    ]
    reliability = float(np.sqrt(max(repeats[0], 0.0) * max(repeats[1], 0.0)))
    if reliability <= 0:
        return NoisyTau(measured, low, high)
    spread = _sine(taus)
    reach = np.quantile(spread, tails) - spread.mean()
    value = float(_sine(measured))
    true, true_low, true_high = (
        float(2 / np.pi * np.arcsin(np.clip(s / reliability, -1, 1)))
        for s in (value, value + reach[0], value + reach[1])
    )
    return NoisyTau(measured, low, high, true, true_low, true_high, reliability)


def _sine(tau: Array | float) -> Array:
    return np.asarray(np.sin(np.pi * np.asarray(tau) / 2))


def _shrunk(values: Array, noise: Array) -> tuple[Array, float]:
    """Values with the spread that noise put in taken out, and the share of it that is real.

    The bulk of the layers is judged by its quartiles: two spikes make a large variance, and say
    nothing of the order of the others. Spikes lose no more than the edge of the bulk does.
    """
    error = float(noise.var(axis=0).mean())
    variance = float(values.var(ddof=1))
    if variance <= 0:
        return values, 0.0
    low, high = np.quantile(values, [0.25, 0.75])
    bulk = min(((high - low) / 1.349) ** 2, variance)
    share = max(1 - error / variance, 0.0)
    inner = max(1 - error / bulk, 0.0) if bulk > 0 else 0.0
    middle = float(np.median(values))
    away = values - middle
    loss = (1 - np.sqrt(inner)) * np.minimum(np.abs(away), _BULK * np.sqrt(bulk))
    return middle + np.sign(away) * (np.abs(away) - loss), share
