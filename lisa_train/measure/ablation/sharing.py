"""One ablation in several processes: each takes whole batches, all know what was measured."""

from collections.abc import Sequence
from typing import Any, TypeVar

from lisa_train.model.parallel import is_first, processes

T = TypeVar("T")


class Sharing:
    """The processes that measure together; often just one.

    Batches are those of one process, so that every loss is that of one process, to the bit.

    Attributes
    ----------
    count
        How many there are.
    number
        Which one this is.
    """

    def __init__(self) -> None:
        self.count = processes()
        self.number = 0
        if self.count > 1:
            import torch.distributed as dist

            self.number = dist.get_rank()

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return is_first()

    def rounds(self, batches: Sequence[T]) -> list[tuple[T | None, bool]]:
        """Return this process's batch of every round, and whether the round is the last.

        In the last round there may be none left for it.
        """
        starts = range(0, len(batches), self.count)
        mine = [start + self.number for start in starts]
        return [
            (batches[place] if place < len(batches) else None, start == starts[-1])
            for start, place in zip(starts, mine, strict=True)
        ]

    def gathered(self, found: T) -> list[T]:
        """Return what every process has found, in their order; all call it together."""
        if self.count == 1:
            return [found]
        import torch.distributed as dist

        every: list[Any] = [None] * self.count
        dist.all_gather_object(every, found)
        return every
