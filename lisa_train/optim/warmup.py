"""Warm-up of a layer after its activation: its first updates are shortened, by any optimizer."""

from collections.abc import Iterable

import torch


class Warmup:
    """Scales the updates of an optimizer step tensor by tensor.

    The j-th update of a tensor after its activation is multiplied by j/(n+1) for j = 1 … n. The
    whole update is scaled, weight decay included; the optimizer's state is untouched.

    Parameters
    ----------
    steps
        n; 0 never scales.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._before: list[tuple[torch.Tensor, torch.Tensor, float]] = []

    def before_step(self, tensors: Iterable[tuple[torch.Tensor, int, float]]) -> None:
        """Note the weights of the tensors whose updates are to be scaled.

        Parameters
        ----------
        tensors
            A tensor, the number of steps since its activation, and a factor of its own that it
            keeps after the warm-up.
        """
        scaled = (
            (tensor, own * min(1.0, (age + 1) / (self._steps + 1) if age < self._steps else 1.0))
            for tensor, age, own in tensors
        )
        self._before = [(t, t.detach().clone(), factor) for t, factor in scaled if factor != 1.0]

    @torch.no_grad()
    def after_step(self) -> None:
        """Scale the updates of the noted tensors."""
        for tensor, before, factor in self._before:
            tensor.copy_(torch.lerp(before, tensor, factor))
        self._before = []
