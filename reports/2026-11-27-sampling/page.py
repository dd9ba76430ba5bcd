"""Tables and figures of the page, from the kept logs alone."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from arms import LEARNED, TUNING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from contrasts import ANCHORS, MISSING, SHOWN, Row, anchors, by_part, contrasts, shown
from differences import difference
from figures import draw_sampling, draw_selection
from outcomes import losses_of, mean_of, of_length, selected
from pages import markdown, write_tables
from plan import LONGER, PAIRS, Plan
from prediction import predicts, validity_and_gain
from seconds import steps_left
from sources import profile_of
from together import over_environments

import lisa_analysis as la


def write(plans: Sequence[Plan], folder: Path) -> None:
    """Write tables and figures of the page."""
    selection, sampling = contrasts(plans)
    draw_selection(selection, folder / "selection.png")
    draw_sampling(sampling, folder / "sampling.png")
    write_tables(folder / "README.md", tables(plans, selection, sampling))


def tables(
    plans: Sequence[Plan], selection: Sequence[Row], sampling: Sequence[Row]
) -> dict[str, str]:
    """Return every table of the page by its mark."""
    settled = [plan for plan in plans if plan.settled()]
    found = {
        "short": _short(settled),
        "rates": _rates(plans),
        "learners": _learners(plans),
        "choice": _choice(settled),
        "selection": shown(selection),
        "sampling": shown(sampling),
        "anchors": anchors(settled),
        "movement": _movement(settled),
        "parts": by_part(settled),
        "by-rate": _by_rate(settled),
        "seconds": _seconds(settled),
        "prediction": _prediction(settled),
        "longer": _longer(settled),
        "together": over_environments(settled),
        "costs": _costs(plans),
    }
    return {name: markdown(rows) if rows else f"{MISSING}." for name, rows in found.items()}


def _short(plans: Sequence[Plan]) -> list[Row]:
    """What is asked of every environment in a row, in nats; bold where 0 is outside."""
    rows = []
    for plan in plans:
        few, best = selected(plan, "lora"), plan.best_learned()
        named = ("uniform", "full", "lora-all", *([best, f"{best}-placebo"] if best else []))
        arms = {name: losses_of(plan, plan.arms[name]) for name in named}
        learned, placebo = arms.get(best or "", {}), arms.get(f"{best}-placebo", {})
        asked = {
            "probe": (few["probe"], few["random"]),
            "even": (few["even"], few["random"]),
            "last": (few["last"], few["random"]),
            "all, lower rank": (arms["lora-all"], few["random"]),
            "best learned": (learned, arms["uniform"]),
            "its placebo": (placebo, arms["uniform"]),
            "full": (arms["full"], arms["uniform"]),
        }
        row: Row = {"environment": plan.environment.name}
        for way, (losses, other) in asked.items():
            apart = difference(losses, other)
            less = "random" if other is few["random"] else "uniform"
            said = f"{apart.mean:+.2f} ({apart.low:+.2f} … {apart.high:+.2f})" if apart else MISSING
            told = apart is not None and apart.low * apart.high > 0
            name = f" ({best})" if way == "best learned" and best else ""
            row[f"{way} − {less}"] = (f"**{said}**" if told else said) + name
        rows.append(row)
    return rows


def _rates(plans: Sequence[Plan]) -> list[Row]:
    rows = []
    for plan in plans:
        explored = [arm.family for arm in plan.sampling.by_part.values()]
        for family in dict.fromkeys((*plan.families, *explored)):
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


def _learners(plans: Sequence[Plan]) -> list[Row]:
    rows = []
    for plan in plans:
        row: dict[str, object] = {"environment": plan.environment.name}
        for name in plan.sampling.learners:
            losses = [
                plan.loss(plan.cell(plan.sampling.learners[name], seed).name) for seed in TUNING
            ]
            finished = [loss for loss in losses if loss is not None]
            known = finished and len(finished) == len(losses)
            row[name] = f"{np.mean(finished):.4f}" if known else MISSING
        rows.append({**row, "chosen": plan.preferred or MISSING})
    return rows


def _choice(plans: Sequence[Plan]) -> list[Row]:
    """What the best learned arm is chosen by, and uniform draws beside it."""
    rows = []
    for plan in plans:
        row: dict[str, object] = {"environment": plan.environment.name}
        for name in ("uniform", *LEARNED):
            cells = [plan.tuned(plan.arms[name], s) for s in TUNING] if name in plan.arms else []
            losses = [plan.loss(cell.name) for cell in cells if "online" not in name]
            if "online" in name and plan.preferred is not None:
                losses = [plan.loss(cell.name) for cell in cells]
            finished = [loss for loss in losses if loss is not None]
            known = bool(finished) and len(finished) == len(losses)
            wanted = cells and name in LEARNED  # `uniform` is shown where a grid has it
            row[name] = f"{np.mean(finished):.4f}" if known else MISSING if wanted else ""
        rows.append({**row, "chosen": plan.best_learned() or MISSING})
    return rows


def _by_rate(plans: Sequence[Plan]) -> list[Row]:
    """What a profile is worth at every rate tried, on the tuning split, and each side's best."""
    rows: list[Row] = []
    for plan in (plan for plan in plans if plan.environment.both_tuned):
        for family in (f for f in PAIRS if plan.losses(f, plan.tried(f)) is not None):
            sides: list[dict[float, float]] = [{}, {}]
            for rate in plan.tried(family):
                losses = [plan.loss(cell.name) for cell in plan.pair(family, rate)]
                for side, both in zip(sides, (losses[:2], losses[2:]), strict=True):
                    side[rate] = float(np.mean([loss for loss in both if loss is not None]))
            best = [min(side, key=side.__getitem__) for side in sides]
            apart = ", ".join(f"{r:.3g}: {loss - sides[1][r]:+.3f}" for r, loss in sides[0].items())
            rows.append({
                "environment": plan.environment.name,
                "pair": f"{PAIRS[family][0]} less {PAIRS[family][1]}",
                "at the rates tried, two seeds": apart, "chosen": f"{plan.rate(family):.3g}",
                "at each one's own best": f"{sides[0][best[0]] - sides[1][best[1]]:+.3f} "
                f"({best[0]:.3g}, {best[1]:.3g})",
            })  # fmt: skip
    return rows


def _seconds(plans: Sequence[Plan]) -> list[Row]:
    """Question B after the time that uniform draws take; sources are paid from it."""
    rows = []
    for plan in plans:
        uniform = losses_of(plan, plan.arms["uniform"])
        anew = [arm.name for arm in plan.shorter_arms()]
        timed = [arm.name for arm in plan.timed_arms() if arm.name != "uniform"]
        for name in sorted(timed, key=(*SHOWN, *ANCHORS).index):
            arm = plan.arms[name]
            steps, losses = steps_left(plan, arm), {}
            if name in anew:
                cells = {s: plan.shorter(arm, s) for s in plan.seeds}
                found = {s: plan.loss(c.name) for s, c in cells.items() if c is not None}
                losses = {s: loss for s, loss in found.items() if loss is not None}
            apart = difference(losses, uniform)
            rows.append({
                "environment": plan.environment.name, "arm": name,
                "steps left": MISSING if steps is None else f"{steps} of {plan.environment.steps}",
                "seeds": len(losses) if name in anew else "",
                "run anew: less uniform (95 %)": apart or MISSING if name in anew else "",
            })  # fmt: skip
    return rows


def _movement(plans: Sequence[Plan]) -> list[Row]:
    """How evenly layers moved, largest over smallest: under `level`, and in what it was made of."""
    rows = []
    for plan in (plan for plan in plans if "level" in plan.arms):
        level = plan.arms["level"]
        folders = {
            "full, a quarter of the steps": lambda s, p=plan: p.source("pilot", s + 1),
            "level": lambda s, p=plan, arm=level: p.cell(arm, s),
        }
        row: Row = {"environment": plan.environment.name}
        for name, cell in folders.items():
            spread = []
            for seed in range(1, plan.environment.secondary + 1):
                folder = plan.kept / cell(seed).name
                if folder.exists():
                    scores = profile_of(folder, "delta_rel").scores
                    spread.append(max(scores) / min(scores))
            row[name] = f"{np.median(spread):.2f}" if spread else MISSING
        rows.append(row)
    return rows


def _longer(plans: Sequence[Plan]) -> list[Row]:
    """The primary contrasts at the steps of the plan and at four times as many, the same seeds."""
    rows = []
    for plan in (plan for plan in plans if plan.environment.longer):
        best = plan.best_learned()
        for question, name, other in (("A", "lora-probe", "random"), ("B", best, "uniform")):
            for times in (1, LONGER):
                losses = {arm.name: of_length(plan, arm, times) for arm in plan.longer_arms()}
                drawn = [each for arm, each in losses.items() if "random" in arm]
                losses["random"] = mean_of(drawn)
                apart = difference(losses.get(name or "", {}), losses.get(other, {}))
                rows.append({
                    "environment": plan.environment.name,
                    "contrast": f"{question}: {name or MISSING} − {other}",
                    "steps": times * plan.environment.steps,
                    "difference, nats (95 %)": MISSING if apart is None else apart,
                })  # fmt: skip
    return rows


def _prediction(plans: Sequence[Plan]) -> list[Row]:
    """Question C: a metric's validity beside what its choice of layers gained over random ones."""
    rows: list[Row] = []
    pairs = []
    for plan in plans:
        found = validity_and_gain(plan)
        pairs.append([(each.validity, each.gain) for each in found])
        rows += [
            {
                "environment": plan.environment.name, "metric": each.metric,
                "agreement with ablation, ρ": f"{each.validity:+.2f}",
                "layers chosen": each.layers,
                "less random, nats": f"{-each.gain:+.4f}",
            }
            for each in found
        ]  # fmt: skip
    told = predicts(pairs)
    if rows and told is not None:
        rows.append({
            **dict.fromkeys(rows[0], ""),
            "metric": f"ρ of validity and gain, {sum(map(len, pairs))} metrics",
            "agreement with ablation, ρ": f"{told.rho:+.2f} ({told.low:+.2f} … {told.high:+.2f})",
            "less random, nats": f"p = {told.p:.3f}, metrics as if independent",
        })  # fmt: skip
    return rows


def _costs(plans: Sequence[Plan]) -> list[Row]:
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
