"""Gradients averaged over processes while a backward pass runs, each dropped when it is measured.

The processes must ask for the same collectives in the same order, however their passes differ: a
tensor that one of them does not reach must not hold up the others. So the order is settled
beforehand: group by group (a layer, or a tensor outside the layers), from the last one in the
model to the first. A process finishes a group when it has all of its gradients, or has gone on to
a later group, or its pass is over; where it has no gradient of a tensor it adds zeros. At no time
are there more gradients than those of a layer, as long as backward takes that direction.
"""

from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist

from lisa_train.measure.processes import Processes
from lisa_train.model.norms import squares
from lisa_train.model.tensor_table import TensorTable

# Elements that are averaged at a time, in fp32.
_CHUNK = 4_194_304


class Averaging:
    """Norms of averaged gradients of one pass, made by all processes together.

    Parameters
    ----------
    table
        The tensors of the model, for their layers.
    tensors
        The tensors to measure, by number: equal copies of them on every process.
    processes
        The processes.
    at_once
        Whether collectives may run inside the backward pass. In a sharded model FSDP runs its
        own there, and everything waits for the end.

    Attributes
    ----------
    found : dict
        ‖g‖² by number, of the tensors that any process reached, equal on all of them.
    """

    def __init__(
        self,
        table: TensorTable,
        tensors: dict[int, Any],
        processes: Processes,
        *,
        at_once: bool,
    ) -> None:
        self.found: dict[int, torch.Tensor] = {}
        self._tensors = tensors
        self._count = processes.count
        self._at_once = at_once
        layers = {row["param_id"]: row["layer"] for row in table.rows}
        # The tensors outside the layers are groups of their own: an embedding is large enough.
        keys = {i: (i if layers[i] is None else f"layer {layers[i]}") for i in tensors}
        backwards = sorted(tensors, reverse=True)
        self._groups = [list(group) for _, group in groupby(backwards, keys.__getitem__)]
        self._group_of = {i: n for n, group in enumerate(self._groups) for i in group}
        self._missing = [set(group) for group in self._groups]
        self._next = 0
        self._reached: dict[int, int] = {}  # by how many processes, once the group is finished
        self._late: set[int] = set()
        self._over = False

    def take(self, tensor: torch.Tensor, number: int) -> None:
        """Take note of a complete gradient; it stays until its group is finished."""
        group = self._group_of[number]
        if group < self._next:
            self._late.add(number)  # the order of this model is another one: see `finish`
        elif self._at_once:
            while self._next < group:
                self._finish_group()
            self._missing[group].discard(number)
            if not self._missing[group]:
                self._finish_group()

    def finish(self, *, failed: bool = False) -> None:
        """Finish what the pass has left; `failed` tells the others that this pass failed.

        Raises
        ------
        RuntimeError
            When the pass of another process has failed.
        """
        while self._next < len(self._groups):
            self._finish_group(failed)
        if not self._over:
            self._finish_late(failed)
        if self._over and not failed:
            raise RuntimeError("the pass failed on another process")

    def _finish_group(self, failed: bool = False) -> None:
        group = self._groups[self._next]
        self._next += 1
        here = [self._tensors[i].grad is not None for i in group]
        if not self._over:  # else a process has failed, and all of them know
            *reached, failures = self._added([*here, failed])
            self._over = failures > 0
            self._reached.update(zip(group, reached, strict=True))
        for i in group:
            if not self._over and self._reached[i]:
                self.found[i] = self._square(self._tensors[i])
            self._tensors[i].grad = None

    def _finish_late(self, failed: bool) -> None:
        """Measure what came when its group had been finished, if all of it came then."""
        order = [i for group in self._groups for i in group]
        *late, failures = self._added([*(i in self._late for i in order), failed])
        self._over = failures > 0
        for i, count in zip(order, late, strict=True):
            if count and not self._over:
                if self._reached[i]:  # one part of the gradient is gone, its norm is not known
                    self.found.pop(i, None)
                else:
                    self.found[i] = self._square(self._tensors[i])
            self._tensors[i].grad = None

    def _added(self, flags: list[bool]) -> list[int]:
        """Count the processes that say yes, for every flag."""
        home = next(iter(self._tensors.values())).device
        counts = torch.tensor(flags, dtype=torch.int32, device=home)
        dist.all_reduce(counts)
        return [int(count) for count in counts.tolist()]

    def _square(self, tensor: torch.Tensor) -> torch.Tensor:
        """‖g‖² of the gradient averaged over the processes."""
        gradient = None if tensor.grad is None else tensor.grad.detach().reshape(-1)
        parts = []
        for start in range(0, tensor.numel(), _CHUNK):
            size = min(_CHUNK, tensor.numel() - start)
            if gradient is None:
                part = torch.zeros(size, device=tensor.device)
            else:
                part = gradient[start : start + size].float() / self._count
            dist.all_reduce(part)
            parts.append(squares([part])[0])
        return torch.stack(parts).sum() if parts else squares([tensor.detach()])[0]
