"""Scores of several seeds -> their mean with intervals, and the spread between seeds (numpy)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lisa_analysis import statistics as st
from lisa_analysis.statistics.moderation import moderated_variance

Array = NDArray[np.float64]

REPLICATES = 1000
# A bootstrap sample of two seeds may be anywhere: beyond e^±50 no number is left.
_FAR = 50.0


@dataclass(frozen=True, eq=False)
class SeedMeans:
    """Means of layers over seeds.

    Attributes
    ----------
    effect
        Shape (layers,): mean over seeds, on the scale of the values.
    relative
        Shape (seeds, layers): the values with what all layers of a seed share taken off (`log`)
        or divided out, so that a residual is `relative - effect`.
    error, degrees
        Shape (layers,): standard error of `effect` from moderated variances, and the degrees of
        freedom of its t; NaN for a layer that fewer than two seeds know.
    low, high, joint_low, joint_high
        Shape (layers,): bounds of each layer by itself, and of all layers at once (Šidák).
    seeds
        Shape (layers,): seeds that know the layer.
    total
        Shape (layers,): standard deviation between seeds, not moderated.
    noise
        Shape (replicates, layers): deviations of resampled means; NaN where `error` is.
    departs
        Shape (layers,): layers that differ between seeds more than the others do.
    """

    effect: Array
    relative: Array
    error: Array
    degrees: Array
    low: Array
    high: Array
    joint_low: Array
    joint_high: Array
    seeds: NDArray[np.int64]
    total: Array
    noise: Array
    departs: NDArray[np.bool_]


def seed_means(
    values: Array,
    *,
    log: bool,
    confidence: float,
    rng: np.random.Generator,
    ordered: bool = True,
    replicates: int = REPLICATES,
) -> SeedMeans:
    """Average scores over seeds and find out how well the average is known.

    Parameters
    ----------
    values
        Shape (seeds, layers), logarithms for `log`; NaN where a seed does not know a layer.
    log
        Take the mean of every seed's layers off; otherwise divide by their common size.
    confidence
        Coverage of the bounds.
    rng, replicates
        Of the resampled means.
    ordered
        Whether neighbouring columns are neighbours in depth, whose deviations may go together.

    Returns
    -------
    SeedMeans
        Student's t over seeds with variances moderated over layers (`moderated_variance`), since
        few seeds tell little of one layer. Where deviations of neighbouring layers go together,
        all layers have together only as many degrees of freedom as (1 − ρ²)/(1 + ρ²) of them
        would (Bartlett 1946). Resampled means are Gaussian combinations of the seeds' residuals
        with the tail of t: every contrast of layers has the spread that seeds show.
    """
    relative, effect = _relative(np.asarray(values, dtype=np.float64), log)
    known = np.isfinite(relative)
    seeds = known.sum(axis=0)
    residuals = np.where(known, relative - effect, 0.0)
    enough = seeds > 1
    own = np.maximum(seeds - 1, 1)
    layers = max(int(enough.sum()), 2)
    # What a seed's layers share was estimated from them as well.
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = (residuals**2).sum(axis=0) / own * (layers / (layers - 1) if log else 1.0)
    variance[~enough] = np.nan
    size = np.ones(len(effect)) if log else _size(relative, known)
    found = moderated_variance(variance / size**2, np.where(enough, seeds - 1, 0))
    together = float((seeds[enough] - 1).sum()) * (_apart(residuals[:, enough]) if ordered else 1.0)
    degrees = np.where(found.departs, found.degrees, np.minimum(found.degrees, max(together, 1.0)))
    error = np.sqrt(found.variance * size**2 / np.maximum(seeds, 1))
    error[~enough], degrees[~enough] = np.nan, np.nan
    reach, joint = _reaches(degrees, int(enough.sum()), confidence)
    return SeedMeans(
        effect, relative, error, degrees, effect - reach * error, effect + reach * error,
        effect - joint * error, effect + joint * error, seeds, np.sqrt(variance),
        _noise(residuals, seeds, rng, replicates), found.departs,
    )  # fmt: skip


def _relative(values: Array, log: bool) -> tuple[Array, Array]:
    """Values freed from what the layers of a seed share, and their means over seeds."""
    if log:
        found = st.additive_effects(values)
        if found.adjusted == "trend":  # seeds are no course in time: each keeps its level
            found = st.additive_effects(values, remove_common=False)
        return found.layer + found.residuals, found.layer
    with np.errstate(divide="ignore", invalid="ignore"):
        sizes = np.where(values != 0, np.log(np.abs(values)), np.nan)
    common = np.exp(st.additive_effects(sizes).common)
    relative = values / (common / common.mean())[:, None]
    known = np.isfinite(relative)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, relative, 0.0).sum(axis=0) / known.sum(axis=0)
    return relative, mean


def _size(relative: Array, known: NDArray[np.bool_]) -> Array:
    """Root mean square over seeds of every layer: the scale that its spread is compared on."""
    squares = np.where(known, relative, 0.0) ** 2
    size = np.sqrt(squares.sum(axis=0) / np.maximum(known.sum(axis=0), 1))
    return np.where(size > 0, size, 1.0)


def _apart(residuals: Array) -> float:
    """How many independent layers one layer is worth, by the correlation of neighbours."""
    scale = np.sqrt((residuals**2).mean(axis=0))
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = np.nan_to_num(residuals / scale)
    if unit.shape[1] < 4:
        return 1.0
    rho = float(np.clip((unit[:, 1:] * unit[:, :-1]).mean(), 0.0, 0.99))
    return (1 - rho**2) / (1 + rho**2)


def _reaches(degrees: Array, layers: int, confidence: float) -> tuple[Array, Array]:
    """Standard errors that the bounds of one layer, and those of all, are away from the mean."""
    df = np.where(np.isfinite(degrees) | np.isinf(degrees), degrees, 1.0)
    all_of_them = 0.5 + confidence ** (1 / max(layers, 1)) / 2
    return st.t_quantile(0.5 + confidence / 2, df), st.t_quantile(all_of_them, df)


def _noise(
    residuals: Array, seeds: NDArray[np.int64], rng: np.random.Generator, replicates: int
) -> Array:
    count = len(residuals)
    normal = rng.standard_normal((replicates, count))
    tail = np.sqrt((count - 1) / rng.chisquare(max(count - 1, 1), replicates))
    with np.errstate(divide="ignore", invalid="ignore"):
        noise = tail[:, None] * (normal @ residuals) / np.sqrt(seeds * (seeds - 1.0))
    noise[:, seeds < 2] = np.nan
    return np.asarray(np.clip(noise, -_FAR, _FAR))
