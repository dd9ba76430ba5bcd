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
            arms, scores = selected(plan, kind), selected(plan, kind, scores_of)
            if not arms:
                continue  # the weights half is asked of the whole matrix alone
            others = {"all": plan.arms[everything]}
            if kind == "lora":
                others = {"all, lower rank": plan.arms["lora-all"], **others}
            arms |= {way: losses_of(plan, arm) for way, arm in others.items()}
            scores |= {way: scores_of(plan, arm) for way, arm in others.items()}
            for way, losses in arms.items():
                row = {"environment": plan.environment.name, "trained": kind, "layers": way}
                row |= _against(losses, arms["random"], "random")
                row |= _score(scores[way], scores["random"], "random")
                shared = set(losses) & set(arms["random"]) & set(arms["all"])
                gain = normalised(losses, arms["random"], arms["all"])
                row["of all layers' gain (seeds)"] = (
                    f"{np.mean(gain):.0%} ({len(shared)})" if len(gain) else ""
                )
                row["primary"] = way == "probe" and kind == "lora"
                row["same"] = next((w for w in arms if _same(losses, arms[w])), way)
                rows.append(row)
    return rows


def _same(losses: Losses, other: Losses) -> bool:
    """Whether two arms are the same runs in every seed that both have."""
    shared = set(losses) & set(other)
    return bool(shared) and all(losses[seed] == other[seed] for seed in shared)


def _sampling(plans: Sequence[Plan]) -> list[Row]:
    rows = []
    for plan in plans:
        uniform, scores = (read(plan, plan.arms["uniform"]) for read in (losses_of, scores_of))
        best = plan.best_learned()
        named = {n: plan.arms[n] for n in SHOWN if n in plan.arms}
        for name, arm in named.items():
            losses = losses_of(plan, arm)
            if name != "uniform" and not losses and name.endswith("-placebo"):
                continue  # of an arm that is not the best: not in the design
            row = {"environment": plan.environment.name, "arm": name, "name": name}
            row |= _against(losses, uniform, "the other")
            row |= _score(scores_of(plan, arm), scores, "the other")
            same = sum(losses[s] == uniform[s] for s in set(losses) & set(uniform))
            if same and name != "uniform":
                row["arm"] = f"{name} ({same} of {len(losses)} seeds are uniform)"
            rows.append({**row, "primary": name == best})
            placebo = f"{name}-placebo"
            if placebo in named and (given := losses_of(plan, named[placebo])):
                row = {"environment": plan.environment.name, "arm": f"{name} less its placebo"}
                row |= _against(losses, given, "the other")
                own, beside = (scores_of(plan, each) for each in (arm, named[placebo]))
                row |= _score(own, beside, "the other")
                rows.append({**row, "primary": False})
    return rows


def anchors(plans: Sequence[Plan]) -> list[Row]:
    """What LISA is compared with, and `level` beside full training, which it is a kind of."""
    rows = []
    for plan in plans:
        uniform, full = (losses_of(plan, plan.arms[name]) for name in ("uniform", "full"))
        scores = scores_of(plan, plan.arms["uniform"])
        for name in (n for n in ANCHORS if n in plan.arms):
            arm = plan.arms[name]
            losses = losses_of(plan, arm)
            row = {"environment": plan.environment.name, "arm": name}
            row |= _against(losses, uniform, "uniform")
            del row["apart"]
            row |= _score(scores_of(plan, arm), scores, "uniform")
            apart = difference(losses, full)
            row["less full (95 %)"] = "" if name == "full" else apart or MISSING
            rows.append(row)
        cells = {seed: plan.source("start", seed) for seed in plan.seeds}
        found = {seed: plan.loss(cell.name) for seed, cell in cells.items()}
        start = [loss for loss in found.values() if loss is not None]
        rows.append({
            **dict.fromkeys(rows[-1], ""), "environment": plan.environment.name,
            "arm": "before the first step", "seeds": len(start),
            "loss": f"{np.mean(start):.4f}" if start else MISSING,
        })  # fmt: skip
    return rows


def by_part(plans: Sequence[Plan]) -> list[Row]:
    """What was explored: LISA whose embedding rests, or whose head rests or has its own rate."""
    rows = []
    for plan in plans:
        explored = plan.sampling.by_part
        for name, arm in explored.items():
            losses = losses_of(plan, arm)
            row = {"environment": plan.environment.name, "arm": name}
            row |= _against(losses, losses_of(plan, plan.arms["uniform"]), "uniform")
            del row["apart"]
            uniform = explored.get("uniform-parts", explored["uniform-rests"])
            beside = {"full": plan.arms["full"], "uniform-parts, else -rests": uniform}
            for against, other in beside.items():
                apart = difference(losses, losses_of(plan, other))
                row[f"less {against} (95 %)"] = "" if arm == other else apart or MISSING
            rows.append(row)
    return rows


def _score(scores: Losses, other: Losses, name: str) -> dict[str, object]:
    """The task's own score, and the difference from another arm's; empty where it has none."""
    apart = None if scores == other else difference(scores, other)
    return {
        "accuracy or WER": f"{np.mean(list(scores.values())):.3f}" if scores else "",
        f"accuracy or WER, less {name} (95 %)": "" if apart is None else f"{apart}",
    }


def _corrected(rows: list[Row]) -> list[Row]:
    """Put p of every contrast into its row; of the secondary ones, by Holm over the question.

    Arms that are the same runs are one contrast, the first one's.
    """
    for row in rows:
        if (same := row.get("same", row.get("layers"))) != row.get("layers"):
            row |= {"p, Holm": f"the runs of `{same}`", "told": False, "again": True}
    compared = [row for row in rows if row["apart"] is not None and "again" not in row]
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
    hidden = {"apart", "primary", "told", "name", "same", "again"}
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
