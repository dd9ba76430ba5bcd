"""Per-tensor sums that norms are made of: exact to 1e-6, one pass, no host synchronisation.

Everything returned is additive over pieces of a tensor (sums of squares, of magnitudes, of
products) and in double precision, so that shards of one tensor can be added across processes
before a root is taken. On the CPU tensors are walked in chunks that stay in the cache: a flat
fp32 sum is 1 % off at 100 million elements and reads the memory once per quantity.
"""

from collections.abc import Callable, Sequence

import torch

# 2 MB of fp32: a chunk, its difference and its gradient stay in the last-level cache, and what
# calling a kernel costs is a small part.
CHUNK = 524_288
_ROW = 1024
# Where ‖W + sBA‖² is this small a part of ‖W‖² + ‖sBA‖², fp32 sums no longer carry it.
_CANCELLED = 1e-2
# On accelerators the limit is the memory of the fp32 temporary, not the cache.
_DEVICE_CHUNK = 16_777_216


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
        return _walk([[x] for x in tensors], _square)[:, 0]
    return _norms(tensors, 2).square()


@torch.no_grad()
def squares_and_magnitudes(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Σx² and Σ|x| of every tensor, each of shape (len(tensors),), float64."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    if _on_cpu(tensors):
        sums = _walk([[x] for x in tensors], _square_and_magnitude)
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
        sums = _walk(list(zip(before, after, strict=True)), _change)
        return sums[:, 0], sums[:, 1], None
    sums = _walk(list(zip(before, after, gradients, strict=True)), _change_and_product)
    return sums[:, 0], sums[:, 1], sums[:, 2]


def gram_square(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """‖BA‖² from the r×r Gram matrices: Σ (BᵀB)∘(AAᵀ); the product is never formed.

    Parameters
    ----------
    a, b
        Factors of shape (r, n) and (m, r).
    """
    kind = wide(a.device)
    a, b = a.detach().to(kind), b.detach().to(kind)
    return ((b.T @ b) * (a @ a.T)).sum().clamp_min(0)


@torch.no_grad()
def merged_square(
    weight: torch.Tensor,
    weight_square: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """‖W + sBA‖² = ‖W‖² + 2s⟨BᵀW, A⟩ + s²‖BA‖², with nothing larger than r×n formed.

    Parameters
    ----------
    weight
        W, shape (m, n), any floating precision.
    weight_square
        ‖W‖², which does not change while W is frozen.
    a, b, scale
        Factors of shape (r, n) and (m, r), and s.
    """
    kind = wide(weight.device)
    product_kind = torch.float32 if _multiplies_fp32_exactly(weight.device) else kind
    rows = max(1, _DEVICE_CHUNK // max(1, weight.shape[1]))
    mixed = torch.zeros((), dtype=kind, device=weight.device)
    small = b.detach().to(product_kind)
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows].detach().to(product_kind)
        mixed = mixed + ((small[start : start + rows].T @ part).to(kind) * a.detach()).sum()
    known = weight_square.to(kind) + scale**2 * gram_square(a, b)
    total = known + 2 * scale * mixed
    if weight.device.type == "cpu" and total < _CANCELLED * known:
        # The adapter takes away what the weight holds: take the differences themselves. Not on
        # accelerators, where the question alone would wait for the device.
        return _walk_rows(weight, a, b, scale)
    return total.clamp_min(0)


def _multiplies_fp32_exactly(device: torch.device) -> bool:
    """Whether products of fp32 matrices keep fp32's digits on a device.

    They do not where TF32 (ten bits) or bf16 (seven, on CPUs) is allowed. That is the user's
    setting to make, for all threads at once: it is read, never changed.
    """
    backends = {"cpu": torch.backends.mkldnn, "cuda": torch.backends.cuda}
    if device.type not in backends:
        return False
    setting = getattr(backends[device.type].matmul, "fp32_precision", None)  # type: ignore[attr-defined]
    if setting is None:  # before torch 2.9
        return torch.get_float32_matmul_precision() == "highest"
    return setting in ("none", "ieee")


def _walk_rows(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    """‖W + sBA‖² from blocks of rows of the sum, in double precision."""
    rows = max(1, 4 * CHUNK // max(1, weight.shape[1]))
    blocks = (slice(start, start + rows) for start in range(0, weight.shape[0], rows))
    wide_a, wide_b = a.detach().double(), b.detach().double() * scale
    return torch.stack(
        [(weight[block].double() + wide_b[block] @ wide_a).square().sum() for block in blocks]
    ).sum()


# Norms that the rows of a weight are given, and the factors (A, B) of what is added to it first.
Rescaling = tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]


@torch.no_grad()
def rescaled_squares(
    weight: torch.Tensor, now: Rescaling, before: Rescaling
) -> tuple[torch.Tensor, torch.Tensor]:
    """‖W′ − W′₀‖² and ‖W′‖² of W′ = m(W + BA)/‖W + BA‖, row by row (DoRA).

    From blocks of rows of the sums, in double precision: the change is a small part of what the
    row norms alone could tell.
    """
    kind = wide(weight.device)
    size = 4 * CHUNK if weight.device.type == "cpu" else _DEVICE_CHUNK // 2
    rows = max(1, size // max(1, weight.shape[1]))
    moved, whole = [], []
    for start in range(0, weight.shape[0], rows):
        block = slice(start, start + rows)
        part = weight[block].detach().to(kind)
        after = _rescaled(part, block, *now)
        moved.append((after - _rescaled(part, block, *before)).square().sum())
        whole.append(after.square().sum())
    return torch.stack(moved).sum(), torch.stack(whole).sum()


def _rescaled(
    part: torch.Tensor,
    block: slice,
    magnitude: torch.Tensor,
    factors: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    if factors is not None:
        a, b = factors
        part = part + b[block].to(part) @ a.to(part)
    return part * (magnitude[block].to(part) / part.norm(dim=1)).unsqueeze(1)


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


def _walk(
    groups: Sequence[Sequence[torch.Tensor]], kernel: Callable[..., list[torch.Tensor]]
) -> torch.Tensor:
    """Sum a kernel's results over the chunks of every group of equally shaped tensors.

    Returns shape (len(groups), results of the kernel). All results are gathered before they are
    added: adding up tensor by tensor costs more than the sums themselves for small ones.
    """
    results: list[torch.Tensor] = []
    counts: list[int] = []
    works = {device: _Workspace(device) for device in {group[0].device for group in groups}}
    for group in groups:
        work = works[group[0].device]
        step = CHUNK if group[0].device.type == "cpu" else _DEVICE_CHUNK
        flat = [local(x).reshape(-1) for x in group]
        size = flat[0].numel()
        for start in range(0, max(size, 1), step):
            pieces = flat if size <= step else [x[start : start + step] for x in flat]
            results += kernel(work, *(work.as_float(i, x) for i, x in enumerate(pieces)))
        counts.append(max(1, -(-size // step)))
    sums = stacked(results).view(sum(counts), -1)
    if len(counts) == len(sums):
        return sums
    return torch.stack([part.sum(0) for part in sums.split(counts)])


class _Workspace:
    """Buffers of one chunk that are used again and again; on the CPU fresh pages cost more.

    On accelerators the allocator does the same, and chunks are too large to hold on to.
    """

    def __init__(self, device: torch.device) -> None:
        self._keep = device.type == "cpu"
        self._buffers: dict[int, torch.Tensor] = {}

    def buffer(self, number: int, like: torch.Tensor) -> torch.Tensor | None:
        """Return an fp32 buffer as long as `like`; None where the allocator serves as well."""
        if not self._keep:
            return None
        if number not in self._buffers:
            self._buffers[number] = torch.empty(CHUNK)
        return self._buffers[number][: like.numel()]

    def as_float(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """Return a flat chunk in fp32."""
        if x.dtype == torch.float32:
            return x
        buffer = self.buffer(number, x)
        return x.float() if buffer is None else buffer.copy_(x)


_SCRATCH = -1


def _sum_of_squares(x: torch.Tensor) -> torch.Tensor:
    """Σx² of a chunk in two levels.

    Products of half-precision values lie on a coarse grid, where one long fp32 sum rounds in one
    direction: 1e-5 off after 65,536 of them, 1e-7 in rows of 1,024.
    """
    whole = x.numel() - x.numel() % _ROW
    rest = torch.linalg.vector_norm(x[whole:])
    total = rest * rest
    if whole:
        rows = torch.linalg.vector_norm(x[:whole].view(-1, _ROW), dim=-1)
        total = total + torch.dot(rows, rows)
    return total


def _square(work: _Workspace, x: torch.Tensor) -> list[torch.Tensor]:
    return [_sum_of_squares(x)]


def _square_and_magnitude(work: _Workspace, x: torch.Tensor) -> list[torch.Tensor]:
    return [_sum_of_squares(x), torch.abs(x, out=work.buffer(_SCRATCH, x)).sum()]


def _change(work: _Workspace, old: torch.Tensor, new: torch.Tensor) -> list[torch.Tensor]:
    difference = torch.sub(new, old, out=work.buffer(_SCRATCH, new))
    return [_sum_of_squares(difference), _sum_of_squares(new)]


def _change_and_product(
    work: _Workspace, old: torch.Tensor, new: torch.Tensor, gradient: torch.Tensor
) -> list[torch.Tensor]:
    difference = torch.sub(new, old, out=work.buffer(_SCRATCH, new))
    return [
        _sum_of_squares(difference),
        _sum_of_squares(new),
        difference.mul_(gradient).sum(),  # a cascade sum, unlike a dot product
    ]


@torch.no_grad()
def inner_products(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> torch.Tensor:
    """Σxy of every pair of equally shaped tensors, shape (len(first),), float64.

    Elements are multiplied in fp32, chunk by chunk.
    """
    if not first:
        return torch.zeros(0, dtype=torch.float64)
    return _walk(list(zip(first, second, strict=True)), _product)[:, 0]


def _product(work: _Workspace, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    return [torch.mul(x, y, out=work.buffer(_SCRATCH, x)).sum()]
