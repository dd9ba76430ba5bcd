"""Per-tensor sums that norms are made of: exact to 1e-6, one pass, no host synchronisation.

On a CPU with a C compiler they come from one kernel (`lisa_train.model.compiled`), else from those
of torch.

Everything returned is additive over pieces of a tensor (sums of squares, of magnitudes, of
products) and in double precision, so that pieces of one tensor can be added across processes
before a root is taken. On the CPU tensors are walked in chunks that stay in the cache: a flat
fp32 sum is 1 % off at 100 million elements and reads the memory once per quantity.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from lisa_train.model import compiled
from lisa_train.model.compiled import Kind
from lisa_train.model.joined import ROW as _ROW
from lisa_train.model.joined import SMALL, Layout, Owners, Pack

# 2 MB of fp32: a chunk, its difference and its gradient stay in the last-level cache, and what
# calling a kernel costs is a small part.
CHUNK = 524_288
# On accelerators the limit is the memory of the fp32 temporary, not the cache.
DEVICE_CHUNK = 16_777_216


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a (possibly sharded) tensor that this process holds, detached."""
    to_local = getattr(tensor, "to_local", None)
    return (to_local() if to_local is not None else tensor).detach()


def widest_float(device: torch.device) -> torch.dtype:
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
        return _walk([[x] for x in tensors], Kind.SQUARE)[:, 0]
    return _norms(tensors, 2).square()


@torch.no_grad()
def squares_and_magnitudes(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Σx² and Σ|x| of every tensor, each of shape (len(tensors),), float64."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    if _on_cpu(tensors):
        sums = _walk([[x] for x in tensors], Kind.SQUARE_AND_MAGNITUDE)
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
        sums = _walk(list(zip(before, after, strict=True)), Kind.CHANGE)
        return sums[:, 0], sums[:, 1], None
    sums = _walk(list(zip(before, after, gradients, strict=True)), Kind.CHANGE_AND_PRODUCT)
    return sums[:, 0], sums[:, 1], sums[:, 2]


@torch.no_grad()
def squares_and_magnitudes_of_rows(
    layout: Layout, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σx² and Σ|x| of joined tensors, in the order of the layout, as `squares_and_magnitudes`."""
    square, magnitude = _walk_rows(layout, [rows], Kind.SQUARE_AND_MAGNITUDE)
    return square, magnitude


@torch.no_grad()
def changes_of_rows(
    layout: Layout, before: torch.Tensor, after: torch.Tensor, gradients: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a step did to joined tensors, in the order of the layout, as `changes`."""
    update, weight, product = _walk_rows(
        layout, [before, after, gradients], Kind.CHANGE_AND_PRODUCT
    )
    return update, weight, product


@torch.no_grad()
def inner_products(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> torch.Tensor:
    """Σxy of every pair of equally shaped tensors, shape (len(first),), float64.

    Elements are multiplied in fp32, chunk by chunk.
    """
    if not first:
        return torch.zeros(0, dtype=torch.float64)
    return _walk(list(zip(first, second, strict=True)), Kind.PRODUCT)[:, 0]


def stacked(scalars: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return numbers as one vector in the widest type, though they lie on several devices.

    It lies where the first one on an accelerator does: between accelerators nothing waits.
    """
    home = common_device(scalars)
    if any(x.device != home for x in scalars):
        scalars = [x.to(home) for x in scalars]
    return torch.stack(list(scalars)).to(widest_float(home))


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


# What torch's kernels make of rows (two-dimensional pieces of every tensor of a group): one value
# per row of each result, and which results are norms, to be squared before they are added.
_Kernel = tuple[Callable[..., list[torch.Tensor]], tuple[bool, ...]]


def _walk(groups: Sequence[Sequence[torch.Tensor]], kind: Kind) -> torch.Tensor:
    """Sum over the elements of every group of equally shaped tensors.

    Returns shape (len(groups), results of the kind).
    """
    if not _on_cpu([x for group in groups for x in group]):
        return _walk_by_torch(groups, kind, host=False)
    flat = [[_flat(x) for x in group] for group in groups]
    suited = [i for i, group in enumerate(flat) if compiled.suits(group)]
    sums = compiled.sums(kind, [flat[i] for i in suited]) if suited else None
    if sums is None:
        return _walk_by_torch(flat, kind, host=True)
    sums = sums[:, : len(_KERNELS[kind][1])]
    if len(suited) == len(flat):
        return sums
    others = sorted(set(range(len(flat))).difference(suited))
    result = sums.new_empty(len(flat), sums.shape[1])
    result[suited] = sums
    result[others] = _walk_by_torch([flat[i] for i in others], kind, host=True)
    return result


def _walk_by_torch(
    groups: Sequence[Sequence[torch.Tensor]], kind: Kind, *, host: bool
) -> torch.Tensor:
    """Sum a kernel's results over the rows of every group, as `_walk`.

    Rows are added in double precision, all tensors together: tensor by tensor it would cost more
    than the sums themselves for small ones.
    """
    measure, norms = _KERNELS[kind]
    scratch = torch.empty(0)
    owners: Owners = []
    results: list[list[torch.Tensor]] = [[] for _ in norms]
    for whose, pieces in _blocks_in_cache(groups) if host else _blocks(groups):
        if host and scratch.numel() < pieces[0].numel():
            scratch = torch.empty(pieces[0].numel())
        out = scratch[: pieces[0].numel()].view(pieces[0].shape) if host else None
        for found, values in zip(results, measure(out, *pieces), strict=True):
            found.append(values)
        owners += whose
    if not owners:
        home = common_device([x for group in groups for x in group])
        return torch.zeros(len(groups), len(norms), dtype=widest_float(home), device=home)
    sums = [
        _per_tensor(_joined(found, squared), owners, len(groups))
        for found, squared in zip(results, norms, strict=True)
    ]
    return torch.stack(sums, dim=1)


def _walk_rows(layout: Layout, columns: Sequence[torch.Tensor], kind: Kind) -> list[torch.Tensor]:
    """Sum over the rows of every joined tensor, as `_walk`."""
    measure, norms = _KERNELS[kind]
    sums = compiled.sums_of_rows(kind, columns, layout.first, layout.count)
    if sums is not None:
        return [sums[:, i] for i in range(len(norms))]
    scratch = torch.empty(max(last - first for first, last in layout.blocks), _ROW)
    results: list[list[torch.Tensor]] = [[] for _ in norms]
    for first, last in layout.blocks:
        pieces = [rows[first:last] for rows in columns]
        for found, values in zip(results, measure(scratch[: last - first], *pieces), strict=True):
            found.append(values)
    joined = [_joined(found, squared) for found, squared in zip(results, norms, strict=True)]
    count = len(layout.shapes)
    return [x.new_zeros(count).index_add_(0, layout.owners, x) for x in joined]


def _blocks(
    groups: Sequence[Sequence[torch.Tensor]],
) -> Iterator[tuple[Owners, list[torch.Tensor]]]:
    """Cut tensors into rows where they are; what is left of a tensor is a short row of its own."""
    for number, group in enumerate(groups):
        flat = [_flat(x) for x in group]
        size = flat[0].numel()
        whole = size - size % _ROW
        for start in range(0, whole, DEVICE_CHUNK):
            stop = min(start + DEVICE_CHUNK, whole)
            rows = (stop - start) // _ROW
            yield [(number, rows)], [x[start:stop].float().view(rows, _ROW) for x in flat]
        if whole < size:
            yield [(number, 1)], [x[whole:].float().view(1, -1) for x in flat]


def _blocks_in_cache(
    groups: Sequence[Sequence[torch.Tensor]],
) -> Iterator[tuple[Owners, list[torch.Tensor]]]:
    """Cut tensors into blocks of rows that fit into the cache, at most `CHUNK` elements.

    Rows of large fp32 tensors are read where they are. Small tensors, remainders and other
    precisions are brought together in fp32 buffers, many tensors in one block: a call for each
    would cost more than the sums.
    """
    pack = Pack(min(CHUNK // 2, sum(_ROW * -(-group[0].numel() // _ROW) for group in groups)))
    for number, group in enumerate(groups):
        flat = [_flat(x) for x in group]
        size, start = flat[0].numel(), 0
        if size >= SMALL and all(x.dtype == torch.float32 for x in flat):
            start = size - size % _ROW
            for begin in range(0, start, CHUNK):
                end = min(begin + CHUNK, start)
                rows = (end - begin) // _ROW
                yield [(number, rows)], [x[begin:end].view(rows, _ROW) for x in flat]
        while start < size:
            stop = min(size, start + pack.room)
            pack.add(number, flat if stop - start == size else [x[start:stop] for x in flat])
            start = stop
            if not pack.room:
                yield pack.take()
    if pack.owners:
        yield pack.take()


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    # `local` asks for an attribute that most tensors lack, which takes longer than this.
    plain = type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter
    return (tensor if plain else local(tensor)).reshape(-1)


def _joined(values: list[torch.Tensor], squared: bool) -> torch.Tensor:
    """All rows' values in the widest type, on the first accelerator if there is any."""
    home = common_device(values)
    joined = torch.cat([x.to(home) for x in values]).to(widest_float(home))
    return joined.square_() if squared else joined


def _per_tensor(values: torch.Tensor, owners: Owners, count: int) -> torch.Tensor:
    """Add up the rows of every tensor."""
    if values.device.type == "cpu":
        numbers, rows = zip(*owners, strict=True)
        index = torch.from_numpy(np.repeat(np.array(numbers), np.array(rows)))
        return values.new_zeros(count).index_add_(0, index, values)
    # There an index from the host would have to be waited for.
    parts: dict[int, list[torch.Tensor]] = {}
    for (number, _), part in zip(owners, values.split([n for _, n in owners]), strict=True):
        parts.setdefault(number, []).append(part)
    zero = values.new_zeros(())
    sums = [sum((part.sum() for part in parts.get(i, ())), zero) for i in range(count)]
    return torch.stack(sums)


def _norm(rows: torch.Tensor) -> torch.Tensor:
    """‖x‖ of every row.

    Products of half-precision values lie on a coarse grid, where one long fp32 sum rounds in one
    direction: 1e-5 off after 65,536 of them, 1e-7 in rows of 1,024.
    """
    return torch.linalg.vector_norm(rows, dim=-1)


def _square(out: torch.Tensor | None, x: torch.Tensor) -> list[torch.Tensor]:
    return [_norm(x)]


def _square_and_magnitude(out: torch.Tensor | None, x: torch.Tensor) -> list[torch.Tensor]:
    return [_norm(x), torch.abs(x, out=out).sum(-1)]


def _change(out: torch.Tensor | None, old: torch.Tensor, new: torch.Tensor) -> list[torch.Tensor]:
    return [_norm(torch.sub(new, old, out=out)), _norm(new)]


def _change_and_product(
    out: torch.Tensor | None, old: torch.Tensor, new: torch.Tensor, gradient: torch.Tensor
) -> list[torch.Tensor]:
    difference = torch.sub(new, old, out=out)
    update = _norm(difference)
    return [update, _norm(new), difference.mul_(gradient).sum(-1)]


def _product(out: torch.Tensor | None, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    return [torch.mul(x, y, out=out).sum(-1)]


_KERNELS: dict[Kind, _Kernel] = {
    Kind.SQUARE: (_square, (True,)),
    Kind.SQUARE_AND_MAGNITUDE: (_square_and_magnitude, (True, False)),
    Kind.CHANGE: (_change, (True, True)),
    Kind.CHANGE_AND_PRODUCT: (_change_and_product, (True, True, False)),
    Kind.PRODUCT: (_product, (False,)),
}
