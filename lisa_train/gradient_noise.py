"""Gradient noise: how much the gradient varies between the micro-batches of a step."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from lisa_train.norms import changes
from lisa_train.processes import Processes
from lisa_train.tensor_table import TensorTable


class GradientNoise:
    """tr Σ of one micro-batch gradient, unbiased: (N²Σ‖Gᵢ‖² − N‖ΣGᵢ‖²)/(N−1).

    Gᵢ is what micro-batch i brings into the gradient of the step, 1/N of its own gradient. With
    several processes the micro-batches are those of all of them: n of each of W make N = nW, and
    already one each will do. DDP puts the average into the place of what a process brought as
    soon as the last micro-batch is done, so that there each gradient is looked at on arrival.

    Parameters
    ----------
    table
        The tensors to measure.
    processes
        The processes that train them.
    due
        Whether the step in progress is to be measured.
    """

    def __init__(self, table: TensorTable, processes: Processes, due: Callable[[], bool]) -> None:
        self._table = table
        self._count = processes.count
        self._due = due
        self._before: dict[int, torch.Tensor] = {}
        self._arrived: dict[int, torch.Tensor] = {}
        self._batches: list[tuple[np.ndarray, torch.Tensor]] = []
        self._handles: list[Any] = []
        if self._count > 1:
            self._handles = [self._listen(i, p) for i, p in table.tensors]

    def micro_batch(self) -> None:
        """Take note of a micro-batch that is done, and of the gradients as they are now."""
        self._add()
        self._before = {i: p.grad.detach().clone() for i, p in self._with_gradient()}

    def variance(
        self, numbers: np.ndarray, square: torch.Tensor, scale: Any
    ) -> torch.Tensor | None:
        """Return tr Σ of the tensors, or None if a step of one micro-batch cannot tell.

        Parameters
        ----------
        numbers, square
            The tensors, and ‖g‖² of the gradient of the step.
        scale
            Factor on the gradients that `square` is free of (fp16 loss scale).
        """
        self._add()
        n = len(self._batches) * self._count
        parts = [self._aligned(numbers, *batch) for batch in self._batches]
        if n < 2 or any(part is None for part in parts):
            return None
        # The processes' values are averaged later: W times this one's part of Σ‖Gᵢ‖², in which
        # what it brought counts 1/W.
        total = torch.stack(parts).sum(0) / scale**2 / self._count  # type: ignore[arg-type]
        return (n * n * total - n * square) / (n - 1)

    def forget(self) -> None:
        """Let go of everything that belongs to the step."""
        self._before, self._arrived, self._batches = {}, {}, []

    def close(self) -> None:
        """Look at gradients no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _listen(self, number: int, parameter: nn.Parameter) -> Any:
        flag = parameter.requires_grad
        parameter.requires_grad_(True)  # torch takes hooks of such tensors only
        handle = parameter.register_post_accumulate_grad_hook(
            lambda tensor: self._arrive(number, tensor)
        )
        parameter.requires_grad_(flag)
        return handle

    def _arrive(self, number: int, tensor: torch.Tensor) -> None:
        if tensor.grad is not None and self._due():
            self._arrived[number] = self._increments([(number, tensor)])[0]

    def _add(self) -> None:
        """End a micro-batch."""
        if self._count == 1:
            active = self._with_gradient()
            numbers = np.array([i for i, _ in active], dtype=np.int64)
            self._batches.append((numbers, self._increments(active)))
            return
        order = sorted(self._arrived)
        values = [self._arrived[i] for i in order]
        joined = torch.stack(values) if values else torch.zeros(0, dtype=torch.float64)
        self._batches.append((np.array(order, dtype=np.int64), joined))
        self._arrived = {}

    def _aligned(
        self, numbers: np.ndarray, found: np.ndarray, values: torch.Tensor
    ) -> torch.Tensor | None:
        """Return one micro-batch's values of the tensors `numbers`, None if they are not there.

        What a process' micro-batch did not reach got nothing from it, and others may have
        reached it: all processes must come to the same tensors.
        """
        if np.array_equal(numbers, found):
            return values
        if self._count == 1:
            return None
        place = {int(i): n for n, i in enumerate(found)}
        zero = torch.zeros((), dtype=values.dtype, device=values.device)
        return torch.stack([values[place[i]] if i in place else zero for i in numbers.tolist()])

    def _increments(self, tensors: list[tuple[int, Any]]) -> torch.Tensor:
        """‖what was added to the gradient since the last micro-batch‖²."""
        gradients = [p.grad.detach() for _, p in tensors]
        before = [
            self._before.get(i, torch.zeros((), device=g.device).expand_as(g))
            for (i, _), g in zip(tensors, gradients, strict=True)
        ]
        return changes(before, gradients)[0]

    def _with_gradient(self) -> list[tuple[int, Any]]:
        return [(i, p) for i, p in self._table.tensors if p.grad is not None and p.requires_grad]
