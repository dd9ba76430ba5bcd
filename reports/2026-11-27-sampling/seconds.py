"""What arms and their sources take, and the steps that they leave an arm."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
from arms import Arm

import lisa_analysis as la

if TYPE_CHECKING:
    from plan import Plan

TIMED = 48  # steps of a run that is timed; what the first half takes is not counted
FEW = 64  # examples of its evaluations, which mark the halves, and of an ablation


def step_seconds(plan: "Plan", arm: Arm) -> float | None:
    """Return the wall time of an arm's step, alone on a machine; None where it was not timed.

    Everything between its two evaluations counts: draws, measuring passes of a learner, loading.
    """
    folder = plan.kept / plan.timed(arm).name
    if not folder.exists():
        return None
    events = la.load(folder).events
    marks = events[events["event"] == "evaluate"].iloc[-2:]
    runtime = float(marks["metrics"].iloc[1]["eval_runtime"])
    begun, ended = marks["time"].iloc[0], marks["time"].iloc[1] - runtime
    return float((ended - begun) / (marks["step"].iloc[1] - marks["step"].iloc[0]))


def step_cost(plan: "Plan", arm: Arm) -> float | None:
    """Return what a step of an arm is counted with: of arms that do the same work, the median.

    One timing of 24 steps is off by up to a tenth, which is no property of an arm.
    """
    alike = plan.sampling.alike()
    if arm.name not in alike:
        return step_seconds(plan, arm)
    timed = [step_seconds(plan, each) for each in plan.timed_arms() if each.name in alike]
    known = [seconds for seconds in timed if seconds is not None]
    return float(np.median(known)) if len(known) == len(timed) else None


def source_seconds(plan: "Plan", kind: str) -> float | None:
    """Return what a profile's source takes alone on a machine; None where it was not timed.

    A probe; a quarter of the steps of full training, recorded; all steps of LoRA, and its ablation.
    """
    if kind == "probe":
        folder = plan.kept / plan.timed_probe().name
        return float(la.load(folder).manifest["result"]["seconds"]) if folder.exists() else None
    trained = plan.arms["full" if kind == "pilot" else "lora-everything"]
    seconds = step_seconds(plan, trained)
    if seconds is None:
        return None
    if kind == "pilot":
        folders = [plan.kept / plan.source("pilot", seed + 1).name for seed in plan.seeds]
        recorded = [_result(folder)["recorder_seconds"] for folder in folders if folder.exists()]
        return seconds * plan.pilot_steps + float(np.mean(recorded or [0.0]))
    file = plan.kept / plan.timed(trained).name / "ablation.parquet"
    about = json.loads(pq.read_schema(file).metadata[b"ablation"])
    return seconds * plan.environment.steps + float(about["seconds"])


def _result(folder: Path) -> dict[str, float]:
    return dict(la.load(folder).manifest["result"])


def steps_left(plan: "Plan", arm: Arm) -> int | None:
    """Return the steps that an arm makes after its sources in the time of `uniform`.

    More than those of `uniform` where its steps are cheaper; None where seconds are not known yet.
    """
    uniform, own = (step_cost(plan, each) for each in (plan.arms["uniform"], arm))
    paid = [source_seconds(plan, kind) for kind in arm.sources]
    known = [seconds for seconds in paid if seconds is not None]
    if uniform is None or own is None or len(known) < len(paid):
        return None
    return max(0, round((plan.environment.steps * uniform - sum(known)) / own))
