"""What a learner is, and which there are (numpy)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.statistics.shrinkage import shrunk_scores
from lisa_train.checks import refuse_built_in
from lisa_train.methods.lisa.learning.evidence import Array, Belief

# Logarithms of scores stay within; far beyond every cap.
_MOST = 20.0
# Coverage of one standard error to each side.
_ONE_ERROR = math.erf(math.sqrt(0.5))


@dataclass(frozen=True)
class Scores:
    """Scores of layers and the intervals that π is made from.

    Each of shape (L,), above 0; NaN where a layer is not known, which then has its prior's π.
    Intervals reach one standard error to each side; of a score that is certain they are the score.
    """

    score: Array
    low: Array
    high: Array

    def shrunk(self) -> Array:
        """Return the scores as a probabilities file takes them, see `shrunk_scores`; NaN as above.

        Each is pulled towards what all layers share, by how little is known of it.
        """
        found = np.full(self.score.size, np.nan)
        known = np.isfinite(self.score) & (np.isfinite(self.low) | np.isfinite(self.high))
        if known.any():
            found[known] = shrunk_scores(
                self.score[known], self.low[known], self.high[known], _ONE_ERROR
            )
        return found


class Learner(ABC):
    """Turns what visits have shown into scores; under `register`, `LearnConfig.learner` names it.

    Asked once for every draw. What it keeps beside the evidence stands in its `state_dict`, so
    that a resumed run goes on alike; it depends on nothing else, so that all processes agree.

    Parameters
    ----------
    layers
        Number of layers.

    Examples
    --------
    >>> from lisa_train.methods.lisa.learning.learners import Learner, Scores, register
    >>> @register
    ... class Certain(Learner):
    ...     name = "certain"
    ...     def scores(self, belief):
    ...         score = np.exp(belief.log_score)
    ...         return Scores(score, score, score)
    >>> lt.LearnConfig(learner="certain")  # doctest: +SKIP
    """

    name: ClassVar[str]

    def __init__(self, layers: int) -> None:
        self.layers = layers

    @abstractmethod
    def scores(self, belief: Belief) -> Scores:
        """Return the scores for the next draw."""

    def state_dict(self) -> dict[str, Any]:
        """Return what it keeps, as JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take up what `state_dict` returned."""


LEARNERS: dict[str, type[Learner]] = {}
"""Learners by the name that `LearnConfig.learner` gives them."""

_Kind = TypeVar("_Kind", bound=type[Learner])


def register(learner: _Kind) -> _Kind:
    """Add a class of learners to `LEARNERS` under its `name`; a decorator.

    One of your own may be registered again; `ConfigError` for the name of a built-in.
    """
    refuse_built_in("learner", learner.name, LEARNERS)
    LEARNERS[learner.name] = learner
    return learner


@register
class RunningMean(Learner):
    """``ema``: the running mean of every layer, with the interval that its visits leave.

    What is known badly is pulled towards the others, and drawn as they are.
    """

    name = "ema"

    def scores(self, belief: Belief) -> Scores:
        """Return the means; a layer that was not seen is not known."""
        center = np.where(np.isfinite(belief.error), belief.log_score, np.nan)
        away = np.where(np.isfinite(belief.error), belief.error, np.nan)
        score, low, high = (
            np.exp(x.clip(-_MOST, _MOST)) for x in (center, center - away, center + away)
        )
        return Scores(score, low, high)


@register
class KullbackLeibler(Learner):
    """``kl``: p ← p^(1−λ)·q^λ·exp(ηz), a distribution pulled to the prior q, pushed by scores z.

    At rest it is q·exp(ηz/λ), the distribution that gains most from z for its divergence from q;
    η = λ here. MISA has q uniform and z = ‖g‖². Here z is the standardised log-score, shrunk by
    its reliability: 1 − noise/variance, with twice the noise that was found. Plainly standardised
    scores of equal layers, which are noise alone, would be as large as those of unequal ones, and
    the sampler would run away with them.

    Scores that are shrunk need no interval any more.
    """

    name = "kl"
    _PULL = _PUSH = 0.1
    _CAUTION = 9.0

    def __init__(self, layers: int) -> None:
        super().__init__(layers)
        self._log_p: Array = np.zeros(layers)

    def scores(self, belief: Belief) -> Scores:
        """Move the distribution once, and return it with mean about 1."""
        z = self._standardised(belief)
        log_p = (1.0 - self._PULL) * self._log_p + self._PULL * belief.prior + self._PUSH * z
        log_p -= log_p.mean()
        self._log_p = np.clip(log_p, -_MOST, _MOST)
        score = np.where(np.isfinite(belief.error), np.exp(self._log_p), np.nan)
        return Scores(score, score, score)

    def _standardised(self, belief: Belief) -> Array:
        # What was learned beyond the prior, which pulls on its own.
        gain = belief.log_score - belief.prior
        known: NDArray[np.bool_] = np.isfinite(belief.error)
        if known.sum() < 2 or not np.ptp(gain[known]) > 0:
            return np.zeros(self.layers)
        deviation = gain - gain[known].mean()
        size = float(np.sqrt(deviation[known].var(ddof=1)))
        with np.errstate(divide="ignore", invalid="ignore"):
            reliability = 1.0 - self._CAUTION * (belief.error / deviation) ** 2
        return np.where(known, np.maximum(0.0, reliability) * deviation / size, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the distribution."""
        return {"log_p": self._log_p.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the distribution."""
        self._log_p = np.array(state["log_p"], dtype=np.float64)
