"""Arms of questions A and B against each other: a row an arm, for tables and figures."""

from collections.abc import Sequence

import numpy as np
from arms import LEARNED
from differences import Losses, difference, holm, normalised
from outcomes import losses_of, scores_of, selected
from plan import Plan

Row = dict[str, object]
MISSING = "not yet"
TOLD = 0.05  # p below which a figure fills a mark
SHOWN = (
    "uniform", "iid", "reset",
    *(name for each in LEARNED for name in (each, f"{each}-placebo")), "reversed",
)  # fmt: skip
ANCHORS = ("full", "level", "lora-everything", "head")  # no answer to question B: not corrected


def contrasts(plans: Sequence[Plan]) -> tuple[list[Row], list[Row]]:
    """Return what tables and figures of questions A and B show, a row an arm."""
    settled = [plan for plan in plans if plan.settled()]
    return _corrected(_selection(settled)), _corrected(_sampling(settled))


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


def anchors(plans: Sequence[Plan]) -> list[Row]:
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


def by_part(plans: Sequence[Plan]) -> list[Row]:
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


def shown(rows: Sequence[Row]) -> list[Row]:
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
