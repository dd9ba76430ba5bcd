"""Errors that neighbouring layers share: how surely a course over depth is known."""

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.statistics.persistence import of_each

Array = NDArray[np.float64]

# Polynomials over depth from the line on: what a ramp, a U or its arms are made of.
MODES = 4


def widen_along_depth(
    noise: Array, residuals: Array, known: NDArray[np.bool_], rng: np.random.Generator
) -> Array:
    """Give samples of the layers' errors the spread that smooth courses over depth show.

    White noise of every layer hides a slow course that is smooth over depth, and an average over
    layers takes the noise away and keeps the course: a line through the layers is less sure than
    the layers by themselves tell. Each of the first polynomials over depth is a series of its own,
    with its own memory; where its mean is less certain than in the samples, they are stretched
    along it, as Student's t is.

    Parameters
    ----------
    noise
        Shape (replicates, layers).
    residuals
        Shape (n, layers); NaN where not observed.
    known
        Shape (layers,): the layers to look at, in the order of depth.
    rng
        Of the stretch.
    """
    columns = np.flatnonzero(known)
    modes = min(MODES, len(columns) - 2)
    if modes < 1:
        return noise
    x = np.linspace(-1.0, 1.0, len(columns))
    basis = np.linalg.qr(np.vander(x, modes + 1, increasing=True))[0][:, 1:]
    series = np.nan_to_num(residuals[:, columns]) @ basis
    noise = noise.copy()
    for mode, error, degrees in zip(basis.T, *of_each(series), strict=True):
        along = noise[:, columns] @ mode
        spread = float(along.std())
        if not np.isfinite(error) or error <= spread or spread == 0:
            continue
        few = max(degrees, 2.0)
        factor = error / spread * np.sqrt(few / rng.chisquare(few, size=len(noise)))
        noise[:, columns] += ((factor - 1) * along)[:, None] * mode
    return noise
