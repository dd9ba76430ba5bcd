"""Which modules PEFT takes for which setting, so that a file names exactly those meant."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.plans.exports.modules import ModelModules, Module
from lisa_analysis.plans.exports.plan import Plan, joined


def check_alpha(name: str, value: object) -> None:
    """`LisaError` unless a scale of adapters is a finite number above 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 0 < value < math.inf):  # type: ignore[operator]
        raise LisaError(f"{name} is {value!r}: expected a number above 0.")


def targets(plan: Plan, leaves: Sequence[str], chosen: NDArray[np.bool_]) -> dict[str, Any]:
    """Settings of `LoraConfig` that adapt these modules of the chosen layers and nothing else.

    Names alone where all layers are meant; names with `layers_to_transform` where one stack is
    meant in part; and a regular expression on whole names where the former would take a module
    too many (an encoder's layer of the same index, a tower beside the stack).
    """
    plain: dict[str, Any] = {"target_modules": list(leaves)}
    if not chosen.all():
        plain |= {
            "layers_to_transform": [
                layer.index for layer, take in zip(plan.layers, chosen, strict=True) if take
            ],
            "layers_pattern": plan.stacks[0].rsplit(".", 1)[-1],
        }
    exact = {"target_modules": _expression(plan, leaves, chosen)}
    if plan.model is None:
        return plain if chosen.all() or len(plan.stacks) == 1 else exact
    wanted = {
        module.path
        for module in plan.model.inside
        if chosen[module.layer] and module.leaf in leaves
    }
    for settings in (plain, exact):
        if set(taken(plan.model.paths, settings)) == wanted:
            return settings
    raise LisaError(
        f"the modules {', '.join(leaves)} of the chosen layers cannot be named apart from others: "
        "give other target_modules."
    )


def beside(plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """Settings of `LoraConfig` for what trains whole beside the adapters, and words for it.

    PEFT does so itself for a classifier only where it is told a `task_type`; without one the new
    head would stay as random as it began.
    """
    whole = list(plan.model.whole) if plan.model is not None else []
    if not whole:
        lost = plan.model is not None and plan.model.classifies
        return {}, [
            "The classifier's head is not known by its name: add it to modules_to_save, or it "
            "stays as it began."
        ] * lost
    verb = "trains" if len(whole) == 1 else "train"
    return {"modules_to_save": whole}, [f"{joined(whole)} {verb} whole beside them."]


def taken(paths: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    """Modules that PEFT (0.18 and later) adapts under these settings, by its documented rules.

    A text is a regular expression on the whole name. A name of a list is the module itself or the
    end of its name after a dot; with `layers_to_transform` the first number behind
    `layers_pattern` has to be one of them.
    """
    names = settings["target_modules"]
    if isinstance(names, str):
        return [path for path in paths if re.fullmatch(names, path)]
    ends = tuple(f".{name}" for name in names)
    found = [path for path in paths if path in names or path.endswith(ends)]
    if "layers_to_transform" not in settings:
        return found
    number = re.compile(rf"(?:^|.*?\.){settings['layers_pattern']}\.(\d+)\.")
    indices = set(settings["layers_to_transform"])
    return [p for p in found if (at := number.match(p)) and int(at[1]) in indices]


def matched(model: ModelModules, settings: Mapping[str, Any]) -> list[Module]:
    """Matrices within the layers that these settings adapt."""
    names = set(taken(model.paths, settings))
    return [module for module in model.inside if module.path in names]


def _expression(plan: Plan, leaves: Sequence[str], chosen: NDArray[np.bool_]) -> str:
    """Match whole names of these modules in the chosen layers."""
    parts = []
    for stack in plan.stacks:
        indices = [
            str(layer.index)
            for layer, take in zip(plan.layers, chosen, strict=True)
            if take and layer.stack == stack
        ]
        if indices:
            parts.append(rf"{re.escape(stack)}\.({'|'.join(indices)})")
    ends = "|".join(map(re.escape, leaves))
    return rf"({'|'.join(parts)})\.(.*\.)?({ends})"
