"""Rules on the realised updates: that the weights moved, and by a sensible amount."""

from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.runs.diagnostics.rule import (
    CouldNotRunError,
    Evidence,
    Outcome,
    Rule,
    name_layers,
)


@dataclass(frozen=True)
class SampledNotUpdated(Rule):
    """A layer had gradients and did not move."""

    id: ClassVar[str] = "sampled_not_updated"
    title: ClassVar[str] = "Sampled but not updated"
    meaning: ClassVar[str] = (
        "The layer had a gradient, and its weights are exactly what they were: it is not in the "
        "optimizer, or the step is rounded away."
    )
    advice: ClassVar[str] = (
        "Build the optimizer from all parameters before any layer is frozen; check the learning "
        "rate of the parameter groups; keep weights in float32."
    )

    @property
    def threshold(self) -> str:
        """When the rule fires."""
        return "gradient > 0 and update = 0 at every recorded step of an activation"

    def check(self, evidence: Evidence) -> Outcome:
        """Look for activations in which nothing moved."""
        gradient, update = evidence.column("grad_norm"), evidence.column("update_norm")
        names = evidence.table.groups.names
        due = gradient > 0
        # Without a logged rate every recorded step counts.
        with suppress(CouldNotRunError):
            due &= (evidence.learning_rate() > 0)[:, None]
        due &= np.isfinite(update)
        moved = due & (update > 0)
        period = evidence.period if evidence.draws else np.zeros(len(update), dtype=np.int64)
        starts = np.flatnonzero(np.concatenate([[True], np.diff(period) != 0]))
        expected = np.logical_or.reduceat(due, starts, axis=0)
        happened = np.logical_or.reduceat(moved, starts, axis=0)
        stuck = (expected > 0) & (happened == 0)
        # Groups outside the stack train throughout: judge them over the whole run.
        inside = evidence.table.groups.inside
        outside = (expected[:, inside:].sum(axis=0) > 0) & (happened[:, inside:].sum(axis=0) == 0)
        stuck[:, inside:] &= outside
        if not expected.any():
            raise CouldNotRunError("no recorded step had a gradient and a learning rate above 0")
        if not stuck.any():
            return Outcome("ok", "Every layer that had a gradient was moved by it.")
        groups = np.flatnonzero(stuck.any(axis=0))
        first = int(evidence.table.steps[starts[np.argmax(stuck.any(axis=1))]])
        layers = tuple(int(g) for g in groups if g < inside)
        others = [names[g] for g in groups if g >= inside]
        what = " and ".join(filter(None, [name_layers(layers) if layers else "", *others]))
        return Outcome(
            "fail",
            f"{what}: gradient but no update in {int(stuck.sum())} of "
            f"{int((expected > 0).sum())} activations, first from step {first}.",
            layers,
            first,
        )


@dataclass(frozen=True)
class Bf16Stall(Rule):
    """Half-precision weights that swallow the step."""

    share: float = 0.5
    id: ClassVar[str] = "bf16_stall"
    title: ClassVar[str] = "Updates lost to half precision"
    meaning: ClassVar[str] = (
        "The spacing of bfloat16 or float16 numbers at the size of the weights is larger than the "
        "step: most of the requested update is rounded to nothing."
    )
    advice: ClassVar[str] = (
        "Keep float32 master weights (bf16=True with a float32 model), or raise the learning rate."
    )
    _HALF_SPACING: ClassVar[dict[str, float]] = {"bfloat16": 2.0**-9, "float16": 2.0**-12}

    @property
    def threshold(self) -> str:
        """When the rule fires."""
        return (
            f"realised update < {self.share:g} of lr·√N (an Adam-sized step) in half precision, "
            "while lr is below half the number spacing of the weights"
        )

    def check(self, evidence: Evidence) -> Outcome:
        """Compare realised steps with the learning rate where weights are in half precision."""
        parameters = evidence.run.parameters
        trained = evidence.table.ever_trained[parameters["param_id"].to_numpy()]
        dtypes = parameters["dtype"][trained]
        coarse = dtypes[dtypes.isin(list(self._HALF_SPACING))]
        if not trained.any():
            raise CouldNotRunError("no tensor was trained")
        if len(coarse) < len(dtypes) / 2:
            return Outcome("ok", "The trained weights are not in half precision.")
        spacing = self._HALF_SPACING[coarse.mode()[0]]
        update, weight = evidence.layers("update_norm"), evidence.layers("weight_norm")
        size = np.sqrt(evidence.table.numel[: update.shape[1]])
        rate = evidence.learning_rate()[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            realised = update / (rate * size)
            lost = (realised < self.share) & (rate < spacing * weight / size) & (rate > 0)
        counted = np.isfinite(realised)
        shares = lost.sum(axis=0) / np.maximum(counted.sum(axis=0), 1)
        layers = np.flatnonzero(shares > 0.5)
        if not len(layers):
            return Outcome("ok", "Realised steps are of the size that the learning rate asks for.")
        typical = float(np.median(realised[:, layers][counted[:, layers]]))
        return Outcome(
            "warn",
            f"{name_layers(layers)}: the realised step is {typical:.2g} of an Adam-sized one, "
            f"and lr is below the spacing of {coarse.mode()[0]} at these weights.",
            tuple(layers.tolist()),
        )


@dataclass(frozen=True)
class UpdateRatio(Rule):
    """Steps far too small or large for the weights."""

    low: float = 1e-6
    high: float = 1e-2
    rate: float = 0.1
    id: ClassVar[str] = "update_ratio"
    title: ClassVar[str] = "Update-to-weight ratio"
    meaning: ClassVar[str] = (
        "A relative step outside the usual range is often a learning rate that is off by orders "
        "of magnitude. The range is a rule of thumb, not a law."
    )
    advice: ClassVar[str] = "Try learning rates a factor of ten lower or higher."
    methods: ClassVar[tuple[str, ...] | None] = ("full", "lisa", "select")

    @property
    def threshold(self) -> str:
        """When the rule fires."""
        return (
            f"‖Δθ‖/‖θ‖ outside [{self.low:g}, {self.high:g}] in more than half of what was "
            f"recorded while the learning rate was above {self.rate:.0%} of its largest; a warning "
            "when ten times further out"
        )

    def check(self, evidence: Evidence) -> Outcome:
        """Count steps and layers outside the range."""
        update, weight = evidence.layers("update_norm"), evidence.layers("weight_norm")
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(weight > 0, update / weight, np.nan)
        counts = np.isfinite(ratio) & (ratio > 0)
        if not counts.any():
            raise CouldNotRunError("no step with a measured update")
        ratio = ratio[counts & self._at_work(evidence)[:, None]]
        if not len(ratio):
            raise CouldNotRunError(
                f"no step was recorded with more than {self.rate:.0%} of the largest learning rate"
            )
        middle = float(np.median(ratio))
        outside = float(((ratio < self.low) | (ratio > self.high)).mean())
        if outside <= 0.5:
            return Outcome("ok", f"Median relative step {middle:.2g}.")
        far = middle < self.low / 10 or middle > self.high * 10
        return Outcome(
            "warn" if far else "info",
            f"{outside:.0%} of the recorded relative steps are outside the range; median "
            f"{middle:.2g}.",
        )

    def _at_work(self, evidence: Evidence) -> NDArray[np.bool_]:
        """Recorded steps whose learning rate says something of the run's: no warm-up, no end."""
        with suppress(CouldNotRunError):
            logged = evidence.scalar("learning_rate")["learning_rate"].to_numpy(dtype=np.float64)
            largest = float(np.nanmax(logged))
            if largest > 0:
                return np.asarray(evidence.learning_rate() > self.rate * largest)
        return np.ones(len(evidence.table.steps), dtype=bool)


@dataclass(frozen=True)
class ReactivationSpike(Rule):
    """A layer that jumps when it is thawed."""

    factor: float = 5.0
    id: ClassVar[str] = "reactivation_spike"
    title: ClassVar[str] = "Spike at re-activation"
    meaning: ClassVar[str] = (
        "The first step after a layer returns is much larger than the others of its period: "
        "its optimizer state is stale, or restarts without warm-up."
    )
    advice: ClassVar[str] = (
        "Compare optimizer_state reset, keep and offload; lengthen the period or warm up the "
        "rate at each activation."
    )
    methods: ClassVar[tuple[str, ...] | None] = ("lisa",)

    @property
    def threshold(self) -> str:
        """When the rule fires."""
        return (
            f"first update > {self.factor:g} × the median of its period in at least a quarter "
            "of the re-activations"
        )

    def check(self, evidence: Evidence) -> Outcome:
        """Compare the first update of every activation with the rest of it."""
        update = evidence.layers("update_norm")
        if not evidence.draws:
            raise CouldNotRunError("no lisa_draw event was logged")
        steps, period = evidence.table.steps, evidence.period
        row_of = {int(step): row for row, step in enumerate(steps)}
        before: set[int] = set()
        ratios: list[tuple[float, int, int]] = []
        for index, (step, layers, _) in enumerate(evidence.draws):
            first = row_of.get(step + 1)
            rows = np.flatnonzero(period == index) if first is not None else np.zeros(0, int)
            for layer in set(layers) - before if len(rows) > 2 else ():
                rest = update[rows, layer]
                rest = rest[np.isfinite(rest) & (rest > 0)]
                if len(rest) > 2 and np.isfinite(update[rows[0], layer]):
                    ratio = float(update[rows[0], layer] / np.median(rest))
                    ratios.append((ratio, layer, step + 1))
            before = set(layers)
        if not ratios:
            raise CouldNotRunError(
                "the first step of an activation and two more of it were never recorded"
            )
        spikes = [found for found in ratios if found[0] > self.factor]
        largest = max(ratios)
        if len(spikes) < max(1, len(ratios) / 4):
            return Outcome(
                "ok", f"Largest first step is {largest[0]:.1f} × the median of its period."
            )
        return Outcome(
            "warn",
            f"{len(spikes)} of {len(ratios)} activations begin with a spike; the largest is "
            f"{largest[0]:.1f} × the median of its period (layer {largest[1]}, step "
            f"{largest[2]}).",
            tuple(sorted({layer for _, layer, _ in spikes})),
            min(step for _, _, step in spikes),
        )
