"""Errors that neighbouring layers share: how surely a course over depth is known."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.statistics.errors import of_memory
from lisa_analysis.statistics.moderation import chi2_over_df
from lisa_analysis.statistics.persistence import of_each, persistence_of

Array = NDArray[np.float64]

# Polynomials over depth from the line on: what a ramp, a U or its arms are made of.
MODES = 4
# A course counts for the band of all layers from so many times the error that the layers by
# themselves tell, and where its own few degrees of freedom do not explain that (at 5 % over all).
CLEAR, CHANCE = 2.0, 0.05 / MODES
LAYERS_PER_MODE = 8


@dataclass(frozen=True, eq=False)
class AlongDepth:
    """Courses over depth whose means are less certain than the layers by themselves tell.

    Attributes
    ----------
    modes
        Shape (modes, layers): of length 1 each, 0 for layers that are not known.
    spread
        Shape (modes,): standard deviation of the layers' errors along each.
    times, degrees
        Shape (modes,): how many times as uncertain its mean is by the larger of two memories, its
        own in time and that of all modes together, and the degrees of freedom of that.
    own, own_degrees
        Shape (modes,): the same by its own memory.
    """

    modes: Array
    spread: Array
    times: Array
    degrees: Array
    own: Array
    own_degrees: Array

    def stretch(self, noise: Array, rng: np.random.Generator) -> Array:
        """Give samples of the layers' errors that spread, as Student's t has it."""
        noise = noise.copy()
        for mode, times, degrees in zip(self.modes, self.times, self.degrees, strict=True):
            if not times > 1:
                continue
            few = max(float(degrees), 2.0)
            factor = times * np.sqrt(few / rng.chisquare(few, size=len(noise)))
            noise += ((factor - 1) * np.nan_to_num(noise @ mode))[:, None] * mode
        return noise

    def widening(self, error: Array) -> Array:
        """How many times as large each layer's error is with them, shape (layers,), at least 1.

        Of courses that are surely there by their own memory: a band of layers is not to be as
        wide as all that a line through them may hide.
        """
        by_chance = chi2_over_df(1 - CHANCE, np.maximum(self.own_degrees, 1.0))
        clear = self.own**2 > np.maximum(by_chance, CLEAR**2)
        # Among few layers a polynomial is no course of many: it follows single ones.
        clear[int((self.modes != 0).any(axis=0).sum()) // LAYERS_PER_MODE :] = False
        more = ((self.own[clear] ** 2 - 1) * self.spread[clear] ** 2) @ self.modes[clear] ** 2
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.sqrt(1 + np.nan_to_num(more / error**2)))


def along_depth(noise: Array, residuals: Array, known: NDArray[np.bool_]) -> AlongDepth:
    """Find the slow courses that are smooth over depth.

    White noise of every layer hides a slow course that is smooth over depth, and an average over
    layers takes the noise away and keeps the course: a line through the layers is less sure than
    the layers by themselves tell. Each of the first polynomials over depth is a series of its own,
    with its own memory.

    Parameters
    ----------
    noise
        Samples of the layers' errors, shape (replicates, layers).
    residuals
        Shape (n, layers); NaN where not observed.
    known
        Shape (layers,): the layers to look at, in the order of depth.
    """
    columns = np.flatnonzero(known)
    count = max(min(MODES, len(columns) - 2), 0)
    modes = np.zeros((count, len(known)))
    if not count:
        return AlongDepth(modes, *[np.zeros(0)] * 5)
    x = np.linspace(-1.0, 1.0, len(columns))
    basis = np.linalg.qr(np.vander(x, count + 1, increasing=True))[0][:, 1:]
    modes[:, columns] = basis.T
    spread = np.asarray((noise[:, columns] @ basis).std(axis=0))
    series = np.nan_to_num(residuals[:, columns]) @ basis
    # A single series that happens to rest at its lowest frequencies hides a course that the
    # others show.
    own, own_degrees = of_each(series)
    # What few series may hide is allowed for in layers; here it would make every line uncertain.
    shared = persistence_of(series - series.mean(axis=0), hidden=False)
    pooled = of_memory(shared, np.full(count, float(len(series))), np.ones(count))
    with np.errstate(invalid="ignore", divide="ignore"):
        own, together = (np.nan_to_num(error / spread) for error in (own, pooled.error))
    larger = together > own
    return AlongDepth(
        modes, spread, np.where(larger, together, own),
        np.where(larger, pooled.degrees, own_degrees), own, np.nan_to_num(own_degrees),
    )  # fmt: skip
