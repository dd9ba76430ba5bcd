"""Where a tensor's weights are exact: fp32 copies that a method keeps beside bf16 parameters.

A method puts them here, a measurement asks here; neither knows the other.
"""

import torch
from torch.utils.weak import WeakIdKeyDictionary

_COPIES: WeakIdKeyDictionary = WeakIdKeyDictionary()


def keep_copy(parameter: torch.Tensor, copy: torch.Tensor) -> None:
    """Say that the optimizer moves `copy`, of which `parameter` is a rounding."""
    _COPIES[parameter] = copy


def drop_copy(parameter: torch.Tensor) -> None:
    """Say that the parameter is all there is."""
    _COPIES.pop(parameter, None)


def exact(parameter: torch.Tensor) -> torch.Tensor:
    """Return what the optimizer moves: the fp32 copy where there is one, else the tensor itself."""
    found: torch.Tensor = _COPIES.get(parameter, parameter)
    return found
