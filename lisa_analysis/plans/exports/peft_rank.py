"""`peft-rank`: LoRA ranks by layer under a budget of trained parameters."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.plans.budget import whole_shares
from lisa_analysis.plans.exports.adapters import beside, check_alpha, matched, targets
from lisa_analysis.plans.exports.plan import Plan
from lisa_analysis.plans.exports.registry import Content, exporter


@exporter(
    "peft-rank", "LoraConfig of PEFT: a rank for every layer, under a budget of parameters",
    provenance="beside",
)  # fmt: skip
def make_peft_rank(
    plan: Plan,
    *,
    r: int | None = None,
    budget: int | None = None,
    alpha_per_rank: float = 2.0,
    target_modules: str | Sequence[str] | None = None,
) -> Content:
    """Share out ranks over layers.

    Parameters
    ----------
    plan
        The profile.
    r
        Mean rank: the budget is what this rank in every layer would cost; 16 without a budget.
    budget
        Trained parameters instead; needs the run, which says how large the modules are.
    alpha_per_rank
        lora_alpha over r, the same in every layer, so that only the rank differs.
    target_modules
        Last parts of module names; None takes every matrix of attention and feed-forward parts.
    """
    for name, value in (("r", r), ("budget", budget)):
        counted = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if value is not None and not counted:
            raise LisaError(f"{name} is {value!r}: expected a whole number of at least 1.")
    if r is not None and budget is not None:
        raise LisaError("r and budget say the same in two ways: give one of them.")
    check_alpha("alpha_per_rank", alpha_per_rank)
    leaves = plan.modules_of(target_modules)
    multiples = plan.multiples().pi
    chosen = multiples > 0
    costs, most = _costs(plan, leaves)
    if budget is None:
        budget = int((16 if r is None else r) * costs.sum())
    elif plan.model is None:
        raise LisaError("a budget of parameters needs the sizes of the modules: give run=.")
    ranks = np.zeros(len(multiples), np.int64)
    ranks[chosen] = whole_shares(multiples[chosen], costs[chosen], budget, most=most)
    usual = int(np.bincount(ranks[chosen]).argmax())
    values: dict[str, Any] = {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": _whole(alpha_per_rank * usual),
        "rank_pattern": _pattern(plan, ranks, usual, 1.0),
        "alpha_pattern": _pattern(plan, ranks, usual, alpha_per_rank),
        **targets(plan, leaves, chosen),
    }
    facts: dict[str, Any] = {"ranks": ranks}
    notes = [f"Ranks from {ranks[chosen].min()} to {ranks[chosen].max()}."]
    if ranks.max() == most:
        notes.append(f"No rank exceeds {most:g}, the shorter side of the smallest module.")
    if plan.model is None:
        notes.append(f"The mean rank is {ranks.mean():.4g} of layers taken to be of one size.")
    else:
        trained = sum(
            int(ranks[module.layer]) * module.per_rank for module in matched(plan.model, values)
        )
        facts["trained_parameters"] = trained
        notes.append(f"{trained:,} trained parameters of a budget of {budget:,}.")
        if plan.model.fused:
            notes.append(
                "Experts in one block are no modules and get no adapter (PEFT's target_parameters "
                "reaches them)."
            )
    whole, words = beside(plan)
    return Content(values | whole, (*notes, *words), multiples, facts)


def _costs(plan: Plan, leaves: Sequence[str]) -> tuple[np.ndarray, float]:
    """Parameters of rank 1 in every layer, and the largest rank that all modules can have."""
    costs = np.zeros(len(plan.layers))
    if plan.model is None:
        return np.ones(len(plan.layers)), float("inf")
    smallest = float("inf")
    for module in plan.model.inside:
        if module.leaf in leaves:
            costs[module.layer] += module.per_rank
            smallest = min(smallest, *module.shape)
    if not costs.all():
        bare = plan.layers[int(np.argmin(costs))].name
        raise LisaError(
            f"layer {bare} has none of the target_modules {', '.join(leaves)}: name some that "
            "every layer has."
        )
    return costs, smallest


def _pattern(plan: Plan, ranks: np.ndarray, usual: int, factor: float) -> Mapping[str, Any]:
    """Regular expressions on the end of module names, one for every rank that is not the usual."""
    found = {}
    for rank in sorted(set(ranks.tolist()) - {0, usual}, reverse=True):
        for stack in plan.stacks:
            of_rank = [
                str(layer.index)
                for layer, own in zip(plan.layers, ranks, strict=True)
                if own == rank and layer.stack == stack
            ]
            if of_rank:
                key = rf"{re.escape(stack)}\.({'|'.join(of_rank)})\..*"
                found[key] = _whole(factor * rank)
    return found


def _whole(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)
