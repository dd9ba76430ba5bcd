"""Per-tensor sums that norms are made of: exact to 1e-6, one pass, no host synchronisation.

Everything returned is additive over pieces of a tensor (sums of squares, of magnitudes, of
products) and in double precision, so that shards of one tensor can be added across processes
before a root is taken. On the CPU tensors are walked in chunks that stay in the cache: a flat
fp32 sum is 1 % off at 100 million elements and reads the memory once per quantity.
"""

from collections.abc import Callable, Sequence

import torch

# 256 kB of fp32: a chunk, its difference and its gradient share a core's second-level cache.
CHUNK = 65_536
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
    norms = torch._foreach_norm([local(x) for x in tensors], 2, dtype=torch.float32)
    return _stack(norms).square()


@torch.no_grad()
def squares_and_magnitudes(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Σx² and Σ|x| of every tensor, each of shape (len(tensors),), float64."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    if _on_cpu(tensors):
        sums = _walk([[x] for x in tensors], _square_and_magnitude)
        return sums[:, 0], sums[:, 1]
    parts = [local(x) for x in tensors]
    return (
        _stack(torch._foreach_norm(parts, 2, dtype=torch.float32)).square(),
        _stack(torch._foreach_norm(parts, 1, dtype=torch.float32)),
    )


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
    rows = max(1, _DEVICE_CHUNK // max(1, weight.shape[1]))
    mixed = torch.zeros((), dtype=kind, device=weight.device)
    small = b.detach().float()
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows].detach().float()
        mixed = mixed + ((small[start : start + rows].T @ part).to(kind) * a.detach()).sum()
    total = weight_square.to(kind) + 2 * scale * mixed + scale**2 * gram_square(a, b)
    return total.clamp_min(0)


def _on_cpu(tensors: Sequence[torch.Tensor]) -> bool:
    return tensors[0].device.type == "cpu"


def _stack(scalars: Sequence[torch.Tensor]) -> torch.Tensor:
    home = scalars[0].device
    stacked = torch.stack([x.to(home) for x in scalars])
    return stacked.to(wide(home))


def _walk(
    groups: Sequence[Sequence[torch.Tensor]], kernel: Callable[..., list[torch.Tensor]]
) -> torch.Tensor:
    """Sum a kernel's results over the chunks of every group of equally shaped tensors.

    Returns shape (len(groups), results of the kernel). All results are gathered before they are
    added: adding up tensor by tensor costs more than the sums themselves for small ones.
    """
    results: list[torch.Tensor] = []
    counts: list[int] = []
    home = groups[0][0].device
    step = CHUNK if home.type == "cpu" else _DEVICE_CHUNK
    for group in groups:
        flat = [local(x).reshape(-1) for x in group]
        size = flat[0].numel()
        for start in range(0, max(size, 1), step):
            pieces = flat if size <= step else [x[start : start + step] for x in flat]
            results += kernel(*(x if x.dtype == torch.float32 else x.float() for x in pieces))
        counts.append(max(1, -(-size // step)))
    if any(x.device != home for x in results):
        results = [x.to(home) for x in results]
    sums = torch.stack(results).to(wide(home)).view(sum(counts), -1)
    if len(counts) == len(sums):
        return sums
    return torch.stack([part.sum(0) for part in sums.split(counts)])


def _square(x: torch.Tensor) -> list[torch.Tensor]:
    return [torch.dot(x, x)]


def _square_and_magnitude(x: torch.Tensor) -> list[torch.Tensor]:
    return [torch.dot(x, x), x.abs().sum()]


def _change(old: torch.Tensor, new: torch.Tensor) -> list[torch.Tensor]:
    difference = new - old
    return [torch.dot(difference, difference), torch.dot(new, new)]


def _change_and_product(
    old: torch.Tensor, new: torch.Tensor, gradient: torch.Tensor
) -> list[torch.Tensor]:
    difference = new - old
    return [
        torch.dot(difference, difference),
        torch.dot(new, new),
        torch.dot(gradient, difference),
    ]
