"""Rules on the weights themselves: adapters that do nothing, weights that drift away."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lisa_analysis.rundir.trained import has_adapters
from lisa_analysis.runs.diagnostics.rule import (
    CouldNotRunError,
    Evidence,
    Outcome,
    Rule,
    name_layers,
)


@dataclass(frozen=True)
class LoraDead(Rule):
    """Adapters that never became anything."""

    steps: int = 10
    id: ClassVar[str] = "lora_dead"
    title: ClassVar[str] = "Dead adapters"
    meaning: ClassVar[str] = (
        "An adapter whose product BA is what it began with changes nothing; one with A or B "
        "frozen learns in half of its directions at most."
    )
    advice: ClassVar[str] = (
        "Check target_modules and that B gets gradients; do not zero-initialise both A and B."
    )
    methods: ClassVar[tuple[str, ...] | None] = ("lora",)

    @property
    def threshold(self) -> str:
        """When the rule fires."""
        return f"‖BA − B_0A_0‖ = 0 after {self.steps} steps; a warning when A or B never trained"

    def check(self, evidence: Evidence) -> Outcome:
        """Look at the last product norm of every adapter, and at which parts trained."""
        frame, table = evidence.run.parameters, evidence.table
        roles = frame["role"].astype(str)
        if not roles.isin(["lora_A", "lora_B"]).any():
            raise CouldNotRunError("the run has no tensors of role lora_A or lora_B")
        if not len(table.steps) or table.steps[-1] < self.steps:
            raise CouldNotRunError(f"fewer than {self.steps} steps were recorded")
        b = frame[roles == "lora_B"]
        product = table.last["delta_norm"][b["param_id"].to_numpy()]
        idle = frame[
            roles.isin(["lora_A", "lora_B"])
            & ~table.ever_trained[frame["param_id"].to_numpy()]
            & frame["tied_to"].isna()
        ]
        if np.isnan(product).all() and not len(idle):
            raise CouldNotRunError("delta_norm was not recorded for any adapter")
        dead = b[product == 0]
        if len(dead):
            layers = tuple(sorted({int(v) for v in dead["layer"].dropna()}))
            return Outcome(
                "fail",
                f"{len(dead)} of {len(b)} adapters have not changed their product BA by step "
                f"{int(table.steps[-1])}, first {dead['name'].iloc[0]}.",
                layers,
                int(table.steps[-1]),
            )
        if len(idle):
            layers = tuple(sorted({int(v) for v in idle["layer"].dropna()}))
            return Outcome(
                "warn",
                f"{len(idle)} adapter tensors never trained, first {idle['name'].iloc[0]}.",
                layers,
            )
        return Outcome("ok", f"All {len(b)} adapters have a product and train both parts.")


@dataclass(frozen=True)
class WeightDrift(Rule):
    """Weight norms that left where they started."""

    change: float = 0.1
    id: ClassVar[str] = "weight_drift"
    title: ClassVar[str] = "Weight drift"
    meaning: ClassVar[str] = (
        "Fine-tuning usually leaves the norm of a layer within a few per cent of the pretrained "
        "one; more suggests a rate or a decay that undoes pre-training."
    )
    advice: ClassVar[str] = "Lower the learning rate; check the weight decay."

    @property
    def threshold(self) -> str:
        """When the rule fires."""
        return f"norm of a layer changed by more than {self.change:.0%} since step 0"

    def check(self, evidence: Evidence) -> Outcome:
        """Compare the last norm of every layer with the first."""
        table = evidence.table
        inside = table.groups.inside
        adapters = has_adapters(evidence.run)
        if adapters:
            # Raw adapters start near zero: their weights' drift is that of the merged weight.
            last, first = table.final_merged[:inside], table.initial_merged[:inside]
        else:
            last, first = table.final[:inside], table.initial[:inside]
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = last / first - 1
        known = np.isfinite(relative)
        if not known.any():
            column = "merged_norm" if adapters else "weight_norm"
            raise CouldNotRunError(f"{column} was not recorded both at step 0 and later")
        size = np.where(known, np.abs(relative), 0.0)
        worst = int(np.argmax(size))
        text = f"Layer {worst} changed most, by {relative[worst]:+.2%}"
        layers = np.flatnonzero(size > self.change)
        if not len(layers):
            return Outcome("ok", f"{text}.")
        return Outcome(
            "warn", f"{text}; {name_layers(layers)} beyond the limit.", tuple(layers.tolist())
        )
