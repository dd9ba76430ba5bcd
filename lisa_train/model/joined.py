"""Many small tensors, copied side by side: read by few calls where each alone would take one."""

from collections.abc import Sequence

import numpy as np
import torch

# Rows of sums: long fp32 sums lose digits, see `lisa_train.model.norms`.
ROW = 1024
# Elements below which a tensor is brought together with others on the CPU: copying it costs less
# than calls of its own.
SMALL = 65_536
# Elements of a block of rows, which stays in the cache.
_BLOCK = 262_144


# Numbers of tensors, each with how many of a block's rows are its own.
Owners = list[tuple[int, int]]


def is_small(tensor: torch.Tensor | None) -> bool:
    """Whether a tensor is one to be joined: small, plain, dense, in fp32, on the CPU."""
    return (
        tensor is not None
        and (type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter)
        and tensor.dtype == torch.float32
        and tensor.is_cpu
        and tensor.numel() < SMALL
        and tensor.layout == torch.strided
    )


class Layout:
    """Where tensors of some shapes lie in one buffer of rows of `ROW` elements.

    Every tensor begins at a whole row, with zeros behind its end; those of one shape lie side by
    side, so that they can be taken as one batch.

    Parameters
    ----------
    shapes
        The tensors' shapes; what is returned of them stands in this order.

    Attributes
    ----------
    rows : int
        Rows of a buffer.
    blocks : list of (int, int)
        First and last row of blocks that fit into the cache.
    owners : tensor of int64, shape (rows,)
        The place of the tensor that a row belongs to.
    alike : dict
        Shape -> first row, rows of each, and how many tensors have it.
    beside : list of int
        Which one of those of its shape a tensor is.
    first, count : array of int64, shape (len(shapes),)
        A tensor's first row, and how many it has.
    """

    def __init__(self, shapes: Sequence[torch.Size]) -> None:
        self.shapes = list(shapes)
        together: dict[torch.Size, list[int]] = {}
        for place, shape in enumerate(self.shapes):
            together.setdefault(shape, []).append(place)
        self._order = [place for places in together.values() for place in places]
        self._gaps: list[torch.Tensor | None] = []
        self.alike: dict[torch.Size, tuple[int, int, int]] = {}
        self.beside = [0] * len(self.shapes)
        self.rows, owners = 0, []
        for shape, places in together.items():
            each = -(-shape.numel() // ROW)
            gap = each * ROW - shape.numel()
            self.alike[shape] = (self.rows, each, len(places))
            for n, place in enumerate(places):
                self.beside[place] = n
            self._gaps += [torch.zeros(gap) if gap else None] * len(places)
            owners.append(torch.tensor(places).repeat_interleave(each))
            self.rows += each * len(places)
        self.owners = torch.cat(owners)
        whose = [self.alike[shape] for shape in self.shapes]
        self.count = np.array([each for _, each, _ in whose])
        self.first = np.array([first for first, _, _ in whose]) + self.beside * self.count
        step = _BLOCK // ROW
        self.blocks = [(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]

    def empty(self) -> torch.Tensor:
        """Return a buffer."""
        return torch.empty(self.rows, ROW)

    @torch.no_grad()
    def fill(self, tensors: Sequence[torch.Tensor], rows: torch.Tensor) -> None:
        """Copy tensors of the layout's shapes into a buffer."""
        parts: list[torch.Tensor] = []
        for place, gap in zip(self._order, self._gaps, strict=True):
            parts.append(tensors[place].reshape(-1))
            if gap is not None:
                parts.append(gap)
        torch.cat(parts, out=rows.view(-1))

    def batch(self, rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Return all tensors of one shape in a buffer, shape (how many, *shape); a view."""
        first, each, count = self.alike[shape]
        part = rows[first : first + each * count].view(count, each * ROW)
        return part[:, : shape.numel()].unflatten(1, shape)


class Joined:
    """Small tensors around an optimizer step, as rows.

    Parameters
    ----------
    tensors
        The tensors, with their gradients as they were accumulated.
    earlier
        Those of an earlier step, whose memory is used again where it fits: on the CPU fresh pages
        cost more than the copies themselves.

    Attributes
    ----------
    layout
        Where they lie.
    gradients
        Their gradients before clipping.
    before, after
        The tensors before the step, and after it where `is_after`.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], earlier: "Joined | None" = None) -> None:
        shapes = [tensor.shape for tensor in tensors]
        self.layout: Layout
        if earlier is None or earlier.layout.shapes != shapes:
            self.layout = Layout(shapes)
            self.gradients, self.before, self.after = (self.layout.empty() for _ in range(3))
        else:
            self.layout = earlier.layout
            self.gradients, self.before, self.after = (
                earlier.gradients, earlier.before, earlier.after
            )  # fmt: skip
        self.is_after = False
        self.layout.fill([t.grad for t in tensors if t.grad is not None], self.gradients)
        self.layout.fill(tensors, self.before)


class Pack:
    """Buffers, one for each tensor of a group, in which pieces begin at whole rows."""

    def __init__(self, size: int) -> None:
        self.room = self._size = size
        self.owners: Owners = []
        self._pieces: list[list[torch.Tensor]] = []
        self._buffers: list[torch.Tensor] = []

    def add(self, number: int, pieces: list[torch.Tensor]) -> None:
        """Take pieces of the tensors of group `number`, not longer than there is room."""
        rows = -(-pieces[0].numel() // ROW)
        self.owners.append((number, rows))
        self._pieces.append(pieces)
        self.room -= rows * ROW

    def take(self) -> tuple[Owners, list[torch.Tensor]]:
        """Return whose rows they are and the rows, the buffers of next time."""
        used = self._size - self.room
        sizes: list[int] = []
        for (_, rows), pieces in zip(self.owners, self._pieces, strict=True):
            n = pieces[0].numel()
            sizes += (n, rows * ROW - n)
        result = []
        for i in range(len(self._pieces[0])):
            if i == len(self._buffers):
                self._buffers.append(torch.empty(self._size))
            buffer = self._buffers[i][:used]
            _fill(buffer, [pieces[i] for pieces in self._pieces], sizes)
            result.append(buffer.view(-1, ROW))
        owners, self.owners, self._pieces, self.room = self.owners, [], [], self._size
        return owners, result


_ZEROS = torch.zeros(ROW)


def _fill(buffer: torch.Tensor, pieces: list[torch.Tensor], sizes: list[int]) -> None:
    """Put pieces one after the other, each with zeros behind it: `sizes` of both in turn."""
    if all(x.dtype == torch.float32 for x in pieces):
        # One call that copies memory; `_foreach_copy_` makes a call for every piece.
        parts: list[torch.Tensor] = []
        for piece, gap in zip(pieces, sizes[1::2], strict=True):
            parts.append(piece)
            if gap:
                parts.append(_ZEROS[:gap])
        torch.cat(parts, out=buffer)
        return
    if sum(sizes[1::2]):
        buffer.zero_()
    torch._foreach_copy_(list(buffer.split(sizes)[::2]), pieces)
