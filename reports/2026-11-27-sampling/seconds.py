"""What arms and their sources take, and where an arm stands after the time of another one."""

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
    uniform, own = (step_seconds(plan, each) for each in (plan.arms["uniform"], arm))
    paid = [source_seconds(plan, kind) for kind in arm.sources]
    known = [seconds for seconds in paid if seconds is not None]
    if uniform is None or own is None or len(known) < len(paid):
        return None
    return max(0, round((plan.environment.steps * uniform - sum(known)) / own))


def read_off(plan: "Plan", arm: Arm) -> dict[int, float]:
    """Return by seed what an arm had reached after `steps_left`, read off its course.

    A bound from above: linear between evaluations, at a rate that has not come down yet, and no
    further than its own last step. Empty where seconds are not known.
    """
    steps = steps_left(plan, arm)
    if steps is None:
        return {}
    courses = {seed: course(plan, arm, seed) for seed in plan.seeds}
    return {
        seed: float(np.interp(steps, list(found), list(found.values())))
        for seed, found in courses.items()
        if found
    }


def course(plan: "Plan", arm: Arm, seed: int) -> dict[int, float]:
    """Return the held-out loss of an arm by step, from before the first one; empty without logs."""
    folder = plan.kept / plan.cell(arm, seed).name
    first = plan.kept / plan.source("start", seed).name
    if not folder.exists() or not first.exists():
        return {}
    return {0: _held_out(first)[0]} | _held_out(folder)


def _held_out(folder: Path) -> dict[int, float]:
    """Held-out loss by step."""
    events = la.load(folder).events
    events = events[events["event"] == "evaluate"]
    return {
        int(step): float(metrics["eval_loss"])
        for step, metrics in zip(events["step"], events["metrics"], strict=True)
    }
