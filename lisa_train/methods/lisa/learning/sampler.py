"""Balanced draws by probabilities that are learned while they are made (numpy)."""

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lisa_analysis.contract.errors import ConfigError, ProbabilitiesError
from lisa_analysis.plans.budget import allocate
from lisa_analysis.plans.stages import probabilities_from_scores
from lisa_analysis.plans.strength import Strength
from lisa_train.methods.lisa.control import Control
from lisa_train.methods.lisa.learning.config import LearnConfig
from lisa_train.methods.lisa.learning.evidence import Array, Evidence
from lisa_train.methods.lisa.learning.learners import LEARNERS, Scores
from lisa_train.methods.lisa.samplers.sampler import Sampler
from lisa_train.methods.lisa.samplers.schemes import BalancedSampler

# By how much a draw may change the π of a layer, up or down.
MOST_CHANGE = 2.0
# Part of k/L by which π may change in a pool all the same, from 0 too.
LEAST_CHANGE = 16.0


class LearnedSampler(Sampler):
    """The balanced scheme with moving π: its credits follow whatever π of a draw is.

    As long as nothing is learned the draws are those of ``balanced`` to the bit. π is made anew
    for every draw, from everything that was learned before it.

    Parameters
    ----------
    prior
        π to start with, shape (L,), Σπ = k; before the control.
    k
        Layers per draw.
    seed
        Seed of the schedule.
    settings
        How to learn.
    control
        What is done to π before it is in force.
    weights
        Sizes of halves or modules over their mean; None for whole layers.
    first
        Number that the first of the layers has in the model, for what is said of them.

    Attributes
    ----------
    frozen
        Why nothing is learned any more; None while it is.
    """

    scheme = "balanced"

    def __init__(
        self,
        prior: ArrayLike,
        k: float,
        seed: int,
        settings: LearnConfig,
        control: Control,
        weights: Array | None = None,
        *,
        first: int = 0,
    ) -> None:
        given = np.array(prior, dtype=np.float64)
        layers = given.size
        if k >= layers:
            raise ConfigError(
                f"lisa.learn has nothing to learn: activated_layers is {k} and the model has "
                f"{layers} layers, which train in every period; lower activated_layers or leave "
                "lisa.learn out."
            )
        strength = Strength.of(
            settings.strength, mix=settings.mix, floor=settings.floor, cap=settings.cap
        )
        if strength.pool and weights is None and strength.pool < k:
            raise ConfigError(
                f"lisa.learn.strength is {settings.strength!r}, a pool of fewer layers than the "
                f"{k} that every draw takes; make it larger, or lower activated_layers."
            )
        # Within the bounds, or what is left of a prior for the layers that are known may not be.
        lower, upper = (min(1.0, bound * k / layers) for bound in (strength.floor, strength.cap))
        given = allocate(given, float(k), lower, upper, weights)
        if (given <= 0).any():
            raise ConfigError(
                f"lisa.learn begins with probabilities of 0 (layer "
                f"{first + int(np.argmin(given))}), as a pool has them, and learns on a scale on "
                "which 0 is none: begin with a file of another strength (lisa-analyze RUN "
                "--probabilities FILE --strength 3), or without one."
            )
        super().__init__(control.of(given, None, weights), k, seed, weights)
        self._prior = given
        self._strength = strength
        self._settings = settings
        self._control = control
        self._first = first
        cover = math.ceil(layers / k)
        self._start = cover if settings.start_after is None else settings.start_after
        self._evidence = Evidence(given, k, settings.memory)
        self._learner = LEARNERS[settings.learner](layers)
        self._credits = BalancedSampler(np.full(layers, k / layers), k, seed, weights)
        self._in_force: Array = self.inclusion_probabilities.copy()
        self._scores: Array | None = None
        self._next = 0
        self._last: tuple[int, ...] = ()
        self.frozen: str | None = None

    def probabilities(self, index: int) -> Array:
        """π of the draw made last, or of the next one by what is known now."""
        if index < self._next:
            return self._in_force.copy()
        return self._refreshed(copy.deepcopy(self._learner), index)[0]

    def scores(self, index: int) -> Array | None:
        """Scores that the draw made last, or the next one, has its π from; NaN where unknown.

        None while π is the prior's.
        """
        if index < self._next:
            return self._scores
        return self._refreshed(copy.deepcopy(self._learner), index)[1]

    def draw(self, index: int) -> tuple[int, ...]:
        """Layer indices of draw `index`, sorted; draws are made in their order."""
        if index < self._next - 1:
            raise ConfigError(
                f"draw {index} of a schedule that learns is gone: draw {self._next - 1} is made; "
                "load the state that was saved with it."
            )
        while self._next <= index:
            self._in_force, self._scores = self._refreshed(self._learner, self._next)
            self._last = tuple(self._credits.follow(self._in_force, self._next).tolist())
            self._next += 1
        return self._last

    def learn(self, step: int, layer_scores: NDArray[np.float64]) -> None:
        """Take what the visits of the present draw showed; what is infinite ends the learning."""
        broken = np.flatnonzero(np.isinf(layer_scores))
        if broken.size and self.frozen is None:
            self.frozen = (
                f"lisa.learn measured a number that is not finite in layer "
                f"{self._first + int(broken[0])} before step "
                f"{step}: π stays what it is"
            )
        if self.frozen is None:
            self._evidence.add(layer_scores)

    def _refreshed(self, learner: Any, index: int) -> tuple[Array, Array | None]:
        """π for draw `index`, near to the one in force, and its scores."""
        if index < self._start or self.frozen is not None:
            return self._in_force, self._scores
        found: Scores = learner.scores(self._evidence.belief())
        pool = self._strength.pool is not None
        try:
            stages = probabilities_from_scores(
                found.score, found.low, found.high, k=self.k, strength=self._strength,
                prior=self._prior, costs=self.weights, shrunk=found.shrunk(),
            )  # fmt: skip
        except ProbabilitiesError:
            if not pool:
                raise
            return self._in_force, found.score  # too few for a draw stand out, or are known
        target = self._control.of(stages.pi, stages.score, self.weights)
        if not pool:
            return _towards(self._in_force, target), found.score
        least = self.k / self._prior.size / LEAST_CHANGE
        moved = _towards(self._in_force, target, least)
        return _settled(moved, target, least, self.weights), found.score

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run draws and learns by, as JSON values."""
        return super().state_dict() | {
            "learn": _plain(self._settings),
            "prior": self._prior.tolist(),
            "inclusion_probabilities": self._in_force.tolist(),
            "scores": _with_gaps(self._scores),
            "credit": self._credits.credit.tolist(),
            "next": self._next,
            "last": list(self._last),
            "evidence": self._evidence.state_dict(),
            "learner": self._learner.state_dict(),
            "frozen": self.frozen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved schedule; a schedule of other settings is a `ConfigError`."""
        super().load_state_dict(state)
        if state.get("learn") != _plain(self._settings) or state["prior"] != self._prior.tolist():
            raise ConfigError(
                "the saved layer schedule learned by other settings of lisa.learn, or none; resume "
                "with the settings that it was saved with."
            )
        self._in_force = np.array(state["inclusion_probabilities"], dtype=np.float64)
        gaps = state["scores"]
        self._scores = None if gaps is None else np.array(gaps, dtype=np.float64)
        self._credits.credit = np.array(state["credit"], dtype=np.float64)
        self._next = int(state["next"])
        self._last = tuple(int(i) for i in state["last"])
        self._evidence.load_state_dict(state["evidence"])
        self._learner.load_state_dict(state["learner"])
        self.frozen = state["frozen"]


def _towards(now: Array, target: Array, least: float = 0.0) -> Array:
    """Go from one π as far towards another as no layer changes by more than `MOST_CHANGE`.

    All layers go the same part of the way: sum, floor and cap are kept. A change of `least` is
    always allowed: a layer that leaves a pool, or comes back, has to reach 0 and leave it again.
    """
    change = target - now
    room = np.where(change > 0, now * (MOST_CHANGE - 1), now * (1 - 1 / MOST_CHANGE))
    room = np.maximum(room, least)
    moving = np.abs(change) > 1e-15
    part = min(1.0, float((room[moving] / np.abs(change[moving])).min())) if moving.any() else 1.0
    result: Array = target if part == 1.0 else now + part * change
    return np.clip(result, 0.0, 1.0)


def _settled(now: Array, target: Array, least: float, weights: Array | None) -> Array:
    """Let go of what leaves a pool and is drawn hardly ever any more, in favour of what enters."""
    out = (target == 0.0) & (now > 0.0) & (now < least)
    missing = np.where(out, 0.0, np.maximum(0.0, target - now))
    price = np.ones(now.size) if weights is None else weights
    if not out.any() or not missing.any():
        return now
    part = float((price * now)[out].sum()) / float((price * missing).sum())
    return np.where(out, 0.0, now + min(1.0, part) * missing)


def _plain(settings: LearnConfig) -> dict[str, Any]:
    """Settings as JSON has them, but for the prior, whose content is kept beside them."""
    found = dataclasses.asdict(settings)
    del found["prior"]
    return {name: None if value == math.inf else value for name, value in found.items()}


def _with_gaps(values: Array | None) -> list[float | None] | None:
    if values is None:
        return None
    return [float(x) if np.isfinite(x) else None for x in values]
