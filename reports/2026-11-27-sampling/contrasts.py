"""What is computed over arms: equal seconds, question C."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from arms import Arm
from plan import START, Plan
from scipy import stats

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError

FIRST = 2  # steps of a timed run that do not count

# --- equal seconds -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """Held-out loss over the steps of a run, and what a step takes.

    Parameters
    ----------
    steps, losses
        Of the evaluations.
    step_seconds
        Of the arm, alone on a machine.
    """

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    step_seconds: float

    def at(self, step: float) -> float:
        """Return the loss after so many steps, linear between evaluations; the last one beyond."""
        return float(np.interp(step, self.steps, self.losses))


def step_seconds(plan: Plan, arm: Arm) -> float | None:
    """Return what a step of an arm takes alone on a machine, over its draws; None where not timed.

    The first steps are left out: caches fill.
    """
    folder = plan.kept / plan.timed(arm).name
    if not folder.exists():
        return None
    return float(la.load(folder).scalars["step_seconds"].iloc[FIRST:].mean())


def course(plan: Plan, arm: Arm, seed: int) -> Course | None:
    """Read the course of an arm's run; None where it is not there or the arm was not timed.

    It begins with what the seed's run of all weights had before its first step.
    """
    folder = plan.kept / plan.cell(arm, seed).name
    first = plan.kept / plan.cell(plan.arms[START], seed).name
    seconds = step_seconds(plan, arm)
    if not folder.exists() or not first.exists() or seconds is None:
        return None
    found = {0: _held_out(first)[0]} | _held_out(folder)
    return Course(tuple(found), tuple(found.values()), seconds)


def _held_out(folder: Path) -> dict[int, float]:
    """Held-out loss by step."""
    events = la.load(folder).events
    events = events[events["event"] == "evaluate"]
    return {
        int(step): float(metrics["eval_loss"])
        for step, metrics in zip(events["step"], events["metrics"], strict=True)
    }


def source_seconds(plan: Plan, kind: str) -> float | None:
    """Return what a profile's source takes alone on a machine; None where it was not timed.

    A probe; a quarter of the steps of full training; all steps of LoRA, and its ablation.
    """
    if kind == "probe":
        folder = plan.kept / plan.timed_probe().name
        return float(la.load(folder).manifest["result"]["seconds"]) if folder.exists() else None
    trained = plan.arms["full" if kind == "pilot" else "lora-everything"]
    seconds = step_seconds(plan, trained)
    if seconds is None:
        return None
    if kind == "pilot":
        return seconds * plan.pilot_steps
    file = plan.kept / plan.timed(trained).name / "ablation.parquet"
    about = json.loads(pq.read_schema(file).metadata[b"ablation"])
    return seconds * plan.environment.steps + float(about["seconds"])


def at_equal_seconds(plan: Plan, arm: Arm, against: Arm) -> tuple[dict[int, float], float]:
    """Return losses by seed after the time that the other arm takes, and the mean steps made.

    An arm begins after its sources; with the time that is left it makes fewer steps, and where its
    own are faster, no more than it made.
    """
    found: dict[int, float] = {}
    made: list[float] = []
    for seed in plan.seeds:
        mine, other = course(plan, arm, seed), course(plan, against, seed)
        sources = [source_seconds(plan, kind) for kind in arm.sources]
        paid = [seconds for seconds in sources if seconds is not None]
        if mine is None or other is None or len(paid) < len(sources):
            continue
        left = plan.environment.steps * other.step_seconds - sum(paid)
        steps = min(max(left / mine.step_seconds, 0.0), float(plan.environment.steps))
        found[seed] = mine.at(steps)
        made.append(steps)
    return found, float(np.mean(made)) if made else 0.0


# --- question C ----------------------------------------------------------------------------------


def validities(plan: Plan) -> dict[str, float]:
    """Return each metric's agreement with `ablation_keep` over layers, a mean over seeds.

    Metrics are of the probe and of the pilot of the same seed; the order is by `la.validity`.
    """
    found: dict[str, list[float]] = {}
    for seed in plan.seeds:
        kinds = {k: plan.kept / plan.source(k, seed + 1).name for k in ("probe", "pilot")}
        ablated = plan.kept / plan.source("ablation", seed + 1).name
        if not all(folder.exists() for folder in (ablated, *kinds.values())):
            continue
        runs = {kind: la.load(folder) for kind, folder in kinds.items()}
        table = la.validity([la.load(ablated), *runs.values()]).to_frame()
        table = table[(table["level"] == "layer") & (table["target"] == "ablation_keep")]
        for kind, run in runs.items():
            of_kind = table[table["source"] == run.run_id]
            for metric, value in zip(of_kind["metric"], of_kind["spearman"], strict=True):
                found.setdefault(f"{kind}: {metric}", []).append(float(value))
    return {name: float(np.mean(values)) for name, values in found.items()}


def choices(plan: Plan, name: str, seed: int) -> list[int] | None:
    """Return the layers that a metric of `validities` chooses for a seed; None without scores."""
    kind, metric = name.split(": ")
    folder = plan.kept / plan.source(kind, seed + 1).name
    if not folder.exists():
        return None
    try:
        scores = la.importance(la.load(folder), metric).scores
    except LisaError:
        return None
    return plan.environment.top(list(scores)) if np.isfinite(scores).all() else None


def prediction(pairs: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Return Spearman's ρ of validity and gain over metrics, and its p; None below four metrics."""
    if len(pairs) < 4 or any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return None
    found = stats.spearmanr(*zip(*pairs, strict=True))
    return float(found.statistic), float(found.pvalue)
