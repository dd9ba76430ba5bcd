"""What visits have shown of every layer: a running mean each, and how sure it is (numpy)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Repeated visits, of all layers together, before their scatter says how noisy a visit is.
_ENOUGH = 8
# Visits by which the noise of all layers counts in that of one.
_POOLED = 4.0


@dataclass(frozen=True)
class Belief:
    """Scores of layers as they are believed to be now.

    Attributes
    ----------
    log_score
        Shape (L,): logarithm of the score, about 0 on average; that of the prior where unseen.
    error
        Shape (L,): standard error of it; infinite where nothing tells.
    visits
        Shape (L,): how often the layer was seen.
    prior
        Shape (L,): logarithm of the prior's score.
    """

    log_score: Array
    error: Array
    visits: NDArray[np.int64]
    prior: Array


class Evidence:
    """Running means of the logarithms of what visits showed, free of their common course.

    Visit t of layer i shows ln x = c_t + s_i + noise, where c_t is the course that all layers
    share: the loss falls, the learning rate changes, gradients are clipped. Few layers are seen at
    a time, so that c is followed over half a cover; what its lag leaves is the same for all layers
    and goes with the mean of s. A new visit counts `memory` in s_i, and more in the first ones: the
    prior stands for one visit. How noisy visits are is learned from their innovations. The doubt
    about a layer grows while it is unseen: by one cover as much as a visit carries into the mean.

    Parameters
    ----------
    prior
        Scores, shape (L,), above 0.
    k
        Layers per draw.
    memory
        See `LearnConfig`.
    """

    def __init__(self, prior: Array, k: float, memory: float) -> None:
        logs = np.log(np.asarray(prior, dtype=np.float64))
        self.prior = logs - logs.mean()
        layers = logs.size
        self._cover = layers / k
        self._memory = memory
        self.visits = np.zeros(layers, dtype=np.int64)
        self._mean = self.prior.copy()
        # Sum of the squared weights of a layer's visits: the noise of its mean in visits.
        self._weights = np.ones(layers)
        self._age = np.zeros(layers)
        self._noise = np.zeros(layers)
        self._pooled = 0.0
        self._repeated = 0
        self._course = 0.0
        self._updates = 0

    def add(self, values: Array) -> None:
        """Take what the visits of one draw showed.

        Parameters
        ----------
        values
            Shape (L,), above 0; NaN where a layer was not seen.
        """
        with np.errstate(invalid="ignore"):
            seen = np.flatnonzero(values > 0)
        self._age += 1.0
        if not seen.size:
            return
        above = np.log(values[seen]) - self._mean[seen]
        surprise = above - self._expected_course(above)
        again = self.visits[seen] > 0
        self._learn_noise(seen[again], surprise[again])
        weight = np.maximum(self._memory, 1.0 / (self.visits[seen] + 2.0))
        self._mean[seen] += weight * surprise
        self._weights[seen] = (1.0 - weight) ** 2 * self._weights[seen] + weight**2
        self.visits[seen] += 1
        self._age[seen] = 0.0
        self._centre()

    def _expected_course(self, above: Array) -> float:
        """Follow the common course; return it as it is known of this draw."""
        layers, count = self._mean.size, above.size
        now = float(above.mean())
        if not self._updates:
            self._course = now
        # A layer that is seen alone tells nothing of the course without itself.
        own = (count - 1) / max(1, layers - 1)
        expected = (1.0 - own) * self._course + own * now
        gain = max(min(1.0, 2.0 * count / layers), 1.0 / (self._updates + 1))
        self._course += gain * (now - self._course)
        self._updates += 1
        return expected

    def _learn_noise(self, seen: NDArray[np.intp], surprise: Array) -> None:
        if not seen.size:
            return
        # A surprise has the noise of the visit and that of the mean that it is compared with.
        variance = surprise**2 / (1.0 + self._weights[seen])
        self._repeated += seen.size
        share = seen.size / min(self._repeated, 4 * self._mean.size)
        self._pooled += min(1.0, share) * (float(variance.mean()) - self._pooled)
        weight = np.maximum(self._memory, 1.0 / self.visits[seen])
        self._noise[seen] += weight * (variance - self._noise[seen])

    def _centre(self) -> None:
        """Keep the mean of what was seen at that of its prior; the course takes the rest."""
        seen = self.visits > 0
        shift = float((self._mean[seen] - self.prior[seen]).mean())
        self._mean[seen] -= shift
        self._course += shift

    def belief(self) -> Belief:
        """Return the scores with their standard errors."""
        error = np.full(self._mean.size, np.inf)
        if self._repeated >= _ENOUGH:
            # A running mean rests on no more visits than this, however many there were.
            most = (2.0 - self._memory) / self._memory
            repeats = np.clip(self.visits - 1.0, 0.0, most)
            noise = (repeats * self._noise + _POOLED * self._pooled) / (repeats + _POOLED)
            doubt = self._weights + self._memory**2 * self._age / self._cover
            error = np.where(self.visits > 0, np.sqrt(noise * doubt), np.inf)
        return Belief(self._mean.copy(), error, self.visits.copy(), self.prior)

    def state_dict(self) -> dict[str, Any]:
        """Return everything, as JSON values."""
        return {
            "prior": self.prior.tolist(), "visits": self.visits.tolist(),
            "mean": self._mean.tolist(), "weights": self._weights.tolist(),
            "age": self._age.tolist(), "noise": self._noise.tolist(), "pooled": self._pooled,
            "repeated": self._repeated, "course": self._course, "updates": self._updates,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.visits = np.array(state["visits"], dtype=np.int64)
        self._mean, self._weights, self._age, self._noise = (
            np.array(state[name], dtype=np.float64) for name in ("mean", "weights", "age", "noise")
        )
        self._pooled, self._course = float(state["pooled"]), float(state["course"])
        self._repeated, self._updates = int(state["repeated"]), int(state["updates"])
