"""Contrasts over all environments (Agarwal et al. 2021, as rliable defines them)."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from differences import Losses, normalised
from numpy.typing import NDArray
from outcomes import losses_of, random_sets, selected
from plan import Plan

from lisa_analysis.statistics.repetitions import MIN_SEEDS

SAMPLES = 10_000  # of the bootstrap over seeds

Values = NDArray[np.float64]
Arms = tuple[Losses, Losses, Losses, Values]  # the one, the other, the whole; the other's runs
Pair = Callable[[Plan], Arms | None]


def over_environments(plans: Sequence[Plan]) -> list[dict[str, object]]:
    """Return a row per contrast: interquartile mean, probability of improvement.

    The primary contrasts, then what the design's table of advice asks beside them. An environment
    in which all layers gain nothing that can be told from 0 has no share of a gain: it is in the
    probability, not in the mean. Environments weigh alike, however many their runs.
    """
    rows = []
    for name, pair in CONTRASTS.items():
        gains: dict[str, tuple[Values, ...]] = {}
        runs: dict[str, tuple[Values, ...]] = {}
        for plan in plans:
            if (arms := pair(plan)) is not None:
                losses, other, whole, every = arms
                gains |= _way(plan.environment.name, losses, other, whole)
                runs |= _enough(plan.environment.name, _values(losses), every)
        rows.append({"contrast": name, **_mean(gains), **_probability(runs)})
    return rows


def _chosen(way: str) -> Pair:
    """Layers chosen in some way against random ones, whose sets each count in the probability."""

    def arms(plan: Plan) -> Arms:
        few = selected(plan, "lora")
        sets = np.concatenate([_values(losses) for losses in random_sets(plan, "lora")])
        return few[way], few["random"], losses_of(plan, plan.arms["lora-everything"]), sets

    return arms


def _sampled(one: str, other: str) -> Pair:
    """One way of drawing against another; `best` is the best learned arm's name."""

    def arms(plan: Plan) -> Arms | None:
        best = plan.best_learned()
        if best is None:
            return None
        named = (name.replace("best", best) for name in (one, other, "full"))
        losses, beside, full = (losses_of(plan, plan.arms[name]) for name in named)
        return losses, beside, full, _values(beside)

    return arms


CONTRASTS = {
    "A: probe less random, LoRA": _chosen("probe"),
    "B: best learned less uniform": _sampled("best", "uniform"),
    "A, beside it: evenly spread less random": _chosen("even"),
    "A, beside it: last less random": _chosen("last"),
    "B, beside it: its placebo less uniform": _sampled("best-placebo", "uniform"),
    "B, beside it: best learned less its placebo": _sampled("best", "best-placebo"),
    "B, beside it: default less uniform": _sampled("default", "uniform"),
    "B, beside it: strong less uniform": _sampled("strong", "uniform"),
}


def _way(name: str, losses: Losses, other: Losses, whole: Losses) -> dict[str, tuple[Values, ...]]:
    """Losses of the three by seed where the way from the other to the whole is told from 0."""
    if not len(normalised(losses, other, whole)):
        return {}
    seeds = sorted(set(losses) & set(other) & set(whole))
    return {name: tuple(np.array([arm[s] for s in seeds]) for arm in (losses, other, whole))}


def _enough(name: str, *arms: Values) -> dict[str, tuple[Values, ...]]:
    """Runs of an environment where every arm has as many seeds as a difference needs."""
    return {name: arms} if min(map(len, arms)) >= MIN_SEEDS else {}


def _values(losses: Losses) -> Values:
    return np.array(list(losses.values()), float)


def _mean(ways: Mapping[str, tuple[Values, ...]]) -> dict[str, object]:
    def shares(group: tuple[Values, ...]) -> Values:
        losses, other, whole = group
        return (other - losses) / max(float((other - whole).mean()), 1e-9)

    def statistic(groups: Sequence[tuple[Values, ...]]) -> float:
        return interquartile_mean([shares(group) for group in groups])

    found = _bootstrapped(list(ways.values()), statistic, paired=True)
    each = {name: float(shares(group).mean()) for name, group in ways.items()}
    return {"interquartile mean of the gain (95 %)": found, "mean of each": _listed(each)}


def _probability(runs: Mapping[str, tuple[Values, ...]]) -> dict[str, object]:
    def statistic(groups: Sequence[tuple[Values, ...]]) -> float:
        return float(np.mean([improvement(*group) for group in groups]))

    each = {name: improvement(*group) for name, group in runs.items()}
    found = _bootstrapped(list(runs.values()), statistic)
    return {"probability of improvement (95 %)": found, "of each": _listed(each)}


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items())


def interquartile_mean(groups: Sequence[Values]) -> float:
    """Return the mean of the middle half of all runs, every group with the same weight in all.

    With groups of one size it is rliable's, but that a run at a quarter's edge counts in part.
    """
    values = np.concatenate(groups)
    weights = np.concatenate([np.full(len(group), 1 / len(group)) for group in groups])
    order = np.argsort(values, kind="stable")
    ends = np.cumsum(weights[order]) / weights.sum()
    begins = ends - weights[order] / weights.sum()
    inside = np.clip(np.minimum(ends, 0.75) - np.maximum(begins, 0.25), 0, None)
    return float(values[order] @ inside / inside.sum())


def improvement(losses: Values, other: Values) -> float:
    """Return the chance that a run of the one is below a run of the other, ties half."""
    return float((losses[:, None] < other).mean() + (losses[:, None] == other).mean() / 2)


def _bootstrapped(
    groups: Sequence[tuple[Values, ...]],
    statistic: Callable[[Sequence[tuple[Values, ...]]], float],
    *,
    paired: bool = False,
) -> str:
    """A statistic with its interval; runs are drawn again within environments.

    `paired` draws seeds, the same of all arms; else every arm's runs by themselves.
    """
    if not groups:
        return "none"
    rng = np.random.default_rng(0)

    def again(group: tuple[Values, ...]) -> tuple[Values, ...]:
        if not paired:
            return tuple(rng.choice(arm, len(arm)) for arm in group)
        rows = rng.integers(len(group[0]), size=len(group[0]))
        return tuple(arm[rows] for arm in group)

    draws = [statistic([again(group) for group in groups]) for _ in range(SAMPLES)]
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{statistic(groups):.2f} ({low:.2f} … {high:.2f})"
