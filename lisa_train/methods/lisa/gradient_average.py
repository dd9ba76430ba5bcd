"""Several processes, a copy of the model in each: LISA averages the gradients of what trains.

DistributedDataParallel plans its all-reduce once, for every tensor that may ever train: it keeps
buckets for all layers and has to be told of the resting ones (find_unused_parameters), which it
then searches for at every step. Here only the gradients that exist are exchanged, after the last
backward pass of a step, whatever gradient checkpointing and accumulation do meanwhile.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lisa_analysis.contract.errors import ConfigError
from lisa_train.model.parallel import processes
from lisa_train.model.sharding import is_sharded

# Small gradients travel together, as in DDP; at most two such buffers exist at a time. A larger
# gradient is reduced where it is.
BUCKET_BYTES = 25 * 2**20
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class GradientAverage:
    """Makes the gradients of all processes their mean, bit-equal on all of them.

    Every process calls it with the same tensors at the same steps. Of a tensor that got no
    gradient in one process, zero counts; one that got none anywhere keeps none.

    Parameters
    ----------
    model
        The model. Where somebody has wrapped it in `DistributedDataParallel`, or FSDP2 has split
        it, that averages, and nothing is done here.
    wanted
        False where such a wrapper is around `model`, out of its sight.

    Attributes
    ----------
    on : bool
        Whether gradients are averaged here.
    """

    def __init__(self, model: nn.Module, *, wanted: bool = True) -> None:
        self._count = processes()
        wrapped = any(isinstance(module, DistributedDataParallel) for module in model.modules())
        sharded = any(is_sharded(parameter) for parameter in model.parameters())
        self.on = wanted and self._count > 1 and not wrapped and not sharded
        self._done = False
        # Statistics that a forward pass updates from its own batch; DDP broadcasts them as well.
        self._statistics: list[torch.Tensor] = []
        if self.on:
            self._statistics = [
                buffer
                for module in model.modules()
                if isinstance(module, BATCH_NORMS)
                for buffer in module.buffers()
            ]
            _from_first((*model.parameters(), *model.buffers()))

    def begin_step(self) -> None:
        """Expect new gradients."""
        self._done = False

    @torch.no_grad()
    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average the gradients of `parameters`, once per step.

        Raises
        ------
        ConfigError
            For a sparse gradient.
        """
        if not self.on or self._done or not parameters:
            return
        self._done = True
        if any(p.grad is not None and p.grad.is_sparse for p in parameters):
            raise ConfigError(
                "a gradient is sparse (an embedding with sparse=True), which LISA does not average "
                f"over {self._count} processes; make the embedding with sparse=False."
            )
        absent = [i for i, p in enumerate(parameters) if p.grad is None]
        # 1 for a gradient that is there. A fill: copying numbers to a GPU would wait for it.
        counts = torch.ones(len(parameters), device=parameters[0].device)
        for i in absent:
            counts[i].fill_(0)
            parameters[i].grad = torch.zeros_like(parameters[i])
        pending = deque([_Bucket([counts])])
        for gradients in _buckets(parameters):
            pending.append(_Bucket(gradients, 1 / self._count))
            if len(pending) > 2:
                pending.popleft().finish()
        while pending:
            pending.popleft().finish()
        if absent:  # only here is a number read
            there = counts.tolist()
            for i in absent:
                if there[i] == 0:
                    parameters[i].grad = None
        _from_first(self._statistics)


class _Bucket:
    """One all-reduce that is under way."""

    def __init__(self, gradients: list[torch.Tensor], factor: float | None = None) -> None:
        self._gradients = gradients
        one = len(gradients) == 1 and gradients[0].is_contiguous()
        self._joined = gradients[0] if one else torch.cat([g.reshape(-1) for g in gradients])
        self._copied = not one
        if factor is not None:
            self._joined.mul_(factor)  # before the sum, which fp16 and bf16 could not hold
        self._work: Any = dist.all_reduce(self._joined, async_op=True)

    def finish(self) -> None:
        """Wait for it, and put the values where they belong."""
        self._work.wait()
        if self._copied:
            parts = self._joined.split([gradient.numel() for gradient in self._gradients])
            for gradient, part in zip(self._gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterable[list[torch.Tensor]]:
    """Yield gradients in the order of their tensors, those that can travel together at once."""
    waiting: dict[Any, list[torch.Tensor]] = {}
    for parameter in parameters:
        gradient = parameter.grad
        assert gradient is not None
        size = gradient.numel() * gradient.element_size()
        if size >= BUCKET_BYTES:
            yield [gradient]
            continue
        kind = gradient.dtype, gradient.device
        bucket = waiting.setdefault(kind, [])
        if sum(g.numel() * g.element_size() for g in bucket) + size > BUCKET_BYTES:
            yield bucket
            bucket = waiting[kind] = []
        bucket.append(gradient)
    yield from filter(None, waiting.values())


@torch.no_grad()
def _from_first(tensors: Iterable[torch.Tensor]) -> None:
    """Give every process what the first one has."""
    for tensor in tensors:
        held = tensor.detach()
        whole = held if held.is_contiguous() else held.contiguous()
        dist.broadcast(whole, src=0)
        if whole is not held:
            held.copy_(whole)
