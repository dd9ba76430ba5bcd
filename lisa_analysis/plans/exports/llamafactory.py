"""`llamafactory`: what LLaMA-Factory can express of a choice of layers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.plans.exports.plan import Plan, joined
from lisa_analysis.plans.exports.registry import Content, exporter


@exporter("llamafactory", "LLaMA-Factory: freeze tuning or LoRA in the chosen layers",
          syntax="yaml")  # fmt: skip
def make_llamafactory(
    plan: Plan,
    *,
    layers: int | None = None,
    method: str = "auto",
    lora_rank: int | None = None,
    target_modules: str | Sequence[str] | None = None,
) -> Content:
    """Write freeze tuning where the chosen layers are the first or last ones, else LoRA targets.

    LLaMA-Factory's freeze tuning knows a number of first or of last layers and nothing between; its
    `lora_target` takes names of modules, so that any choice of layers can be written as LoRA.

    Parameters
    ----------
    plan
        The profile.
    layers
        How many of the best train; None takes those that stand above the mean.
    method
        ``freeze``, ``lora``, or ``auto``: LoRA where one of its options is given, else freeze
        where it can say it.
    lora_rank, target_modules
        Of LoRA; None takes 16, and every matrix of attention and feed-forward parts, and needs the
        run.
    """
    if method not in ("auto", "freeze", "lora"):
        raise LisaError(f"method is {method!r}: expected auto, freeze or lora.")
    of_lora = {"lora_rank": lora_rank, "target_modules": target_modules}
    given = [name for name, value in of_lora.items() if value is not None]
    if given and method == "freeze":
        raise LisaError(
            f"{' and '.join(given)} of LoRA cannot be had with method=freeze: use method=lora."
        )
    if lora_rank is not None and not (type(lora_rank) is int and lora_rank >= 1):
        raise LisaError(f"lora_rank is {lora_rank!r}: expected a whole number of at least 1.")
    chosen = plan.chosen(layers)
    number = _from_an_end(plan, chosen)
    names = joined(plan.names(chosen))
    said = f"{chosen.sum()} of {len(chosen)} layers train: {names}."
    if method == "freeze" and number is None:
        raise LisaError(
            "freeze tuning of LLaMA-Factory trains the first or the last layers of one stack, and "
            f"the chosen ones are {names}: use method=lora, or the export 'axolotl'."
        )
    values: dict[str, Any]
    if number is not None and method != "lora" and not given:
        values = {
            "finetuning_type": "freeze",
            "freeze_trainable_layers": number,
            "freeze_trainable_modules": "all",
        }
        return Content(values, (said, *plan.strength_words), chosen.astype(int))
    leaves = plan.modules_of(target_modules)
    if plan.model is None:
        raise LisaError(
            "the names of the modules in these layers are not known: give run= (the run directory "
            "of the profile)."
        )
    targets = [
        module.path
        for module in plan.model.inside
        if chosen[module.layer] and module.leaf in leaves
    ]
    values = {
        "finetuning_type": "lora",
        "lora_rank": 16 if lora_rank is None else lora_rank,
        "lora_target": ",".join(targets),
    }
    notes = (said, "LoRA on their modules, by name.", *plan.strength_words)
    return Content(values, notes, chosen.astype(int))


def _from_an_end(plan: Plan, chosen: NDArray[np.bool_]) -> int | None:
    """Return n for the last n layers, −n for the first n, None where they are neither."""
    if len(plan.stacks) > 1:
        return None
    count = int(chosen.sum())
    if chosen[len(chosen) - count :].all():
        return count
    return -count if chosen[:count].all() else None
