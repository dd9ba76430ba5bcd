"""The primary contrasts over all environments (Agarwal et al. 2021, as rliable defines them)."""

from collections.abc import Callable, Sequence

import numpy as np
from differences import normalised
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
    gains: dict[str, list[Values]] = {"A: probe less random, LoRA": [],
                                      "B: best learned less uniform": []}  # fmt: skip
    runs: dict[str, list[tuple[Values, Values]]] = {name: [] for name in gains}
    for plan in plans:
        arms = selected(plan, "lora")
        whole = losses_of(plan, plan.arms["lora-everything"])
        name = "A: probe less random, LoRA"
        gains[name].append(normalised(arms["probe"], arms["random"], whole))
        sets = np.concatenate([_values(losses) for losses in random_sets(plan, "lora")])
        runs[name].append((_values(arms["probe"]), sets))
        best = plan.best_learned()
        if best is None:
            continue
        name = "B: best learned less uniform"
        learned, uniform = (losses_of(plan, plan.arms[arm]) for arm in (best, "uniform"))
        gains[name].append(normalised(learned, uniform, losses_of(plan, plan.arms["full"])))
        runs[name].append((_values(learned), _values(uniform)))
    return [{"contrast": name, **_mean(gains[name]), **_probability(runs[name])} for name in gains]


def _values(losses: dict[int, float]) -> Values:
    return np.array(list(losses.values()), float)


def _mean(gains: Sequence[Values]) -> dict[str, object]:
    told = [gain for gain in gains if len(gain) > 1]
    found = _bootstrapped([(gain,) for gain in told], lambda groups: interquartile_mean(
        np.concatenate([gain for (gain,) in groups])))  # fmt: skip
    return {"interquartile mean of the gain (95 %)": found, "of environments": len(told)}


def _probability(runs: Sequence[tuple[Values, Values]]) -> dict[str, object]:
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
) -> str:
    """A statistic with its interval; runs are drawn again within arms and environments."""
    if not groups:
        return "none"
    rng = np.random.default_rng(0)
    draws = [
        statistic([tuple(rng.choice(arm, len(arm)) for arm in group) for group in groups])
        for _ in range(SAMPLES)
    ]
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{statistic(groups):.2f} ({low:.2f} … {high:.2f})"
