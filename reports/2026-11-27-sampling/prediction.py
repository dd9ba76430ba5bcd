"""Question C: whether a metric's validity predicts what its choice of layers gains."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from outcomes import losses_of, mean_of, random_sets
from plan import Plan
from scipy import stats
from sources import profile_of

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError

CHOICES = {  # of metrics, the arm of question A that trains what they choose
    "probe: grad_signal": "probe", "pilot: grad_rms": "pilot", "weights: spectrum_snr": "spectrum",
}  # fmt: skip


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
        Held-out loss of random sets less that of the layers chosen by it, nats, a mean over the
        seeds that every metric of the environment has.
    layers
        Chosen, of every seed.
    """

    metric: str
    validity: float
    gain: float
    layers: str


class Correlation(NamedTuple):
    """Spearman's ρ with its interval (Fisher's z, 95 %) and p, metrics as if independent."""

    rho: float
    low: float
    high: float
    p: float


def validity_and_gain(plan: Plan) -> list[Predicted]:
    """Return every metric whose choice was trained with adapters, the most valid first.

    Where every layer was trained alone each metric's choice is a look-up; elsewhere those of
    question A's arms were trained.
    """
    if not plan.environment.whole:
        return []
    random = mean_of(random_sets(plan, "lora"))
    valid = validities(plan)
    chosen = {metric: _of_choice(plan, metric, list(random)) for metric in valid}
    chosen = {metric: found for metric, found in chosen.items() if found[0]}
    seeds = set(random).intersection(*(losses for losses, _ in chosen.values()))
    found = [
        Predicted(m, valid[m], float(np.mean([random[s] - losses[s] for s in seeds])), layers)
        for m, (losses, layers) in chosen.items()
        if seeds
    ]
    return sorted(found, key=lambda each: -each.validity)


def _of_choice(plan: Plan, metric: str, seeds: Sequence[int]) -> tuple[dict[int, float], str]:
    """Losses by seed with the layers that a metric chooses, and which these were."""
    if not plan.environment.every_layer:
        if metric not in CHOICES:
            return {}, ""
        way = CHOICES[metric]
        chosen = {seed: plan.selection.chosen(way, seed) for seed in seeds}
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
        ways = {"/".join(folder.parts[-2:]): kind for kind, folder in kinds.items()}
        names = {"a profile": "weights"} | ways  # as `la.validity` tells folders of one name apart
        others = [*runs.values(), plan.sources.profile("spectrum", seed)]
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
        return plan.selection.chosen("spectrum", seed)
    folder = plan.kept / plan.source(kind, seed + 1).name
    if not folder.exists():
        return None
    try:
        scores = profile_of(folder, metric).scores
    except LisaError:
        return None
    return plan.environment.top(list(scores)) if np.isfinite(scores).all() else None


def predicts(groups: Sequence[Sequence[tuple[float, float]]]) -> Correlation | None:
    """Return Spearman's ρ of validity and gain over metrics; None below four metrics.

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
    interval = found.confidence_interval(0.95)
    return Correlation(*map(float, (found.statistic, interval.low, interval.high, found.pvalue)))
