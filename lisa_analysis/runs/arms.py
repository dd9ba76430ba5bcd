"""Arms: runs that differ in nothing but the seed, what to call them, and how they compare."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from lisa_analysis.rundir.configurations import (
    LEARNING,
    Settings,
    data_of,
    differing,
    distinct,
    grouped,
    head_of,
    held_out_of,
    model_of,
    seeds_of,
    settings,
    short_name,
)
from lisa_analysis.rundir.run import Run
from lisa_analysis.statistics.repetitions import MIN_SEEDS, Mean, mean_difference, mean_over

ARM_COLUMNS = ("arm", "runs", "seeds", "mean", "low", "high", "method", "kendall")
DIFFERENCE_COLUMNS = ("a", "b", "mean", "low", "high", "pairs", "lower", "higher")
_MOST = 3
_WIDEST = 24


@dataclass(frozen=True)
class Arm:
    """Runs that stand for one another.

    Attributes
    ----------
    name
        What it is called.
    runs
        Positions of its runs.
    mixes
        Settings in which its runs differ all the same, when they were put together by hand.
    control
        0 for an arm that is compared with others, 1 for a placebo, 2 for uniform sampling.
    """

    name: str
    runs: tuple[int, ...]
    mixes: tuple[str, ...] = ()
    control: int = 0


def find_arms(runs: Sequence[Run], made: Sequence[Settings]) -> list[Arm]:
    """Group runs by what they did: method, settings and the content of what was sampled."""
    groups = grouped(made)
    names = _names([runs[g[0]] for g in groups], [made[g[0]] for g in groups])
    return [
        Arm(name, tuple(group), control=_control(made[group[0]]))
        for name, group in zip(names, groups, strict=True)
    ]


def by_arm(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of every arm under its name, in the order of first appearance."""
    arms = find_arms(runs, [settings(run) for run in runs])
    return {arm.name: [runs[i] for i in arm.runs] for arm in arms}


def given_arms(named: Mapping[str, Sequence[int]], made: Sequence[Settings]) -> list[Arm]:
    """Arms that were put together by hand."""
    return [
        Arm(
            name, tuple(runs), _mixed([made[i] for i in runs]),
            min((_control(made[i]) for i in runs), default=0),
        )
        for name, runs in named.items()
    ]  # fmt: skip


def _control(own: Settings) -> int:
    word = own.sampled.word
    return 2 if word == "uniform" else int(word in ("permuted", "reversed"))


def _mixed(members: Sequence[Settings]) -> tuple[str, ...]:
    if len(grouped(members)) < 2:
        return ()
    sampled = all(members[0].sampled.agrees(other.sampled) for other in members[1:])
    return (*differing(members), *(() if sampled else ("probabilities",)))


def _names(runs: Sequence[Run], made: Sequence[Settings]) -> list[str]:
    """Name every arm by what tells it from the others."""
    methods = [run.method for run in runs]
    models = [model_of(run) or "unknown model" for run in runs]
    names = []
    for i, own in enumerate(made):
        words = [methods[i]] if len(set(methods)) > 1 or len(made) == 1 else []
        if len(set(models)) > 1:
            words.append(models[i])
        beside = zip(methods, models, made, strict=True)
        words += _within(own, [s for m, n, s in beside if (m, n) == (methods[i], models[i])])
        names.append(", ".join(words) or methods[i])
    return distinct(names)


def _within(own: Settings, kin: Sequence[Settings]) -> list[str]:
    """What tells an arm from the others of its method and model."""
    words = []
    if not all(own.sampled.agrees(other.sampled) for other in kin):
        word = own.sampled.word
        alike = [o for o in kin if o.sampled.word == word]
        words += [word, *_options(own, alike)]
    elif len(kin) == 1 and own.sampled.pi and own.sampled.word != "uniform":
        words.append(own.sampled.word)
    keys = differing(kin)
    if len({other.sampled.learns for other in kin}) > 1:
        keys = [key for key in keys if not key.startswith(LEARNING)]  # the word says it
    words += [f"{short_name(key)}={_value(own.values.get(key))}" for key in keys[:_MOST]]
    return [*words, "…"] if len(keys) > _MOST else words


def _options(own: Settings, alike: Sequence[Settings]) -> list[str]:
    """Options of the probabilities that differ between arms with one word."""
    read = [json.loads(o.sampled.options) if o.sampled.options else {} for o in alike]
    mine = json.loads(own.sampled.options) if own.sampled.options else {}
    keys = [key for key in mine if len({json.dumps(r.get(key)) for r in read}) > 1]
    return [f"{key}={mine[key]}" for key in keys[:_MOST]]


def _value(text: str | None) -> str:
    if text is None:
        return "off"
    shown = " ".join(text.replace("\n-", ",").split()).strip(", '\"").replace(" ,", ",")
    shown = shown.rsplit("/", 1)[-1] if shown.startswith(("/", ".")) else shown
    return shown if len(shown) <= _WIDEST else f"{shown[: _WIDEST - 1]}…"


# What losses have to share to be compared, and what it is called where they do not.
COMPARED = (
    ("models", model_of), ("kinds of model", head_of), ("data", data_of),
    ("parts of the data", held_out_of),
)  # fmt: skip


def comparable(runs: Sequence[Run]) -> bool:
    """Whether no two runs are known to be of different models or data, or of other examples."""
    return all(len({*map(of, runs)} - {""}) < 2 for _, of in COMPARED)


def arm_table(
    arms: Sequence[Arm], runs: Sequence[Run], table: pd.DataFrame, pairs: pd.DataFrame,
    confidence: float,
) -> pd.DataFrame:  # fmt: skip
    """One row per arm: mean held-out loss over its seeds, its interval, agreement of rankings.

    Runs of one seed are averaged first: a repetition of a seed is no further seed.
    """
    rows = []
    for arm in arms:
        by_seed = _losses(arm, runs, table, _identity)
        mean = mean_over(list(by_seed.values()), confidence)
        names = set(table["run"].iloc[list(arm.runs)])
        inside = pairs[pairs["run_a"].isin(names) & pairs["run_b"].isin(names)]
        rows.append(
            {
                "arm": arm.name, "runs": len(arm.runs),
                "seeds": len(by_seed) or len({_identity(i, runs[i]) for i in arm.runs}),
                "mean": mean.value, "low": mean.low, "high": mean.high,
                "method": "/".join(dict.fromkeys(runs[i].method for i in arm.runs)),
                "kendall": float(inside["kendall"].mean()) if len(inside) else float("nan"),
            }
        )  # fmt: skip
    return pd.DataFrame(rows, columns=list(ARM_COLUMNS))


def difference_table(
    arms: Sequence[Arm], runs: Sequence[Run], table: pd.DataFrame, confidence: float
) -> pd.DataFrame:
    """One row per pair of arms: mean held-out loss of `a` less that of `b`.

    Paired by seed where the arms have enough seeds in common (or all of them), else Welch's
    interval with `pairs` 0; `lower` and `higher` count the pairs in which `a` is that. Where one of
    the two is a control, it is `b`. Losses on different models or data have no difference.
    """
    rows: list[tuple[Any, ...]] = []
    for first, second in combinations(arms, 2):
        a, b = (second, first) if first.control > second.control else (first, second)
        left, right = (_losses(arm, runs, table, _pairing) for arm in (a, b))
        if not comparable([runs[i] for i in (*a.runs, *b.runs)]):
            rows.append((a.name, b.name, np.nan, np.nan, np.nan, 0, None, None))
            continue
        common = [seed for seed in left if seed in right]
        lower = higher = None
        if len(common) >= MIN_SEEDS or (common and len(common) == len(left) == len(right)):
            apart = np.array([left[seed] - right[seed] for seed in common])
            mean: Mean = mean_over(apart, confidence)
            lower, higher = int((apart < 0).sum()), int((apart > 0).sum())
        else:
            common = []
            mean = mean_difference(list(left.values()), list(right.values()), confidence)
        rows.append((a.name, b.name, mean.value, mean.low, mean.high, len(common), lower, higher))
    frame = pd.DataFrame(rows, columns=list(DIFFERENCE_COLUMNS))
    return frame.astype({"pairs": "int64", "lower": "Int64", "higher": "Int64"})


def _losses(arm: Arm, runs: Sequence[Run], table: pd.DataFrame, key: Any) -> dict[Any, float]:
    """Mean held-out loss of every seed of an arm that has one."""
    equal = table["loss_at_equal_steps"]
    losses = (equal if equal.notna().any() else table["held_out_loss"]).to_numpy(np.float64)
    found: dict[Any, list[float]] = {}
    for i in arm.runs:
        if np.isfinite(losses[i]):
            found.setdefault(key(i, runs[i]), []).append(float(losses[i]))
    return {seed: float(np.mean(values)) for seed, values in found.items()}


def _identity(position: int, run: Run) -> Any:
    """What makes a run a repetition of its own; a run of unknown seed is always one."""
    return tuple(sorted(seeds_of(run).items(), key=str)) or position


def _pairing(position: int, run: Run) -> Any:
    """What two arms must have in common to be paired: the seed, and with it the data's order."""
    seeds = seeds_of(run)
    pair = tuple(seeds.get(name) for name in ("seed", "data_seed"))
    return pair if any(part is not None for part in pair) else (position, None, None)
