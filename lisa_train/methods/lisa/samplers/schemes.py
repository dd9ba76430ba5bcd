"""Which layers train next: exact sampling schemes, each a pure function of seed and draw (numpy).

Every scheme meets its inclusion probabilities π (Σπ = k) exactly, which weighted choice without
replacement (`numpy.random.Generator.choice(replace=False, p=…)`) does not. A draw depends on the
seed and its own index alone, so that every rank and every resumed run draws the same layers, and
no global random stream is read or advanced.
"""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lisa_analysis.contract.errors import ConfigError, ProbabilitiesError
from lisa_train.methods.lisa.inclusion import CERTAIN, SUM_TOLERANCE, check_probabilities
from lisa_train.methods.lisa.inclusion import resolve as resolve
from lisa_train.methods.lisa.samplers.conditional_poisson import fit_log_weights, log_elementary

# Second word of every generator key, so that no other part of a program draws the same stream.
_STREAM = 0x115A


class Sampler(ABC):
    """Draws layers; draw `index` is the same whenever and wherever it is asked for.

    Parameters
    ----------
    pi
        Inclusion probabilities, shape (L,).
    k
        Layers per draw (expected number for `BernoulliSampler`).
    seed
        Seed of the schedule.
    """

    scheme: str

    def __init__(self, pi: ArrayLike, k: int, seed: int) -> None:
        self.inclusion_probabilities = check_probabilities(pi, k)
        self.inclusion_probabilities.flags.writeable = False
        self.k = k
        self.seed = int(seed)
        # Certain layers are in every draw; the scheme decides about the others only.
        self._certain = np.flatnonzero(self.inclusion_probabilities >= CERTAIN)
        self._open = np.flatnonzero(self.inclusion_probabilities < CERTAIN)
        self._open_k = k - self._certain.size
        self._drawn = 0

    def draw(self, index: int) -> tuple[int, ...]:
        """Layer indices of draw `index` (0, 1, …), sorted."""
        if index < 0:
            raise ConfigError(f"draws are numbered from 0, got index {index}.")
        self._drawn = max(self._drawn, index + 1)
        chosen = self._open[self._choose(index)] if self._open.size else self._open
        return tuple(int(i) for i in np.sort(np.concatenate([self._certain, chosen])))

    @abstractmethod
    def _choose(self, index: int) -> NDArray[np.intp]:
        """Positions in `self._open` that draw `index` takes."""

    def _rng(self, index: int) -> np.random.Generator:
        """Return a fresh generator of its own for draw `index`."""
        return np.random.default_rng([_STREAM, seed_word(self.seed), index])

    def state_dict(self) -> dict[str, Any]:
        """Return what identifies the schedule, as plain JSON values."""
        return {
            "scheme": self.scheme,
            "seed": self.seed,
            "activated_layers": self.k,
            "inclusion_probabilities": self.inclusion_probabilities.tolist(),
            "drawn": self._drawn,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a saved schedule; a schedule of other settings is a `ConfigError`."""
        mine = self.state_dict()
        for key in ("scheme", "seed", "activated_layers"):
            if state[key] != mine[key]:
                raise ConfigError(
                    f"the saved layer schedule has {key} = {state[key]!r}, this run has "
                    f"{mine[key]!r}; resume with the setting that it was saved with."
                )
        saved = state["inclusion_probabilities"]
        if saved != mine["inclusion_probabilities"]:
            raise ConfigError(
                f"the saved layer schedule has other inclusion probabilities ({len(saved)} layers) "
                f"than this run ({len(mine['inclusion_probabilities'])} layers); resume with the "
                "probabilities that it was saved with."
            )
        self._drawn = int(state["drawn"])


class SystematicSampler(Sampler):
    """Systematic sampling with probability proportional to size, on a fresh random order (Madow).

    Lay the layers end to end as intervals of length π in random order and take those that
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


class UniformSampler(SystematicSampler):
    """k of L layers, all sets equally likely: the systematic scheme with equal weights."""

    scheme = "uniform"


class BernoulliSampler(Sampler):
    """Every layer on its own with probability π: the first published version; sizes vary."""

    scheme = "bernoulli"

    def _choose(self, index: int) -> NDArray[np.intp]:
        uniforms = self._rng(index).random(self._open.size)
        return np.flatnonzero(uniforms < self.inclusion_probabilities[self._open])


class CyclicSampler(Sampler):
    """Shuffled sweeps: every layer once before any layer twice; equal probabilities only.

    A draw that reaches over the end of a sweep takes the rest of it and goes on in the next
    one, whose first layers are then chosen among the others, so that the draw holds no layer
    twice. The rule treats all layers alike, hence π = k/L for every draw.
    """

    scheme = "cyclic"

    def __init__(self, pi: ArrayLike, k: int, seed: int) -> None:
        super().__init__(pi, k, seed)
        spread = np.ptp(self.inclusion_probabilities)
        if spread > SUM_TOLERANCE:
            low, high = self.inclusion_probabilities.min(), self.inclusion_probabilities.max()
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


class ConditionalPoissonSampler(Sampler):
    """Maximum-entropy design of fixed size: independent draws conditioned on their number.

    The weights w are fitted so that the inclusion probabilities are π (Tillé, *Sampling
    Algorithms*, 2006, §5.2); all sums of products are elementary symmetric polynomials, kept as
    logarithms, so that 80 layers neither overflow nor cancel.
    """

    scheme = "conditional_poisson"

    def __init__(self, pi: ArrayLike, k: int, seed: int) -> None:
        super().__init__(pi, k, seed)
        self._log_w = fit_log_weights(self.inclusion_probabilities[self._open], self._open_k)
        self._log_e = log_elementary(self._log_w, self._open_k)

    def _choose(self, index: int) -> NDArray[np.intp]:
        uniforms = self._rng(index).random(self._open.size)
        left = self._open_k
        chosen = []
        # From the last unit down: P(take i | `left` of the first i+1 units are taken) is
        # w_i e_{left-1}(first i units) / e_left(first i+1 units).
        for i in range(self._open.size - 1, -1, -1):
            if left == 0:
                break
            log_p = self._log_w[i] + self._log_e[i, left - 1] - self._log_e[i + 1, left]
            if uniforms[i] < np.exp(log_p):
                chosen.append(i)
                left -= 1
        return np.array(chosen, dtype=np.intp)


class BalancedSampler(Sampler):
    """Error diffusion: the layers that are furthest behind their share train next.

    Every draw adds π to each layer's credit, takes the k largest and charges them 1. The share
    of draws of every layer is π with an error of at most about two visits at any time (measured;
    independent draws miss by the square root of their number), so that no layer waits long.

    Every single draw has the inclusion probabilities π as well. Modulo 1, a draw turns the
    credits by π whatever it takes, and that leaves a uniform law uniform. The credits start
    there, with sum 0, and after the draws of `_BURN_IN` they depend on their values modulo 1 and
    on the jitter alone; from then on a draw does not change their law, so that
    E[credit + π − taken] = E[credit], that is P(taken) = π.
    """

    scheme = "balanced"
    # Breaks the fixed rotation that equal credits would fall into, without letting a layer slip
    # by more than half a visit.
    _JITTER = 0.5
    # Where the credits started is forgotten geometrically; the slowest case tried, a layer with
    # π = 0.001, needs 80 draws.
    _BURN_IN = 400

    def __init__(self, pi: ArrayLike, k: int, seed: int) -> None:
        super().__init__(pi, k, seed)
        self._restart()

    def _restart(self) -> None:
        # The last word tells this stream from draw 0's: numpy ignores zeros at a key's end.
        rng = np.random.default_rng([_STREAM, seed_word(self.seed), 0, 1])
        self._credit = _uniform_with_sum_zero(rng, self._open.size)
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

    def _advance(self, jitter: NDArray[np.float64]) -> None:
        self._credit += self.inclusion_probabilities[self._open]
        ranked = np.argsort(-(self._credit + self._JITTER * jitter), kind="stable")
        self._last = ranked[: self._open_k]
        self._credit[self._last] -= 1.0


def _uniform_with_sum_zero(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    """Numbers that are uniform modulo 1 and sum to 0, none far from it; shape (size,)."""
    values = rng.random(size)
    if size:
        values[-1] = -values[:-1].sum() % 1.0
        largest_first = np.argsort(-values)
        values[largest_first[: round(values.sum())]] -= 1.0
    return values


SAMPLERS: dict[str, type[Sampler]] = {
    cls.scheme: cls
    for cls in (
        UniformSampler,
        BernoulliSampler,
        CyclicSampler,
        SystematicSampler,
        ConditionalPoissonSampler,
        BalancedSampler,
    )
}


def make_sampler(sampling: str, pi: ArrayLike, k: int, seed: int) -> Sampler:
    """Build the sampler called `sampling`.

    Parameters
    ----------
    sampling
        One of `SAMPLERS`. ``uniform`` with unequal probabilities becomes ``systematic``, whose
        draws are the same to the bit when the probabilities are equal.
    pi
        Inclusion probabilities, shape (L,), Σπ = k.
    k
        Layers per draw.
    seed
        Seed of the schedule.
    """
    if sampling == "uniform" and np.ptp(np.asarray(pi, dtype=np.float64)) > SUM_TOLERANCE:
        sampling = "systematic"
    return SAMPLERS[sampling](pi, k, seed)


def never_drawn(sampler: Sampler, draws: int) -> tuple[int, ...]:
    """Layers that none of the first `draws` draws of the schedule takes."""
    missing = set(range(sampler.inclusion_probabilities.size))
    for index in range(draws):
        missing.difference_update(sampler.draw(index))
        if not missing:
            break
    return tuple(sorted(missing))


def seed_word(seed: int) -> int:
    """Map any integer seed to the non-negative integers that numpy accepts, one to one."""
    return 2 * seed if seed >= 0 else -2 * seed - 1
