"""Exact draws of what differs in size, within a budget of parameters (numpy)."""

import numpy as np
from numpy.typing import NDArray

from lisa_train.methods.lisa.samplers.sampler import PureSampler


class BudgetSampler(PureSampler):
    """Exact π, and a size that misses its mean by less than one unit: the scheme of ``uniform``.

    In random order, two undecided units at a time give each other probability, as much of it, by
    size, as one takes from the other, until one of them is certain or out. The direction is chosen
    so that neither gains on average, hence P(drawn) = π exactly; what is exchanged leaves Σ π·size
    as it is, so that only the last undecided unit can miss the budget. This is the flight of the
    cube method with one constraint (Deville & Tillé, Biometrika 2004), the pivotal method where
    all sizes are equal.
    """

    scheme = "uniform"

    def _choose(self, index: int) -> NDArray[np.intp]:
        rng = self._rng(index)
        order = rng.permutation(self._open.size)
        coins = rng.random(self._open.size)
        pi = self.inclusion_probabilities[self._open]
        size = self._size[self._open]
        taken = np.zeros(self._open.size, dtype=bool)
        held, left = int(order[0]), float(pi[order[0]])
        for other, coin in zip(order[1:], coins[1:], strict=True):
            chance, rises, falls = exchange(left, float(size[held]), float(pi[other]),
                                            float(size[other]))  # fmt: skip
            mine, its = rises if coin < chance else falls
            if mine in (0.0, 1.0):
                taken[held] = mine == 1.0
                held, left = int(other), its
            else:
                taken[other] = its == 1.0
                left = mine
        taken[held] = coins[0] < left
        return np.flatnonzero(taken)


def exchange(
    p: float, size: float, q: float, other: float
) -> tuple[float, tuple[float, float], tuple[float, float]]:
    """Return what becomes of two probabilities: the chance that the first rises, and both ends.

    Either way one of them ends at 0 or 1, p·size + q·other stays, and the mean over both ways is
    what they were.

    Parameters
    ----------
    p, q
        The probabilities; q is neither 0 nor 1.
    size, other
        What each of them costs.
    """
    up, down = min(size * (1 - p), other * q), min(size * p, other * (1 - q))
    rises = (1.0, _kept(q - up / other)) if size * (1 - p) <= other * q else (
        _kept(p + up / size), 0.0)  # fmt: skip
    falls = (0.0, _kept(q + down / other)) if size * p <= other * (1 - q) else (
        _kept(p - down / size), 1.0)  # fmt: skip
    return down / (up + down), rises, falls


def _kept(value: float) -> float:
    return min(1.0, max(0.0, value))
