"""Tensors that are split over processes (`DTensor`, FSDP2), and backward passes beside training."""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lisa_analysis.contract.errors import ConfigError
from lisa_train.private_names import check


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a `DTensor`; asked so that nothing distributed is imported."""
    return hasattr(tensor, "to_local")


def pieces(tensor: torch.Tensor) -> int:
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


def split_as(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a whole tensor as this process's part of one that is split as `like` is.

    Raises
    ------
    ConfigError
        For another shape, of which it is not known where it would be cut.
    """
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    where = local_slices(like)
    if where is None or tensor.shape != like.shape:
        raise ConfigError(
            f"optimizer state of shape {tuple(tensor.shape)} belongs to a tensor of shape "
            f"{tuple(like.shape)} that is split over processes, and cannot be split like it; take "
            "an optimizer whose state has the shape of its tensors, as AdamW."
        )
    from torch.distributed.tensor import DTensor

    split: Any = like
    part = tensor[where].to(split.to_local().device).contiguous()
    return DTensor.from_local(  # type: ignore[no-any-return, no-untyped-call, unused-ignore]
        part, split.device_mesh, split.placements, shape=like.shape, stride=like.stride()
    )


def fsdp_modules(model: nn.Module) -> list[Any]:
    """Return the modules that FSDP2 gathers and splits, each on its own."""
    return [module for module in model.modules() if hasattr(module, "_get_fsdp_state")]


def reshard(model: nn.Module) -> None:
    """Let FSDP2 put its pieces back into the modules, which an evaluation leaves gathered."""
    for module in fsdp_modules(model):
        module.reshard()


def fsdp_groups(model: nn.Module) -> list[Any]:
    """FSDP's groups of tensors; `ConfigError` where this torch keeps them in another way."""
    check("sharded probe")
    return [
        group
        for module in fsdp_modules(model)
        for group in module._get_fsdp_state()._fsdp_param_groups
    ]


def settle_reductions(model: nn.Module) -> None:
    """Let FSDP2 know again which tensors train; for good it does at the first forward pass only.

    In which precision a group of tensors is reduced it takes from those that train then, and of a
    group that rests it would not know.
    """
    for group in fsdp_groups(model):
        group._init_mp_dtypes()


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


@contextmanager
def requiring_gradients(
    model: nn.Module, wanted: Collection[int]
) -> Iterator[dict[int, nn.Parameter]]:
    """Let the `wanted` sharded tensors (by id) require gradients; yield all sharded ones by id."""
    tensors = {id(p): p for p in model.parameters() if is_sharded(p)}
    if not tensors:
        yield {}
        return
    before = [(p, p.requires_grad, p.grad) for p in tensors.values()]
    unused: list[tuple[Any, bool]] = []
    try:
        for key, p in tensors.items():
            p.grad = None
            if key in wanted and p.is_floating_point():
                p.requires_grad_(True)
        settle_reductions(model)
        for group in fsdp_groups(model):
            # A tensor that one process alone reaches must not hold up the others.
            unused.append((group, group.reduce_scatter_unused_params))
            group.reduce_scatter_unused_params = True
        yield tensors
    finally:
        for group, flag in unused:
            group.reduce_scatter_unused_params = flag
        for p, flag, gradient in before:
            p.requires_grad_(flag)
            p.grad = gradient
        reshard(model)


@contextmanager
def unsynchronised(model: nn.Module) -> Iterator[None]:
    """Keep DDP from waiting for gradients of its tensors if the pass goes through its wrapper."""
    kind = nn.parallel.DistributedDataParallel
    silenced: list[Any] = []

    def silence(*_: Any) -> None:
        wrapper: Any = kind._active_ddp_module
        if wrapper is not None and wrapper.require_backward_grad_sync:
            wrapper.require_backward_grad_sync = False  # as `no_sync` does
            silenced.append(wrapper)

    inner = model.module if isinstance(model, kind) else model
    handle = inner.register_forward_pre_hook(silence)
    try:
        yield
    finally:
        handle.remove()
        for wrapper in silenced:
            wrapper.require_backward_grad_sync = True


def _splits(tensor: torch.Tensor) -> list[tuple[int, int, int]]:
    """Dimension that is cut, number of parts and number of this part, for every mesh dimension."""
    mesh: Any = getattr(tensor, "device_mesh", None)
    placements: Any = getattr(tensor, "placements", ())
    return [
        (placement.dim, mesh.size(i), mesh.get_local_rank(i))
        for i, placement in enumerate(placements)
        if placement.is_shard()
    ]
