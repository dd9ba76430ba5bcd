"""Which tensors of a bitsandbytes optimizer hold 8-bit state, by group instead of by module."""

from collections.abc import Collection
from typing import Any

from torch import nn

from lisa_analysis.contract.errors import ConfigError
from lisa_train.model.layer_map import LayerMap, Unit
from lisa_train.optim.frozen_state import optimizers_of
from lisa_train.private_names import check


def set_eight_bit_states(
    optimizer: Any, model: nn.Module, layer_map: LayerMap, groups: Collection[str]
) -> None:
    """Give the tensors of `groups` 8-bit optimizer state, and all others 32-bit state.

    Per element, AdamW then holds 2.03 bytes (two bytes, and two fp32 scales for every 256
    elements) instead of 8. bitsandbytes leaves tensors below `min_8bit_size` elements (4,096) in
    32 bits. Without this, transformers' Trainer keeps all of an `nn.Embedding` in 32 bits.

    Call it before the first step.

    Parameters
    ----------
    optimizer
        A bitsandbytes optimizer; wrappers are looked through.
    model, layer_map
        The model and its layers.
    groups
        Any of ``layers``, ``embed``, ``head``, ``norm`` and ``other``. A matrix that is embedding
        and head at once belongs to both.

    Raises
    ------
    ConfigError
        For an optimizer of another package.
    """
    several = optimizers_of(optimizer)
    if len(several) != 1:
        raise ConfigError(
            f"eight_bit_states is {list(groups)} but there are {len(several)} optimizers (of "
            f"{', '.join(type(o).__name__ for o in several)}); set the bits in the one of "
            "bitsandbytes yourself, or train with that alone."
        )
    optimizer = several[0]
    check("eight bit")
    try:
        from bitsandbytes.optim import GlobalOptimManager
        from bitsandbytes.optim.optimizer import Optimizer8bit
    except ImportError:
        raise ConfigError(
            f"eight_bit_states is {list(groups)} but bitsandbytes is not installed; install it "
            "(pip install bitsandbytes)."
        ) from None
    if not isinstance(optimizer, Optimizer8bit):
        raise ConfigError(
            f"eight_bit_states is {list(groups)} but the optimizer is {type(optimizer).__name__}: "
            "only those of bitsandbytes hold 8-bit state by tensor; set optim to adamw_bnb_8bit "
            "or paged_adamw_8bit."
        )
    # A manager of its own: the one that bitsandbytes shares between all optimizers of a process
    # would hand these settings on to the next one, by position.
    manager = GlobalOptimManager.__new__(GlobalOptimManager)
    manager.initialize()
    small = eight_bit_parameters(model, layer_map, groups)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            manager.override_config(parameter, "optim_bits", 8 if parameter in small else 32)
    optimizer.mng = manager
    # Trainer leaves its embeddings there, to be held in 32 bits; they would stay for ever.
    modules = set(model.modules())
    shared = GlobalOptimManager.get_instance()
    shared.module_weight_config_triple = [
        entry for entry in shared.module_weight_config_triple if entry[0] not in modules
    ]


def eight_bit_parameters(
    model: nn.Module, layer_map: LayerMap, groups: Collection[str]
) -> set[nn.Parameter]:
    """Return the parameters whose state has 8 bits; `groups` as in `set_eight_bit_states`."""
    units = layer_map.units(model)
    chosen: list[Unit] = [group for group in groups if group != "layers"]
    if "layers" in groups:
        chosen += range(len(layer_map))
    return {parameter for unit in chosen for parameter in units[unit]}
