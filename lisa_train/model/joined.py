"""Many small tensors, copied side by side: read by few calls where each alone would take one."""

from collections.abc import Sequence

import torch

from lisa_train.model import host_sums
from lisa_train.model.host_sums import ROW, SMALL


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
    owners : tensor of int64, shape (rows,)
        The place of the tensor that a row belongs to.
    alike : dict
        Shape -> first row, rows of each, and how many tensors have it.
    beside : list of int
        Which one of those of its shape a tensor is.
    """

    def __init__(self, shapes: Sequence[torch.Size]) -> None:
        self.shapes = list(shapes)
        together: dict[torch.Size, list[int]] = {}
        for place, shape in enumerate(self.shapes):
            together.setdefault(shape, []).append(place)
        self._starts = [0] * len(self.shapes)
        self.alike: dict[torch.Size, tuple[int, int, int]] = {}
        self.beside = [0] * len(self.shapes)
        self.rows, owners = 0, []
        for shape, places in together.items():
            each = -(-shape.numel() // ROW)
            self.alike[shape] = (self.rows, each, len(places))
            for n, place in enumerate(places):
                self.beside[place] = n
                self._starts[place] = (self.rows + n * each) * ROW
            owners.append(torch.tensor(places).repeat_interleave(each))
            self.rows += each * len(places)
        self.owners = torch.cat(owners)

    def empty(self) -> torch.Tensor:
        """Return a buffer, with zeros behind the end of every tensor."""
        return torch.zeros(self.rows, ROW)

    def fill(self, tensors: Sequence[torch.Tensor], rows: torch.Tensor) -> None:
        """Copy tensors of the layout's shapes into a buffer of its own."""
        flat = rows.view(-1).numpy()
        parts = zip(self._starts, self.shapes, tensors, strict=True)
        host_sums.copy_arrays(
            [
                (flat[start : start + shape.numel()].reshape(shape), tensor.detach().numpy())
                for start, shape, tensor in parts
            ]
        )

    def sums(self, columns: Sequence[torch.Tensor], kernel: host_sums.Kernel) -> torch.Tensor:
        """Sum a kernel's results over buffers, shape (tensors, results), float64."""
        return host_sums.walk_rows(columns, self.owners, len(self.shapes), kernel)

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
