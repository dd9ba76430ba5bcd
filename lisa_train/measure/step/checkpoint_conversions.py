"""Which tensors of a checkpoint make up which parameter, by transformers' own rules of loading.

Since version 5 transformers renames, stacks, splits and transposes tensors while it loads them:
the experts of a mixture become one parameter, a prefix comes or goes. A model remembers the rules
that it was loaded by.
"""

from collections.abc import Callable, Collection, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Conversion:
    """How one parameter (or several, of one tensor that is split) comes out of a checkpoint.

    Attributes
    ----------
    target
        Name of the parameter, the first one if there are several.
    converter
        Transformers' `WeightConverter`, or None where the tensor is taken as it is.
    sources
        Keys in the checkpoint, in the order that the converter needs, each with the pattern of
        the converter that it matches.
    """

    target: str
    converter: Any = None
    sources: list[tuple[str, str | None]] = field(default_factory=list)

    def build(self, model: Any, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the parameters by name; `read` fetches a tensor of the checkpoint."""
        if self.converter is None:
            return {self.target: read(self.sources[0][0])}
        converter = deepcopy(self.converter)  # it holds the tensors until it has converted them
        for key, pattern in self.sources:
            converter.add_tensor(self.target, key, pattern, read(key))
        built = converter.convert(self.target, model=model, config=model.config)
        return {name: x[0] if isinstance(x, list) else x for name, x in built.items()}


def conversions(model: Any, keys: Iterable[str], names: Collection[str]) -> list[Conversion]:
    """Return how the parameters called `names` come out of a checkpoint with these keys.

    Parameters
    ----------
    model
        The bare model; one that is not of transformers has its parameters under their own names.
    keys
        Keys of the checkpoint.
    names
        The model's parameters, as they are called without adapters.

    Returns
    -------
    list of Conversion
        Parameters of which nothing is in the checkpoint have none.
    """
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = _rules(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {p: converter for converter in converters for p in converter.source_patterns}
    prefix = getattr(model, "base_model_prefix", None) or None
    known = dict.fromkeys(names, True)
    found: dict[str, Conversion] = {}
    for key in sorted(keys, key=dot_natural_key):  # as experts are numbered: 2 before 10
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = key, None
        if name in known:
            converter = by_pattern[pattern] if pattern is not None else None
            found.setdefault(name, Conversion(name, converter)).sources.append((key, pattern))
    return list(found.values())


def _rules(model: Any) -> list[Any]:
    """Rules that the model was loaded by, or those that transformers would load it by."""
    used = getattr(model, "_weight_conversions", None)
    if used is None and hasattr(model, "base_model_prefix"):
        from transformers.conversion_mapping import get_model_conversion_mapping

        used = get_model_conversion_mapping(model)
    return deepcopy(used or [])
