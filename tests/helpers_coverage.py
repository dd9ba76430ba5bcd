"""Logs of layers with a known truth, and how often what is said of them holds."""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import scipy.signal

from lisa_analysis.profiles import verdict as judgement
from lisa_analysis.profiles.thresholds import THRESHOLDS
from lisa_analysis.statistics.estimate import fit_series

LAYERS = 32
X = np.linspace(-1, 1, LAYERS)
FLAT = 0.0 * X
BOWL = np.log(0.2 + X**4)


def ar1(rng, n, columns, rho):
    """Stationary AR(1) courses of variance 1, shape (n, columns)."""
    noise = rng.standard_normal((n, columns))
    noise[1:] *= np.sqrt(1 - rho**2)
    return scipy.signal.lfilter([1.0], [1.0, -rho], noise, axis=0)


def course(rho, sd=0.5):
    """AR(1) noise of each layer and a common course that moves all of them."""

    def make(rng, n, layers):
        return sd * ar1(rng, n, layers, rho) + 0.3 * ar1(rng, n, 1, 0.9)

    return make


def slow(amplitude, rho=0.99, smooth=False):
    """White noise of batches plus a slow course, each layer's own or smooth over depth."""

    def make(rng, n, layers):
        if smooth:
            depth = np.linspace(-1, 1, layers)
            forms = np.stack([depth, depth**2 - 1 / 3, depth**3])
            moved = 1.2 * ar1(rng, n, 3, rho) @ forms
        else:
            moved = ar1(rng, n, layers, rho)
        return 0.5 * rng.standard_normal((n, layers)) + amplitude * moved

    return make


def trend(size):
    """AR(1) noise, and every layer drifts on a line of its own through its mean."""

    def make(rng, n, layers):
        line = np.linspace(-1, 1, n)[:, None] * size * rng.standard_normal(layers)
        return 0.5 * ar1(rng, n, layers, 0.5) + line

    return make


def uneven(rng, n, layers):
    """AR(1) noise whose size differs between layers (log-sd 0.4)."""
    return 0.5 * ar1(rng, n, layers, 0.5) * np.exp(0.4 * rng.standard_normal(layers))


def one_apart(rng, n, layers):
    """Layer 7 remembers ten times as long as the others."""
    logs = 0.5 * ar1(rng, n, layers, 0.5)
    logs[:, 7] = 0.5 * ar1(rng, n, 1, 0.93)[:, 0]
    return logs


@dataclass(frozen=True)
class World:
    """A way in which layers vary, the number of recorded steps, and LISA's draws or None."""

    name: str
    noise: Callable
    steps: int
    lisa: tuple[int, int] | None = None
    n_eff: float | None = None
    layers: int = LAYERS


@dataclass
class Held:
    """How often intervals held the truth, over all repetitions."""

    shown: list = field(default_factory=list)
    layer: list = field(default_factory=list)
    joint: list = field(default_factory=list)
    n_eff: list = field(default_factory=list)
    verdicts: Counter = field(default_factory=Counter)
    drift: list = field(default_factory=list)
    figures: dict = field(default_factory=lambda: defaultdict(list))

    def rate(self, what):
        values = np.concatenate([np.atleast_1d(v) for v in getattr(self, what)])
        return float(values.mean()) if len(values) else float("nan")


def simulate(world, truth, rng):
    """Logs of one run, and its periods (None where all layers train)."""
    logs = truth + world.noise(rng, world.steps, len(truth))
    if world.lisa is None:
        return logs, None
    interval, k = world.lisa
    seen = np.zeros(logs.shape, dtype=bool)
    for start in range(0, world.steps, interval):
        seen[start : start + interval, rng.choice(len(truth), k, replace=False)] = True
    return np.where(seen, logs, np.nan), np.arange(world.steps) // interval


def coverage(world, truth=None, repetitions=20, judge=True, replicates=400):
    """Fit so many runs of a world, and count."""
    held = Held()
    truth = np.zeros(world.layers) if truth is None else truth
    for repetition in range(repetitions):
        rng = np.random.default_rng([repetition, world.steps])
        logs, clusters = simulate(world, truth, rng)
        fit = fit_series(
            np.exp(logs), log=True, clusters=clusters, confidence=0.95, rng=rng,
            replicates=replicates,
        )  # fmt: skip
        known, seen = fit.known, fit.seen
        held.shown.append(known[seen])
        held.n_eff.append(fit.n_eff[seen])
        # Intervals are those of a layer relative to the others.
        relative = truth - truth[seen].mean() + fit.effect[seen].mean()
        with np.errstate(invalid="ignore"):
            inside = (np.log(fit.low) <= relative) & (relative <= np.log(fit.high))
            both = (np.log(fit.joint_low) <= relative) & (relative <= np.log(fit.joint_high))
        held.layer.append(inside[known])
        if known.any():
            held.joint.append(both[known].all())
        if judge:
            found = judgement.judge(
                fit, 0.95, THRESHOLDS, steps=np.arange(world.steps), period=clusters, rng=rng,
                stacks=("h",) * len(truth),
            )  # fmt: skip
            held.verdicts[found.shape.verdict] += 1
            held.drift.append(bool(found.reliability.drift))
    return held


WORLDS = [
    World("independent", course(0.0), 200, n_eff=200),
    World("independent, few", course(0.0), 20, n_eff=20),
    World("AR(1) .5", course(0.5), 20, n_eff=7),
    World("AR(1) .5", course(0.5), 40, n_eff=13),
    World("AR(1) .5", course(0.5), 200, n_eff=67),
    World("AR(1) .5", course(0.5), 1200, n_eff=400),
    World("AR(1) .9", course(0.9), 114, n_eff=6),
    World("AR(1) .9", course(0.9), 400, n_eff=21),
    World("AR(1) .9", course(0.9), 2000, n_eff=105),
    World("AR(1) .99", course(0.99), 2000, n_eff=10),
    World("white + slow .05", slow(0.05), 500, n_eff=194),
    World("white + slow .15", slow(0.15), 500, n_eff=35),
    World("white + slow .15", slow(0.15), 2000, n_eff=121),
    World("white + slow .15, 6 layers", slow(0.15), 300, layers=6),
    World("white + slower .15, 6 layers", slow(0.15, rho=0.995), 300, layers=6),
    World("white + outlasting .15, 4 layers", slow(0.15, rho=0.998), 300, layers=4),
    World("white + outlasting .15, 6 layers", slow(0.15, rho=0.998), 300, layers=6),
    World("white + outlasting .15, 8 layers", slow(0.15, rho=0.998), 300, layers=8),
    World("white + outlasting .15, 12 layers", slow(0.15, rho=0.998), 300, layers=12),
    World("independent, 6 layers", course(0.0), 300, n_eff=300, layers=6),
    World("smooth slow .15", slow(0.15, smooth=True), 500),
    World("smooth slow .3", slow(0.3, smooth=True), 2000),
    World("own trends", trend(0.3), 200),
    World("own sizes", uneven, 40),
    World("one layer apart", one_apart, 200),
    World("LISA 2 of 32, 50 draws", course(0.5), 200, (4, 2)),
    World("LISA 2 of 32, 200 draws", course(0.5), 800, (4, 2)),
    World("LISA 8 of 32, 60 draws", course(0.5), 1200, (20, 8)),
    World("LISA 1 of 32, 300 draws", course(0.5), 1500, (5, 1)),
    World("LISA 16 of 32, 100 draws", course(0.9), 300, (3, 16)),
]
