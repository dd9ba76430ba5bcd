"""Several processes, one run: every recorded step is put together by a single collective.

What is recorded is additive (sums of squares, of magnitudes, of products), so that the pieces of
a sharded tensor add up to the tensor's, and equal copies add up to one copy after division. The
products of sharded LoRA factors take a second collective, which gathers the factors; a measuring
pass takes its own.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from lisa_train.measure.buffers import Piece
from lisa_train.measure.quantities import REGISTRY
from lisa_train.model.norms import local, widest_float
from lisa_train.model.parallel import is_first, processes
from lisa_train.model.sharding import is_first_copy, is_sharded, local_slices, pieces
from lisa_train.model.tensor_table import TensorTable

T = TypeVar("T")


class Processes:
    """The processes that train one model together; often just one.

    Parameters
    ----------
    table
        The tensors, plain ones (replicated, as under DDP) or sharded `DTensor` (FSDP2).

    Attributes
    ----------
    count : int
        How many there are.
    first : bool
        Whether this is the one that writes.
    sharded : bool
        Whether any tensor is split over them.
    """

    def __init__(self, table: TensorTable) -> None:
        self.count = processes()
        self.sharded = any(is_sharded(tensor) for _, tensor in table.tensors)
        self.first = is_first()
        self._device = table.tensors[0][1].device
        self._shares = {i: _share(p, self.count) for i, p in table.tensors}

    def merge(self, pieces: list[Piece], lines: list[dict[str, Any]]) -> None:
        """Replace local values by those of all processes, with one all-reduce.

        Every process calls it at the same steps with the same tensors. `loss` becomes the mean
        over the processes, weighted by `labels` where a line has them, `tokens` and `labels` the
        sums; a process of its own leaves everything as it is.
        """
        if self.count == 1:
            return
        kind = widest_float(self._device)
        missing = [(piece, piece.missing) for piece in pieces if piece.missing is not None]
        parts = [piece.values.to(self._device, kind) * self._weights(piece) for piece in pieces]
        parts += [flags.to(self._device, kind) for _, flags in missing]
        weights = [_scalar(_weight(line), self._device, kind) for line in lines]
        for line, weight in zip(lines, weights, strict=True):
            loss = _scalar(line.get("loss"), self._device, kind) * weight
            parts.append(torch.where(weight > 0, loss, torch.zeros_like(loss)))
        parts += weights
        parts += [_scalar(line.get("tokens"), self._device, kind) for line in lines]
        if not parts:
            return
        joined = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(joined)
        split = list(joined.split([part.numel() for part in parts]))
        for piece in pieces:
            piece.values, piece.merged = split.pop(0), True
        for piece, _ in missing:
            piece.missing = split.pop(0)
        n = len(lines)
        for line, loss, weight, tokens in zip(
            lines, split[:n], split[n : 2 * n], split[2 * n :], strict=True
        ):
            values = {"loss": loss / weight, "labels": weight, "tokens": tokens}
            line.update({k: v for k, v in values.items() if line.get(k) is not None})

    def gather(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return sharded tensors as whole ones, in fp32, with one all-reduce for all of them.

        Every process calls it with the same tensors.
        """
        if not tensors:
            return []
        joined = torch.zeros(sum(tensor.numel() for tensor in tensors), device=self._device)
        parts = joined.split([tensor.numel() for tensor in tensors])
        whole = [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
        for target, tensor in zip(whole, tensors, strict=True):
            where = local_slices(tensor)
            assert where is not None
            if is_first_copy(tensor):
                target[where].copy_(local(tensor))
        dist.all_reduce(joined)
        return whole

    def from_first(self, value: T) -> T:
        """Return what the first process has, on all of them; for small things, now and then."""
        if self.count == 1:
            return value
        held: list[Any] = [value if self.first else None]
        dist.broadcast_object_list(held, src=0)
        return held[0]  # type: ignore[no-any-return]

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process; all of them call it together."""
        return bool(self.highest(int(flag))[0])

    def highest(self, *values: int) -> tuple[int, ...]:
        """Return the largest of every process's values; all of them call it together."""
        if self.count == 1:
            return values
        joined = torch.tensor(values, dtype=torch.int32, device=self._device)
        dist.all_reduce(joined, op=dist.ReduceOp.MAX)
        return tuple(int(value) for value in joined.tolist())

    def joined(self, part: np.ndarray) -> np.ndarray:
        """Return the arrays of all processes, one after the other along the first axis."""
        if self.count == 1:
            return part
        parts: list[Any] = [None] * self.count
        dist.all_gather_object(parts, part)
        return np.concatenate(parts)

    def added(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor summed over the processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def _weights(self, piece: Piece) -> torch.Tensor | float:
        if REGISTRY[piece.column].column.adds == "copies":  # whatever holds the tensor
            return 1 / self.count
        shares = np.array([self._shares[int(i)] for i in piece.ids])
        if (shares == shares[0]).all():
            return float(shares[0])
        return torch.from_numpy(shares).to(piece.values.device, widest_float(self._device))


def _share(tensor: torch.Tensor, count: int) -> float:
    """Part that one process's sum has in the sum over all processes."""
    return pieces(tensor) / count


def _weight(line: dict[str, Any]) -> Any:
    labels = line.get("labels")
    return 1 if labels is None else labels


def _scalar(value: Any, device: torch.device, kind: torch.dtype) -> torch.Tensor:
    if torch.is_tensor(value):
        return value.detach().to(device, kind).reshape(1)
    # A fill: copying a number to an accelerator would wait for it.
    return torch.full((1,), 0.0 if value is None else float(value), dtype=kind, device=device)
