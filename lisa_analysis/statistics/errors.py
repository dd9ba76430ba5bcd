"""Standard errors of layer effects: of independent rows, of a course in time, of visits (LISA)."""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.statistics.autocorrelation import cluster_sums, intraclass_correlation
from lisa_analysis.statistics.bootstrap import block_totals, cluster_totals, t_quantile
from lisa_analysis.statistics.effects import Effects
from lisa_analysis.statistics.moderation import moderated_variance
from lisa_analysis.statistics.persistence import MIN_ROWS, Persistence, persistence_of

Array = NDArray[np.float64]

# Share of a variance that a mean takes with it: beyond half of it the correction is a guess.
MOST_TAKEN = 0.5

__all__ = [
    "MIN_ROWS",
    "Errors",
    "deviates",
    "of_course",
    "of_memory",
    "of_repetitions",
    "of_visits",
    "reaches",
]


@dataclass(frozen=True, eq=False)
class Errors:
    """How well the effects of layers are known; NaN where nothing can be said.

    Attributes
    ----------
    error
        Shape (layers,): standard error of the effect.
    degrees
        Shape (layers,): degrees of freedom of Student's t with it.
    n_eff
        Shape (layers,): effective number of observations.
    rho
        Shape (layers,): correlation of neighbouring observations.
    slow
        Shape (layers,): share of the variance that comes from courses slower than a fifth of the
        run; 0 where rows are independent.
    departs
        Shape (layers,): layers with another memory than the others.
    units
        Shape (layers,): visits of each layer, or rows where all are seen together.
    fresh
        Share of an observation's variance that the next one knows nothing of.
    passing, slowest
        See `Persistence`; None where the rows are no course in time.
    """

    error: Array
    degrees: Array
    n_eff: Array
    rho: Array
    slow: Array
    departs: NDArray[np.bool_]
    units: Array
    fresh: float = 1.0
    passing: float = 1.0
    slowest: Array | None = None


def of_repetitions(residuals: Array, scale: Array) -> Errors:
    """Errors where the rows are independent repetitions.

    Parameters
    ----------
    residuals
        Shape (n, layers), each column centred; NaN where not observed.
    scale
        Shape (layers,): what the layers' variances are compared on (1 for logarithms).
    """
    observed = np.isfinite(residuals)
    n = observed.sum(axis=0).astype(np.float64)
    squares = np.where(observed, residuals, 0.0) ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = squares.sum(axis=0) / (n - 1) / scale**2
        shared = moderated_variance(np.where(n > 1, variance, np.nan), np.maximum(n - 1, 0))
        error = np.sqrt(shared.variance / n) * scale
    nothing = np.zeros(len(n))
    return Errors(error, shared.degrees, n, nothing, nothing, shared.departs, n)


def of_course(residuals: Array, scale: Array) -> Errors:
    """Errors of means over a course in time, by the memory that the layers have in common.

    Parameters are those of `of_repetitions`. The variance of an observation is moderated over
    layers, and so is how far a layer's memory is its own (see `persistence_of`).
    """
    observed = np.isfinite(residuals).sum(axis=0).astype(np.float64)
    return of_memory(persistence_of(residuals), observed, scale)


def of_memory(found: Persistence, observed: Array, scale: Array) -> Errors:
    """Errors of means of so many observations with a memory that is known."""
    with np.errstate(invalid="ignore", divide="ignore"):
        degrees = np.maximum(np.nan_to_num(found.degrees * observed) - 1, 0.0)
        degrees = np.where(np.isfinite(found.variance), np.maximum(degrees, 1.0), 0.0)
        shared = moderated_variance(found.variance / scale**2, degrees)
        error = np.sqrt(shared.variance * found.stretch / observed) * scale
        both = 1 / (1 / shared.degrees + 1 / found.worth)
        n_eff = np.clip(observed / found.stretch, np.minimum(observed, 1), observed)
    known = np.isfinite(found.variance)
    return Errors(
        np.where(known, error, np.nan), np.where(known, both, np.nan),
        np.where(known, n_eff, np.minimum(observed, 1)), found.neighbours, found.slow,
        found.departs, observed, found.fresh, found.passing, found.slowest,
    )  # fmt: skip


def of_visits(effects: Effects, labels: NDArray[np.int64], scale: Array) -> Errors:
    """Errors where few layers are seen at a time: a period is one observation.

    Parameters
    ----------
    effects
        The fit of the layers.
    labels
        Shape (n,): period of every row.
    scale
        As in `of_repetitions`.

    Notes
    -----
    With A the layers active in a period of w rows, P_A the projector that takes their mean
    out, and D the (moderated) variances of a layer's mean in a period, the effects have the
    covariance M (Σ w² P_A D P_A) M with M the inverse of the fit's normal equations. A layer's
    own variance is its squared residuals over what the fit has left of its degrees of freedom.
    """
    totals, rows = cluster_sums(effects.residuals, labels)
    active = (rows > 0).astype(np.float64)
    visits = active.sum(axis=0)
    means = totals / np.maximum(rows, 1)
    weight, size = rows.max(axis=1), np.maximum(active.sum(axis=1), 1)
    by_steps = effects.adjusted == "steps"
    left = (
        _left_by_steps(active, weight, size, effects.inverse)
        if by_steps
        else _left_by_trend(visits, trend=effects.adjusted == "trend")
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = np.where(left > 0.25, (means**2).sum(axis=0) / left / scale**2, np.nan)
        shared = moderated_variance(variance, np.where(left > 0.25, left, 0.0))
        spread = np.where(visits > 0, shared.variance, 0.0)
        if by_steps:
            error = _error_by_steps(active, weight, size, effects.inverse, spread)
        else:
            squares = (rows**2).sum(axis=0) / np.maximum(rows.sum(axis=0), 1) ** 2
            error = np.sqrt(spread * squares + _error_of_trend(active, labels, spread, effects))
        stretch, worth = _between_visits(means / np.sqrt(spread), active)
        # Residuals about a mean of visits that go together are too small by more than one degree
        # of freedom: the mean took its own variance with it.
        once = 1 / np.maximum(visits, 2)
        taken = np.clip(stretch * once, once, np.maximum(once, MOST_TAKEN))
        error = error * np.sqrt(stretch * (1 - once) / (1 - taken)) * scale
        degrees = 1 / (1 / shared.degrees + 1 / worth)
    known = (visits > 0) & np.isfinite(error) & np.isfinite(shared.variance)
    counts = rows.sum(axis=0)
    alike = intraclass_correlation(effects.residuals, labels)
    # Design effect of a cluster sample (Kish 1965).
    n_eff = counts / (1 + (np.maximum(counts / np.maximum(visits, 1), 1) - 1) * alike)
    nothing = np.zeros(len(visits))
    return Errors(
        np.where(known, error, np.nan), np.where(known, degrees, np.nan), n_eff,
        np.full(len(visits), alike), nothing, shared.departs, visits,
    )  # fmt: skip


def _left_by_steps(active: Array, weight: Array, size: Array, inverse: Array) -> Array:
    """Degrees of freedom of every layer that means per step and layer effects leave."""
    beside = active @ inverse
    total = (beside * active).sum(axis=1)
    taken = np.diag(inverse) - 2 * beside / size[:, None] + (total / size**2)[:, None]
    return np.asarray((active * (1 - 1 / size[:, None] - weight[:, None] * taken)).sum(axis=0))


def _left_by_trend(visits: Array, *, trend: bool) -> Array:
    parameters = (visits > 0).sum() + 2 * trend
    return np.asarray(visits * max(1 - parameters / max(visits.sum(), 1.0), 0.0))


def _error_by_steps(
    active: Array, weight: Array, size: Array, inverse: Array, spread: Array
) -> Array:
    square = weight**2
    pairs = (active * (square / size)[:, None]).T @ active
    inside = (active * (square * (active @ spread) / size**2)[:, None]).T @ active
    middle = np.diag(square @ active * spread) - (spread[:, None] + spread) * pairs + inside
    return np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", inverse, middle, inverse), 0.0))


def _error_of_trend(
    active: Array, labels: NDArray[np.int64], spread: Array, effects: Effects
) -> Array:
    """Variance that a fitted quadratic course adds to every layer's effect."""
    known = spread[np.isfinite(spread)]
    if effects.adjusted != "trend" or not len(known):
        return np.zeros(active.shape[1])
    time = np.linspace(-1.0, 1.0, len(labels))
    basis, rows = cluster_sums(np.stack([time, time**2], axis=1), labels)
    basis = basis / np.maximum(rows, 1)
    visits = np.maximum(active.sum(axis=0), 1)
    level = (active.T @ basis) / visits[:, None]
    gram = basis.T @ (active.sum(axis=1)[:, None] * basis) - level.T @ (visits[:, None] * level)
    away = level - level[active.any(axis=0)].mean(axis=0)
    inverse = np.linalg.pinv(gram, hermitian=True)
    return np.asarray(np.einsum("ij,jk,ik->i", away, inverse, away) * known.mean())


def _between_visits(deviates: Array, active: Array, most: int = 20) -> tuple[Array, float]:
    """What the memory from visit to visit adds to the variance of every layer's mean, at least 1.

    And how many degrees of freedom that was read from: visits over lags (Priestley 1981, 6.2.4).

    1 + 2 Σ_h ρ_h p_h with p_h the layer's share of visits that had another h periods before, and
    ρ_h of all layers together, as long as it is positive. Residuals about a mean of v visits are
    by 1/v of that mean's own variance too little alike, which is put back.
    """
    filled = np.where((active > 0) & np.isfinite(deviates), deviates, 0.0)
    square, visits = float((filled**2).sum()), active.sum(axis=0)
    together = float(visits.sum())
    stretch = np.ones(len(visits))
    if square <= 0:
        return stretch, float("inf")
    lost, common, products, pairs = float((visits > 0).sum()) / together, 1.0, 0.0, 0.0
    found: list[tuple[float, Array]] = []
    for lag in range(1, min(most, len(filled) // 4) + 1):
        own = (active[lag:] * active[:-lag]).sum(axis=0)
        product, count = float((filled[lag:] * filled[:-lag]).sum()) / square, own.sum() / together
        if product + count * lost * common <= 0:
            break
        products, pairs = products + product, pairs + count
        common = max((1 + 2 * products) / max(1 - 2 * pairs * lost, 0.2), 1.0)
        found.append((product / max(count, 1e-12), own / np.maximum(visits, 1)))
    for correlation, share in found:
        stretch += 2 * min(max(correlation + lost * common, 0.0), 1.0) * share
    return stretch, together / (2 * len(found) + 1) if found else float("inf")


def reaches(largest: float, degrees: Array, confidence: float) -> tuple[Array, Array]:
    """How many standard errors the bounds of one layer, and those of all at once, are away.

    Parameters
    ----------
    largest
        The level that the largest of all layers' standard normal deviates reaches with
        `confidence`; its quantile is taken of each layer's own t.
    degrees
        Shape (layers,).
    confidence
        Of the bounds.
    """
    single = 0.5 + confidence / 2
    upper = min(max(NormalDist().cdf(largest), single), 1 - 1e-9)
    return t_quantile(single, degrees), t_quantile(upper, degrees)


@dataclass(frozen=True, eq=False)
class Deviates:
    """Standardised errors of the effects in bootstrap samples.

    Attributes
    ----------
    common, alone
        Shape (replicates, layers): what the layers' errors have in common, and the rest of each;
        their sum has variance 1.
    units
        How many repetitions `common` was read from.
    """

    common: Array
    alone: Array
    units: float

    @property
    def both(self) -> Array:
        """Shape (replicates, layers)."""
        return self.common + self.alone

    def stretched(self, degrees: float, rng: np.random.Generator) -> Array:
        """Stretched as Student's t is: neither the size nor what is common was known."""
        rows = len(self.common)
        few, many = max(self.units, 2.0), max(degrees, 2.0)
        tails = [np.sqrt(df / rng.chisquare(df, size=rows))[:, None] for df in (few, many)]
        return np.asarray(self.common * tails[0] + self.alone * tails[1])


def deviates(
    residuals: Array,
    labels: NDArray[np.int64] | None,
    found: Errors,
    inverse: Array,
    rng: np.random.Generator,
    replicates: int,
) -> Deviates | None:
    """Bootstrap samples of the errors, standardised; None with fewer than four rows.

    Of a course in time the slowest waves are combined at random, of others rows or activation
    periods are drawn, with all layers together: the samples keep what the layers' errors have in
    common. Few of them make up correlations: what their number alone would give is taken out
    again, by as much independent noise.
    """
    filled = np.nan_to_num(residuals)
    if len(filled) < 4:
        return None
    if found.slowest is not None:
        units = float(len(found.slowest))
        drawn = rng.standard_normal((replicates, len(found.slowest))) @ found.slowest
    elif labels is None:
        units = float(len(filled))
        drawn = block_totals(filled, 1, rng, replicates) @ inverse.T
    else:
        units = float(len(np.unique(labels)))
        drawn = cluster_totals(filled, labels, rng, replicates) @ inverse.T
    size = drawn.std(axis=0)
    known = size > 0
    common = np.zeros_like(drawn)
    common[:, known] = drawn[:, known] / size[known]
    layers, made_up = int(known.sum()), np.ones(drawn.shape[1])
    if layers > 1 and units > 1:
        correlation = common[:, known].T @ common[:, known] / replicates
        square = (float((correlation**2).sum()) - layers) / (layers * (layers - 1))
        alike = float(np.clip((square - 1 / units) / (1 - 1 / units), 0.0, 1.0))
        made_up[known] = np.clip((1 - alike) / units / max(square, 1e-12), 0.0, 1.0)
    else:
        made_up[known] = 0.0
    alone = np.sqrt(made_up) * rng.standard_normal(drawn.shape)
    return Deviates(np.sqrt(1 - made_up) * common, alone, units - 1)
