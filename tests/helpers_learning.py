"""A training of layers that is nothing but its numbers: draws, visits, what they show."""

from dataclasses import dataclass, field

import numpy as np

from lisa_train.methods.lisa.control import Control
from lisa_train.methods.lisa.learning.config import LearnConfig
from lisa_train.methods.lisa.learning.sampler import LearnedSampler
from lisa_train.methods.lisa.learning.step_metrics import STEP_METRICS

LAYERS, STEPS, SIZE = 32, 20, 1000


def sampler(k=2, seed=0, layers=LAYERS, control=None, prior=None, **settings):
    prior = np.full(layers, k / layers) if prior is None else np.asarray(prior)
    return LearnedSampler(prior, k, seed, LearnConfig(**settings), control or Control())


def shown(metric, truth, course, rng):
    """What a visit shows of a layer whose gradient is `truth`: steps as noisy as the metric is."""
    if metric == "probe":
        return truth * course * np.exp(0.2 * rng.standard_normal())
    # Steps of a visit resemble each other.
    drift = 0.1 * rng.standard_normal()
    steps = truth * course * np.exp(drift + 0.3 * rng.standard_normal(STEPS))
    if metric == "grad_rms":
        steps = steps**2 * SIZE
    elif metric == "descent":
        steps = steps * (1.0 + 1.0 * rng.standard_normal(STEPS))
    elif metric == "signal":
        steps = SIZE * steps**2 * (1.0 + 2.0 * rng.standard_normal(STEPS))
    return STEP_METRICS[metric]().of_visit(steps, SIZE)


@dataclass
class Course:
    """What a simulation went through."""

    pi: np.ndarray
    drawn: np.ndarray
    scores: list = field(default_factory=list)

    @property
    def discrepancy(self):
        """Largest distance between visits and the sum of π, at any time and layer."""
        return np.abs(np.cumsum(self.drawn - self.pi, axis=0)).max()


def simulate(learned, truth, rounds, *, metric="grad_rms", seed=0, start=0):
    """Draw and learn; `truth(round)` gives the gradients of the layers at that time."""
    rng = np.random.default_rng(seed)
    layers = learned.inclusion_probabilities.size
    pi, drawn, scores = np.zeros((rounds, layers)), np.zeros((rounds, layers)), []
    for t in range(rounds):
        chosen = list(learned.draw(start + t))
        pi[t], drawn[t, chosen] = learned.probabilities(start + t), 1
        scores.append(learned.scores(start + t))
        values = np.full(layers, np.nan)
        real = truth(t)
        course = (1 + t / 50) ** -0.5  # the loss falls, and all gradients with it
        if metric == "probe":
            if (t + 1) % 4 == 0:
                values = np.array([shown(metric, real[i], course, rng) for i in range(layers)])
            else:
                continue
        else:
            for i in chosen:
                values[i] = shown(metric, real[i], course, rng)
        learned.learn(t + 1, values)
    return Course(pi, drawn, scores)


def effective(pi):
    share = pi / pi.sum()
    return 1 / (share**2).sum()


def planted(layer, times=2.0, layers=LAYERS):
    truth = np.ones(layers)
    truth[layer] = times
    return truth
