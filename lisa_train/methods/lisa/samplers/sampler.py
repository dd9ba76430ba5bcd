"""What a sampler is, and which there are (numpy)."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lisa_analysis.contract.errors import ConfigError
from lisa_train.checks import refuse_built_in
from lisa_train.methods.lisa.inclusion import CERTAIN, check_probabilities

# Second word of every generator key, so that no other part of a program draws the same stream.
STREAM = 0x115A


class Sampler(ABC):
    """Draws the layers of every period; under `register`, `LisaConfig.sampling` can name it.

    The engine asks in the order of training: `probabilities(index)`, `draw(index)`, and whatever
    it is given to `learn` until the next draw. A sampler of its own is a subclass with `draw`. One
    that learns overrides `learn` and `probabilities` too, and keeps what it has learned in its
    `state_dict`; its draw `index` may depend on all that was learned before, and on nothing else
    beside the seed, so that all processes and every resumed run draw alike.

    Parameters
    ----------
    pi
        Inclusion probabilities to start with, shape (L,).
    k
        Layers per draw; the expected number where draws vary in size.
    seed
        Seed of the schedule.
    weights
        Where parts of layers are drawn: their sizes over the mean, shape (L,). Σ π·weight is k
        then, a budget in parts of mean size. Only schemes that keep a budget are given any.

    Attributes
    ----------
    scheme : str
        Its name among the `SAMPLERS`.
    may_draw_nothing : bool
        Whether draws may be of any size, no layer at all or every one among them; an estimate of
        memory then counts with all.
    keeps_budget : bool
        Whether it takes `weights`: then parts of layers can be drawn by it (`LisaConfig.by`).
    inclusion_probabilities : numpy.ndarray
        Those that it started with, freed of rounding.

    Examples
    --------
    >>> from lisa_train.methods.lisa.samplers import Sampler, register
    >>> @register
    ... class FirstLayers(Sampler):
    ...     scheme = "first"
    ...     def draw(self, index):
    ...         return tuple(range(self.k))
    >>> lt.LisaConfig(sampling="first")  # doctest: +SKIP
    """

    scheme: ClassVar[str]
    may_draw_nothing: bool = False
    keeps_budget: ClassVar[bool] = False

    def __init__(
        self, pi: ArrayLike, k: float, seed: int, weights: NDArray[np.float64] | None = None
    ) -> None:
        self.inclusion_probabilities = check_probabilities(pi, k, weights)
        self.inclusion_probabilities.flags.writeable = False
        self.k = k
        self.weights = weights
        self.seed = int(seed)

    def probabilities(self, index: int) -> NDArray[np.float64]:
        """π by which draw `index` is taken, shape (L,): of every draw so far, and of the next."""
        return self.inclusion_probabilities

    def scores(self, index: int) -> NDArray[np.float64] | None:
        """Scores that the π of draw `index` is made from, shape (L,), NaN where unknown.

        None when it is not made from any.
        """
        return None

    @abstractmethod
    def draw(self, index: int) -> tuple[int, ...]:
        """Layer indices of draw `index` (0, 1, …), sorted."""

    def learn(self, step: int, layer_scores: NDArray[np.float64]) -> None:  # noqa: B027
        """Take what was measured after `step` completed steps; what learns nothing ignores it.

        Parameters
        ----------
        step
            Completed optimizer steps.
        layer_scores
            One number per layer, the same in all processes; NaN where none was measured.
        """

    @property
    def learns(self) -> bool:
        """Whether later draws depend on what is still to be learned."""
        return type(self).learn is not Sampler.learn

    def always_drawn(self) -> tuple[int, ...]:
        """Layers that are certain to be in every draw to come: none, unless k is their number."""
        layers = self.inclusion_probabilities.size
        return tuple(range(layers)) if self.k == layers else ()

    def excluded(self) -> tuple[int, ...]:
        """Layers that no draw ever takes; of a sampler with π of its own none are known."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain JSON values."""
        return {"scheme": self.scheme, "seed": self.seed, "activated_layers": self.k}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved schedule; a schedule of other settings is a `ConfigError`."""
        mine = Sampler.state_dict(self)
        for key, value in mine.items():
            if state[key] != value:
                raise ConfigError(
                    f"the saved layer schedule has {key} = {state[key]!r}, this run has "
                    f"{value!r}; resume with the setting that it was saved with."
                )


class PureSampler(Sampler):
    """Draws that are functions of seed and index alone, by fixed π that every draw meets exactly.

    Draw `index` is the same whenever and wherever it is asked for.
    """

    def __init__(
        self, pi: ArrayLike, k: float, seed: int, weights: NDArray[np.float64] | None = None
    ) -> None:
        super().__init__(pi, k, seed, weights)
        # Certain layers are in every draw, excluded ones in none; the scheme decides the others.
        pi = self.inclusion_probabilities
        self._certain = np.flatnonzero(pi >= CERTAIN)
        self._open = np.flatnonzero((pi > 0.0) & (pi < CERTAIN))
        self._size = np.ones(pi.size) if weights is None else weights
        # What is left for them: a number, or a budget.
        left = k - float(self._size[self._certain].sum())
        self._budget = left
        self._open_k = round(left)
        self._drawn = 0

    def draw(self, index: int) -> tuple[int, ...]:
        """Layer indices of draw `index` (0, 1, …), sorted."""
        if index < 0:
            raise ConfigError(f"draws are numbered from 0, got index {index}.")
        self._drawn = max(self._drawn, index + 1)
        chosen = self._open[self._choose(index)] if self._open.size else self._open
        return tuple(int(i) for i in np.sort(np.concatenate([self._certain, chosen])))

    def always_drawn(self) -> tuple[int, ...]:
        """Layers with π = 1."""
        return tuple(self._certain.tolist())

    def excluded(self) -> tuple[int, ...]:
        """Layers with π = 0."""
        return tuple(np.flatnonzero(self.inclusion_probabilities == 0.0).tolist())

    @abstractmethod
    def _choose(self, index: int) -> NDArray[np.intp]:
        """Positions in `self._open` that draw `index` takes."""

    def _rng(self, index: int) -> np.random.Generator:
        """Return a fresh generator of its own for draw `index`."""
        return np.random.default_rng([STREAM, seed_word(self.seed), index])

    def state_dict(self) -> dict[str, Any]:
        """Return what identifies the schedule, as plain JSON values."""
        return super().state_dict() | {
            "inclusion_probabilities": self.inclusion_probabilities.tolist(),
            "drawn": self._drawn,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved schedule; a schedule of other settings is a `ConfigError`."""
        super().load_state_dict(state)
        saved, mine = state["inclusion_probabilities"], self.inclusion_probabilities.tolist()
        if saved != mine:
            raise ConfigError(
                f"the saved layer schedule has other inclusion probabilities ({len(saved)} layers) "
                f"than this run ({len(mine)} layers); resume with the probabilities that it was "
                "saved with."
            )
        self._drawn = int(state["drawn"])


SAMPLERS: dict[str, type[Sampler]] = {}
"""Samplers by the name that `LisaConfig.sampling` gives them."""

_Kind = TypeVar("_Kind", bound=type[Sampler])


def register(sampler: _Kind) -> _Kind:
    """Add a class of samplers to `SAMPLERS` under its `scheme`; a decorator.

    One of your own may be registered again; `ConfigError` for the name of a built-in.
    """
    refuse_built_in("sampler", sampler.scheme, SAMPLERS)
    SAMPLERS[sampler.scheme] = sampler
    return sampler


def seed_word(seed: int) -> int:
    """Map any integer seed to the non-negative integers that numpy accepts, one to one."""
    return 2 * seed if seed >= 0 else -2 * seed - 1
