"""How unequal the layers of a profile are."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.statistics.bootstrap import Interval

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Concentration:
    """Inequality of a profile, every figure with its interval.

    Attributes
    ----------
    ends_to_middle
        Mean of the first and last eighth of the layers over the median of the middle half; NaN
        where half of an end is unknown, and of rows or several stacks without a common depth.
    gini, gini_floor
        Gini coefficient, and what noise alone would give if all layers were equal.
    top_share
        Share of the total in the top tenth of the layers (at least one); flat gives the tenth.
    effective_layers
        exp of the entropy: the number of equal layers that would be as concentrated.
    cv, headroom
        Coefficient of variation, and the spread of the scores 1 + CV²: the summed score of one
        draw in proportion to the scores over that of a uniform one, no promise of a gain.
    """

    ends_to_middle: Interval
    gini: Interval
    gini_floor: Interval
    top_share: Interval
    effective_layers: Interval
    cv: Interval
    headroom: Interval


def _positive(scores: Array) -> Array:
    """Negative scores (a layer that worked against the loss) count as no importance."""
    return np.maximum(np.asarray(scores, dtype=np.float64), 0.0)


def gini(scores: Array) -> Array:
    """Gini coefficient Σ(2i − n − 1) w_(i) / (n Σw) of profiles of shape (..., layers)."""
    ordered = np.sort(_positive(scores), axis=-1)
    n = ordered.shape[-1]
    weights = 2 * np.arange(1, n + 1) - n - 1
    return np.asarray((ordered @ weights) / (n * _total(ordered)))


def top_share(scores: Array, fraction: float = 0.1) -> Array:
    """Share of the total held by the largest `fraction` of the layers, at least one layer."""
    ordered = np.sort(_positive(scores), axis=-1)
    size = max(1, round(fraction * ordered.shape[-1]))
    return np.asarray(ordered[..., -size:].sum(axis=-1) / _total(ordered))


def effective_layers(scores: Array) -> Array:
    """exp(−Σ p ln p): the number of equally important layers with the same entropy."""
    p = _positive(scores)
    p = p / _total(p)[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(p > 0, p * np.log(p), 0.0).sum(axis=-1)
    return np.asarray(np.exp(entropy))


def coefficient_of_variation(scores: Array) -> Array:
    """Standard deviation over mean (population form, ddof 0)."""
    p = _positive(scores)
    return np.asarray(p.std(axis=-1) * p.shape[-1] / _total(p))


def headroom(scores: Array) -> Array:
    """1 + CV²: the ratio of the variance of uniform to that of proportional sampling."""
    return np.asarray(1 + coefficient_of_variation(scores) ** 2)


def ends_to_middle(scores: Array) -> Array:
    """Mean of the first and last eighth of the layers over the median of the middle half.

    Layers are counted in their places, unknown ones (NaN) too, as those that LISA did not draw.
    NaN where of the first eighth, of the last or of the middle less than half is known, and of
    fewer than four layers, which have no middle.
    """
    scores = np.asarray(scores, dtype=np.float64)
    n = scores.shape[-1]
    end = max(1, round(n / 8))
    parts = (scores[..., :end], scores[..., n - end :], scores[..., n // 4 : n - n // 4])
    enough = np.logical_and.reduce([_half_known(part) for part in parts]) & (n >= 4)
    # Where nothing is known there is nothing to take a mean or a median of; `enough` says so.
    first, last, half = (np.where(enough[..., None], part, 1.0) for part in parts)
    ends = np.nanmean(np.concatenate([first, last], axis=-1), axis=-1)
    middle = np.nanmedian(half, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(enough & (middle > 0), ends / middle, np.nan))


def _half_known(scores: Array) -> NDArray[np.bool_]:
    return np.asarray(2 * np.isfinite(scores).sum(axis=-1) >= scores.shape[-1])


def _total(values: Array) -> Array:
    total = np.asarray(values.sum(axis=-1))
    return np.where(total > 0, total, np.nan)
