"""Values per step and layer -> scores with intervals, and bootstrap samples (numpy only)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis import statistics as st
from lisa_analysis.statistics import errors as er
from lisa_analysis.statistics.depth_modes import along_depth
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


@dataclass(frozen=True, eq=False)
class Parts:
    """The earlier and the later half of a run, shape (layers,) each, on the scale of the fit.

    `error` is the standard error of one half by what varies within the halves, `degrees` its
    degrees of freedom.
    """

    early: Array
    late: Array
    error: Array
    degrees: Array


@dataclass(frozen=True, eq=False)
class Fit:
    """Scores of the columns of a series.

    Attributes
    ----------
    score, low, high
        Shape (layers,); bounds are NaN where the data are insufficient, all NaN where a layer
        was never observed. A layer of `zero` has the score 0 and no bounds.
    effect
        Shape (layers,): the score on the scale of the fit (logarithm for `log`); NaN for `zero`.
    samples
        Shape (replicates, layers) on the scale of the fit, NaN for layers without an interval;
        None when no layer has one.
    noise
        Shape (replicates, layers): deviations of the samples from `effect`, there for every layer
        with a standard error; None otherwise.
    n_eff, rho, observations
        Shape (layers,).
    within
        Standard deviation over time of a layer about its effect, pooled over layers.
    blocks
        Shape (blocks, layers): means of the adjusted series over bootstrap blocks or periods.
    length
        Rows per block (1 for periods).
    halves
        Effects from odd and from even blocks, shape (2, layers), or None.
    zero
        Shape (layers,): observed, and exactly zero every time. No average of zeros says how the
        layer compares with others, so that it takes no part in the fit.
    zeros
        Shape (layers,): observations that were exactly zero. A logarithmic fit leaves them out;
        steps at which all layers are zero (learning rate 0) are not counted.
    joint_low, joint_high
        Shape (layers,): bounds that hold for all layers at once at the stated confidence (max-t).
    error, degrees
        Shape (layers,): standard error of `effect`, and its degrees of freedom.
    departs
        Shape (layers,): layers whose memory from step to step is another than the others'.
    slow
        Shape (layers,): share of the error that comes from courses slower than a fifth of the run.
    parts
        Both halves of the run, or None where the rows are no course in time.
    fresh
        Share of an observation's variance that the next one knows nothing of.
    over_depth
        `noise` with what neighbouring layers share: for courses over depth.
    adjusted_by_visits
        Whether layers were seen in periods only (LISA).
    passing
        Share of an observation's variance that is forgotten within a fifth of the run.
    widened
        Shape (layers,): times that a layer's error is larger where all layers are judged at once,
        for the slow courses that it shares with its neighbours in depth.
    """

    score: Array
    low: Array
    high: Array
    effect: Array
    samples: Array | None
    noise: Array | None
    n_eff: Array
    rho: Array
    observations: NDArray[np.int64]
    within: float
    blocks: Array
    length: int
    halves: Array | None
    log: bool
    adjusted: str
    zero: NDArray[np.bool_]
    zeros: NDArray[np.int64]
    joint_low: Array = field(default_factory=lambda: np.zeros(0))
    joint_high: Array = field(default_factory=lambda: np.zeros(0))
    error: Array = field(default_factory=lambda: np.zeros(0))
    degrees: Array = field(default_factory=lambda: np.zeros(0))
    departs: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=bool))
    slow: Array = field(default_factory=lambda: np.zeros(0))
    parts: Parts | None = None
    fresh: float = 1.0
    over_depth: Array | None = None
    adjusted_by_visits: bool = False
    passing: float = 1.0
    widened: Array = field(default_factory=lambda: np.zeros(0))

    @property
    def seen(self) -> NDArray[np.bool_]:
        """Layers that were observed, and not as zero throughout."""
        return np.isfinite(self.effect)

    @property
    def known(self) -> NDArray[np.bool_]:
        """Layers with an interval."""
        return np.isfinite(self.low) & np.isfinite(self.high) & self.seen

    def only(self, layers: NDArray[np.bool_]) -> "Fit":
        """Return the fit of some of the layers, as it came out among all."""
        kept: dict[str, Any] = {
            f.name: value[..., layers]
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), np.ndarray) and value.shape[-1:] != (0,)
        }
        if self.parts is not None:
            halves = {f.name: getattr(self.parts, f.name)[layers] for f in fields(self.parts)}
            kept["parts"] = Parts(**halves)
        return replace(self, **kept)

    def scale(self, effects: Array) -> Array:
        """Back from the scale of the fit to that of the scores."""
        return np.exp(effects) if self.log else effects


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
    values = np.where(np.isfinite(values), values, np.nan)
    zero, zeros = find_zeros(values)
    values[:, zero] = np.nan
    if log:
        values[values <= 0] = np.nan
        np.log(values, out=values)
    elif levelled and not independent:
        values = level(values)
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
        over_depth, widened = np.empty_like(noise), np.empty(len(scale))
        for layers in of_each_stack(stacks) or (np.ones(len(scale), dtype=bool),):
            shared = along_depth(noise[:, layers], residuals[:, layers], enough[layers])
            over_depth[:, layers] = shared.stretch(noise[:, layers], rng)
            # A band for all layers must hold where a slow course moves many of them at once.
            widened[layers] = shared.widening(found.error[layers])
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
