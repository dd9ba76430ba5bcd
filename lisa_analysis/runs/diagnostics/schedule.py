"""Rules on LISA's schedule: declared against active, covered, visited as often as intended."""

from dataclasses import dataclass
from math import exp, lgamma, log
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.rundir.events import chosen
from lisa_analysis.rundir.parts import part_draws, parts_of
from lisa_analysis.runs.diagnostics.rule import (
    CouldNotRunError,
    Evidence,
    Outcome,
    Rule,
    name_layers,
)


@dataclass(frozen=True)
class _ScheduleRule(Rule):
    """Applies to LISA runs, and needs their draws."""

    methods: ClassVar[tuple[str, ...] | None] = ("lisa",)

    def draws(self, evidence: Evidence) -> list[tuple[int, tuple[int, ...], NDArray | None]]:
        if not evidence.draws:
            raise CouldNotRunError("no lisa_draw event was logged")
        return evidence.draws


@dataclass(frozen=True)
class ScheduleMismatch(_ScheduleRule):
    """The declared layers are not those that trained."""

    id: ClassVar[str] = "schedule_mismatch"
    title: ClassVar[str] = "Schedule and training disagree"
    meaning: ClassVar[str] = (
        "The layers that were drawn are not the layers that had gradients: freezing did not take "
        "effect, or the layers were found at the wrong path."
    )
    advice: ClassVar[str] = (
        "Check find_layers(model); attach LISA before the optimizer is built and let no other "
        "callback touch requires_grad."
    )

    @property
    def threshold(self) -> str:
        """When the rule fires."""
        return "any recorded step whose trained layers differ from the draw in force"

    def check(self, evidence: Evidence) -> Outcome:
        """Compare every recorded step with its draw."""
        self.draws(evidence)
        declared = chosen(evidence.run)
        ruled = evidence.period >= 0
        if not ruled.any():
            raise CouldNotRunError("no step was recorded after a draw")
        trained = evidence.table.trained[ruled][:, : evidence.n_layers]
        wrong = trained != declared[evidence.period[ruled]]
        if not wrong.any():
            return Outcome(
                "ok", f"Trained layers are the drawn ones at all {int(ruled.sum())} recorded steps."
            )
        row = int(np.argmax(wrong.any(axis=1)))
        step = int(evidence.table.steps[ruled][row])
        drawn = np.flatnonzero(declared[evidence.period[ruled][row]])
        active = np.flatnonzero(trained[row])
        return Outcome(
            "fail",
            f"{int(wrong.any(axis=1).sum())} of {int(ruled.sum())} recorded steps; at step {step} "
            f"{name_layers(drawn)} drawn, {name_layers(active) if len(active) else 'none'} "
            "trained.",
            tuple(np.flatnonzero(wrong.any(axis=0)).tolist()),
            step,
        )


@dataclass(frozen=True)
class Coverage(_ScheduleRule):
    """Layers that were never drawn.

    Parameters
    ----------
    chance
        Leave alone the layers that independent draws with their π would have passed over until now
        with at least this probability: of a run that goes on, those whose turn may still come.
    """

    chance: float = 1.0
    id: ClassVar[str] = "coverage"
    title: ClassVar[str] = "Layers never sampled"
    meaning: ClassVar[str] = (
        "A layer that was never drawn has not trained, and nothing is known about its importance. "
        "Layers that the run's probabilities leave out (π = 0) are not counted."
    )
    advice: ClassVar[str] = (
        "Use a balanced or cyclic sampler, shorter periods, more layers per period, or more steps."
    )

    @property
    def threshold(self) -> str:
        """When the rule fires."""
        late = f" and that chance passes over in less than {self.chance:g} of runs"
        return "any layer without a draw whose π is above 0" + (late if self.chance < 1 else "")

    def check(self, evidence: Evidence) -> Outcome:
        """Count draws per layer."""
        draws = self.draws(evidence)
        visits = chosen(evidence.run).sum(axis=0)
        out = _left_out(draws, evidence.n_layers)
        but = f" ({name_layers(np.flatnonzero(out))} left out by π = 0)" if out.any() else ""
        waits = (visits == 0) & ~out
        unseen = np.flatnonzero(
            waits & (self._passed_over(draws, evidence.n_layers) <= self.chance)
        )
        if not len(unseen) and waits.any():
            return Outcome(
                "info", f"{int(waits.sum())} layers were not drawn yet in {len(draws)} draws{but}."
            )
        if not len(unseen):
            least = int(visits[~out].min())
            return Outcome("ok", f"Every layer was drawn{but}, the least {least} times.")
        k, n = np.mean([len(layers) for _, layers, _ in draws]), int((~out).sum())
        expected = n * (1 - k / n) ** len(draws)
        return Outcome(
            "warn",
            f"{len(unseen)} of {n} layers were never drawn in {len(draws)} draws "
            f"({name_layers(unseen)}){but}; independent uniform draws would leave {expected:.1f}.",
            tuple(unseen.tolist()),
        )

    @staticmethod
    def _passed_over(
        draws: list[tuple[int, tuple[int, ...], NDArray | None]], n_layers: int
    ) -> NDArray[np.float64]:
        """Probability that independent draws never hold a layer, shape (layers,)."""
        left = np.ones(n_layers)
        for _, layers, pi in draws:
            if pi is None or len(pi) != n_layers:
                pi = np.full(n_layers, len(layers) / n_layers)
            left *= 1 - pi
        return left


def _left_out(
    draws: list[tuple[int, tuple[int, ...], NDArray | None]], n_layers: int
) -> NDArray[np.bool_]:
    """Layers with π = 0 in every draw, as far as π was logged."""
    pis = [pi for _, _, pi in draws if pi is not None and len(pi) == n_layers]
    if len(pis) < len(draws):
        return np.zeros(n_layers, dtype=bool)
    return np.asarray(np.max(pis, axis=0) == 0)


@dataclass(frozen=True)
class Visits(_ScheduleRule):
    """Draws against the probabilities they were meant to follow."""

    error: float = 0.01
    id: ClassVar[str] = "visits"
    title: ClassVar[str] = "Visits against expectation"
    meaning: ClassVar[str] = (
        "The layers were not drawn with the probabilities that the run declares: an inexact "
        "sampler, or a schedule from another file."
    )
    advice: ClassVar[str] = (
        "Check which probabilities file the run used; naive weighted sampling without replacement "
        "misses its probabilities."
    )

    @property
    def threshold(self) -> str:
        """When the rule fires."""
        return (
            f"a layer's draws outside the binomial range of Σπ with error {self.error:g}, all "
            "layers together"
        )

    def check(self, evidence: Evidence) -> Outcome:
        """Compare visits with Σπ over the draws."""
        draws, visits = self.draws(evidence), chosen(evidence.run).sum(axis=0)
        names = [f"Layer {layer}" for layer in range(evidence.n_layers)]
        if (parts := parts_of(evidence.run)) is not None:
            draws, names = part_draws(evidence.run, parts), list(parts.names)
            counted = [unit for _, units, _ in draws for unit in units]
            visits = np.bincount(counted, minlength=len(names))
        pis = [pi for _, _, pi in draws if pi is not None and len(pi) == len(names)]
        if len(pis) < len(draws) or not draws:
            raise CouldNotRunError("inclusion probabilities were not logged with every draw")
        expected = np.sum(pis, axis=0)
        n = len(draws)
        # Two tails, all layers: a binomial is wider than the sum of draws with varying π.
        limit = self.error / (2 * len(names))
        odd = [
            layer
            for layer in range(len(names))
            if min(
                binomial_tail(n, float(expected[layer]) / n, int(visits[layer]), upper=True),
                binomial_tail(n, float(expected[layer]) / n, int(visits[layer]), upper=False),
            )
            < limit
        ]
        gap = np.abs(visits - expected)
        worst = int(odd[0]) if odd else int(np.argmax(gap))
        text = (
            f"{names[worst]} was drawn {int(visits[worst])} times where {expected[worst]:.1f} were "
            f"expected in {n} draws"
        )
        if not odd:
            return Outcome("ok", f"Visits agree with π; largest gap: {text[0].lower()}{text[1:]}.")
        if parts is not None:
            layers = tuple(sorted({int(parts.layers[i]) for i in odd}))
            return Outcome("warn", f"{text}; {len(odd)} parts are outside chance.", layers)
        return Outcome("warn", f"{text}; {len(odd)} layers are outside chance.", tuple(odd))


def binomial_tail(n: int, p: float, x: int, *, upper: bool) -> float:
    """P(X ≥ x) or P(X ≤ x) of a binomial, summed exactly in logarithms."""
    if p <= 0 or p >= 1:
        certain = 0 if p <= 0 else n
        return float(certain >= x if upper else certain <= x)
    values = range(x, n + 1) if upper else range(0, x + 1)
    head = lgamma(n + 1)
    return min(
        1.0,
        sum(
            exp(head - lgamma(v + 1) - lgamma(n - v + 1) + v * log(p) + (n - v) * log(1 - p))
            for v in values
        ),
    )
