"""Tokens of a batch."""

from collections.abc import Mapping
from typing import Any

import torch


def count_tokens(inputs: Any) -> Any:
    """Count the tokens of a batch, padding left out, without waiting for the device."""
    if not isinstance(inputs, Mapping):
        return None
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    if torch.is_tensor(mask) and mask.ndim == 2:
        return mask.sum()
    return ids.numel() if torch.is_tensor(ids) else None
