"""Values per step and layer -> scores with bootstrap samples of them (numpy only)."""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis import statistics as st

Array = NDArray[np.float64]

# Below this many effective observations an interval would be wrong far more often than it says.
MIN_EFFECTIVE = 25.0
MIN_VISITS = 3
# Of independent repetitions fewer will do: nothing about their course has to be estimated.
MIN_INDEPENDENT = 6.0
# Longer series are averaged over neighbouring steps first: time and memory stay bounded.
MAX_ROWS = 8192


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
        Shape (replicates, layers) on the scale of the fit, NaN for `zero`; None when any other
        layer's data are insufficient.
    noise
        Shape (replicates, layers): deviations of the samples from `effect`, always there when
        anything could be resampled; None otherwise.
    n_eff, rho, observations
        Shape (layers,).
    within
        Standard deviation over time of a layer about its effect, pooled over layers.
    blocks
        Shape (blocks, layers): means of the adjusted series over bootstrap blocks or intervals.
    length
        Rows per block (1 for activation intervals).
    halves
        Effects from odd and from even blocks, shape (2, layers), or None.
    zero
        Shape (layers,): observed, and exactly zero every time. No average of zeros says how the
        layer compares with others, so that it takes no part in the fit.
    zeros
        Shape (layers,): observations that were exactly zero. A logarithmic fit leaves them out;
        steps at which all layers are zero (learning rate 0) are not counted.
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

    @property
    def seen(self) -> NDArray[np.bool_]:
        """Layers that were observed, and not as zero throughout."""
        return np.isfinite(self.effect)

    def only(self, layers: NDArray[np.bool_]) -> "Fit":
        """Return the fit of some of the layers, as it came out among all."""
        parts: dict[str, Any] = {
            f.name: value[..., layers]
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), np.ndarray)
        }
        return replace(self, **parts)

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
) -> Fit:
    """Average over time and find out how well the average is known.

    Parameters
    ----------
    values
        Shape (n, layers); NaN where a layer was not observed, inf for non-finite measurements,
        which are left out (diagnostics report them).
    log
        Average logarithms (multiplicative noise, heavy right tail). Zeros have none and are left
        out: see `Fit.zero` and `Fit.zeros`.
    clusters
        Shape (n,): activation interval of every row when layers were sampled, else None.
    confidence, rng, replicates
        Of the bootstrap: circular blocks over time, or whole intervals, all layers together.
    remove_common
        Remove what all layers share at a step before errors are estimated.
    min_effective, min_visits
        Effective observations, and blocks or intervals, below which a layer has no interval.
    independent
        The rows are independent repetitions (batches of a probe), not a course over time: every
        row counts in full, and `min_effective` does not apply.
    """
    values = np.where(np.isfinite(values), values, np.nan)
    zero, zeros = _zeros(values)
    values[:, zero] = np.nan
    if log:
        values[values <= 0] = np.nan
        np.log(values, out=values)
    if clusters is not None and not log:
        values = _level(values)
    series, labels = condense(values, clusters)
    effects = st.additive_effects(series, remove_common=remove_common and log)
    residuals = effects.residuals
    counts = np.isfinite(series).sum(axis=0)
    rho = np.zeros(series.shape[1]) if independent else st.ar1(residuals)
    if independent:
        length, shown = 1, 1.0
        block = np.arange(len(series))
        n_eff = units = counts.astype(np.float64)
        min_effective = MIN_INDEPENDENT
    elif labels is None:
        known = rho[np.isfinite(rho)] if np.isfinite(rho).any() else np.zeros(1)
        length = st.block_length(len(series), float(np.quantile(known, 0.75)))
        shown = st.block_deflation(float(np.median(known)), length)
        # However strong the correlation, what was seen was seen once.
        n_eff = np.maximum(np.nan_to_num(st.effective_size(counts, rho)), np.minimum(counts, 1))
        units = np.full(series.shape[1], len(series) / length)
        block = np.arange(len(series)) // length
    else:
        length, shown = 1, 1.0
        block = labels
        n_eff, units = _cluster_size(residuals, labels, counts)
    enough = (n_eff >= min_effective) & (units >= min_visits)
    noise = _noise(residuals, labels, length, effects.inverse, rng, replicates)
    if noise is not None:
        noise /= np.sqrt(shown)
    low, high = _bounds(effects.layer, noise, units, enough, confidence)
    seen = np.isfinite(effects.layer)
    complete = bool((seen | zero).all() and seen.any() and enough[seen].all())
    samples = effects.layer + _stretch(noise, units) if complete and noise is not None else None
    back = np.exp if log else np.asarray
    score = np.where(zero, 0.0, back(effects.layer))
    return Fit(
        score, back(low), back(high), effects.layer, samples, noise, n_eff, rho,
        counts, float(np.sqrt(np.nanmean(residuals**2))) if counts.any() else float("nan"),
        _block_means(residuals, effects.layer, block), length,
        _halves(series, block, remove_common and log), log, effects.adjusted, zero, zeros,
    )  # fmt: skip


def condense(
    series: NDArray[np.floating], clusters: NDArray[np.int64] | None
) -> tuple[NDArray[np.floating], NDArray[np.int64] | None]:
    """Average neighbouring rows (never across an activation interval) down to about MAX_ROWS."""
    n = len(series)
    if n <= MAX_ROWS:
        return series, clusters
    width = -(-n // MAX_ROWS)
    starts = np.arange(n) % width == 0
    if clusters is not None:
        changes = np.concatenate([[True], np.diff(clusters) != 0])
        begin = np.maximum.accumulate(np.where(changes, np.arange(n), 0))
        starts = (np.arange(n) - begin) % width == 0
    rows = np.flatnonzero(starts)
    means = np.empty((len(rows), series.shape[1]))
    # A few thousand rows at a time: the working set stays in the cache, and no copy is made.
    edges = [*rows.tolist(), n]
    for first in range(0, len(rows), 256):
        last = min(first + 256, len(rows))
        block = series[edges[first] : edges[last]]
        known = np.isfinite(block)
        cuts = rows[first:last] - edges[first]
        total = np.add.reduceat(np.where(known, block, 0), cuts, axis=0, dtype=np.float64)
        count = np.add.reduceat(known, cuts, axis=0, dtype=np.int64)
        means[first:last] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return means, None if clusters is None else clusters[rows]


def _zeros(values: NDArray[np.floating]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which layers are zero whenever they were observed, and how often every layer is."""
    is_zero = values == 0
    known = np.isfinite(values)
    zero = known.any(axis=0) & (is_zero | ~known).all(axis=0)
    # A learning rate of 0 says nothing of a layer.
    together = known.sum(axis=1)
    idle = (together > 1) & (is_zero.sum(axis=1) == together)
    return zero, np.where(zero, known.sum(axis=0), is_zero[~idle].sum(axis=0))


def _level(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """Divide quantities that may be negative by their common size at each step.

    When layers are observed at different times, a plain mean would credit those drawn while all
    of them were large. What they share is fitted to ln|x|; identical layers come out equal.
    """
    size = np.abs(values)
    with np.errstate(divide="ignore"):
        logs = np.where(size > 0, np.log(size), np.nan)
    common = st.additive_effects(logs).common
    return values / np.exp(common)[:, None]


def _cluster_size(
    residuals: Array, labels: NDArray[np.int64], counts: NDArray[np.int64]
) -> tuple[Array, Array]:
    """Effective size and number of activation intervals of every layer."""
    _, per_cluster = st.autocorrelation.cluster_sums(residuals, labels)
    visits = (per_cluster > 0).sum(axis=0).astype(np.float64)
    shared = st.intraclass_correlation(residuals, labels)
    size = counts / np.maximum(visits, 1)
    # Design effect of a cluster sample (Kish 1965).
    return counts / (1 + (np.maximum(size, 1) - 1) * shared), visits


def _noise(
    residuals: Array,
    labels: NDArray[np.int64] | None,
    length: int,
    inverse: Array,
    rng: np.random.Generator,
    replicates: int,
) -> Array | None:
    """Deviations of the layer effects in bootstrap samples."""
    filled = np.nan_to_num(residuals)
    if len(filled) < 4:
        return None
    if labels is None:
        totals = st.block_totals(filled, length, rng, replicates)
    else:
        totals = st.cluster_totals(filled, labels, rng, replicates)
    return np.asarray(totals @ inverse.T)


def _stretch(noise: Array, units: Array) -> Array:
    """Samples with the variance that the small number of units took away."""
    units = np.maximum(units, 2.0)
    return noise * np.sqrt(units / (units - 1))


def _bounds(
    effect: Array,
    noise: Array | None,
    units: Array,
    enough: NDArray[np.bool_],
    confidence: float,
) -> tuple[Array, Array]:
    if noise is None:
        return np.full(effect.shape, np.nan), np.full(effect.shape, np.nan)
    low, high = st.expanded_interval(effect, effect + noise, units, confidence)
    return np.where(enough, low, np.nan), np.where(enough, high, np.nan)


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
