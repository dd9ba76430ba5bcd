"""Values per step and layer -> scores with intervals, and bootstrap samples (numpy only)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lisa_analysis import statistics as st
from lisa_analysis.statistics import errors as er
from lisa_analysis.statistics.depth_modes import along_depth
from lisa_analysis.statistics.fit import Fit, Parts
from lisa_analysis.statistics.persistence import of_halves
from lisa_analysis.statistics.rows import condense, find_zeros, level

Array = NDArray[np.float64]

# Below this many effective observations nothing tells a layer's level from its slow course.
MIN_EFFECTIVE = 3.0
MIN_VISITS = 2
# Independent repetitions need no idea of their course.
MIN_INDEPENDENT = 6.0
# Degrees of freedom below which the error of an effect is not known itself.
MIN_DEGREES = 1.0


def fit_series(
    values: NDArray[np.floating],
    *,
    log: bool,
    clusters: NDArray[np.int64] | None,
    confidence: float,
    rng: np.random.Generator,
    replicates: int = st.bootstrap.REPLICATES,
    remove_common: bool = True,
    min_effective: float = MIN_EFFECTIVE,
    min_visits: float = MIN_VISITS,
    independent: bool = False,
    levelled: bool = True,
    stacks: Sequence[str] = (),
) -> Fit:
    """Average over time and find out how well the average is known.

    Parameters
    ----------
    values
        Shape (n, layers); NaN where a layer was not observed, inf for non-finite measurements,
        which are left out (diagnostics report them).
    log
        Average logarithms (multiplicative noise, heavy right tail). Zeros have none and are left
        out: see `Fit.zero` and `Fit.zeros`. Otherwise values are divided by what all layers share
        in size at a step, so that a common course is no noise either.
    clusters
        Shape (n,): period of every row when layers were sampled, else None.
    confidence, rng, replicates
        Of the intervals, and of the bootstrap: circular blocks over time, or whole intervals, all
        layers together.
    remove_common
        Remove what all layers share at a step before errors are estimated.
    min_effective, min_visits
        Effective observations in time, or periods, below which a layer has no
        interval.
    independent
        The rows are independent repetitions (batches of a probe), not a course over time: every
        row counts in full, and `min_effective` does not apply.
    levelled
        Divide values that are no logarithms by what all layers share in size at a step.
    stacks
        The stack of every layer, where there are several: each has a depth of its own.
    """
    values, zero, zeros = _to_average(values, log, levelled and not independent)
    series, labels = condense(values, clusters)
    effects = st.additive_effects(series, remove_common=remove_common and log)
    residuals = effects.residuals
    counts = np.isfinite(series).sum(axis=0)
    scale = np.ones(series.shape[1]) if log else _size(series)
    found, enough = _errors(effects, labels, scale, independent, min_effective, min_visits)
    length, parts = 1, None
    if labels is None and not independent:
        known = found.rho[np.isfinite(found.rho)]
        length = st.block_length(len(series), float(np.median(known)) if len(known) else 0.0)
        parts = _parts(residuals, effects.layer, scale)
    block = np.arange(len(series)) // length if labels is None or independent else labels
    shape = er.deviates(residuals, labels, found, effects.inverse, rng, replicates)
    enough &= np.isfinite(effects.layer) & (shape is not None)
    point, joint = _multiples(shape, found, enough, confidence)
    noise = _noise(shape, found, enough, rng)
    over_depth, widened = noise, np.ones(len(scale))
    if noise is not None and labels is None and not independent:
        over_depth, widened = _over_depth(noise, residuals, found, enough, stacks, rng)
    joint = joint * widened
    bounds = [effects.layer + sign * np.where(enough, reach * found.error, np.nan)
              for reach in (point, joint) for sign in (-1, 1)]  # fmt: skip
    samples = None
    if noise is not None and enough.any():
        samples = effects.layer + np.where(enough, noise, np.nan)
    back = np.exp if log else np.asarray
    low, high, joint_low, joint_high = map(back, bounds)
    return Fit(
        np.where(zero, 0.0, back(effects.layer)), low, high, effects.layer, samples, noise,
        found.n_eff, found.rho, counts,
        float(np.sqrt(np.nanmean(residuals**2))) if counts.any() else float("nan"),
        _block_means(residuals, effects.layer, block), length,
        _halves(series, block, remove_common and log), log, effects.adjusted, zero, zeros,
        joint_low, joint_high, found.error, found.degrees, found.departs, found.slow, parts,
        found.fresh, over_depth, labels is not None, found.passing, widened,
    )  # fmt: skip


def _to_average(
    values: NDArray[np.floating], log: bool, levelled: bool
) -> tuple[NDArray[np.floating], NDArray[np.bool_], NDArray[np.int64]]:
    """Values on the scale on which they are averaged; layers that are zero, and single zeros."""
    values = np.where(np.isfinite(values), values, np.nan)
    zero, zeros = find_zeros(values)
    values[:, zero] = np.nan
    if log:
        values[values <= 0] = np.nan
        np.log(values, out=values)
    elif levelled:
        values = level(values)
    return values, zero, zeros


def _over_depth(
    noise: Array, residuals: Array, found: er.Errors, enough: NDArray[np.bool_],
    stacks: Sequence[str], rng: np.random.Generator,
) -> tuple[Array, Array]:  # fmt: skip
    """Noise with what neighbours in depth share, and how much wider that makes a joint band."""
    over_depth, widened = np.empty_like(noise), np.empty(noise.shape[1])
    for layers in of_each_stack(stacks) or (np.ones(noise.shape[1], dtype=bool),):
        shared = along_depth(noise[:, layers], residuals[:, layers], enough[layers])
        over_depth[:, layers] = shared.stretch(noise[:, layers], rng)
        # A band for all layers must hold where a slow course moves many of them at once.
        widened[layers] = shared.widening(found.error[layers])
    return over_depth, widened


def of_each_stack(stacks: Sequence[str]) -> tuple[NDArray[np.bool_], ...]:
    """Mask of the layers of every stack, in order."""
    return tuple(np.array([own == stack for own in stacks]) for stack in dict.fromkeys(stacks))


def _errors(
    effects: st.Effects, labels: NDArray[np.int64] | None, scale: Array, independent: bool,
    min_effective: float, min_visits: float,
) -> tuple[er.Errors, NDArray[np.bool_]]:  # fmt: skip
    """Standard errors by what the rows are, and the layers with enough rows behind theirs."""
    if independent:
        found = er.of_repetitions(effects.residuals, scale)
        enough = found.n_eff >= MIN_INDEPENDENT
    elif labels is None:
        found = er.of_course(effects.residuals, scale)
        enough = found.n_eff >= min_effective
    else:
        found = er.of_visits(effects, labels, scale)
        enough = found.units >= min_visits
    with np.errstate(invalid="ignore"):
        return found, enough & (found.degrees >= MIN_DEGREES) & (found.error >= 0)


def _size(series: NDArray[np.floating]) -> Array:
    """Root mean square of every column: the scale that its noise is compared on."""
    observed = np.isfinite(series)
    squares = np.where(observed, series, 0.0).astype(np.float64) ** 2
    size = np.sqrt(squares.sum(axis=0) / np.maximum(observed.sum(axis=0), 1))
    return np.where(size > 0, size, 1.0)


def _multiples(
    shape: er.Deviates | None, found: er.Errors, known: NDArray[np.bool_], confidence: float
) -> tuple[Array, Array]:
    """How many standard errors the pointwise and the joint bounds reach, shape (layers,) each.

    The joint one is the max-t: the level at which the largest of the deviates of a sample is
    reached with the wanted confidence, as a quantile of each layer's own t.
    """
    degrees = np.where(known, found.degrees, np.inf)
    point = st.t_quantile(0.5 + confidence / 2, degrees)
    if shape is None or not known.any():
        return point, point
    largest = float(np.quantile(np.abs(shape.both[:, known]).max(axis=1), confidence))
    return er.reaches(largest, degrees, confidence)


def _noise(
    shape: er.Deviates | None, found: er.Errors, known: NDArray[np.bool_], rng: np.random.Generator
) -> Array | None:
    """Errors of the effects, stretched as Student's t is: their size was estimated as well."""
    if shape is None:
        return None
    degrees = float(np.median(found.degrees[known])) if known.any() else 2.0
    return np.asarray(shape.stretched(degrees, rng) * found.error)


def _parts(residuals: Array, effect: Array, scale: Array) -> Parts | None:
    """Both halves of a run with the errors that what varies within them leads to expect."""
    n = len(residuals) // 2
    if n < er.MIN_ROWS or np.isfinite(effect).sum() < 2:
        return None
    known = [np.isfinite(part) for part in (residuals[:n], residuals[-n:])]
    with np.errstate(invalid="ignore", divide="ignore"):
        means = [
            np.where(seen, part, 0.0).sum(axis=0) / seen.sum(axis=0)
            for seen, part in zip(known, (residuals[:n], residuals[-n:]), strict=True)
        ]
    within = er.of_memory(of_halves(residuals), known[0].sum(axis=0).astype(np.float64), scale)
    return Parts(effect + means[0], effect + means[1], within.error, within.degrees)


def _block_means(residuals: Array, effect: Array, block: NDArray[np.int64]) -> Array:
    if not len(residuals):
        return np.zeros((0, residuals.shape[1]))
    totals, counts = st.autocorrelation.cluster_sums(residuals, block)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(counts > 0, totals / counts, np.nan) + effect)


def _halves(
    series: NDArray[np.floating], block: NDArray[np.int64], remove_common: bool
) -> Array | None:
    """Effects from every other block; None when a layer is missing from a half."""
    _, index = np.unique(block, return_inverse=True)
    if not len(index) or index.max() < 3:
        return None
    halves = [
        st.additive_effects(series[index % 2 == side], remove_common=remove_common).layer
        for side in (0, 1)
    ]
    return np.stack(halves)
