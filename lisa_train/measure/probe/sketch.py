"""Inner products of gradients that are not kept: a count sketch of every one.

A tensor of n elements becomes m numbers: every element, with a random sign, is added to the bucket
of its index modulo m (Charikar, Chen & Farach-Colton 2002; Weinberger et al. 2009). Inner products
of sketches are unbiased for those of the tensors, with a variance of at most 2‖x‖²‖y‖²/m where no
few elements hold it all. Tensors of up to m elements lose nothing.
"""

import torch

# Prime, so that no row length of a matrix puts a whole column into one bucket.
BUCKETS = 2003
# Elements taken at once: with their signs they stay in the cache.
_CHUNK = 256 * BUCKETS
_TABLE = 4 * _CHUNK + 1

# Relative standard deviation of a sketched square whose mass is spread over many elements.
RELATIVE_ERROR = (2 / BUCKETS) ** 0.5


class Sketch:
    """Random signs, the same for every batch, and the sketches that they give.

    Parameters
    ----------
    seed
        Of the signs.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._tables: dict[torch.device, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, number: int, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sketch of a tensor, shape (BUCKETS,), fp32, on the tensor's device.

        Parameters
        ----------
        number
            The tensor's number: tensors of one number share their signs.
        tensor
            Any shape and floating precision; accumulated in fp32.
        """
        flat = tensor.detach().reshape(-1)
        table = self._table(flat.device)
        buckets = torch.zeros(BUCKETS, device=flat.device)
        starts = torch.Generator().manual_seed(hash((self._seed, number)) % 2**63)
        chunks = max(1, -(-flat.numel() // _CHUNK))
        offsets = torch.randint(0, _TABLE - _CHUNK, (chunks,), generator=starts).tolist()
        # Two chunks may meet the same signs; a sign of their own keeps them apart.
        own = (2 * torch.randint(0, 2, (chunks,), generator=starts) - 1).tolist()
        for n, (offset, sign) in enumerate(zip(offsets, own, strict=True)):
            part = flat[n * _CHUNK : (n + 1) * _CHUNK]
            signed = part * table[offset : offset + part.numel()]
            whole = signed.numel() - signed.numel() % BUCKETS
            sums = signed[:whole].view(-1, BUCKETS).sum(0)
            sums[: signed.numel() - whole] += signed[whole:]
            buckets.add_(sums, alpha=sign)
        return buckets

    def _table(self, device: torch.device) -> torch.Tensor:
        if device not in self._tables:
            generator = torch.Generator().manual_seed(self._seed)
            signs = 2.0 * torch.randint(0, 2, (_TABLE,), generator=generator) - 1.0
            self._tables[device] = signs.to(device)
        return self._tables[device]
