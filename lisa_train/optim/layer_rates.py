"""Learning rates by layer: the groups of an optimizer split by a file of multipliers."""

from pathlib import Path
from typing import Any

from torch import nn

from lisa_analysis.contract.errors import ConfigError
from lisa_analysis.contract.layers import same_layers
from lisa_analysis.contract.multipliers_file import read_multipliers
from lisa_train.model.layer_map import LayerMap
from lisa_train.optim.frozen_state import optimizers_of


def set_layer_rates(
    optimizer: Any, model: nn.Module, layer_map: LayerMap, path: str | Path
) -> None:
    """Multiply the learning rate of every tensor by that of its layer or group.

    Every parameter group becomes one group for each multiplier among its tensors, the same in
    everything else; tensors of multiplier 1 come first, so that what is logged as the learning
    rate is the plain one wherever there is one. Call it before a scheduler is made, and before
    the first step.

    Parameters
    ----------
    optimizer
        The optimizer, a list of several, or a wrapper of either.
    model, layer_map
        The model and its layers.
    path
        File of `lisa-analyze --export lr:FILE`, or one of groups alone.

    Raises
    ------
    ConfigError
        For a broken file, one of another model or for a group that the model does not have, or an
        optimizer without a learning rate of its own or that has begun.
    """
    rates = read_multipliers(path)
    if (rates.layers and len(rates.layers) != len(layer_map)) or (
        rates.layer_names and not same_layers(rates.layer_names, layer_map.names)
    ):
        raise ConfigError(
            f"{path} was made for {len(rates.layers)} layers "
            f"({', '.join(rates.layer_names[:1]) or 'without names'} …), this model has "
            f"{len(layer_map)} ({layer_map.names[0]} …); make it from a run of this model."
        )
    factors, groups = {}, set()
    for name, parameter in model.named_parameters():
        layer, group = layer_map.layer_of(name), layer_map.group_of(name)
        factors[parameter] = rates.factor(layer, group)
        groups |= {group} if layer is None else set()
    for group in (g for g, factor in rates.groups.items() if factor != 1 and g not in groups):
        tied = ": its head is tied to the embeddings, as 'embed'" if group == "head" else ""
        raise ConfigError(
            f"{path} has the multiplier {rates.groups[group]:g} for {group!r}, and this model has "
            f"no tensors of that group{tied}; leave it out, or give it to another."
        )
    for held in optimizers_of(optimizer):
        if held.state or any("initial_lr" in group for group in held.param_groups):
            raise ConfigError(
                f"lr_multipliers is {str(path)!r}, but {type(held).__name__} has made steps or has "
                "a scheduler already, whose rates would not be multiplied; set them before."
            )
        held.param_groups[:] = [
            part for group in held.param_groups for part in _split(group, factors, held)
        ]


def _split(group: dict[str, Any], factors: dict[Any, float], held: Any) -> list[dict[str, Any]]:
    if not isinstance(group.get("lr"), int | float):
        raise ConfigError(
            f"lr_multipliers need a learning rate that is a number, and {type(held).__name__} has "
            f"lr = {group.get('lr')!r}; choose another optimizer."
        )
    parts: dict[float, list[Any]] = {}
    for parameter in group["params"]:
        parts.setdefault(factors.get(parameter, 1.0), []).append(parameter)
    order = sorted(parts, key=lambda factor: (factor != 1.0, factor))
    return [{**group, "params": parts[m], "lr": group["lr"] * m} for m in order] or [group]
