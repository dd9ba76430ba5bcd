"""The primary contrasts over all environments (Agarwal et al. 2021, as rliable defines them)."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from differences import Losses, normalised
from numpy.typing import NDArray
from outcomes import losses_of, random_sets, selected
from plan import Plan

from lisa_analysis.statistics.repetitions import MIN_SEEDS

SAMPLES = 10_000  # of the bootstrap over seeds

Values = NDArray[np.float64]


def over_environments(plans: Sequence[Plan]) -> list[dict[str, object]]:
    """Return a row per primary contrast: interquartile mean, probability of improvement.

    An environment in which all layers gain nothing that can be told from 0 has no share of a gain:
    it is in the probability, not in the mean. Environments weigh alike, however many their runs.
    """
    selection, sampling = "A: probe less random, LoRA", "B: best learned less uniform"
    gains: dict[str, dict[str, tuple[Values, ...]]] = {selection: {}, sampling: {}}
    runs: dict[str, dict[str, tuple[Values, ...]]] = {selection: {}, sampling: {}}
    for plan in plans:
        name, arms = plan.environment.name, selected(plan, "lora")
        whole = losses_of(plan, plan.arms["lora-everything"])
        gains[selection] |= _way(name, arms["probe"], arms["random"], whole)
        sets = np.concatenate([_values(losses) for losses in random_sets(plan, "lora")])
        runs[selection] |= _enough(name, _values(arms["probe"]), sets)
        best = plan.best_learned()
        if best is None:
            continue
        learned, uniform = (losses_of(plan, plan.arms[arm]) for arm in (best, "uniform"))
        gains[sampling] |= _way(name, learned, uniform, losses_of(plan, plan.arms["full"]))
        runs[sampling] |= _enough(name, _values(learned), _values(uniform))
    return [{"contrast": name, **_mean(gains[name]), **_probability(runs[name])} for name in gains]


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
