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

    def before_step(self, tensors: Iterable[tuple[torch.Tensor, int]]) -> None:
        """Note the weights of the tensors that have made fewer than n steps.

        Parameters
        ----------
        tensors
            Pairs of a tensor and the number of steps since its activation.
        """
        self._before = [
            (tensor, tensor.detach().clone(), (age + 1) / (self._steps + 1))
            for tensor, age in tensors
            if age < self._steps
        ]

    @torch.no_grad()
    def after_step(self) -> None:
        """Shorten the updates of the noted tensors."""
        for tensor, before, factor in self._before:
            tensor.copy_(torch.lerp(before, tensor, factor))
        self._before = []
