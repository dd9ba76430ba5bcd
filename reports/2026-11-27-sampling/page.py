"""Tables and figures of the page, from the kept logs alone."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from arms import LEARNED, TUNING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from differences import Losses, difference, holm, normalised
from figures import draw_sampling, draw_selection
from outcomes import losses_of, mean_of, of_length, scores_of, selected
from pages import markdown, write_tables
from plan import LONGER, Plan
from prediction import predicts, validity_and_gain
from seconds import read_off, steps_left
from together import over_environments

import lisa_analysis as la

Row = dict[str, object]
MISSING = "not yet"
TOLD = 0.05  # p below which a figure fills a mark
SHOWN = (
    "uniform", "iid", "reset",
    *(name for each in LEARNED for name in (each, f"{each}-placebo")), "reversed",
)  # fmt: skip
ANCHORS = ("full", "level", "lora-everything", "head")  # no answer to question B: not corrected


def write(plans: Sequence[Plan], folder: Path) -> None:
    """Write tables and figures of the page."""
    selection, sampling = contrasts(plans)
    draw_selection(selection, folder / "selection.png")
    draw_sampling(sampling, folder / "sampling.png")
    write_tables(folder / "README.md", tables(plans, selection, sampling))


def contrasts(plans: Sequence[Plan]) -> tuple[list[Row], list[Row]]:
    """Return what tables and figures of questions A and B show, a row an arm."""
    settled = [plan for plan in plans if plan.settled()]
    return _corrected(_selection(settled)), _corrected(_sampling(settled))


def tables(
    plans: Sequence[Plan], selection: Sequence[Row], sampling: Sequence[Row]
) -> dict[str, str]:
    """Return every table of the page by its mark."""
    settled = [plan for plan in plans if plan.settled()]
    found = {
        "state": _state(plans),
        "rates": _rates(plans),
        "learners": _learners(plans),
        "choice": _choice(settled),
        "selection": _shown(selection),
        "sampling": _shown(sampling),
        "anchors": _anchors(settled),
        "parts": _by_part(settled),
        "seconds": _seconds(settled),
        "prediction": _prediction(settled),
        "longer": _longer(settled),
        "together": over_environments(settled),
        "costs": _costs(plans),
    }
    return {name: markdown(rows) if rows else f"{MISSING}." for name, rows in found.items()}


def _state(plans: Sequence[Plan]) -> list[Row]:
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
            row[name] = f"{np.mean(finished):.4f}" if known else MISSING if cells else ""
        rows.append({**row, "chosen": plan.best_learned() or MISSING})
    return rows


def _selection(plans: Sequence[Plan]) -> list[Row]:
    rows = []
    for plan in plans:
        for kind, everything in (("lora", "lora-everything"), ("weights", "weights-everything")):
            arms = selected(plan, kind)
            if not arms:
                continue  # the weights half is asked of the whole matrix alone
            whole = losses_of(plan, plan.arms[everything])
            others = {"all": whole}
            if kind == "lora":
                others = {"all, lower rank": losses_of(plan, plan.arms["lora-all"]), **others}
            for way, losses in {**arms, **others}.items():
                row = {"environment": plan.environment.name, "trained": kind, "layers": way}
                row |= _against(losses, arms["random"], "random")
                gain = normalised(losses, arms["random"], whole)
                row["of all layers' gain"] = f"{np.mean(gain):.0%}" if len(gain) else ""
                row["primary"] = way == "probe" and kind == "lora"
                rows.append(row)
    return rows


def _sampling(plans: Sequence[Plan]) -> list[Row]:
    rows = []
    for plan in plans:
        uniform = losses_of(plan, plan.arms["uniform"])
        best = plan.best_learned()
        named = {n: plan.arms[n] for n in SHOWN if n in plan.arms}
        for name, arm in named.items():
            losses = losses_of(plan, arm)
            if name != "uniform" and not losses and name.endswith("-placebo"):
                continue  # of an arm that is not the best: not in the design
            row = {"environment": plan.environment.name, "arm": name, "name": name}
            row |= _against(losses, uniform, "the other") | _score(plan, name)
            same = sum(losses[s] == uniform[s] for s in set(losses) & set(uniform))
            if same and name != "uniform":
                row["arm"] = f"{name} ({same} of {len(losses)} seeds are uniform)"
            rows.append({**row, "primary": name == best})
            placebo = f"{name}-placebo"
            if placebo in named and (given := losses_of(plan, named[placebo])):
                row = {"environment": plan.environment.name, "arm": f"{name} less its placebo"}
                row |= _against(losses, given, "the other") | {"accuracy or WER": ""}
                row["accuracy or WER, less uniform (95 %)"] = ""
                rows.append({**row, "primary": False})
    return rows


def _anchors(plans: Sequence[Plan]) -> list[Row]:
    """What LISA is compared with, and `level` beside full training, which it is a kind of."""
    rows = []
    for plan in plans:
        uniform, full = (losses_of(plan, plan.arms[name]) for name in ("uniform", "full"))
        for name in (n for n in ANCHORS if n in plan.arms):
            losses = losses_of(plan, plan.arms[name])
            row = {"environment": plan.environment.name, "arm": name}
            row |= _against(losses, uniform, "uniform")
            del row["apart"]
            row |= _score(plan, name)
            apart = difference(losses, full)
            row["less full (95 %)"] = "" if name == "full" else apart or MISSING
            rows.append(row)
    return rows


def _by_part(plans: Sequence[Plan]) -> list[Row]:
    """What was explored: LISA whose head has a rate of its own, or whose embedding rests."""
    rows = []
    for plan in plans:
        explored = plan.sampling.by_part
        for name, arm in explored.items():
            losses = losses_of(plan, arm)
            row = {"environment": plan.environment.name, "arm": name}
            row |= _against(losses, losses_of(plan, plan.arms["uniform"]), "uniform")
            del row["apart"]
            beside = {"full": plan.arms["full"], "uniform-parts": explored["uniform-parts"]}
            for against, other in beside.items():
                apart = difference(losses, losses_of(plan, other))
                row[f"less {against} (95 %)"] = "" if arm == other else apart or MISSING
            rows.append(row)
    return rows


def _score(plan: Plan, name: str) -> dict[str, object]:
    """The task's own score, and the difference from uniform draws."""
    _, own = scores_of(plan, plan.arms[name])
    _, uniform = scores_of(plan, plan.arms["uniform"])
    apart = None if name == "uniform" else difference(own, uniform)
    return {
        "accuracy or WER": f"{np.mean(list(own.values())):.3f}" if own else "",
        "accuracy or WER, less uniform (95 %)": "" if apart is None else f"{apart}",
    }


def _corrected(rows: list[Row]) -> list[Row]:
    """Put p of every contrast into its row; of the secondary ones, by Holm over the question."""
    compared = [row for row in rows if row["apart"] is not None]
    secondary = [row for row in compared if not row["primary"]]
    corrected = iter(holm([row["apart"].p for row in secondary]))  # type: ignore[attr-defined]
    for row in compared:
        p = row["apart"].p if row["primary"] else next(corrected)  # type: ignore[attr-defined]
        row["p, Holm"] = f"{p:.3f} (primary)" if row["primary"] else f"{p:.3f}"
        row["told"] = p < TOLD
    for row in rows:
        row.setdefault("p, Holm", "")
    return rows


def _shown(rows: Sequence[Row]) -> list[Row]:
    """Leave out what figures alone read."""
    hidden = {"apart", "primary", "told", "name"}
    return [{key: row[key] for key in row if key not in hidden} for row in rows]


def _against(losses: Losses, other: Losses, name: str) -> dict[str, object]:
    """Loss of an arm and the other's on the same seeds, and the difference."""
    both = sorted(set(losses) & set(other))
    itself = losses == other
    apart = None if itself else difference(losses, other)
    beside = f"{np.mean([other[s] for s in both]):.4f}" if both and not itself else ""
    return {
        "seeds": len(losses),
        "loss": f"{np.mean(list(losses.values())):.4f}" if losses else MISSING,
        "the other's, same seeds": beside,
        f"less {name} (95 %)": "" if itself else MISSING if apart is None else str(apart),
        "apart": apart,
    }


def _seconds(plans: Sequence[Plan]) -> list[Row]:
    """Question B after the time that uniform draws take; sources are paid from it."""
    rows = []
    for plan in plans:
        uniform = losses_of(plan, plan.arms["uniform"])
        anew = [arm.name for arm in plan.shorter_arms()]
        timed = [arm.name for arm in plan.timed_arms() if arm.name != "uniform"]
        for name in sorted(timed, key=(*SHOWN, *ANCHORS).index):
            arm = plan.arms[name]
            steps, found = steps_left(plan, arm), read_off(plan, arm)
            if name in anew:
                cells = {s: plan.shorter(arm, s) for s in plan.seeds}
                losses = {s: plan.loss(c.name) for s, c in cells.items() if c is not None}
                found = {s: loss for s, loss in losses.items() if loss is not None}
            apart = difference(found, uniform)
            rows.append({
                "environment": plan.environment.name, "arm": name,
                "steps left": MISSING if steps is None else f"{steps} of {plan.environment.steps}",
                "less uniform (95 %)": MISSING if apart is None else str(apart),
                "how": "run anew" if name in anew else "at most, read off its course",
            })  # fmt: skip
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
            "agreement with ablation, ρ": f"{told[0]:+.2f}",
            "less random, nats": f"p = {told[1]:.3f}, metrics as if independent",
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
