"""Diagnostics: is the run healthy? One small class per rule."""

from collections.abc import Iterable
from typing import Any

from lisa_analysis.rundir.opened import opened
from lisa_analysis.runs.diagnostics.finding import STATES, Diagnostics, Finding
from lisa_analysis.runs.diagnostics.gradients import (
    ClipPressure,
    DepthImbalance,
    LossSpikes,
    NonFinite,
    NormMismatch,
)
from lisa_analysis.runs.diagnostics.recording import LogGaps, RecorderCost
from lisa_analysis.runs.diagnostics.rule import CouldNotRunError, Evidence, Outcome, Rule
from lisa_analysis.runs.diagnostics.schedule import Coverage, ScheduleMismatch, Visits
from lisa_analysis.runs.diagnostics.updates import (
    Bf16Stall,
    ReactivationSpike,
    SampledNotUpdated,
    UpdateRatio,
)
from lisa_analysis.runs.diagnostics.weights import LoraDead, WeightDrift

RULES: tuple[type[Rule], ...] = (
    SampledNotUpdated,
    ScheduleMismatch,
    NormMismatch,
    NonFinite,
    ClipPressure,
    Bf16Stall,
    UpdateRatio,
    DepthImbalance,
    ReactivationSpike,
    LoraDead,
    Coverage,
    Visits,
    LogGaps,
    RecorderCost,
    WeightDrift,
    LossSpikes,
)

__all__ = [
    "RULES",
    "CouldNotRunError",
    "Diagnostics",
    "Evidence",
    "Finding",
    "Outcome",
    "Rule",
    "diagnose",
]


def diagnose(run: Any, rules: Iterable[Rule] | None = None) -> Diagnostics:
    """Check a run.

    Parameters
    ----------
    run
        A run directory opened with `load`, or its path; one still being written is judged so far.
    rules
        Rules with other thresholds, as ``[ClipPressure(share=0.3)]``; None takes all with their
        defaults. Rules that mean nothing for the run's method are left out.

    Returns
    -------
    Diagnostics
        Findings, worst first. A rule whose input is missing says ``could not run``, and why.
    """
    run = opened(run, "diagnose")
    evidence = Evidence(run)
    chosen = [rule() for rule in RULES] if rules is None else list(rules)
    findings = [rule(evidence) for rule in chosen if rule.applies(run)]
    findings.sort(key=lambda finding: STATES.index(finding.state))
    return Diagnostics(str(run.run_id), tuple(findings))
