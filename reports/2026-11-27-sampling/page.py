"""Tables of the page, from the kept logs alone."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from arms import RANDOM, TUNING, Arm
from contrasts import at_equal_seconds, choices, prediction, validities
from numpy.typing import NDArray
from plan import LONGER, LONGER_SEEDS, Plan

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from differences import Losses, difference, holm, normalised
from pages import markdown

import lisa_analysis as la

SAMPLES = 10_000  # of the bootstrap over seeds
PLACEBO = {"strong": "strong-placebo", "pool": "pool-placebo", "online": "online-placebo"}
MISSING = "not yet"
SHOWN = (
    "iid", "default", "strong", "strong-placebo", "pool", "pool-placebo", "pilot", "ablation",
    "online", "online-placebo", "reversed", "uniform", "full", "lora-everything", "level", "head",
)  # fmt: skip


def tables(plans: Sequence[Plan]) -> dict[str, str]:
    """Return every table of the page by its mark."""
    settled = [plan for plan in plans if plan.settled()]
    found = {
        "state": _state(plans),
        "rates": _rates(plans),
        "learners": _learners(plans),
        "selection": _corrected(_selection(settled)),
        "sampling": _corrected(_sampling(settled)),
        "seconds": _seconds(settled),
        "prediction": _prediction(settled),
        "longer": _longer(settled),
        "together": _together(settled),
        "costs": _costs(plans),
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


def _learners(plans: Sequence[Plan]) -> list[dict[str, object]]:
    rows = []
    for plan in plans:
        row: dict[str, object] = {"environment": plan.environment.name}
        for name in plan.learners:
            losses = [plan.loss(plan.cell(plan.learners[name], seed).name) for seed in TUNING]
            finished = [loss for loss in losses if loss is not None]
            known = finished and len(finished) == len(losses)
            row[name] = f"{np.mean(finished):.4f}" if known else MISSING
        rows.append({**row, "chosen": plan.preferred or MISSING})
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
            if f"{kind}-{way}" in plan.arms
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
            if not arms:
                continue  # the weights half is asked of the whole matrix alone
            whole = losses_of(plan, plan.arms[everything])
            low = {"all, lower rank": losses_of(plan, plan.arms["lora-all"])}
            for way, losses in {**arms, **(low if kind == "lora" else {})}.items():
                row = {"environment": plan.environment.name, "trained": kind, "layers": way}
                row |= _against(losses, arms["random"], "random", whole)
                row["primary"] = way == "probe" and kind == "lora"
                rows.append(row)
    return rows


def _sampling(plans: Sequence[Plan]) -> list[dict[str, object]]:
    rows = []
    for plan in plans:
        uniform = losses_of(plan, plan.arms["uniform"])
        whole = losses_of(plan, plan.arms["full"])
        best = plan.best_learned()
        for name in (n for n in SHOWN if n in plan.arms):
            losses = losses_of(plan, plan.arms[name])
            row = {"environment": plan.environment.name, "arm": name}
            row |= _against(losses, uniform, "uniform", whole)
            placebo = PLACEBO.get(name)
            row["less placebo (95 %)"] = ""
            if placebo in plan.arms:
                apart = difference(losses, losses_of(plan, plan.arms[placebo]))
                row["less placebo (95 %)"] = MISSING if apart is None else apart
            row["primary"] = name == best
            rows.append(row)
    return rows


def _corrected(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Put p of every contrast into its row; of the secondary ones, by Holm over the question.

    What the random sets or uniform sampling are compared with is one family, anchors as well; the
    differences from placebos are shown with their intervals alone.
    """
    compared = [row for row in rows if row["apart"] is not None and not row["primary"]]
    corrected = holm([row["apart"].p for row in compared])  # type: ignore[attr-defined]
    for row, p in zip(compared, corrected, strict=True):
        row["p, Holm"] = f"{p:.3f}"
    for row in rows:
        apart = row.pop("apart")
        alone = f"{apart.p:.3f} (primary)" if row.pop("primary") and apart is not None else ""
        row.setdefault("p, Holm", alone)
    return rows


def _against(losses: Losses, other: Losses, name: str, whole: Losses) -> dict[str, object]:
    gain = normalised(losses, other, whole)
    apart = None if losses == other else difference(losses, other)
    return {
        "seeds": len(losses),
        "loss": f"{np.mean(list(losses.values())):.4f}" if losses else MISSING,
        f"less {name} (95 %)": "" if losses == other else MISSING if apart is None else str(apart),
        "gain over it, of all layers'": f"{np.mean(gain):.0%}" if len(gain) else "",
        "apart": apart,
    }


def _seconds(plans: Sequence[Plan]) -> list[dict[str, object]]:
    """Question B after the time that uniform draws take; sources are paid from it."""
    rows = []
    for plan in plans:
        uniform = plan.arms["uniform"]
        for name in (n for n in SHOWN if n in plan.arms and n != "uniform"):
            losses, steps = at_equal_seconds(plan, plan.arms[name], uniform)
            apart = difference(losses, losses_of(plan, uniform))
            rows.append({
                "environment": plan.environment.name, "arm": name,
                "steps left": f"{steps:.0f} of {plan.environment.steps}" if losses else MISSING,
                "less uniform (95 %)": MISSING if apart is None else str(apart),
            })  # fmt: skip
    return rows


def _longer(plans: Sequence[Plan]) -> list[dict[str, object]]:
    """The primary contrasts at the steps of the plan and at four times as many, the same seeds."""
    rows = []
    for plan in (plan for plan in plans if plan.environment.longer):
        best = plan.best_learned()
        for question, name, other in (("A", "lora-probe", "random"), ("B", best, "uniform")):
            for times in (1, LONGER):
                losses = {arm.name: _of_length(plan, arm, times) for arm in plan.longer_arms()}
                if question == "A":
                    found = {way.removeprefix("lora-"): each for way, each in losses.items()}
                    losses |= with_placebo(found)
                apart = difference(losses.get(name or "", {}), losses.get(other, {}))
                rows.append({
                    "environment": plan.environment.name,
                    "contrast": f"{question}: {name or MISSING} − {other}",
                    "steps": times * plan.environment.steps,
                    "difference, nats (95 %)": MISSING if apart is None else apart,
                })  # fmt: skip
    return rows


def _of_length(plan: Plan, arm: Arm, times: int) -> dict[int, float]:
    found = {}
    for seed in LONGER_SEEDS:
        value = plan.loss(plan.cell(arm, seed, times=times).name)
        if value is not None:
            found[seed] = value
    return found


def _prediction(plans: Sequence[Plan]) -> list[dict[str, object]]:
    """Question C: a metric's validity beside what its choice of layers gained over random ones."""
    rows: list[dict[str, object]] = []
    pairs = []
    for plan in plans:
        if not plan.environment.every_layer:
            continue  # only where every layer was trained alone is each choice a look-up
        alone = {
            layer: losses_of(plan, plan.arms[f"lora-layer-{layer}"])
            for layer in range(plan.environment.layers)
        }
        random = with_placebo(selected(plan, "lora"))["random"]
        whole = losses_of(plan, plan.arms["lora-everything"])
        valid = validities(plan)
        for name in sorted(valid, key=lambda name: -valid[name]):
            chosen = {seed: choices(plan, name, seed) for seed in random}
            losses = {s: alone[layers[0]][s] for s, layers in chosen.items() if layers}
            gain = normalised(losses, random, whole)
            if not len(gain):
                continue
            pairs.append((valid[name], float(np.mean(gain))))
            named = sorted({layers[0] for layers in chosen.values() if layers})
            rows.append({
                "environment": plan.environment.name, "metric": name,
                "agreement with ablation, ρ": f"{valid[name]:+.2f}",
                "layer chosen": ", ".join(map(str, named)),
                "gain of the choice, of all layers'": f"{np.mean(gain):+.0%}",
            })  # fmt: skip
    found = prediction(pairs)
    if rows and found is not None:
        rows.append({
            **dict.fromkeys(rows[0], ""), "metric": f"ρ of the two columns, {len(pairs)} metrics",
            "agreement with ablation, ρ": f"{found[0]:+.2f}",
            "gain of the choice, of all layers'": f"p = {found[1]:.3f}, metrics as if independent",
        })  # fmt: skip
    return rows


def _costs(plans: Sequence[Plan]) -> list[dict[str, object]]:
    """What runs took on one core, from their own logs."""
    rows = []
    for plan in plans:
        cells = plan.cells()
        seconds = [
            la.load(plan.kept / cell.name).manifest["result"]["seconds"]
            for cell in cells
            if (plan.kept / cell.name).exists()
        ]
        row: dict[str, object] = {"environment": plan.environment.name}
        row["seconds a run, one core"] = f"{np.median(seconds):.0f}" if seconds else MISSING
        row["runs"] = f"{len(seconds)} of {len(cells)}"
        row["core-hours"] = f"{sum(seconds) / 3600:.1f}" if seconds else MISSING
        rows.append(row)
    return rows


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
        best = plan.best_learned()
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
