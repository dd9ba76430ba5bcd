"""Exact sampling schemes, each a pure function of seed and draw (numpy).

Every scheme meets its inclusion probabilities π (Σπ = k) exactly, which weighted choice without
replacement (`numpy.random.Generator.choice(replace=False, p=…)`) does not. A draw depends on the
seed and its own index alone, so that every rank and every resumed run draws the same layers, and
no global random stream is read or advanced.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lisa_analysis.contract.errors import ProbabilitiesError
from lisa_train.methods.lisa.config import SUM_TOLERANCE
from lisa_train.methods.lisa.inclusion import CERTAIN
from lisa_train.methods.lisa.samplers.sampler import STREAM, PureSampler, register, seed_word


@register
class SystematicSampler(PureSampler):
    """Systematic sampling with probability proportional to size, on a fresh random order (Madow).

    Lay the layers end to end as stretches of length π in random order and take those that
    contain u, u+1, …, u+k−1 for one uniform u in [0, 1): exact π, fixed size.
    """

    scheme = "systematic"

    def _choose(self, index: int) -> NDArray[np.intp]:
        rng = self._rng(index)
        order = rng.permutation(self._open.size)
        edges = np.cumsum(self.inclusion_probabilities[self._open[order]])
        edges[-1] = self._open_k  # the sum without its rounding, so that exactly k points fall in
        points = rng.random() + np.arange(self._open_k)
        return order[np.searchsorted(edges, points, side="right")]


@register
class UniformSampler(SystematicSampler):
    """k of L layers, all sets equally likely: the systematic scheme with equal weights.

    Of what differs in size draws `BudgetSampler` instead.
    """

    scheme = "uniform"
    keeps_budget = True


@register
class BernoulliSampler(PureSampler):
    """Every layer on its own with probability π: the first published version; sizes vary."""

    scheme = "bernoulli"
    may_draw_nothing = True
    keeps_budget = True

    def _choose(self, index: int) -> NDArray[np.intp]:
        uniforms = self._rng(index).random(self._open.size)
        return np.flatnonzero(uniforms < self.inclusion_probabilities[self._open])


@register
class CyclicSampler(PureSampler):
    """Shuffled sweeps: every layer once before any layer twice; equal probabilities only.

    A draw that reaches over the end of a sweep takes the rest of it and goes on in the next
    one, whose first layers are then chosen among the others, so that the draw holds no layer
    twice. The rule treats all layers alike, hence π = k/L for every draw of the L layers that are
    not excluded (by π = 0).
    """

    scheme = "cyclic"

    def __init__(self, pi: ArrayLike, k: float, seed: int) -> None:
        super().__init__(pi, k, seed)
        drawn = self.inclusion_probabilities[self.inclusion_probabilities > 0.0]
        low, high = drawn.min(), drawn.max()
        if high - low > SUM_TOLERANCE:
            raise ProbabilitiesError(
                f"cyclic sampling visits all layers equally often, but the probabilities run from "
                f"{low:.4g} to {high:.4g}; use sampling='balanced' for unequal ones."
            )
        self._order: list[int] = []

    def _choose(self, index: int) -> NDArray[np.intp]:
        start, end = index * self._open_k, (index + 1) * self._open_k
        while len(self._order) < end:
            self._append_sweep()
        return np.array(self._order[start:end], dtype=np.intp)

    def _append_sweep(self) -> None:
        n, k = self._open.size, self._open_k
        sweep = len(self._order) // n
        order = self._rng(sweep).permutation(n).tolist()
        open_draw = len(self._order) % k  # layers that the unfinished draw already holds
        if open_draw:
            held = set(self._order[-open_draw:])
            first = [layer for layer in order if layer not in held][: k - open_draw]
            order = first + [layer for layer in order if layer not in first]
        self._order += order


@register
class BalancedSampler(PureSampler):
    """Error diffusion: the layers that are furthest behind their share train next.

    Every draw adds π to each layer's credit, takes the k largest and charges them 1. With a budget
    of parameters, it takes the largest credits up to where their size is nearest to what is due:
    the budget, and what the draws before have left or overdrawn, which is the sum of size times
    credit. The share
    of draws of every layer is π with an error of at most about two visits at any time (measured;
    independent draws miss by the square root of their number), so that no layer waits long.

    Every single draw has the inclusion probabilities π as well. Modulo 1, a draw turns the
    credits by π whatever it takes, and that leaves a uniform law uniform. The credits start
    there, with sum 0, and after the draws of `_BURN_IN` they depend on their values modulo 1 and
    on the jitter alone; from then on a draw does not change their law, so that
    E[credit + π − taken] = E[credit], that is P(taken) = π.
    """

    scheme = "balanced"
    keeps_budget = True
    # Breaks the fixed rotation that equal credits would fall into, without letting a layer slip
    # by more than half a visit.
    _JITTER = 0.5
    # Where the credits started is forgotten geometrically; the slowest case tried, a layer with
    # π = 0.001, needs 80 draws.
    _BURN_IN = 400

    def __init__(
        self, pi: ArrayLike, k: float, seed: int, weights: NDArray[np.float64] | None = None
    ) -> None:
        super().__init__(pi, k, seed, weights)
        self._restart()

    def _restart(self) -> None:
        # The last word tells this stream from draw 0's: numpy ignores zeros at a key's end.
        rng = np.random.default_rng([STREAM, seed_word(self.seed), 0, 1])
        self.credit = (
            _uniform_with_sum_zero(rng, self._open.size)
            if self.weights is None
            else _uniform_near_zero(rng, self.weights[self._open])
        )
        for jitter in rng.random((self._BURN_IN, self._open.size)):
            self._advance(jitter)
        self._next = 0

    def _choose(self, index: int) -> NDArray[np.intp]:
        if index < self._next - 1:
            self._restart()
        while self._next <= index:
            self._advance(self._rng(self._next).random(self._open.size))
            self._next += 1
        return self._last

    def follow(self, pi: NDArray[np.float64], index: int) -> NDArray[np.intp]:
        """Make draw `index` by `pi`, whatever π was in the draws before; sorted layer indices.

        For a schedule whose π moves, whose sampler starts with equal probabilities. Visits follow
        the sum of the π as closely as they follow equal ones: whoever comes late to a certain
        place has it all the same.
        """
        jitter = self._rng(index).random(pi.size)
        self.credit += pi
        urgent = self.credit + self._JITTER * jitter
        certain = pi >= CERTAIN
        urgent = np.where(certain, np.inf, np.where(pi == 0.0, -np.inf, urgent))
        ranked = np.argsort(-urgent, kind="stable")
        count = round(self.k) if self.weights is None else self._affordable(ranked, self.weights)
        self._last = ranked[: min(max(count, int(certain.sum())), int((pi > 0.0).sum()))]
        self.credit[self._last] -= 1.0
        return np.sort(self._last)

    def _advance(self, jitter: NDArray[np.float64]) -> None:
        self.credit += self.inclusion_probabilities[self._open]
        ranked = np.argsort(-(self.credit + self._JITTER * jitter), kind="stable")
        count = (
            self._open_k
            if self.weights is None
            else self._affordable(ranked, self.weights[self._open])
        )
        self._last = ranked[:count]
        self.credit[self._last] -= 1.0

    def _affordable(self, ranked: NDArray[np.intp], weights: NDArray[np.float64]) -> int:
        """How many of the first have a size nearest to what is due."""
        due = float(weights @ self.credit)
        sizes = np.concatenate([[0.0], np.cumsum(weights[ranked])])
        return int(np.argmin(np.abs(sizes - due)))


def _uniform_with_sum_zero(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    """Numbers that are uniform modulo 1 and sum to 0, none far from it; shape (size,)."""
    values = rng.random(size)
    if size:
        values[-1] = -values[:-1].sum() % 1.0
        largest_first = np.argsort(-values)
        values[largest_first[: round(values.sum())]] -= 1.0
    return values


def _uniform_near_zero(
    rng: np.random.Generator, weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Numbers that are uniform modulo 1 and whose weighted sum is near 0; shape (size,)."""
    values = rng.random(weights.size)
    if weights.size:
        largest_first = np.argsort(-values)
        sums = np.concatenate([[0.0], np.cumsum(weights[largest_first])])
        values[largest_first[: int(np.argmin(np.abs(sums - weights @ values)))]] -= 1.0
    return values
