"""`LearnConfig`: how the probabilities of layers are learned while they train."""

from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any, Literal, get_args

from lisa_analysis.contract.errors import ConfigError, ProbabilitiesError
from lisa_analysis.plans.strength import CAP, FLOOR, MIX, Strength
from lisa_train.checks import one_of, real, whole

LearnMetric = Literal["grad_rms", "l1_descent", "descent", "signal", "probe"]
LearnerName = Literal["ema", "kl"]
PRIORS = ("uniform", "depth")
_POOL_HAS_NO = {"mix": MIX, "floor": FLOOR, "cap": CAP}


@dataclass(frozen=True)
class LearnConfig:
    """How inclusion probabilities are learned during training; `LisaConfig.learn`.

    Every visit of a layer shows a number, the mean of `metric` over its steps. The numbers, free
    of the course that all layers share, become scores with intervals; scores become π by the
    stages by which a probabilities file is made.

    Parameters
    ----------
    metric
        What a step shows of a layer that trains. ``grad_rms``: the gradient per element, ‖g‖/√N.
        ``l1_descent``: η‖g‖₁, the loss decrease that a step of Adam promises. ``descent``:
        −⟨g, θ′−θ⟩, what the step that was made promises; it takes a copy of the layers that train.
        ``signal``: √(‖E g‖²/N), what the micro-batches of a step agree on, or, where there is one,
        the halves of a batch, in a pass of its own once in every period.
        ``probe``: the gradient per element of all layers, drawn or not, in a measuring pass.
    learner
        How visits become scores: ``ema``, a running mean with its interval; ``kl``, a
        distribution that moves from the prior by standardised scores (after MISA). In Python, also
        the name of a learner of your own, see `lisa_train.methods.lisa.learning.learners`.
    strength
        How far π follows the scores: the power on them. 0 is uniform; above 1, mix and floor fall
        in proportion and the cap rises. With ``metric="probe"``, which sees layers that are not
        drawn, also ``"pool"`` (the layers that stand above the mean with their whole interval) or
        ``"pool=6"`` (the six best): they share k, the others have π = 0 until they come back.
    memory
        Weight of a new visit in the running mean of its layer, above 0 and at most 1.
    mix
        Share of uniform in π; not of a pool.
    floor, cap
        Bounds of π in units of k/L; π never exceeds 1. Not of a pool.
    prior
        Scores of layers that were not seen, and one visit's worth of evidence of the others:
        ``uniform``, ``depth`` (falls evenly from the first layer to half of it in the last), the
        path of a probabilities file, or one number per layer.
    start_after
        Draws by the prior before what was learned counts; None takes one cover, ⌈L/k⌉ draws.
    probe_every
        With ``metric="probe"``: draws from one measuring pass to the next.
    """

    metric: LearnMetric = "grad_rms"
    learner: LearnerName = "ema"
    strength: float | str = 1.0
    memory: float = 0.3
    mix: float = MIX
    floor: float = FLOOR
    cap: float = CAP
    prior: str | tuple[float, ...] = "uniform"
    start_after: int | None = None
    probe_every: int = 4

    def __post_init__(self) -> None:
        one_of("lisa.learn.metric", self.metric, get_args(LearnMetric))
        self._check_learner()
        self._check_strength()
        for name, least, most, words in (
            ("memory", 0.0, 1.0, "a number above 0 and at most 1"),
            ("mix", 0.0, 1.0, "a number from 0 to 1"),
            ("floor", 0.0, 1.0, "a number above 0 and at most 1"),
            ("cap", 1.0, float("inf"), "a number of at least 1"),
        ):
            value = real(f"lisa.learn.{name}", getattr(self, name), words)
            if not least <= value <= most or (name in ("memory", "floor") and value == 0.0):
                raise ConfigError(f"lisa.learn.{name} is {value:g}, but must be {words}.")
            object.__setattr__(self, name, value)
        if self.start_after is not None:
            words = " of draws of at least 0, or None for one cover"
            value = whole("lisa.learn.start_after", self.start_after, words, 0)
            object.__setattr__(self, "start_after", value)
        value = whole("lisa.learn.probe_every", self.probe_every, " of draws of at least 1", 1)
        object.__setattr__(self, "probe_every", value)
        if self.metric != "probe" and value != LearnConfig.probe_every:
            raise ConfigError(
                f"lisa.learn.probe_every is {value} with metric={self.metric!r}, which makes no "
                "measuring passes; set lisa.learn.metric to 'probe', or leave probe_every out."
            )
        self._check_prior()

    def _check_strength(self) -> None:
        words = "a number from 0 to 16, or with metric='probe' 'pool' or 'pool=6'"
        if not isinstance(self.strength, str):
            value = real("lisa.learn.strength", self.strength, words)
            object.__setattr__(self, "strength", value)
            if not 0.0 <= value <= 16.0:
                raise ConfigError(f"lisa.learn.strength is {value:g}, but must be {words}.")
            return
        try:
            found = Strength.of(self.strength)
        except ProbabilitiesError:
            found = None
        if found is None:
            raise ConfigError(f"lisa.learn.strength is {self.strength!r}, but must be {words}.")
        if found.pool is None:  # a number that came as a text
            object.__setattr__(self, "strength", found.power)
        elif self.metric != "probe":
            raise ConfigError(
                f"lisa.learn.strength is {self.strength!r} with metric={self.metric!r}, which sees "
                "drawn layers alone: a pool never draws the others again, so that nothing could "
                "be learned of them; set the metric to 'probe', which measures all, or make a pool "
                "from a finished run, with lisa-analyze."
            )
        elif given := [n for n, usual in _POOL_HAS_NO.items() if getattr(self, n) != usual]:
            raise ConfigError(
                f"lisa.learn.{given[0]} is {getattr(self, given[0])!r} with "
                f"strength={self.strength!r}: a pool has no {given[0]}, its layers share equally; "
                f"leave {given[0]} out."
            )

    def _check_learner(self) -> None:
        """`ConfigError` unless the learner is built in or registered; numpy is loaded for those."""
        built_in = get_args(LearnerName)
        if self.learner not in built_in:
            from lisa_train.methods.lisa.learning.learners import LEARNERS

            added = (name for name in LEARNERS if name not in built_in)
            one_of("lisa.learn.learner", self.learner, (*built_in, *added))

    def _check_prior(self) -> None:
        given: Any = self.prior
        if isinstance(given, PathLike):
            given = fspath(given)
        elif not isinstance(given, str):
            if not isinstance(given, Iterable):
                raise ConfigError(
                    f"lisa.learn.prior is {given!r}, but must be one of {', '.join(PRIORS)}, the "
                    "path of a probabilities file, or one number per layer."
                )
            given = tuple(
                real(f"lisa.learn.prior[{i}]", value, "a number above 0")
                for i, value in enumerate(given)
            )
            for i, value in enumerate(given):
                if not 0.0 < value < float("inf"):
                    raise ConfigError(
                        f"lisa.learn.prior[{i}] is {value:g}, but must be a finite number above 0."
                    )
        object.__setattr__(self, "prior", given)
