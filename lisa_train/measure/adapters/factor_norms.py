"""Norms of what LoRA's factors make of a weight, without the product or the sum being formed."""

from collections.abc import Sequence

import torch

from lisa_train.model.joined import Layout
from lisa_train.model.norms import CHUNK, DEVICE_CHUNK, widest_float

# Gram matrices are taken in fp32 up to this length, whose rounding is 2e-6 of a square then; and
# where ‖BA‖² is no smaller part than this of Σ‖aᵢ‖²‖bᵢ‖², what it is without any cancellation.
_FP32_LENGTH, _FP32_PART = 4096, 0.25
# Where ‖W + sBA‖² is this small a part of ‖W‖² + ‖sBA‖², fp32 sums no longer carry it.
_CANCELLED = 1e-2


def gram_square(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """‖BA‖² from the r×r Gram matrices: Σ (BᵀB)∘(AAᵀ); the product is never formed.

    Parameters
    ----------
    a, b
        Factors of shape (r, n) and (m, r).
    """
    kind = widest_float(a.device)
    a, b = a.detach().to(kind), b.detach().to(kind)
    return ((b.T @ b) * (a @ a.T)).sum().clamp_min(0)


@torch.no_grad()
def gram_squares(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> torch.Tensor:
    """‖BA‖² of many pairs of equal shapes at once, shape (len(first),), as `gram_square` of each.

    On the CPU in fp32, where that is exact to 1e-5: in double precision the matrices of r × r cost
    three times as much, and those of small adapters more than all else that is recorded of them.

    Parameters
    ----------
    first, second
        Factors A of shape (r, n) and B of shape (m, r), all on one device.
    """
    a, b = torch.stack(list(first)), torch.stack(list(second))
    kind = widest_float(a.device)
    if not _in_fp32(a, b):
        a, b = a.to(kind), b.to(kind)
        return _sums(torch.bmm(a, a.mT), torch.bmm(b.mT, b))[0]
    a, b = a.float(), b.float()
    found, cancelled = _sums(torch.bmm(a, a.mT), torch.bmm(b.mT, b))
    if cancelled.any():
        a, b = a[cancelled].to(kind), b[cancelled].to(kind)
        found[cancelled] = _sums(torch.bmm(a, a.mT), torch.bmm(b.mT, b))[0]
    return found


@torch.no_grad()
def joined_gram_squares(
    layout: Layout, rows: torch.Tensor, first: Sequence[int], second: Sequence[int]
) -> torch.Tensor:
    """‖BA‖² of pairs that lie in one buffer on the CPU, as `gram_squares`, and nothing is copied.

    Parameters
    ----------
    layout, rows
        The buffer.
    first, second
        Places of the factors A and B in it, pair by pair.
    """
    grams: dict[tuple[torch.Size, bool], torch.Tensor] = {}
    pairs: dict[tuple[torch.Size, torch.Size], list[int]] = {}
    for i, places in enumerate(zip(first, second, strict=True)):
        pairs.setdefault((layout.shapes[places[0]], layout.shapes[places[1]]), []).append(i)
    squares = torch.zeros(len(first), dtype=torch.float64)
    for (shape_a, shape_b), group in pairs.items():
        where_a = torch.tensor([layout.beside[first[i]] for i in group])
        where_b = torch.tensor([layout.beside[second[i]] for i in group])
        all_a, all_b = (
            layout.batch(rows, shape_a).flatten(2),
            layout.batch(rows, shape_b).flatten(2),
        )
        found = torch.zeros(len(group), dtype=torch.float64)
        cancelled = torch.ones(len(group), dtype=torch.bool)
        if _in_fp32(all_a, all_b):
            if (shape_a, True) not in grams:
                grams[shape_a, True] = torch.bmm(all_a, all_a.mT)
            if (shape_b, False) not in grams:
                grams[shape_b, False] = torch.bmm(all_b.mT, all_b)
            found, cancelled = _sums(grams[shape_a, True][where_a], grams[shape_b, False][where_b])
        if cancelled.any():
            one, other = all_a[where_a[cancelled]].double(), all_b[where_b[cancelled]].double()
            found[cancelled] = _sums(torch.bmm(one, one.mT), torch.bmm(other.mT, other))[0]
        squares[group] = found
    return squares


def _in_fp32(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether fp32 carries the Gram matrices of factors of shapes (…, r, n) and (…, m, r)."""
    short = max(a.shape[-1], b.shape[-2]) <= _FP32_LENGTH
    return a.device.type == "cpu" and short and _multiplies_fp32_exactly(a.device)


def _sums(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ G∘H of pairs of Gram matrices, and whether terms cancel (NaN counts) that fp32 lost."""
    product = (first * second).to(widest_float(first.device))
    found = product.sum((1, 2)).clamp_min(0)
    size = product.diagonal(dim1=1, dim2=2).sum(1)  # Σ‖aᵢ‖²‖bᵢ‖²
    return found, ~(found >= _FP32_PART * size)


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
    kind = widest_float(weight.device)
    product_kind = torch.float32 if _multiplies_fp32_exactly(weight.device) else kind
    rows = max(1, DEVICE_CHUNK // max(1, weight.shape[1]))
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
    # torch 2.6 has no such switch for the CPU.
    matmul = getattr(backends[device.type], "matmul", None)
    setting = getattr(matmul, "fp32_precision", None)
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
    kind = widest_float(weight.device)
    size = 4 * CHUNK if weight.device.type == "cpu" else DEVICE_CHUNK // 2
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
