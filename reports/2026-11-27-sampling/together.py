"""The primary contrasts over all environments (Agarwal et al. 2021, as rliable defines them)."""

from collections.abc import Callable, Sequence

import numpy as np
from differences import Losses, normalised
from numpy.typing import NDArray
from outcomes import losses_of, random_sets, selected
from plan import Plan
from scipy import stats

SAMPLES = 10_000  # of the bootstrap over seeds

Values = NDArray[np.float64]


def over_environments(plans: Sequence[Plan]) -> list[dict[str, object]]:
    """Return a row per primary contrast: interquartile mean, probability of improvement.

    An environment in which all layers gain nothing that can be told from 0 has no share of a gain:
    it is in the probability, not in the mean.
    """
    selection, sampling = "A: probe less random, LoRA", "B: best learned less uniform"
    gains: dict[str, list[tuple[Values, ...]]] = {selection: [], sampling: []}
    runs: dict[str, list[tuple[Values, ...]]] = {selection: [], sampling: []}
    for plan in plans:
        arms = selected(plan, "lora")
        whole = losses_of(plan, plan.arms["lora-everything"])
        gains[selection] += _way(arms["probe"], arms["random"], whole)
        sets = np.concatenate([_values(losses) for losses in random_sets(plan, "lora")])
        runs[selection].append((_values(arms["probe"]), sets))
        best = plan.best_learned()
        if best is None:
            continue
        learned, uniform = (losses_of(plan, plan.arms[arm]) for arm in (best, "uniform"))
        gains[sampling] += _way(learned, uniform, losses_of(plan, plan.arms["full"]))
        runs[sampling].append((_values(learned), _values(uniform)))
    return [{"contrast": name, **_mean(gains[name]), **_probability(runs[name])} for name in gains]


def _way(losses: Losses, other: Losses, whole: Losses) -> list[tuple[Values, ...]]:
    """Losses of the three by seed where the way from the other to the whole is told from 0."""
    if not len(normalised(losses, other, whole)):
        return []
    seeds = sorted(set(losses) & set(other) & set(whole))
    return [tuple(np.array([arm[s] for s in seeds]) for arm in (losses, other, whole))]


def _values(losses: Losses) -> Values:
    return np.array(list(losses.values()), float)


def _mean(ways: Sequence[tuple[Values, ...]]) -> dict[str, object]:
    def statistic(groups: Sequence[tuple[Values, ...]]) -> float:
        shares = [(b - a) / max(float((b - c).mean()), 1e-9) for a, b, c in groups]
        return interquartile_mean(np.concatenate(shares))

    found = _bootstrapped(ways, statistic, paired=True)
    return {"interquartile mean of the gain (95 %)": found, "of environments": len(ways)}


def _probability(runs: Sequence[tuple[Values, ...]]) -> dict[str, object]:
    both = [pair for pair in runs if min(map(len, pair)) > 1]
    found = _bootstrapped(both, lambda groups: float(np.mean([improvement(*g) for g in groups])))
    return {"probability of improvement (95 %)": found, "of so many": len(both)}


def interquartile_mean(values: Values) -> float:
    """Return the mean of the middle half of all runs."""
    return float(stats.trim_mean(values, 0.25))


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
