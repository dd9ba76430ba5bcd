"""Slow courses that a run may hide: what few layers and few waves cannot exclude.

White noise of batches hides a course that lasts about as long as the run. A fit of the power by
frequency takes the likeliest amount of it, often none: six layers show no more than six waves of
the lowest frequency. Here the amount and the length are averaged over what the power leaves open.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.statistics.decays import SLOW, Mixture, banded

Array = NDArray[np.float64]

# Length of a run over the memory 1/(1 − ρ) of the course, from longer than the run on.
LENGTHS = np.geomspace(0.15, 10.0, 10)
# Power of the course at the lowest frequency, over that of the rest.
POWERS = np.geomspace(0.1, 30.0, 24)
# Probability that there is none, before the power is looked at.
NONE = 0.7
# A run shows less than there is of a course about as long as itself: its share is raised by so
# much (1 doubles it), twice what many layers need, since few tell its length by less.
ALLOWANCE = 1.0
# In fewer rows a slow course and the memory of neighbouring rows are one thing, which is fitted.
LEAST_ROWS = 40


@dataclass(frozen=True)
class Allowed:
    """What a mean is worth where a slow course may be hidden.

    Attributes
    ----------
    stretch
        N · Var(mean) of a layer of variance 1, never below that of the fit.
    slow
        Share of it from courses slower than a fifth of the run.
    worth
        Degrees of freedom that are left of those of the fit.
    """

    stretch: float
    slow: float
    worth: float


def allowed(common: Mixture, relative: Array, layers: float, worth: float) -> Allowed:
    """Average over the slow courses that the power by frequency does not exclude.

    Parameters
    ----------
    common
        The mixture fitted to `relative`.
    relative
        Shape (n − 1,): power over variance by frequency, a mean over layers.
    layers
        Independent layers that it is the mean of.
    worth
        Degrees of freedom behind the fit.

    Notes
    -----
    The slow decays of the fit are replaced by none (probability `NONE` beforehand), or by one
    AR(1) of any of `LENGTHS` and `POWERS`, all alike; each is weighed by Whittle's likelihood. The
    variance of a mean is the average of theirs, and what it varies by from one to the other is
    taken off the degrees of freedom: 2/cv² are those of a χ² of that spread (Satterthwaite 1946);
    below one degree an interval is withheld. The share of the slow courses is raised by
    `ALLOWANCE`. A course that lasts far longer than the run is a constant to it, which nothing
    can show.
    """
    n = common.rows
    lasting = (1 + common.decays) / (1 - common.decays) > SLOW * n
    fast = np.where(lasting, 0.0, common.weights)
    if n < LEAST_ROWS or fast.sum() <= 1e-6:
        return Allowed(common.stretch, common.slow, worth)
    fast = fast / fast.sum()
    found, count = banded(relative[:, None], n)
    power, error = common.of_decays(np.exp(-LENGTHS / n))
    base_power, base_error = common.of_decays(common.decays)
    base, least = base_power @ fast, float(fast @ base_error)
    ratio = np.append(np.outer(POWERS, base[0] / power[0]).ravel(), 0.0)
    share = ratio / (1 + ratio)
    which = np.append(np.tile(np.arange(len(LENGTHS)), len(POWERS)), 0)
    expected = (1 - share) * base[:, None] + share * power[:, which]
    fits = -0.5 * layers * (count * (np.log(expected) + found / expected)).sum(axis=0)
    before = np.append(np.full(len(which) - 1, (1 - NONE) / (len(which) - 1)), NONE)
    weight = before * np.exp(fits - fits.max())
    weight /= weight.sum()
    stretches = (1 - share) * least + share * error[which]
    mean = float(weight @ stretches)
    varies = float(weight @ stretches**2) / mean**2 - 1
    left = 1 / (1 / worth + max(varies, 0.0) / 2)
    slow = float(weight @ (share * error[which])) / mean
    raised = mean * (1 + ALLOWANCE * slow)
    if raised <= common.stretch:
        return Allowed(common.stretch, common.slow, left)
    return Allowed(raised, slow, left)
