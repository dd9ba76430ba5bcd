"""`peft-layers`: LoRA in the layers that matter, and in no other."""

from collections.abc import Sequence

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.plans.exports.adapters import beside, check_alpha, matched, targets
from lisa_analysis.plans.exports.plan import Plan, joined
from lisa_analysis.plans.exports.registry import Content, exporter


@exporter(
    "peft-layers", "LoraConfig of PEFT: adapters in the layers that matter alone",
    provenance="beside",
)  # fmt: skip
def make_peft_layers(
    plan: Plan,
    *,
    layers: int | None = None,
    r: int = 16,
    lora_alpha: int | None = None,
    target_modules: str | Sequence[str] | None = None,
) -> Content:
    """Name the modules of the chosen layers.

    Parameters
    ----------
    plan
        The profile.
    layers
        How many of the best; None takes those that stand above the mean.
    r, lora_alpha
        Rank, and its scale (None: twice the rank).
    target_modules
        Last parts of module names; None takes every matrix of attention and feed-forward parts.
    """
    if not (isinstance(r, int) and not isinstance(r, bool) and r >= 1):
        raise LisaError(f"r is {r!r}: expected a whole number of at least 1.")
    if lora_alpha is not None:
        check_alpha("lora_alpha", lora_alpha)
    chosen = plan.chosen(layers)
    leaves = plan.modules_of(target_modules)
    values = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": 2 * r if lora_alpha is None else lora_alpha,
        **targets(plan, leaves, chosen),
    }
    whole, words = beside(plan)
    facts = {}
    notes = [f"Adapters in {chosen.sum()} of {len(chosen)} layers: {joined(plan.names(chosen))}."]
    notes += plan.strength_words
    adapted = [] if plan.model is None else matched(plan.model, values)
    if adapted and all(module.shape for module in adapted):
        facts["trained_parameters"] = sum(r * module.per_rank for module in adapted)
        notes.append(f"{facts['trained_parameters']:,} trained parameters.")
    notes += words
    return Content(values | whole, tuple(notes), chosen.astype(int), facts)
