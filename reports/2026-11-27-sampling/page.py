"""Tables of the page, from the kept logs alone."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from arms import RANDOM, TUNING, Arm
from numpy.typing import NDArray
from plan import Plan

from lisa_analysis.statistics.repetitions import MIN_SEEDS, mean_over

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pages import markdown

SAMPLES = 10_000  # of the bootstrap over seeds
LEARNED = ("default", "strong", "pool", "pilot", "ablation", "online")
PLACEBO = {"strong": "strong-placebo", "pool": "pool-placebo", "online": "online-placebo"}
MISSING = "not yet"


def tables(plans: Sequence[Plan]) -> dict[str, str]:
    """Return every table of the page by its mark."""
    settled = [plan for plan in plans if plan.settled()]
    found = {
        "state": _state(plans),
        "rates": _rates(plans),
        "selection": _selection(settled),
        "sampling": _sampling(settled),
        "together": _together(settled),
    }
    return {name: markdown(rows) if rows else f"{MISSING}." for name, rows in found.items()}


def _state(plans: Sequence[Plan]) -> list[dict[str, object]]:
    rows = []
    for plan in plans:
        cells = plan.cells()
        finished = sum((plan.kept / cell.name).exists() for cell in cells)
        step = "rates" if not plan.settled() else "arms"
        rows.append(
            {"environment": plan.environment.name, "now at": step,
             "runs finished": f"{finished} of {len(cells)} known so far"}
        )  # fmt: skip
    return rows


def _rates(plans: Sequence[Plan]) -> list[dict[str, object]]:
    rows = []
    for plan in plans:
        for family in plan.families:
            tried = plan.tried(family)
            losses = plan.losses(family, tried)
            if losses is None:
                said: dict[str, object] = {"chosen": MISSING, "losses at the rates tried": ""}
            else:
                each = ", ".join(f"{rate:.3g}: {losses[rate]:.4f}" for rate in tried)
                edge = plan.rate(family) in (tried[0], tried[-1])
                said = {
                    "chosen": f"{plan.rate(family):.3g}" + (" (edge of the grid)" if edge else ""),
                    "losses at the rates tried": each,
                }
            rows.append({"environment": plan.environment.name, "family": family, **said})
    return rows


def losses_of(plan: Plan, arm: Arm) -> dict[int, float]:
    """Return the held-out losses of an arm by seed, of the runs that there are."""
    found = {}
    for seed in range(1, plan.environment.seeds + 1):
        value = plan.loss(plan.cell(arm, seed).name)
        if value is not None:
            found[seed] = value
    return found


def selected(plan: Plan, kind: str) -> dict[str, dict[int, float]]:
    """Return losses by seed of question A's arms; looked up where every layer trained alone."""
    if not plan.environment.every_layer:
        return {
            way: losses_of(plan, plan.choices[f"{kind}-{way}"])
            for way in (name.removeprefix("lora-") for name in plan.choices if "lora-" in name)
        }
    alone = {
        layer: losses_of(plan, plan.arms[f"{kind}-layer-{layer}"])
        for layer in range(plan.environment.layers)
    }
    seeds = set.intersection(*(set(values) for values in alone.values()))
    found: dict[str, dict[int, float]] = {}
    for way in ("probe", "pilot", "ablation", "last", "even", "lowest", "spectrum"):
        chosen = {seed: plan.chosen(way, seed) for seed in sorted(seeds)}
        found[way] = {s: alone[layers[0]][s] for s, layers in chosen.items() if layers is not None}
    # The mean over all sets stands in for random ones.
    found["random"] = {s: float(np.mean([alone[i][s] for i in alone])) for s in sorted(seeds)}
    return found


def with_placebo(arms: Mapping[str, Mapping[int, float]]) -> dict[str, Mapping[int, float]]:
    """Return the arms with `random` as the mean of the random sets of a seed."""
    drawn = [arms[f"random-{n}"] for n in range(1, RANDOM + 1) if f"random-{n}" in arms]
    if not drawn:
        return dict(arms)
    seeds = set.intersection(*(set(values) for values in drawn))
    mean = {seed: float(np.mean([values[seed] for values in drawn])) for seed in sorted(seeds)}
    return {**{way: arms[way] for way in arms if "random" not in way}, "random": mean}


def _selection(plans: Sequence[Plan]) -> list[dict[str, object]]:
    rows = []
    for plan in plans:
        for kind, everything in (("lora", "lora-everything"), ("weights", "full")):
            arms = with_placebo(selected(plan, kind))
            whole = losses_of(plan, plan.arms[everything])
            low = {"all, lower rank": losses_of(plan, plan.arms["lora-all"])}
            for way, losses in {**arms, **(low if kind == "lora" else {})}.items():
                rows.append(
                    {"environment": plan.environment.name, "trained": kind, "layers": way,
                     **_against(losses, arms["random"], "random", whole)}
                )  # fmt: skip
    return rows


def _sampling(plans: Sequence[Plan]) -> list[dict[str, object]]:
    rows = []
    for plan in plans:
        names = ("iid", "default", "strong", "strong-placebo", "pool", "pool-placebo", "pilot",
                 "ablation", "online", "online-placebo", "reversed", "uniform", "full",
                 "lora-everything", "level", "head")  # fmt: skip
        uniform = losses_of(plan, plan.arms["uniform"])
        whole = losses_of(plan, plan.arms["full"])
        for name in (n for n in names if n in plan.arms):
            losses = losses_of(plan, plan.arms[name])
            row = {"environment": plan.environment.name, "arm": name}
            row |= _against(losses, uniform, "uniform", whole)
            placebo = PLACEBO.get(name)
            row["less placebo (95 %)"] = (
                _difference(losses, losses_of(plan, plan.arms[placebo])) if placebo else ""
            )
            rows.append(row)
    return rows


def _against(
    losses: Mapping[int, float],
    other: Mapping[int, float],
    name: str,
    whole: Mapping[int, float],
) -> dict[str, object]:
    gain = normalised(losses, other, whole)
    return {
        "seeds": len(losses),
        "loss": f"{np.mean(list(losses.values())):.4f}" if losses else MISSING,
        f"less {name} (95 %)": "" if losses == other else _difference(losses, other),
        "gain over it, of all layers'": f"{np.mean(gain):.0%}" if len(gain) else "",
    }


def _difference(a: Mapping[int, float], b: Mapping[int, float]) -> str:
    """Mean of the differences within seeds and its interval, by Student's t."""
    apart = [a[seed] - b[seed] for seed in sorted(set(a) & set(b))]
    if len(apart) < MIN_SEEDS:
        return MISSING
    mean = mean_over(apart)
    return f"{mean.value:+.4f} ({mean.low:+.4f} … {mean.high:+.4f})"


def normalised(
    losses: Mapping[int, float], other: Mapping[int, float], whole: Mapping[int, float]
) -> NDArray[np.float64]:
    """Return, by seed, how much of the way from the other arm's loss to that of all layers."""
    seeds = sorted(set(losses) & set(other) & set(whole))
    reach = float(np.mean([other[s] - whole[s] for s in seeds])) if seeds else 0.0
    if reach <= 0:
        return np.array([])
    return np.array([(other[s] - losses[s]) / reach for s in seeds])


def _together(plans: Sequence[Plan]) -> list[dict[str, object]]:
    """The primary contrasts over environments: interquartile mean, probability of improvement."""
    contrasts: dict[str, list[NDArray[np.float64]]] = {
        "A: probe less random, LoRA": [], "B: best learned less uniform": []
    }  # fmt: skip
    for plan in plans:
        arms = with_placebo(selected(plan, "lora"))
        whole = losses_of(plan, plan.arms["lora-everything"])
        contrasts["A: probe less random, LoRA"].append(
            normalised(arms["probe"], arms["random"], whole)
        )
        best = best_learned(plan)
        if best is not None:
            uniform = losses_of(plan, plan.arms["uniform"])
            contrasts["B: best learned less uniform"].append(
                normalised(losses_of(plan, plan.arms[best]), uniform,
                           losses_of(plan, plan.arms["full"]))
            )  # fmt: skip
    rows = []
    for name, gains in contrasts.items():
        gains = [gain for gain in gains if len(gain) > 1]
        row: dict[str, object] = {"contrast": name, "environments": len(gains)}
        for title, statistic in (
            ("interquartile mean of the gain (95 %)", interquartile_mean),
            ("probability of improvement (95 %)", lambda x: float((x > 0).mean())),
        ):
            row[title] = _bootstrapped(gains, statistic) if gains else MISSING
        rows.append(row)
    return rows


def best_learned(plan: Plan) -> str | None:
    """Return the learned arm with the lowest mean loss on the tuning split; None as yet."""
    found = {}
    for name in LEARNED:
        values = [plan.loss(plan.cell(plan.arms[name], seed).name) for seed in TUNING]
        finished = [value for value in values if value is not None]
        if len(finished) < len(values):
            return None
        found[name] = float(np.mean(finished))
    return min(found, key=found.__getitem__)


def interquartile_mean(values: NDArray[np.float64]) -> float:
    """Return the mean of the middle half (Agarwal et al. 2021)."""
    ordered = np.sort(values)
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())


def _bootstrapped(
    groups: Sequence[NDArray[np.float64]], statistic: Callable[[NDArray[np.float64]], float]
) -> str:
    """A statistic of all seeds of all environments; seeds are drawn again within environments."""
    rng = np.random.default_rng(0)
    draws = np.array([
        statistic(np.concatenate([rng.choice(group, len(group)) for group in groups]))
        for _ in range(SAMPLES)
    ])  # fmt: skip
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{statistic(np.concatenate(groups)):.2f} ({low:.2f} … {high:.2f})"
