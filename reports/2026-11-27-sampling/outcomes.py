"""Held-out losses of the arms by seed, from the kept logs."""

from collections.abc import Callable, Sequence

import numpy as np
from arms import RANDOM, Arm
from differences import Losses
from plan import LONGER_SEEDS, Plan
from sources import result

SCORES = ("accuracy", "word_error_rate")  # what tasks are judged by, beside the loss


def losses_of(plan: Plan, arm: Arm) -> dict[int, float]:
    """Return the held-out losses of an arm by seed, of the runs that there are."""
    found = {}
    for seed in range(1, plan.environment.seeds + 1):
        value = plan.loss(plan.cell(arm, seed).name)
        if value is not None:
            found[seed] = value
    return found


def scores_of(plan: Plan, arm: Arm) -> dict[int, float]:
    """Return the task's own score of an arm by seed; empty where it has none."""
    folders = {s: plan.kept / plan.cell(arm, s).name for s in losses_of(plan, arm)}
    found = {seed: result(folder) for seed, folder in folders.items() if folder.exists()}
    return {s: each[name] for s, each in found.items() for name in SCORES if name in each}


Read = Callable[[Plan, Arm], dict[int, float]]  # of an arm, by seed


def of_length(plan: Plan, arm: Arm, times: int) -> dict[int, float]:
    """Return losses after so many times the steps, of the seeds that are run at other lengths."""
    found = {}
    for seed in LONGER_SEEDS:
        value = plan.loss(plan.cell(arm, seed, times=times).name)
        if value is not None:
            found[seed] = value
    return found


def mean_of(arms: Sequence[Losses]) -> dict[int, float]:
    """Return the mean over arms by seed, of the seeds that all of them have."""
    seeds = set.intersection(*(set(losses) for losses in arms)) if arms else set()
    return {seed: float(np.mean([losses[seed] for losses in arms])) for seed in sorted(seeds)}


def random_sets(plan: Plan, kind: str, read: Read = losses_of) -> list[dict[int, float]]:
    """Return losses by seed, or scores, of every set of question A's placebo.

    Where every layer was trained alone, all sets of one stand in for random ones.
    """
    if plan.environment.every_layer:
        names = [f"{kind}-layer-{layer}" for layer in range(plan.environment.layers)]
    else:
        names = [f"{kind}-random-{number}" for number in range(1, RANDOM + 1)]
    return [read(plan, plan.arms[name]) for name in names if name in plan.arms]


def selected(plan: Plan, kind: str, read: Read = losses_of) -> dict[str, dict[int, float]]:
    """Return losses by seed, or scores, of question A's arms, `random` as the mean of its sets.

    Looked up where every layer was trained alone; nothing where the kind is not asked.
    """
    random = random_sets(plan, kind, read)
    if not random:
        return {}
    ways = [
        name.removeprefix("lora-") for name in plan.selection.choices if name.startswith("lora-")
    ]
    ways = [way for way in ways if not way.startswith("random")]
    if plan.environment.every_layer:
        found = {way: _looked_up(plan, random, way) for way in ways}
    else:
        arms = {way: plan.arms.get(f"{kind}-{way}") for way in ways}
        found = {way: read(plan, arm) for way, arm in arms.items() if arm is not None}
    return {**found, "random": mean_of(random)}


def _looked_up(plan: Plan, alone: Sequence[Losses], way: str) -> dict[int, float]:
    """Losses of the layer that a way names, by seed."""
    chosen = {seed: plan.selection.chosen(way, seed) for seed in mean_of(alone)}
    return {seed: alone[layers[0]][seed] for seed, layers in chosen.items() if layers is not None}
