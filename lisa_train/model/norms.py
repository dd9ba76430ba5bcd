"""Per-tensor sums that norms are made of: exact to 1e-6, one pass, no host synchronisation.

Everything returned is additive over pieces of a tensor (sums of squares, of magnitudes, of
products) and in double precision, so that shards of one tensor can be added across processes
before a root is taken. Tensors are walked in rows, because a flat fp32 sum is 1 % off at 100
million elements; on the CPU by `lisa_train.model.host_sums`, which reads the memory once.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from lisa_train.model import host_sums
from lisa_train.model.host_sums import ROW as _ROW
from lisa_train.model.joined import Layout

# Elements of a tensor that are taken at once on accelerators: what bounds an fp32 temporary.
DEVICE_CHUNK = 16_777_216


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a (possibly sharded) tensor that this process holds, detached."""
    to_local = getattr(tensor, "to_local", None)
    return (to_local() if to_local is not None else tensor).detach()


def wide(device: torch.device) -> torch.dtype:
    """Return the widest floating type of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


@torch.no_grad()
def squares(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Σx² of every tensor, shape (len(tensors),), float64, on the tensors' device.

    Elements are taken in fp32: those below 1e-19 count as zero, sums beyond 3e38 as infinite.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    if _on_cpu(tensors):
        return host_sums.walk([[_flat(x)] for x in tensors], host_sums.SQUARE)[:, 0]
    return _norms(tensors, 2).square()


@torch.no_grad()
def squares_and_magnitudes(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Σx² and Σ|x| of every tensor, each of shape (len(tensors),), float64."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    if _on_cpu(tensors):
        flat = [[_flat(x)] for x in tensors]
        sums = host_sums.walk(flat, host_sums.SQUARE_AND_MAGNITUDE)
        return sums[:, 0], sums[:, 1]
    return _norms(tensors, 2).square(), _norms(tensors, 1)


@torch.no_grad()
def changes(
    before: Sequence[torch.Tensor],
    after: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What an optimizer step did to every tensor.

    Parameters
    ----------
    before, after
        The tensors before and after the step, in the precision they are stored in.
    gradients
        Gradients of the same shapes; None leaves the products out.

    Returns
    -------
    updates, weights, products
        Σ(θ′−θ)², Σθ′² and Σg(θ′−θ), each of shape (len(after),), float64. The difference is
        taken in fp32 of the stored values: what rounding swallowed is not there.
    """
    if not after:
        empty = torch.zeros(0, dtype=torch.float64)
        return empty, empty, None if gradients is None else empty
    if gradients is None:
        pairs = list(zip(before, after, strict=True))
        sums = _walk(pairs, host_sums.CHANGE, _change)
        return sums[:, 0], sums[:, 1], None
    groups = list(zip(before, after, gradients, strict=True))
    sums = _walk(groups, host_sums.CHANGE_AND_PRODUCT, _change_and_product)
    return sums[:, 0], sums[:, 1], sums[:, 2]


@torch.no_grad()
def squares_and_magnitudes_of_rows(
    layout: Layout, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σx² and Σ|x| of joined tensors, in the order of the layout, as `squares_and_magnitudes`."""
    sums = layout.sums([rows], host_sums.SQUARE_AND_MAGNITUDE)
    return sums[:, 0], sums[:, 1]


@torch.no_grad()
def changes_of_rows(
    layout: Layout, before: torch.Tensor, after: torch.Tensor, gradients: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a step did to joined tensors, in the order of the layout, as `changes`."""
    sums = layout.sums([before, after, gradients], host_sums.CHANGE_AND_PRODUCT)
    return sums[:, 0], sums[:, 1], sums[:, 2]


@torch.no_grad()
def inner_products(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> torch.Tensor:
    """Σxy of every pair of equally shaped tensors, shape (len(first),), float64.

    Elements are multiplied in fp32, chunk by chunk.
    """
    if not first:
        return torch.zeros(0, dtype=torch.float64)
    pairs = list(zip(first, second, strict=True))
    return _walk(pairs, host_sums.PRODUCT, _product)[:, 0]


def stacked(scalars: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return numbers as one vector in the widest type, though they lie on several devices.

    It lies where the first one on an accelerator does: between accelerators nothing waits.
    """
    home = common_device(scalars)
    if any(x.device != home for x in scalars):
        scalars = [x.to(home) for x in scalars]
    return torch.stack(list(scalars)).to(wide(home))


def common_device(tensors: Sequence[torch.Tensor]) -> torch.device:
    """Return the first device that is an accelerator, or the CPU where all tensors are there."""
    return next((x.device for x in tensors if x.device.type != "cpu"), tensors[0].device)


def _on_cpu(tensors: Sequence[torch.Tensor]) -> bool:
    return common_device(tensors).type == "cpu"


def _norms(tensors: Sequence[torch.Tensor], order: int) -> torch.Tensor:
    """Norms of whole tensors by the kernels of accelerators."""
    parts = [local(x) for x in tensors]
    # The kernels refuse to narrow, and elements are taken in fp32.
    parts = [x.float() if x.dtype == torch.float64 else x for x in parts]
    return stacked(torch._foreach_norm(parts, order, dtype=torch.float32))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    # `local` asks for an attribute that most tensors lack, which takes longer than this.
    plain = type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter
    return (tensor.detach() if plain else local(tensor)).reshape(-1)


# How many rows of one block belong to which group.
_Owners = list[tuple[int, int]]
# What a kernel of accelerators makes of rows (two-dimensional pieces of every tensor of a group):
# one value per row of each result.
_Kernel = Callable[..., list[torch.Tensor]]


def _walk(
    groups: Sequence[Sequence[torch.Tensor]], on_host: host_sums.Kernel, on_device: _Kernel
) -> torch.Tensor:
    """Sum a kernel's results over the rows of every group of equally shaped tensors.

    Returns shape (len(groups), results of the kernel), in double precision.
    """
    flat = [[_flat(x) for x in group] for group in groups]
    everything = [x for group in flat for x in group]
    if _on_cpu(everything):
        return host_sums.walk(flat, on_host)
    owners: _Owners = []
    results: list[list[torch.Tensor]] = [[] for _ in range(on_host.results)]
    for whose, pieces in _blocks(flat):
        for found, values in zip(results, on_device(*pieces), strict=True):
            found.append(values)
        owners.append(whose)
    if not owners:
        home = common_device(everything)
        return torch.zeros(len(groups), on_host.results, dtype=wide(home), device=home)
    sums = [_per_tensor(_together(found), owners, len(groups)) for found in results]
    return torch.stack(sums, dim=1)


def _blocks(
    groups: Sequence[Sequence[torch.Tensor]],
) -> Iterator[tuple[tuple[int, int], list[torch.Tensor]]]:
    """Cut tensors into rows where they are; what is left of a tensor is a short row of its own."""
    for number, flat in enumerate(groups):
        size = flat[0].numel()
        whole = size - size % _ROW
        for start in range(0, whole, DEVICE_CHUNK):
            stop = min(start + DEVICE_CHUNK, whole)
            rows = (stop - start) // _ROW
            yield (number, rows), [x[start:stop].float().view(rows, _ROW) for x in flat]
        if whole < size:
            yield (number, 1), [x[whole:].float().view(1, -1) for x in flat]


def _together(values: list[torch.Tensor]) -> torch.Tensor:
    """All rows' values in the widest type, on the first accelerator."""
    home = common_device(values)
    return torch.cat([x.to(home) for x in values]).to(wide(home))


def _per_tensor(values: torch.Tensor, owners: _Owners, count: int) -> torch.Tensor:
    """Add up the rows of every tensor; an index from the host would have to be waited for."""
    parts: dict[int, list[torch.Tensor]] = {}
    for (number, _), part in zip(owners, values.split([n for _, n in owners]), strict=True):
        parts.setdefault(number, []).append(part)
    zero = values.new_zeros(())
    sums = [sum((part.sum() for part in parts.get(i, ())), zero) for i in range(count)]
    return torch.stack(sums)


def _square(rows: torch.Tensor) -> torch.Tensor:
    """‖x‖² of every row, in the widest type.

    Products of half-precision values lie on a coarse grid, where one long fp32 sum rounds in one
    direction: 1e-5 off after 65,536 of them, 1e-7 in rows of 1,024.
    """
    return torch.linalg.vector_norm(rows, dim=-1).to(wide(rows.device)).square_()


def _change(old: torch.Tensor, new: torch.Tensor) -> list[torch.Tensor]:
    return [_square(new - old), _square(new)]


def _change_and_product(
    old: torch.Tensor, new: torch.Tensor, gradient: torch.Tensor
) -> list[torch.Tensor]:
    difference = new - old
    return [_square(difference), _square(new), difference.mul_(gradient).sum(-1)]


def _product(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    return [(x * y).sum(-1)]
