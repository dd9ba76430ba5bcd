"""What is asked of the next run: one object for probabilities, strengths and other tools' files."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.plans.sampling import (
    SamplingProbabilities,
    sampling_probabilities,
    strengths,
)

if TYPE_CHECKING:
    import pandas as pd

    from lisa_analysis.profiles.profile import ImportanceProfile
    from lisa_analysis.rundir.run import Run


@dataclass(frozen=True)
class NextRun:
    """How a profile is turned into what the next run does.

    Attributes
    ----------
    activated_layers
        For how many layers per interval probabilities are; None takes the run's own, or 2.
    use_intervals
        Whether layers that the intervals leave open get their uniform share.
    strength, control, control_seed
        See `lisa_analysis.sampling_probabilities`.
    """

    activated_layers: int | None = None
    use_intervals: bool = True
    strength: float | str = 1.0
    control: Any = None
    control_seed: int = 0

    def probabilities(
        self, profile: "ImportanceProfile | None", run: "Run"
    ) -> tuple[SamplingProbabilities | None, LisaError | None]:
        """Probabilities that a profile gives, or why it gives none; nothing of no profile."""
        if profile is None:
            return None, None
        own = (run.manifest.get("lisa") or {}).get("activated_layers")
        try:
            found = sampling_probabilities(
                profile,
                activated_layers=self.activated_layers or own or min(2, run.n_layers),
                use_intervals=self.use_intervals,
                strength=self.strength,
                control=self.control,
                seed=self.control_seed,
            )
        except LisaError as error:
            return None, error
        return found, None

    def strengths(
        self, profile: "ImportanceProfile | None", probabilities: SamplingProbabilities | None
    ) -> "pd.DataFrame | None":
        """What other strengths than that of `probabilities` would give; None where nothing.

        Of a control, and where the profile is undecided, there is nothing to show.
        """
        if profile is None or probabilities is None:
            return None
        if probabilities.undecided or probabilities.control:
            return None
        try:
            return strengths(
                profile, probabilities.activated_layers, use_intervals=self.use_intervals
            )
        except LisaError:
            return None
