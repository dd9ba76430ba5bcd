"""Sums over tensors on the CPU: whole blocks in the cache, shared out among threads.

torch divides every call among its threads and waits for the last of them. A block that stays in
the cache is done in microseconds, so that a step would wait thousands of times, and on a machine
with other work each time for as long as that has its turn. Here a thread takes one block after the
other, does all of it by itself, in NumPy, which lets go of the interpreter meanwhile, and they wait
for each other once. Every element is read from memory once.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

# Rows of sums: long fp32 sums lose digits, see `lisa_train.model.norms`.
ROW = 1024
# Elements below which a tensor is brought together with others: copying it costs less than calls
# of its own.
SMALL = 65_536
# Elements of a block: in fp32 the new weights and what they differ by stay in a core's own cache.
BLOCK = 131_072
# torch leaves calls below 32,768 elements to the thread that makes them.
_UNDIVIDED = 31 * ROW
# Elements that are worth a further thread, and how many threads the memory can feed.
_WORTH, _MOST = 1_048_576, 8

# Gets scratch memory and rows of every tensor of a group, all of shape (rows, ROW), and fills a
# vector of (rows,) for each of its results.
Measure = Callable[[np.ndarray, list[np.ndarray], list[np.ndarray]], None]
# A part of the tensors of one group: its number, the first element and the one after the last.
Piece = tuple[int, int, int]


@dataclass(frozen=True)
class Kernel:
    """What is summed over the rows of a group of tensors, and how many sums that makes."""

    measure: Measure
    results: int


@torch.no_grad()
def walk(groups: Sequence[Sequence[torch.Tensor]], kernel: Kernel) -> torch.Tensor:
    """Sum a kernel's results over all rows of every group of equally shaped, flat tensors.

    Parameters
    ----------
    groups
        Groups of as many tensors as the kernel takes, each of one dimension and detached, in any
        precision; elements are taken in fp32.
    kernel
        What is summed.

    Returns
    -------
    Tensor
        Shape (len(groups), kernel.results), float64. Rows are summed in fp32, which is exact to
        1e-7, and added in double precision.
    """
    blocks = _cut([group[0].numel() for group in groups])
    arrays = [[_array(tensor) for tensor in group] for group in groups]
    lengths = [sum(_rows(piece) for piece in block) for block in blocks]
    ends = np.cumsum(lengths, dtype=np.int64).tolist()
    found = np.empty((kernel.results, ends[-1] if ends else 0), np.float32)

    def work(todo: Iterator[int]) -> None:
        memory = _Memory()
        for i in todo:
            first = ends[i] - lengths[i]
            rows = memory.rows(blocks[i], lengths[i], groups, arrays)
            kernel.measure(memory.scratch(lengths[i]), rows, list(found[:, first : ends[i]]))

    _share_out(work, len(blocks), ROW * found.shape[1])
    pieces = [piece for block in blocks for piece in block]
    numbers = np.array([number for number, _, _ in pieces], dtype=np.int64)
    owners = np.repeat(numbers, [_rows(piece) for piece in pieces])
    return _per_tensor(found, owners, len(groups))


@torch.no_grad()
def walk_rows(
    columns: Sequence[torch.Tensor], owners: torch.Tensor, count: int, kernel: Kernel
) -> torch.Tensor:
    """Sum a kernel's results over rows that lie in buffers already, as `walk`.

    Parameters
    ----------
    columns
        Buffers of shape (rows, ROW) in fp32, as many as the kernel takes.
    owners
        Numbers of the tensors that the rows belong to, below `count`.
    """
    arrays = [rows.numpy() for rows in columns]
    n, step = len(owners), BLOCK // ROW
    found = np.empty((kernel.results, n), np.float32)

    def work(todo: Iterator[int]) -> None:
        memory = _Memory()
        for i in todo:
            part = slice(i * step, min(i * step + step, n))
            scratch = memory.scratch(part.stop - part.start)
            kernel.measure(scratch, [rows[part] for rows in arrays], list(found[:, part]))

    _share_out(work, -(-n // step), ROW * n)
    return _per_tensor(found, owners.numpy(), count)


@torch.no_grad()
def copy(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy tensors on the CPU into others of their shapes and precisions."""
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    for target, source in zip(targets, sources, strict=True):
        to, of = _array(target.detach()), _array(source.detach())
        if to is None or of is None:
            target.copy_(source)
        else:
            pairs.append((to, of))
    copy_arrays(pairs)


def copy_arrays(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Copy into the first array of every pair what is in the second, of the same shape."""
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for target, source in pairs:
        if target.size > BLOCK and target.flags.c_contiguous and source.flags.c_contiguous:
            to, of = target.reshape(-1), source.reshape(-1)
            cuts = range(0, to.size, BLOCK)
            parts += [(to[i : i + BLOCK], of[i : i + BLOCK]) for i in cuts]
        else:
            parts.append((target, source))

    def work(todo: Iterator[int]) -> None:
        for i in todo:
            np.copyto(*parts[i])

    _share_out(work, len(parts), sum(target.size for target, _ in pairs))


def _cut(sizes: Sequence[int]) -> list[list[Piece]]:
    """Cut groups of tensors of some sizes into blocks of at most `BLOCK` elements of each.

    The whole rows of large tensors are blocks by themselves. Small ones, and what is left of the
    others, come together; each piece begins at a whole row.
    """
    blocks: list[list[Piece]] = []
    together: list[Piece] = []
    room = BLOCK
    for number, size in enumerate(sizes):
        start = size - size % ROW if size >= SMALL else 0
        blocks += [[(number, i, min(i + BLOCK, start))] for i in range(0, start, BLOCK)]
        if start < size:
            piece = (number, start, size)
            if room < ROW * _rows(piece):
                blocks.append(together)
                together, room = [], BLOCK
            together.append(piece)
            room -= ROW * _rows(piece)
    return [*blocks, together] if together else blocks


def _rows(piece: Piece) -> int:
    return -(-(piece[2] - piece[1]) // ROW)


def _array(tensor: torch.Tensor) -> np.ndarray | None:
    """Return an fp32 tensor as NumPy sees it, where it does."""
    plain = type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter
    seen = plain and tensor.dtype == torch.float32 and tensor.layout == torch.strided
    return tensor.numpy() if seen else None


class _Memory:
    """What one thread writes to: rows that had to be brought together, and scratch."""

    def __init__(self) -> None:
        self._scratch: np.ndarray | None = None
        self._buffers: list[torch.Tensor] = []

    def scratch(self, rows: int) -> np.ndarray:
        """Return rows of scratch memory."""
        if self._scratch is None:
            self._scratch = np.empty((BLOCK // ROW, ROW), np.float32)
        return self._scratch[:rows]

    def rows(
        self,
        block: list[Piece],
        rows: int,
        groups: Sequence[Sequence[torch.Tensor]],
        arrays: Sequence[Sequence[np.ndarray | None]],
    ) -> list[np.ndarray]:
        """Return a block of every tensor of a group: where it lies, or brought together."""
        number, start, stop = block[0]
        whole = len(block) == 1 and not (stop - start) % ROW
        found = []
        for i, array in enumerate(arrays[number]):
            if whole and array is not None:
                found.append(array[start:stop].reshape(rows, ROW))
                continue
            while len(self._buffers) <= i:
                self._buffers.append(torch.empty(BLOCK))
            buffer, place = self._buffers[i], 0
            target = buffer.numpy()
            for piece in block:
                number, start, stop = piece
                end, following = place + stop - start, place + ROW * _rows(piece)
                if (array := arrays[number][i]) is not None:
                    target[place:end] = array[start:stop]
                else:
                    part = groups[number][i][start:stop]
                    _converted(buffer[place:end], part)
                target[end:following] = 0
                place = following
            found.append(target[:place].reshape(rows, ROW))
        return found


def _converted(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy what NumPy does not see into fp32, in this thread alone."""
    if torch.get_num_threads() == 1:
        target.copy_(source)
        return
    targets, sources = target.split(_UNDIVIDED), source.split(_UNDIVIDED)
    torch._foreach_copy_(list(targets), list(sources))


def _share_out(work: Callable[[Iterator[int]], None], count: int, elements: int) -> None:
    """Let as many threads as torch uses, this one among them, work on numbers below `count`."""
    todo = deque(range(count))
    errors: list[BaseException] = []

    def take() -> Iterator[int]:
        while todo:
            try:
                yield todo.popleft()
            except IndexError:  # another thread was faster
                return

    def help_out() -> None:
        try:
            with torch.no_grad(), np.errstate(all="ignore"):
                work(take())
        except BaseException as error:
            errors.append(error)
            todo.clear()

    threads = min(torch.get_num_threads(), _MOST, count, 1 + elements // _WORTH)
    helpers = [threading.Thread(target=help_out, daemon=True) for _ in range(threads - 1)]
    for helper in helpers:
        helper.start()
    try:
        # What is not finite is measured as that.
        with np.errstate(all="ignore"):
            work(take())
    finally:
        todo.clear()
        for helper in helpers:
            helper.join()
    if errors:
        raise errors[0]


def _per_tensor(found: np.ndarray, owners: np.ndarray, count: int) -> torch.Tensor:
    """Add up the rows of every tensor, shape (count, results)."""
    with np.errstate(all="ignore"):
        sums = [np.bincount(owners, values, count) for values in found]
    return torch.from_numpy(np.stack(sums, axis=1))


def _dots(x: np.ndarray, y: np.ndarray, out: np.ndarray) -> None:
    """Σxy of every row; a `y` of one row is that of all."""
    np.matmul(x[:, None, :], y[..., None], out=out[:, None, None])


_ONES = np.ones(ROW, np.float32)


def _square(scratch: np.ndarray, rows: list[np.ndarray], out: list[np.ndarray]) -> None:
    _dots(rows[0], rows[0], out[0])


def _square_and_magnitude(
    scratch: np.ndarray, rows: list[np.ndarray], out: list[np.ndarray]
) -> None:
    _dots(rows[0], rows[0], out[0])
    _dots(np.abs(rows[0], out=scratch), _ONES, out[1])


def _change(scratch: np.ndarray, rows: list[np.ndarray], out: list[np.ndarray]) -> None:
    old, new = rows[:2]
    difference = np.subtract(new, old, out=scratch)
    _dots(difference, difference, out[0])
    _dots(new, new, out[1])


def _change_and_product(scratch: np.ndarray, rows: list[np.ndarray], out: list[np.ndarray]) -> None:
    _change(scratch, rows, out)
    _dots(scratch, rows[2], out[2])


def _product(scratch: np.ndarray, rows: list[np.ndarray], out: list[np.ndarray]) -> None:
    _dots(rows[0], rows[1], out[0])


# Σx²; Σx² and Σ|x|; of old and new values Σ(y−x)² and Σy², and with gradients Σg(y−x); Σxy.
SQUARE = Kernel(_square, 1)
SQUARE_AND_MAGNITUDE = Kernel(_square_and_magnitude, 2)
CHANGE = Kernel(_change, 2)
CHANGE_AND_PRODUCT = Kernel(_change_and_product, 3)
PRODUCT = Kernel(_product, 1)
