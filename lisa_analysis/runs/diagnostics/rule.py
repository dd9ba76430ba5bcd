"""What a rule is, and the evidence that all rules share."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lisa_analysis.metrics.step_tables import StepTable, step_table
from lisa_analysis.rundir.events import draw_events, learning_rates, ruling_draws
from lisa_analysis.runs.diagnostics.finding import Finding, State

if TYPE_CHECKING:
    from lisa_analysis.rundir.run import Run

Array = NDArray[Any]


class CouldNotRunError(Exception):
    """A rule lacks its input; the message says which."""


@dataclass(frozen=True)
class Outcome:
    """State and evidence of one rule; the rest of a Finding comes from the rule."""

    state: State
    evidence: str
    layers: tuple[int, ...] = ()
    step: int | None = None


class Evidence:
    """One run, read once for all rules."""

    def __init__(self, run: "Run") -> None:
        self.run = run

    @cached_property
    def table(self) -> StepTable:
        """Norms per recorded step and layer."""
        return step_table(self.run, "layer")

    @cached_property
    def scalars(self) -> pd.DataFrame:
        """The run's scalars."""
        frame: pd.DataFrame = self.run.scalars
        return frame

    @property
    def n_layers(self) -> int:
        """Layers of the stack."""
        return int(self.run.n_layers)

    @cached_property
    def draws(self) -> list[tuple[int, tuple[int, ...], Any]]:
        """(step, layers, π) of every draw."""
        return draw_events(self.run)

    @cached_property
    def period(self) -> NDArray[np.int64]:
        """Index of the draw that ruled every recorded step."""
        return ruling_draws(self.run, self.table.steps)

    def column(self, name: str) -> Array:
        """Recorded column, shape (steps, groups); `CouldNotRunError` without it."""
        if name not in self.table or not len(self.table.steps):
            raise CouldNotRunError(f"{name} was not recorded")
        return self.table[name]

    def layers(self, name: str) -> Array:
        """The part of `column` inside the stack."""
        return self.column(name)[:, : self.table.groups.inside]

    def scalar(self, *names: str) -> pd.DataFrame:
        """Rows of the scalars where all of `names` were logged, with their step."""
        frame = self.scalars
        missing = [n for n in names if n not in frame or not frame[n].notna().any()]
        if missing:
            raise CouldNotRunError(f"{missing[0]} was not logged")
        return frame[["step", *names]].dropna()

    def learning_rate(self) -> Array:
        """Learning rate of every recorded step."""
        rates = learning_rates(self.run, self.table.steps)
        if rates is None:
            raise CouldNotRunError("learning_rate was not logged")
        return rates


@dataclass(frozen=True)
class Rule:
    """One thing that can be wrong with a run. Subclasses set the class texts and `check`."""

    id: ClassVar[str] = field(init=False)
    title: ClassVar[str] = field(init=False)
    meaning: ClassVar[str] = field(init=False)
    advice: ClassVar[str] = field(init=False)
    methods: ClassVar[tuple[str, ...] | None] = None

    @property
    def threshold(self) -> str:
        """When the rule fires, in words, with the values in force."""
        raise NotImplementedError

    def check(self, evidence: Evidence) -> Outcome:
        """Look at a run; raise `CouldNotRunError` when the input is missing."""
        raise NotImplementedError

    def applies(self, run: "Run") -> bool:
        """Whether the rule means anything for this method of training; a probe trains nothing."""
        return not run.is_probe if self.methods is None else run.method in self.methods

    def __call__(self, evidence: Evidence) -> Finding:
        """Check, and put the outcome together with the texts of the rule."""
        try:
            outcome = self.check(evidence)
        except CouldNotRunError as reason:
            outcome = Outcome("could not run", f"Could not run: {reason}.")
        return Finding(
            id=self.id,
            state=outcome.state,
            title=self.title,
            evidence=outcome.evidence,
            threshold=self.threshold,
            meaning=self.meaning,
            advice=self.advice,
            layers=outcome.layers,
            step=outcome.step,
        )


def name_layers(layers: Any, limit: int = 6) -> str:
    """``layer 3``, ``layers 0, 1, 2`` or ``layers 0, 1, 2, 3, 4, 5 and 9 more``."""
    layers = [int(layer) for layer in layers]
    shown = ", ".join(map(str, layers[:limit]))
    more = f" and {len(layers) - limit} more" if len(layers) > limit else ""
    return f"layer{'s' if len(layers) != 1 else ''} {shown}{more}"
