"""What is computed over arms: equal seconds, question C."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from arms import Arm
from plan import Plan
from scipy import stats

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError

# --- equal seconds -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """Held-out loss over the steps of a run, and what a step takes.

    Parameters
    ----------
    steps, losses
        Of the evaluations.
    step_seconds
        Median over the run's steps.
    """

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    step_seconds: float

    def at(self, step: float) -> float:
        """Return the loss after so many steps, linear between evaluations; the last one beyond."""
        return float(np.interp(step, self.steps, self.losses))


def course(folder: Path) -> Course | None:
    """Read the course of a kept run; None where there is none."""
    if not folder.exists():
        return None
    run = la.load(folder)
    events = run.events[run.events["event"] == "evaluate"]
    losses = [float(metrics["eval_loss"]) for metrics in events["metrics"]]
    seconds = float(run.scalars["step_seconds"].median())
    return Course(tuple(int(step) for step in events["step"]), tuple(losses), seconds)


def source_seconds(plan: Plan, kind: str, seed: int) -> float:
    """Return what a profile's source takes: its run, and where it is ablated the ablation."""
    folder = plan.kept / plan.source(kind, seed).name
    seconds = float(la.load(folder).manifest["result"]["seconds"])
    if kind == "ablation":
        about = pq.read_schema(folder / "ablation.parquet").metadata[b"ablation"]
        seconds += float(json.loads(about)["seconds"])
    return seconds


def at_equal_seconds(plan: Plan, arm: Arm, against: Arm) -> tuple[dict[int, float], float]:
    """Return losses by seed after the time that the other arm takes, and the mean steps made.

    An arm begins after its sources; with the time that is left it makes fewer steps, and where its
    own are faster, no more than it made.
    """
    found: dict[int, float] = {}
    made: list[float] = []
    for seed in plan.seeds:
        mine = course(plan.kept / plan.cell(arm, seed).name)
        other = course(plan.kept / plan.cell(against, seed).name)
        sources = [plan.kept / plan.source(kind, seed + 1).name for kind in arm.sources]
        if mine is None or other is None or not all(folder.exists() for folder in sources):
            continue
        given = plan.environment.steps * other.step_seconds
        left = given - sum(source_seconds(plan, kind, seed + 1) for kind in arm.sources)
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
