"""Analysis: what was found in one run or several, each part computed once, for all who show it."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.metrics.layer_grid import (
    LayerGrid,
    layer_grids,
    over_learning_rate,
    update_ratio_grid,
)
from lisa_analysis.metrics.registry import find_metric
from lisa_analysis.metrics.step_tables import StepTable, step_table
from lisa_analysis.plans.sampling import SamplingProbabilities
from lisa_analysis.profiles.across_seeds import check_seeds, over_seeds_of_runs
from lisa_analysis.profiles.from_run import importance
from lisa_analysis.profiles.probe_changes import ProbeChange, probe_change, probed_steps
from lisa_analysis.profiles.profile import ImportanceProfile
from lisa_analysis.rundir.configurations import data_of, labels, model_of
from lisa_analysis.rundir.events import draws
from lisa_analysis.rundir.opening import RunLike as RunLike
from lisa_analysis.rundir.opening import opened
from lisa_analysis.rundir.run import Run
from lisa_analysis.runs.comparing import compare
from lisa_analysis.runs.comparison import Comparison
from lisa_analysis.runs.diagnostics import Diagnostics, diagnose
from lisa_analysis.runs.losses import RunSummary, table
from lisa_analysis.runs.metric_validity import Validity, validity
from lisa_analysis.views.next_run import AskedExport, NextRun

if TYPE_CHECKING:
    import pandas as pd

    from lisa_analysis.plans.exports import Export

# Metrics of an ablation, in the order in which they are shown.
ABLATED = ("ablation_keep", "ablation_reset", "forgetting", "forgetting_keep")


def arm_label(arm: str, runs: Sequence[str]) -> str:
    """What an arm is called: by what differs, and how many runs it has, or which run it is."""
    if len(runs) > 1:
        return f"{arm} ({len(runs)} runs)"
    return runs[0] if arm == runs[0] else f"{runs[0]} ({arm})"


@dataclass(frozen=True, eq=False)
class RunAnalysis:
    """What was found in one run; computed when it is first asked for, then kept.

    Attributes
    ----------
    run
        The opened run directory.
    name
        What the run is called beside the others.
    metric
        Importance metric of its profile, an id or a callable; None for the run's default.
    plan
        What is asked of the next run.
    """

    run: Run
    name: str
    metric: Any = None
    plan: NextRun = field(default_factory=NextRun)

    @cached_property
    def diagnostics(self) -> Diagnostics:
        """Whether the run is healthy."""
        return diagnose(self.run)

    @cached_property
    def table(self) -> StepTable:
        """What was measured per step and layer."""
        return step_table(self.run)

    @property
    def drew_layers(self) -> bool:
        """Whether LISA drew any layer."""
        return bool(draws(self.run))

    def grids(self, columns: Iterable[str]) -> Mapping[str, LayerGrid]:
        """Layer × step grids of metrics columns."""
        return layer_grids(self.run, columns)

    @property
    def model(self) -> str:
        """Name of the model, without the way to its folder; empty when unknown."""
        return model_of(self.run)

    @property
    def data(self) -> str:
        """Name of the data; empty when unknown."""
        return data_of(self.run)

    @property
    def updates(self) -> LayerGrid:
        """‖update‖ per layer and step over the learning rate of the step."""
        return over_learning_rate(self.grids(["update_norm"])["update_norm"], self.run)

    @property
    def update_ratio(self) -> LayerGrid:
        """‖update‖ / ‖weight‖ per layer and step."""
        return update_ratio_grid(self.grids(["update_norm", "weight_norm"]))

    @property
    def profile(self) -> ImportanceProfile | None:
        """Which layers mattered; None where `why_no_profile` says why."""
        return self._profiles("layer")[0]

    @property
    def known_profile(self) -> ImportanceProfile:
        """The profile.

        Raises
        ------
        LisaError
            Where there is none.
        """
        if self.profile is None:
            raise self.why_no_profile or LisaError(f"{self.name} has no profile.")
        return self.profile

    @property
    def why_no_profile(self) -> LisaError | None:
        """Why there is no profile."""
        return self._profiles("layer")[1]

    @property
    def profile_by_module(self) -> ImportanceProfile | None:
        """The profile by kind of module within the layers; None where there is none."""
        return self._profiles("module")[0]

    @cached_property
    def probe_change(self) -> ProbeChange | None:
        """What training changed between the first probe and the newest; None without two."""
        try:
            return probe_change(self.run) if len(probed_steps(self.run)) > 1 else None
        except LisaError:
            return None

    @property
    def worth(self) -> Mapping[str, ImportanceProfile]:
        """What the layers' changes were worth, by metric of the ablation; empty without one."""
        return self._ablated("layer")

    @property
    def worth_by_module(self) -> Mapping[str, ImportanceProfile]:
        """The same by kind of module within the layers."""
        return self._ablated("module")

    def _ablated(self, by: str) -> Mapping[str, ImportanceProfile]:
        key = f"ablation by {by}"
        if key not in self._kept:
            found = {}
            for metric in ABLATED if not self.run.ablation.empty else ():
                with contextlib.suppress(LisaError):  # another mode or text was ablated
                    found[metric] = importance(self.run, metric, by=by)
            self._kept[key] = found
        return self._kept[key]

    @cached_property
    def _kept(self) -> dict[str, Mapping[str, ImportanceProfile]]:
        return {}

    @property
    def probabilities(self) -> SamplingProbabilities | None:
        """How often to sample each layer next time; None where `why_not` says why."""
        return self._probabilities[0]

    @property
    def why_not(self) -> LisaError | None:
        """Why there is no profile, or why it gives no probabilities."""
        return self.why_no_profile or self._probabilities[1]

    def _profiles(self, by: str) -> tuple[ImportanceProfile | None, LisaError | None]:
        if by not in self._fitted:
            try:
                self._fitted[by] = importance(self.run, self.metric, by=by), None
            except LisaError as error:
                # A run that has just begun has findings all the same.
                self._fitted[by] = None, error
        return self._fitted[by]

    @cached_property
    def _fitted(self) -> dict[str, tuple[ImportanceProfile | None, LisaError | None]]:
        return {}

    @cached_property
    def _probabilities(self) -> tuple[SamplingProbabilities | None, LisaError | None]:
        return self.plan.probabilities(self.profile, self.run)


@dataclass(frozen=True, eq=False)
class Analysis:
    """What was found in all runs, each part computed once. Made by `Analysis.of`."""

    runs: tuple[RunAnalysis, ...]
    metric: Any = None
    plan: NextRun = field(default_factory=NextRun)

    @classmethod
    def of(cls, runs: Sequence[RunLike], metric: Any = None, **options: Any) -> "Analysis":
        """Prepare the analysis of runs, opened or by their paths.

        Parameters
        ----------
        runs
            At least one.
        metric
            Importance metric of all profiles; None for the default.
        **options
            Attributes of `NextRun`: `activated_layers`, `use_intervals`, `strength`, `control`
            and `control_seed`.
        """
        plan = NextRun(**options)
        found = [opened(run, "report") for run in runs]
        return cls(
            tuple(
                RunAnalysis(run, name, metric, plan)
                for run, name in zip(found, labels(found), strict=True)
            ),
            metric,
            plan,
        )

    @property
    def alone(self) -> bool:
        """Whether there is one run only."""
        return len(self.runs) == 1

    @property
    def profile(self) -> ImportanceProfile | None:
        """Which layers mattered, over seeds where there are several; None as `why_not` says."""
        return self._profile[0]

    @property
    def probabilities(self) -> SamplingProbabilities | None:
        """How often to sample each layer next time, over seeds where there are several."""
        return self.runs[0].probabilities if self.alone else self._probabilities[0]

    @property
    def why_not(self) -> LisaError | None:
        """Why there is no profile, or why it gives no probabilities."""
        if self.alone:
            return self.runs[0].why_not
        return self._profile[1] or self._probabilities[1]

    @cached_property
    def _profile(self) -> tuple[ImportanceProfile | None, LisaError | None]:
        if self.alone:
            return self.runs[0].profile, self.runs[0].why_no_profile
        try:
            check_seeds([one.run for one in self.runs])
            chosen = None if self.metric is None else find_metric(self.metric)
            return over_seeds_of_runs(
                [one.run for one in self.runs],
                [one.known_profile for one in self.runs],
                metric=chosen,
            ), None
        except LisaError as error:
            return None, error

    @cached_property
    def _probabilities(self) -> tuple[SamplingProbabilities | None, LisaError | None]:
        return self.plan.probabilities(self._profile[0], self.runs[0].run)

    def export(self, asked: AskedExport) -> "Export":
        """Make a file for another tool, of the profile over seeds where there are several runs.

        Raises
        ------
        LisaError
            Where there is no profile, or it cannot give that file.
        """
        if self.profile is None:
            raise self.why_not or LisaError(f"{self.runs[0].run.path} has no profile.")
        return self.plan.export(self.profile, self.runs[0].run, asked)

    @cached_property
    def comparison(self) -> Comparison | None:
        """The runs side by side; None for a run alone."""
        if self.alone:
            return None
        runs, profiles = [one.run for one in self.runs], [one.profile for one in self.runs]
        if len({profile.metric for profile in profiles if profile is not None}) > 1:
            return compare(runs)  # the defaults of runs differ: all are compared by the first's
        return compare(runs, self.metric, profiles=profiles)

    @cached_property
    def arm_profiles(self) -> Mapping[str, ImportanceProfile]:
        """The profile of every arm, over its seeds where it was repeated; of one run its own.

        Named by what differs, and by the run where an arm is a single one; arms without a profile
        are left out.
        """
        if self.comparison is None:
            return {} if self.profile is None else {self.runs[0].name: self.profile}
        found = {}
        arms = self.comparison.table["arm"].to_numpy()
        for arm in self.comparison.arms["arm"]:
            members = [one for one, name in zip(self.runs, arms, strict=True) if name == arm]
            known = [one for one in members if one.profile is not None]
            if not known:
                continue
            name = arm_label(arm, [one.name for one in members])
            found[name] = known[0].known_profile
            if len(known) > 1:
                with contextlib.suppress(LisaError):  # other layers, or another metric
                    check_seeds([one.run for one in known])
                    found[name] = over_seeds_of_runs(
                        [one.run for one in known], [one.known_profile for one in known]
                    )
        return found

    @cached_property
    def validity(self) -> Validity | None:
        """Which metric predicts what the layers were worth; None where nothing was ablated."""
        try:
            return validity([one.run for one in self.runs])
        except LisaError:
            return None

    @cached_property
    def numbers(self) -> "pd.DataFrame":
        """What the runs achieved and cost, one row per run."""
        if self.comparison is not None:
            return self.comparison.to_frame()
        [one] = self.runs
        return table([RunSummary.of(one.run, one.name)])
