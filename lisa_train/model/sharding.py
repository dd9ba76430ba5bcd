"""Tensors that are split over processes (`DTensor`, FSDP2): how often, and which part is here."""

import math
from typing import Any

import torch
from torch import nn


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a `DTensor`; asked so that nothing distributed is imported."""
    return hasattr(tensor, "to_local")


def shards(tensor: torch.Tensor) -> int:
    """Return how many pieces make up the tensor; 1 for a plain one, which every process holds."""
    return math.prod(parts for _, parts, _ in _splits(tensor))


def local_slices(tensor: torch.Tensor) -> tuple[slice, ...] | None:
    """Return where this process's part lies in the whole tensor, or None if that is no block.

    No block is what two kinds of sharding at once (FSDP and tensor parallelism) may leave.
    """
    cuts = [slice(0, size) for size in tensor.shape]
    splits = _splits(tensor)
    if len(splits) > 1:
        return None
    for dimension, parts, position in splits:
        size = tensor.shape[dimension]
        length = -(-size // parts)  # as torch.chunk: the last ones may be short, or empty
        start = min(size, position * length)
        cuts[dimension] = slice(start, min(size, start + length))
    if is_sharded(tensor):
        shape = tuple(cut.stop - cut.start for cut in cuts)
        if shape != tuple(tensor.to_local().shape):  # type: ignore[attr-defined]
            return None
    return tuple(cuts)


def fsdp_modules(model: nn.Module) -> list[Any]:
    """Return the modules that FSDP2 gathers and shards, each on its own."""
    return [module for module in model.modules() if hasattr(module, "_get_fsdp_state")]


def reshard(model: nn.Module) -> None:
    """Let FSDP2 put its shards back into the modules, which an evaluation leaves gathered."""
    for module in fsdp_modules(model):
        module.reshard()


def is_first_copy(tensor: torch.Tensor) -> bool:
    """Whether no earlier process holds the same part: with replicas (HSDP) one of them speaks."""
    mesh: Any = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return True
    coordinate = mesh.get_coordinate()
    placements: Any = tensor.placements  # type: ignore[attr-defined]
    return coordinate is not None and all(
        place == 0 or placement.is_shard()
        for place, placement in zip(coordinate, placements, strict=True)
    )


def _splits(tensor: torch.Tensor) -> list[tuple[int, int, int]]:
    """Dimension that is cut, number of parts and number of this part, for every mesh dimension."""
    mesh: Any = getattr(tensor, "device_mesh", None)
    placements: Any = getattr(tensor, "placements", ())
    return [
        (placement.dim, mesh.size(i), mesh.get_local_rank(i))
        for i, placement in enumerate(placements)
        if placement.is_shard()
    ]
