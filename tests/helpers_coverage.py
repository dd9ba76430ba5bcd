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


def own_course(amplitude, rho=0.99):
    """A slow course of each layer's own."""
    return lambda rng, n, layers: amplitude * ar1(rng, n, layers, rho)


def smooth_course(amplitude, rho=0.99):
    """A slow course that is smooth over depth."""

    def make(rng, n, layers):
        depth = np.linspace(-1, 1, layers)
        forms = np.stack([depth, depth**2 - 1 / 3, depth**3])
        return amplitude * (1.2 * ar1(rng, n, 3, rho) @ forms)

    return make


def white(rng, n, layers):
    """Noise of batches."""
    return 0.5 * rng.standard_normal((n, layers))


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
    """A way in which layers vary, the number of recorded steps, and LISA's draws or None.

    `slow` is a course in addition to the noise, `repetitions` how many times as many runs the
    table of the benchmark takes.
    """

    name: str
    noise: Callable
    steps: int
    lisa: tuple[int, int] | None = None
    n_eff: float | None = None
    layers: int = LAYERS
    slow: Callable | None = None
    repetitions: int = 1


@dataclass
class Held:
    """How often intervals held the truth, over all repetitions.

    `layer` and `joint` are of the mean of the process, `run_layer` and `run_joint` of that with
    the slow course as it was in the run: what is meant where the course outlasts it.
    """

    shown: list = field(default_factory=list)
    layer: list = field(default_factory=list)
    joint: list = field(default_factory=list)
    run_layer: list = field(default_factory=list)
    run_joint: list = field(default_factory=list)
    n_eff: list = field(default_factory=list)
    verdicts: Counter = field(default_factory=Counter)
    drift: list = field(default_factory=list)
    figures: dict = field(default_factory=lambda: defaultdict(list))

    def rate(self, what):
        values = np.concatenate([np.atleast_1d(v) for v in getattr(self, what)])
        return float(values.mean()) if len(values) else float("nan")


def simulate(world, truth, rng):
    """Logs of one run, its periods (None where all layers train), and the slow course's mean."""
    moved = np.zeros((1, len(truth)))
    if world.slow is not None:
        moved = world.slow(rng, world.steps, len(truth))
    logs = truth + world.noise(rng, world.steps, len(truth)) + moved
    if world.lisa is None:
        return logs, None, moved.mean(axis=0)
    interval, k = world.lisa
    seen = np.zeros(logs.shape, dtype=bool)
    for start in range(0, world.steps, interval):
        seen[start : start + interval, rng.choice(len(truth), k, replace=False)] = True
    return (
        np.where(seen, logs, np.nan), np.arange(world.steps) // interval, moved.mean(axis=0)
    )  # fmt: skip


def coverage(world, truth=None, repetitions=20, judge=True, replicates=400):
    """Fit so many runs of a world, and count."""
    held = Held()
    truth = np.zeros(world.layers) if truth is None else truth
    for repetition in range(repetitions):
        rng = np.random.default_rng([repetition, world.steps])
        logs, clusters, moved = simulate(world, truth, rng)
        fit = fit_series(
            np.exp(logs), log=True, clusters=clusters, confidence=0.95, rng=rng,
            replicates=replicates,
        )  # fmt: skip
        known, seen = fit.known, fit.seen
        held.shown.append(known[seen])
        held.n_eff.append(fit.n_eff[seen])
        targets = ((truth, held.layer, held.joint), (truth + moved, held.run_layer, held.run_joint))
        for target, single, together in targets:
            # Intervals are those of a layer relative to the others.
            relative = target - target[seen].mean() + fit.effect[seen].mean()
            with np.errstate(invalid="ignore"):
                inside = (np.log(fit.low) <= relative) & (relative <= np.log(fit.high))
                both = (np.log(fit.joint_low) <= relative) & (relative <= np.log(fit.joint_high))
            single.append(inside[known])
            if known.any():
                together.append(both[known].all())
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
    World("white + slow .05", white, 500, slow=own_course(0.05), n_eff=194),
    World("white + slow .15", white, 500, slow=own_course(0.15), n_eff=35),
    World("white + slow .15", white, 2000, slow=own_course(0.15), n_eff=121),
    World("white + slow .15, 6 layers", white, 300, slow=own_course(0.15), layers=6),
    World("independent, 6 layers", course(0.0), 300, n_eff=300, layers=6),
    World("smooth slow .15", white, 500, slow=smooth_course(0.15), repetitions=2),
    World("smooth slow .3", white, 2000, slow=smooth_course(0.3)),
    World("own trends", trend(0.3), 200),
    World("own sizes", uneven, 40),
    World("one layer apart", one_apart, 200),
    World("LISA 2 of 32, 50 draws", course(0.5), 200, (4, 2)),
    World("LISA 2 of 32, 200 draws", course(0.5), 800, (4, 2)),
    World("LISA 8 of 32, 60 draws", course(0.5), 1200, (20, 8)),
    World("LISA 1 of 32, 300 draws", course(0.5), 1500, (5, 1)),
    World("LISA 16 of 32, 100 draws", course(0.9), 300, (3, 16), repetitions=3),
]


def outlasting(layers, rho=0.998):
    """White noise of batches and a course that lasts longer than the run, twice 1/(1 − ρ)."""
    return World(
        f"white + outlasting .15, {layers} layers, memory {1 / (1 - rho):.0f}", white, 300,
        slow=own_course(0.15, rho=rho), layers=layers,
    )  # fmt: skip


OUTLASTING = [outlasting(6, 0.995), *(outlasting(layers) for layers in (4, 6, 8, 12, 32))]
