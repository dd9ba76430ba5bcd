"""Which towers of a model read images or sounds beside the layers that are trained by depth."""

import re

from torch import nn

from lisa_analysis.contract.layers import canonical_name
from lisa_train.model.layer_map import LayerMap
from lisa_train.model.module_tree import below, resting_tower, stacks, unwrap

# A module that is no transformers model says by its name what it reads.
_SENSES = re.compile(r"vision|visual|image|video|audio|speech|sound", re.IGNORECASE)


def sense_towers(model: nn.Module, layer_map: LayerMap) -> tuple[str, ...]:
    """Canonical paths of the towers of images or sounds whose layers are not those of `layer_map`.

    A tower holds a stack of layers outside the chosen ones, and reads no text: by transformers'
    `input_modalities`, or by its name. What joins it to the language model (a projection, a
    Q-Former, which reads text too) is no part of it. The encoder of an encoder-decoder is none.

    Parameters
    ----------
    model
        The model.
    layer_map
        Its layers.
    """
    rotating = list(dict.fromkeys(layer_map.stacks))
    every = [stack.path for stack in stacks(model)] if layer_map.groups["other"] else []
    resting = [path for path in every if not any(below(r, path) for r in rotating)]
    pair = getattr(getattr(unwrap(model), "config", None), "is_encoder_decoder", False)
    if not resting or (pair and len(every) == 2):
        return ()
    modules = {canonical_name(name): module for name, module in model.named_modules()}
    found = dict.fromkeys(_tower(path, rotating, modules) for path in resting)
    return tuple(path for path in found if path)


def _tower(path: str, rotating: list[str], modules: dict[str, nn.Module]) -> str:
    """Highest module above a stack that reads images or sounds alone; empty where none does."""
    parts = path.split(".")
    highest = resting_tower(path, rotating).count(".") + 1
    for depth in range(highest, len(parts) + 1):
        place = ".".join(parts[:depth])
        reads = getattr(modules.get(place), "input_modalities", None)
        if reads is not None:
            if "text" not in ((reads,) if isinstance(reads, str) else tuple(reads)):
                return place
        elif _SENSES.search(parts[depth - 1]):
            return place
    return ""
