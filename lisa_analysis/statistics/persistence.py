"""How long the layers of a run remember: one pooled autocorrelation, and layers that differ.

The memory is a mixture of decays, fitted to the power of the residuals by frequency, see `decays`;
pooled over layers, but for those that keep another memory than the rest.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.statistics.decays import Mixture, cosines, expected_power, fit, fits, lowest
from lisa_analysis.statistics.hidden import LEAST_ROWS, Allowed, allowed
from lisa_analysis.statistics.moderation import moderated_variance

Array = NDArray[np.float64]

# Fewer rows than these tell nothing about their own course.
MIN_ROWS = 8
# A layer that was seen at fewer of the rows has no spectrum of its own.
SEEN = 0.9
PASSES = 3
# Fewer layers than these tell too little of a slow course for the likeliest one to be believed.
FEW_LAYERS = 16
# Waves that what layers have in common is read from.
MIN_WAVES, MOST_WAVES = 3, 64


@dataclass(frozen=True, eq=False)
class Persistence:
    """What one observation after another is worth.

    Attributes
    ----------
    stretch
        Shape (layers,): n · Var(mean) over the variance of one observation; 1 for independent
        observations, (1 + ρ)/(1 − ρ) for a long AR(1). n over it is the effective number.
    variance
        Shape (layers,): variance of one observation, the part that went into the mean added back.
    worth
        Shape (layers,): degrees of freedom behind `stretch`.
    degrees
        Degrees of freedom of a layer's `variance` for every row that it was seen.
    neighbours
        Shape (layers,): correlation of neighbouring observations.
    slow
        Share of the variance of a mean that comes from courses slower than a fifth of the run.
    departs
        Shape (layers,): whether a layer keeps another memory than the others, and has its own.
    together
        How many layers' worth of independent courses there are.
    fresh
        Share of an observation's variance that the next one knows nothing of.
    passing
        Share of it that is forgotten within a fifth of the run.
    slowest
        Shape (waves, layers): the course at its slowest frequencies, as deviates of variance 1,
        which show what the errors of the layers' means have in common; 0 for layers without any.
    """

    stretch: Array
    variance: Array
    worth: Array
    degrees: Array
    neighbours: Array
    slow: Array
    departs: NDArray[np.bool_]
    together: float
    fresh: float = 1.0
    passing: float = 1.0
    slowest: Array | None = None


def persistence_of(residuals: Array, hidden: bool = True) -> Persistence:
    """Fit the memory of residuals from one row to the next.

    Parameters
    ----------
    residuals
        Shape (n, layers), each column centred; NaN where a layer was not observed.
    hidden
        Where few layers pool, allow for slow courses that they do not exclude, see
        `hidden.allowed`.

    Returns
    -------
    Persistence
        All NaN below `MIN_ROWS` rows, and for layers that do not vary.
    """
    residuals = np.asarray(residuals, dtype=np.float64)
    n, layers = residuals.shape
    observed = np.isfinite(residuals)
    counts = observed.sum(axis=0)
    filled = np.where(observed, residuals, 0.0)
    raw = np.einsum("ij,ij->j", filled, filled) / np.maximum(counts, 1)
    usable = (counts >= np.maximum(MIN_ROWS, SEEN * n)) & (raw > 0)
    nothing = np.full(layers, np.nan)
    if n < MIN_ROWS or not usable.any():
        none = np.zeros(layers, dtype=bool)
        return Persistence(nothing, nothing, nothing, nothing, nothing, nothing, none, 1.0)
    columns = np.flatnonzero(usable)
    waves = cosines(filled[:, columns])
    relative = waves**2 / raw[columns]
    departs = np.zeros(len(columns), dtype=bool)
    for _ in range(PASSES):
        common = fit(relative[:, ~departs].mean(axis=1), n)
        found = departs | _others(relative, common, departs)
        if (found == departs).all() or found.sum() > len(columns) // 3:
            break
        departs = found
    return _spread(common, relative, waves, columns, departs, raw, counts, hidden)


def _spread(
    common: Mixture,
    relative: Array,
    waves: Array,
    columns: NDArray[np.int64],
    departs: NDArray[np.bool_],
    raw: Array,
    counts: NDArray[np.int64],
    hidden: bool,
) -> Persistence:
    """Give every layer the common memory, or its own."""
    layers, n = len(raw), common.rows
    low = lowest(common)
    level = relative[:low] / expected_power(common)[:low, None]
    shared = moderated_variance(
        np.where(departs, np.nan, level.mean(axis=0)), np.full(len(columns), float(low))
    )
    together = _independent_layers(waves[:, ~departs], expected_power(common))
    behind, slowly = together * common.pieces, Allowed(common.stretch, common.slow, np.inf)
    if hidden and (~departs).sum() < FEW_LAYERS:
        slowly = allowed(common, relative[:, ~departs].mean(axis=1), together, behind)
        behind = slowly.worth
    elif hidden and n >= LEAST_ROWS:
        # Pieces of a course that noise hides are there, and not seen.
        behind = together * min(common.pieces, common.told)
    stretch = np.full(layers, slowly.stretch)
    worth = np.full(layers, behind)
    neighbours = np.full(layers, float(common.weights @ common.decays))
    slow, degrees = np.full(layers, slowly.slow), np.full(layers, common.degrees)
    apart = np.zeros(layers, dtype=bool)
    apart[columns] = departs
    if np.isfinite(shared.prior) and np.isfinite(shared.prior_degrees):
        own = shared.variance / shared.prior
        stretch[columns] *= own
        worth[columns] = 1 / (1 / behind + 1 / shared.degrees)
    for place in np.flatnonzero(departs):
        layer, mixture = columns[place], fit(relative[:, place], n)
        stretch[layer], worth[layer] = mixture.stretch, mixture.pieces
        neighbours[layer], slow[layer] = mixture.weights @ mixture.decays, mixture.slow
        degrees[layer] = mixture.degrees
    with np.errstate(invalid="ignore", divide="ignore"):
        lost = np.minimum(stretch / np.maximum(counts, 1), 0.9)
        variance = np.where((raw > 0) & (counts > 1), raw / (1 - lost), np.nan)
    return Persistence(
        stretch, variance, worth, degrees, neighbours, slow, apart, together, common.fresh,
        common.passing, _slowest(waves, raw, columns, common),
    )  # fmt: skip


def _slowest(waves: Array, raw: Array, columns: NDArray[np.int64], common: Mixture) -> Array:
    low = max(MIN_WAVES, min(lowest(common, share=0.25), MOST_WAVES))
    unit = waves[:low] / np.sqrt(expected_power(common)[:low, None])
    found = np.zeros((len(unit), len(raw)))
    found[:, columns] = unit / np.sqrt(raw[columns])
    return found


def of_halves(residuals: Array) -> Persistence:
    """Memory within the halves of a run, by which a drift between them is told; one per layer."""
    n = len(residuals) // 2
    halves = np.hstack([residuals[:n], residuals[-n:]])
    known = np.isfinite(halves)
    mean = np.where(known, halves, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    found = persistence_of(halves - mean, hidden=False)
    layers = residuals.shape[1]
    both = {
        name: np.asarray(getattr(found, name)).reshape(2, layers)
        for name in ("stretch", "variance", "worth", "degrees", "neighbours", "slow")
    }
    return replace(
        found, departs=np.asarray(found.departs.reshape(2, layers).any(axis=0)),
        **{name: value.mean(axis=0) for name, value in both.items()},
    )  # fmt: skip


def of_each(series: Array) -> tuple[Array, Array]:
    """Standard errors of the means of single series, each by its own memory.

    Parameters
    ----------
    series
        Shape (n, columns), without gaps.

    Returns
    -------
    tuple of ndarray
        Standard errors and their degrees of freedom, (columns,) each; NaN below `MIN_ROWS` rows.
    """
    n, columns = series.shape
    raw = series.var(axis=0)
    error, degrees = np.full(columns, np.nan), np.full(columns, np.nan)
    known = np.flatnonzero(raw > 0)
    if n < MIN_ROWS or not len(known):
        return error, degrees
    relative = cosines(series[:, known] - series[:, known].mean(axis=0)) ** 2 / raw[known]
    for column, found in zip(known, fits(relative, n), strict=True):
        lost = min(found.stretch / n, 0.9)
        error[column] = np.sqrt(raw[column] / (1 - lost) * found.stretch / n)
        degrees[column] = found.pieces
    return error, degrees


def _others(relative: Array, common: Mixture, departs: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Layers whose slow power is beyond what all layers together lead to expect."""
    expected = expected_power(common)
    found = departs.copy()
    # A layer with a longer memory than the others shows at frequencies where they are flat.
    for low in {lowest(common), max(2, min(lowest(common), round(len(expected) ** (1 / 3))))}:
        level = (relative[:low] / expected[:low, None]).mean(axis=0)
        judged = moderated_variance(level, np.full(len(level), float(low)))
        found |= judged.departs
    return found


def _independent_layers(waves: Array, expected: Array, most: int = 8) -> float:
    """How many layers there are by their slowest courses: L/(1 + (L − 1) r²), r² without noise."""
    layers = waves.shape[1]
    low = min(most, len(waves))
    if layers < 3 or low < 3:
        return 1.0
    scaled = waves[:low] / np.sqrt(expected[:low, None])
    scaled = scaled / np.maximum(np.sqrt((scaled**2).mean(axis=0)), 1e-300)
    correlation = scaled.T @ scaled / low
    square = (float((correlation**2).sum()) - layers) / (layers * (layers - 1))
    alike = float(np.clip((square - 1 / low) / (1 - 1 / low), 0.0, 1.0))
    return layers / (1 + (layers - 1) * alike)
