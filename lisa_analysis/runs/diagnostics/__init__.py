"""Diagnostics: is the run healthy? One small class per rule."""

from collections.abc import Iterable
from typing import Any

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.rundir.opening import opened
from lisa_analysis.runs.diagnostics.finding import STATES, Diagnostics, Finding
from lisa_analysis.runs.diagnostics.gradients import (
    ClipPressure,
    DeadLayers,
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

RULES: list[type[Rule]] = [
    SampledNotUpdated,
    ScheduleMismatch,
    NormMismatch,
    NonFinite,
    DeadLayers,
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
]

__all__ = [
    "RULES",
    "CouldNotRunError",
    "Diagnostics",
    "Evidence",
    "Finding",
    "Outcome",
    "Rule",
    "diagnose",
    "register",
]


def register(rule: type[Rule]) -> type[Rule]:
    """Add a rule to those that `diagnose` checks, as a decorator of its class.

    Raises
    ------
    LisaError
        When there is another rule of this id.
    """
    before = next((known for known in RULES if known.id == rule.id), None)
    if before is not None and before.__module__.startswith("lisa_analysis."):
        raise LisaError(f"rule {rule.id!r} is built in: give yours another id.")
    if before is not None:
        RULES.remove(before)
    RULES.append(rule)
    return rule


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
        Findings, worst first. A rule whose input is missing says ``could not run``, and why. Of a
        run whose first step has not reached the disk yet one finding, ``not_yet``, says when it
        will.
    """
    run = opened(run, "diagnose")
    if (waiting := run.waiting) is not None:
        return Diagnostics(str(run.run_id), (_not_yet(waiting),))
    evidence = Evidence(run)
    chosen = [rule() for rule in RULES] if rules is None else _rules(rules)
    if not run.has_course:  # weights alone: nothing over time is there to be unhealthy
        chosen = []
    findings = [rule(evidence) for rule in chosen if rule.applies(run)]
    findings.sort(key=lambda finding: STATES.index(finding.state))
    return Diagnostics(str(run.run_id), tuple(findings))


def _not_yet(waiting: str) -> Finding:
    """Say of a run that has just begun when there will be something to look at."""
    return Finding(
        id="not_yet",
        state="info",
        title="Just begun",
        evidence=f"{waiting[0].upper()}{waiting[1:]}.",
        threshold="a run that is being written, and no step of it on the disk",
        meaning="What is measured is written every record.flush_seconds; until then there is none.",
        advice="Look again then.",
    )


def _rules(given: Any) -> list[Rule]:
    rules = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    for rule in rules:
        if not isinstance(rule, Rule):
            name = f"the class {rule.__name__}" if isinstance(rule, type) else repr(rule)
            raise LisaError(
                f"rules holds {name}: expected a list of rules, as [ClipPressure(share=0.3)]."
            )
    return rules
