"""Wraps on the methods of one object, for what a callback cannot reach; and a batch's tokens."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch


class Wraps:
    """Functions put around methods of single objects; their classes stay as they are."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def put(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Let `wrapper(original, *args, **kwargs)` stand for `owner.name`."""
        original = getattr(owner, name)
        had_own = name in vars(owner)
        setattr(owner, name, functools.wraps(original)(functools.partial(wrapper, original)))

        def undo() -> None:
            if had_own:
                setattr(owner, name, original)
            else:
                delattr(owner, name)

        self._undo.append(undo)

    def take_off(self) -> None:
        """Restore everything, the last first; safe to call twice."""
        while self._undo:
            self._undo.pop()()


def count_tokens(inputs: Any) -> Any:
    """Count the tokens of a batch, padding left out, without waiting for the device."""
    if not isinstance(inputs, Mapping):
        return None
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    if torch.is_tensor(mask) and mask.ndim == 2:
        return mask.sum()
    return ids.numel() if torch.is_tensor(ids) else None
