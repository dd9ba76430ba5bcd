"""What is computed over arms: equal seconds, question C."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from arms import Arm
from outcomes import losses_of, mean_of, random_sets
from plan import START, Plan
from scipy import stats

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError

FIRST = 2  # steps of a timed run that do not count
CHOICES = {  # of metrics, the arm of question A that trains what they choose
    "probe: grad_signal": "probe", "pilot: grad_rms": "pilot", "weights: spectrum_snr": "spectrum",
}  # fmt: skip

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


@dataclass(frozen=True)
class Predicted:
    """A metric: how well it ranks the layers, and what its choice of them gained.

    Parameters
    ----------
    metric
        With the run that it is of: probe, pilot, or the base's weights.
    validity
        Spearman's ρ with `ablation_keep` over layers, a mean over seeds.
    gain
        Held-out loss of random sets less that of the layers chosen by it, nats, a mean over seeds.
    layers
        Chosen, of every seed.
    """

    metric: str
    validity: float
    gain: float
    layers: str


def validity_and_gain(plan: Plan) -> list[Predicted]:
    """Return every metric whose choice was trained with adapters, the most valid first.

    Where every layer was trained alone each metric's choice is a look-up; elsewhere those of
    question A's arms were trained.
    """
    if not plan.environment.whole:
        return []
    random = mean_of(random_sets(plan, "lora"))
    found = []
    for metric, validity in validities(plan).items():
        losses, layers = _of_choice(plan, metric, list(random))
        gains = [random[seed] - loss for seed, loss in losses.items() if seed in random]
        if gains:
            found.append(Predicted(metric, validity, float(np.mean(gains)), layers))
    return sorted(found, key=lambda each: -each.validity)


def _of_choice(plan: Plan, metric: str, seeds: Sequence[int]) -> tuple[dict[int, float], str]:
    """Losses by seed with the layers that a metric chooses, and which these were."""
    if not plan.environment.every_layer:
        if metric not in CHOICES:
            return {}, ""
        way = CHOICES[metric]
        chosen = {seed: plan.chosen(way, seed) for seed in seeds}
        losses = losses_of(plan, plan.arms[f"lora-{way}"])
    else:
        alone = random_sets(plan, "lora")
        chosen = {seed: choices(plan, metric, seed) for seed in seeds}
        losses = {s: alone[layers[0]][s] for s, layers in chosen.items() if layers}
    named = sorted({tuple(layers) for layers in chosen.values() if layers})
    return losses, ", ".join("+".join(map(str, layers)) for layers in named)


def validities(plan: Plan) -> dict[str, float]:
    """Return each metric's agreement with `ablation_keep` over layers, a mean over seeds.

    Metrics are of the probe and of the pilot of the same seed, and of the base's weights; the order
    is by `la.validity`.
    """
    found: dict[str, list[float]] = {}
    for seed in plan.seeds:
        kinds = {k: plan.kept / plan.source(k, seed + 1).name for k in ("probe", "pilot")}
        ablated = plan.kept / plan.source("ablation", seed + 1).name
        if not all(folder.exists() for folder in (ablated, *kinds.values())):
            continue
        runs = {kind: la.load(folder) for kind, folder in kinds.items()}
        names = {"a profile": "weights"} | {run.run_id: kind for kind, run in runs.items()}
        others = [*runs.values(), plan.profile("spectrum", seed)]
        table = la.validity([la.load(ablated), *others]).to_frame()
        table = table[(table["level"] == "layer") & (table["target"] == "ablation_keep")]
        for source, metric, value in zip(
            table["source"], table["metric"], table["spearman"], strict=True
        ):
            if source in names:
                found.setdefault(f"{names[source]}: {metric}", []).append(float(value))
    return {name: float(np.mean(values)) for name, values in found.items()}


def choices(plan: Plan, name: str, seed: int) -> list[int] | None:
    """Return the layers that a metric of `validities` chooses for a seed; None without scores."""
    kind, metric = name.split(": ")
    if kind == "weights":
        return plan.chosen("spectrum", seed)
    folder = plan.kept / plan.source(kind, seed + 1).name
    if not folder.exists():
        return None
    try:
        scores = la.importance(la.load(folder), metric).scores
    except LisaError:
        return None
    return plan.environment.top(list(scores)) if np.isfinite(scores).all() else None


def prediction(groups: Sequence[Sequence[tuple[float, float]]]) -> tuple[float, float] | None:
    """Return Spearman's ρ of validity and gain over metrics, and its p; None below four metrics.

    Ranks are taken within environments and pooled: losses of two tasks are no common scale.
    """
    sides: list[list[float]] = [[], []]
    for group in groups:
        for side, values in zip(sides, zip(*group, strict=True), strict=False):
            ranks = stats.rankdata(values)
            side.extend((ranks - ranks.mean()) / len(ranks))
    if len(sides[0]) < 4 or any(np.ptp(side) == 0 for side in sides):
        return None
    found = stats.pearsonr(*sides)
    return float(found.statistic), float(found.pvalue)
