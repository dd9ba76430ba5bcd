"""Counts bytes of tensors while they live: what a training step holds, on any device.

Every storage that an operation returns counts from then until Python lets go of it. What kernels
allocate within themselves is not seen. Nothing here shares code with the package.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Allocations(TorchDispatchMode):
    """Live and peak bytes of the storages allocated while it is active.

    Parameters
    ----------
    known
        Tensors that were there before and do not count.
    width
        Tensors whose last dimension is at least this wide count as logits.

    Attributes
    ----------
    live, peak : int
        Bytes now, and at most.
    widest : int
        Bytes of the largest of the logits.
    """

    def __init__(self, known: Iterable[torch.Tensor] = (), width: int | None = None) -> None:
        super().__init__()
        self.live = self.peak = self.widest = 0
        self._width = width
        storages = [tensor.untyped_storage() for tensor in known]
        self._known = {storage._cdata: weakref.ref(storage) for storage in storages}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        return out

    def _see(self, tensor: torch.Tensor) -> None:
        if self._width is not None and tensor.ndim and tensor.shape[-1] >= self._width:
            self.widest = max(self.widest, tensor.numel() * tensor.element_size())
        storage = tensor.untyped_storage()
        known = self._known.get(storage._cdata)
        if known is not None and known() is storage:
            return
        size, key = storage.nbytes(), storage._cdata
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone(reference: Any) -> None:
            self.live -= size
            if self._known.get(key) is reference:
                del self._known[key]

        self._known[key] = weakref.ref(storage, gone)


def tensors_of(model: nn.Module) -> list[torch.Tensor]:
    """Weights and buffers of a model."""
    return [*model.parameters(), *model.buffers()]


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the different storages of the tensors."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients that are there now."""
    return bytes_of(p.grad for p in model.parameters() if p.grad is not None)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in an optimizer's state, shared ones (code books) once."""
    states = optimizer.state.values()
    return bytes_of(v for state in states for v in state.values() if torch.is_tensor(v))


def forward_bytes(
    model: nn.Module, forward: Callable[[], torch.Tensor]
) -> tuple[int, torch.Tensor]:
    """Bytes that stay allocated for the backward pass of a loss, and the loss."""
    with Allocations(tensors_of(model)) as seen:
        loss = forward()
    return seen.live - loss.untyped_storage().nbytes(), loss
