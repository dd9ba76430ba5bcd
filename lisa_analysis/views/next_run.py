"""What is asked of the next run: one object for probabilities, strengths and other tools' files."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import LisaError, suggest
from lisa_analysis.plans.budget import seed_of_control
from lisa_analysis.plans.sampling import (
    SamplingProbabilities,
    own_activated_layers,
    sampling_probabilities,
    strengths,
)

if TYPE_CHECKING:
    import pandas as pd

    from lisa_analysis.plans.exports import Export
    from lisa_analysis.profiles.profile import ImportanceProfile
    from lisa_analysis.rundir.run import Run

# What lisa-train draws unless it is told another number.
USUAL_LAYERS = 2


@dataclass(frozen=True)
class AskedExport:
    """One ``--export KIND[,OPTION=VALUE…]:FILE``."""

    kind: str
    path: Path
    options: dict[str, Any]

    @classmethod
    def read(cls, text: str) -> "AskedExport":
        """Read the words of the command line.

        >>> AskedExport.read("peft-rank,r=8,target_modules=q_proj+v_proj:lora.json").options
        {'r': 8, 'target_modules': 'q_proj+v_proj'}
        """
        from lisa_analysis.plans.exports import EXPORTS
        from lisa_analysis.plans.exports.registry import SHARED

        words, colon, path = text.partition(":")
        kind, *pairs = words.split(",")
        known = ", ".join(EXPORTS)
        if not (colon and path):
            raise LisaError(f"--export is {text!r}: expected KIND:FILE with one of {known}.")
        if kind not in EXPORTS:
            raise LisaError(
                f"--export has the kind {kind!r}: expected one of {known}." + suggest(kind, EXPORTS)
            )
        options: dict[str, Any] = {}
        for pair in pairs:
            name, equals, value = pair.partition("=")
            if not equals:
                raise LisaError(f"--export has {pair!r} after the kind: expected OPTION=VALUE.")
            if name in options:
                raise LisaError(f"--export has the option {name!r} twice: give one of them.")
            if name in SHARED:
                raise LisaError(
                    f"--export has the option {name!r}, which is one of the whole command: see "
                    "--strength, --control, --control-seed and --ignore-intervals."
                )
            options[name] = _value(value)
        # Only of the last part of a path: folders of sweeps are called 'lr=0.1,seed=2'.
        late = re.search(r",(\w+)=[^/]*$", path)
        if late and late[1] in (*EXPORTS[kind].options, *SHARED):
            raise LisaError(
                f"--export has the option {late[1]!r} after the file: options stand before the "
                f"colon, as --export {kind}{late[0]}:{path[: late.start()]}."
            )
        return cls(kind, Path(path), options)


def _value(text: str) -> int | float | str:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


@dataclass(frozen=True)
class NextRun:
    """How a profile is turned into what the next run does.

    Attributes
    ----------
    activated_layers
        For how many layers per period probabilities are; None takes the run's own, or 2.
    use_intervals
        Whether layers that the intervals leave open get their uniform share.
    strength, control, control_seed
        See `lisa_analysis.sampling_probabilities`; a strength of None is the usual one of what is
        made: 1 for probabilities.
    """

    activated_layers: int | None = None
    use_intervals: bool = True
    strength: float | str | None = None
    control: Any = "none"
    control_seed: int | None = None

    def __post_init__(self) -> None:
        seed_of_control(self.control, self.control_seed, "--control-seed")

    def probabilities(
        self, profile: "ImportanceProfile | None", run: "Run"
    ) -> tuple[SamplingProbabilities | None, LisaError | None]:
        """Probabilities that a profile gives, or why it gives none; nothing of no profile."""
        if profile is None:
            return None, None
        try:
            found = sampling_probabilities(
                profile,
                activated_layers=self.activated_layers
                or own_activated_layers(run)
                or min(USUAL_LAYERS, run.n_layers),
                use_intervals=self.use_intervals,
                strength=1.0 if self.strength is None else self.strength,
                control=self.control,
                seed=self.control_seed,
            )
        except LisaError as error:
            return None, error
        return found, None

    def export(self, profile: "ImportanceProfile", run: "Run", asked: "AskedExport") -> "Export":
        """Make a file for another tool; `LisaError` where the profile or the options forbid it."""
        from lisa_analysis.plans.exports import EXPORTS, export

        options = dict(asked.options)
        if self.activated_layers and "activated_layers" in EXPORTS[asked.kind].options:
            options.setdefault("activated_layers", self.activated_layers)
        return export(
            profile, asked.kind, run=run, strength=self.strength, control=self.control,
            seed=self.control_seed, use_intervals=self.use_intervals, **options,
        )  # fmt: skip

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
