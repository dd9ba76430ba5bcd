"""Arms against each other within seeds: paired differences, Holm's correction, shares of a gain."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lisa_analysis.statistics.repetitions import MIN_SEEDS, mean_over

Losses = Mapping[int, float]  # of an arm, by seed


@dataclass(frozen=True)
class Difference:
    """An arm less another, within seeds.

    Parameters
    ----------
    mean, low, high
        Of the differences in held-out loss, nats, with Student's interval (95 %).
    p
        Of the paired t test, two-sided.
    """

    mean: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ({self.low:+.4f} … {self.high:+.4f})"


def difference(a: Losses, b: Losses) -> Difference | None:
    """Return `a` less `b` within the seeds that both have; None below three."""
    apart = np.array([a[seed] - b[seed] for seed in sorted(set(a) & set(b))])
    if len(apart) < MIN_SEEDS:
        return None
    mean = mean_over(apart)
    p = float(stats.ttest_1samp(apart, 0.0).pvalue) if apart.std() > 0 else float(apart[0] == 0)
    return Difference(mean.value, mean.low, mean.high, p)


def holm(values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number (Holm 1979), in the order given."""
    order = np.argsort(values, kind="stable")
    found, highest = np.empty(len(values)), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        found[index] = highest
    return [float(value) for value in found]


def normalised(losses: Losses, other: Losses, whole: Losses) -> NDArray[np.float64]:
    """Return, by seed, how much of the way from the other arm's loss to that of all layers.

    Empty where that way is not told from 0: a share of it would be noise divided by noise.
    """
    seeds = sorted(set(losses) & set(other) & set(whole))
    way = difference({s: other[s] for s in seeds}, whole)
    if way is None or way.low <= 0:
        return np.array([])
    return np.array([(other[s] - losses[s]) / way.mean for s in seeds])
