"""bf16 gradients of several micro-batches, added up as fp32 would add them."""

from typing import Any

import torch

from lisa_train.model.sharding import is_sharded
from lisa_train.optim.rounding import add_exactly


class GradientSums:
    """Keeps, where a second gradient is added to a first, the digits that bf16 has no room for.

    `.grad` is at any time the bf16 rounding of the fp32 sum, made once instead of once per
    micro-batch, and whoever clips, averages or reads it finds an ordinary gradient. The other 16
    bits of the sum, 2 bytes an element, exist from the second micro-batch of a step to the step.
    Split tensors are added up by FSDP2, outside autograd, and not here.
    """

    def __init__(self) -> None:
        self._handles: dict[torch.Tensor, list[Any]] = {}
        self._rest: dict[torch.Tensor, torch.Tensor] = {}
        self._sums: dict[torch.Tensor, torch.Tensor] = {}

    def watch(self, parameter: torch.Tensor) -> None:
        """Begin with a bf16 tensor."""
        if parameter in self._handles or is_sharded(parameter):
            return
        flag = parameter.requires_grad
        parameter.requires_grad_(True)  # torch takes hooks of such tensors only
        self._handles[parameter] = [
            parameter.register_hook(lambda gradient: self._arriving(parameter, gradient)),
            parameter.register_post_accumulate_grad_hook(self._arrived),
        ]
        parameter.requires_grad_(flag)

    def leave(self, parameter: torch.Tensor) -> None:
        """End it."""
        for handle in self._handles.pop(parameter, ()):
            handle.remove()
        self.stepped(parameter)

    def stepped(self, parameter: torch.Tensor) -> None:
        """Let go of a sum that has been used."""
        self._rest.pop(parameter, None)
        self._sums.pop(parameter, None)

    def bytes(self) -> int:
        """Bytes that are held now."""
        return sum(
            t.numel() * t.element_size() for t in (*self._rest.values(), *self._sums.values())
        )

    def _arriving(self, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add a gradient exactly, before autograd adds it in bf16."""
        held = parameter.grad
        if held is None or held.dtype != torch.bfloat16 or gradient.is_sparse or held.is_sparse:
            return
        rest = self._rest.get(parameter)
        if rest is None:
            rest = torch.zeros(held.shape, dtype=torch.int16, device=held.device)
            self._rest[parameter] = rest
        self._sums[parameter] = add_exactly(held, rest, gradient)

    def _arrived(self, parameter: torch.Tensor) -> None:
        """Put the rounding of the sum where autograd has added in bf16."""
        total = self._sums.pop(parameter, None)
        if total is not None and parameter.grad is not None:
            parameter.grad.detach().copy_(total)
