"""fp32 as bf16: rounded by chance, with a mean that is exact, or to the nearest, with what is left.

bf16 is the upper half of fp32, so that both are arithmetic of the bits. It is done in chunks: what
it needs besides is small, whatever the size of the tensor.
"""

from collections.abc import Iterator

import torch

# Elements at a time: on the CPU they stay in the cache, on accelerators the limit is what their
# random bits take in memory (about 80 MB).
_CHUNK, _DEVICE_CHUNK = 1 << 16, 1 << 22


@torch.no_grad()
def stochastic_round(values: torch.Tensor, key: int, start: int = 0) -> torch.Tensor:
    """Round fp32 to bf16, up or down with the probability that makes the mean exact.

    Adding 16 uniform random bits to the lower half and cutting it off rounds up in magnitude with
    probability (distance from below)/(distance of the two). The bits of an element are a hash
    (Wellons, lowbias32) of `key` and of its place, and so the same on every device, and in
    whichever process its part of a split tensor lies.

    Parameters
    ----------
    values
        fp32, any shape. Infinities and NaN stay what they are.
    key
        Seed of the random bits, 63 of them.
    start
        Place of the first element in the whole tensor.
    """
    rounded = torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)
    round_into(rounded, values, key, start)
    return rounded


def round_into(target: torch.Tensor, values: torch.Tensor, key: int, start: int) -> None:
    """Put the rounded values into a contiguous tensor, see `stochastic_round`."""
    flat, into = values.reshape(-1), target.view(-1)
    for begin, end in _chunks(flat):
        part = flat[begin:end]
        bits = part.view(torch.int32) + _random_bits(part, key, start + begin)
        rounded = (bits & -(1 << 16)).view(torch.float32)
        into[begin:end] = torch.where(part.isfinite(), rounded, part)


@torch.no_grad()
def add_exactly(rounded: torch.Tensor, rest: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Add to an fp32 number that is held as its bf16 rounding and 16 bits more.

    Parameters
    ----------
    rounded
        bf16: what the number is to the nearest.
    rest
        int16: the distance of its bits from those of `rounded`; the new distance is put here.
    gradient
        What is added, of the same shape.

    Returns
    -------
    The new rounding, bf16. With `rest` it is the fp32 sum, to one unit in its last place; unless
    that is not finite.
    """
    result = torch.empty(rounded.shape, dtype=torch.bfloat16, device=rounded.device)
    high, low = rounded.reshape(-1), rest.view(-1)
    added, into = gradient.reshape(-1), result.view(-1)
    for begin, end in _chunks(high):
        bits = high[begin:end].float().view(torch.int32) + low[begin:end]
        total = bits.view(torch.float32) + added[begin:end]
        bits = total.view(torch.int32)
        # Halfway, as two bf16 numbers often sum to, goes to the even one, as everywhere in torch.
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -(1 << 16)
        finite = total.isfinite()
        # Of what lies halfway above, 16 bits hold all but one unit in fp32's last place.
        low[begin:end] = torch.where(finite, (bits - nearest).clamp(max=0x7FFF), 0)
        into[begin:end] = torch.where(finite, nearest.view(torch.float32), total)
    return result


def _chunks(flat: torch.Tensor) -> Iterator[tuple[int, int]]:
    size = _CHUNK if flat.device.type == "cpu" else _DEVICE_CHUNK
    for begin in range(0, flat.numel(), size):
        yield begin, min(begin + size, flat.numel())


def _random_bits(like: torch.Tensor, key: int, start: int) -> torch.Tensor:
    """16 random bits per element; int32 arithmetic wraps round, and shifts keep the sign."""
    x = torch.arange(like.numel(), dtype=torch.int32, device=like.device)
    x += _signed(start)
    # Places that are 2³² apart, in a tensor of that size, get other bits too.
    x ^= _signed(key + (start >> 32))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= (x >> shift) & ((1 << (32 - shift)) - 1)
        x *= _signed(factor)
        x += _signed(key >> 32)
    return (x ^ (x >> 16)) & 0xFFFF


def _signed(word: int) -> int:
    """The lower 32 bits of a number, as int32 holds them."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word


def mixed(key: list[int]) -> int:
    """One 63-bit seed from several numbers (SplitMix64's finaliser, chained)."""
    state = 0
    for word in key:
        state = (state + word + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1
