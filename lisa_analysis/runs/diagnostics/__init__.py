"""Diagnostics: is the run healthy? One small class per rule."""

from collections.abc import Iterable
from typing import Any

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.rundir.logs.others_log import ATTACH
from lisa_analysis.rundir.opening import RunLike, opened
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


def diagnose(run: RunLike, rules: Iterable[Rule] | None = None) -> Diagnostics:
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
        will. Of another trainer's log, which holds no layer, the rules that need more are counted
        in one finding, ``no_layers``.
    """
    run = opened(run, "diagnose")
    if (waiting := run.waiting) is not None:
        return Diagnostics(str(run.run_id), (_not_yet(waiting),))
    evidence = Evidence(run)
    chosen = [rule() for rule in RULES] if rules is None else _rules(rules)
    if not run.has_course:  # weights alone: nothing over time is there to be unhealthy
        chosen = []
    findings = [rule(evidence) for rule in chosen if rule.applies(run)]
    if not run.has_layers:
        findings = [*_of_the_course(findings), _no_layers(findings)]
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


def _of_the_course(findings: Iterable[Finding]) -> list[Finding]:
    """Findings on what a log holds; that it is no record of ours is no gap."""
    return [f for f in findings if f.state != "could not run" and f.id != LogGaps.id]


def _no_layers(findings: Iterable[Finding]) -> Finding:
    """Say of a log how many rules need more than it holds, and what would give it."""
    waiting = sum(finding.state == "could not run" for finding in findings)
    return Finding(
        id="no_layers",
        state="info",
        title="No layers in this log",
        evidence=f"{waiting} rules need what each layer did, or a number that was not logged.",
        threshold="a log of another trainer",
        meaning="A log of loss, rate and global norm cannot say which layer is at fault.",
        advice=f"{ATTACH[0].upper()}{ATTACH[1:]}.",
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
