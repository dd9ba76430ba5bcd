"""Whether an optimizer leaves frozen tensors alone, seen in its first step after each change."""

from collections.abc import Iterable

import torch
from torch.optim import Optimizer

from lisa_analysis.contract.errors import ConfigError


class WriteCheck:
    """Compares how often frozen tensors were written to before and after a step.

    torch counts the writes to every tensor, so that this reads no values.
    """

    def __init__(self) -> None:
        self._versions: dict[Optimizer, list[tuple[torch.Tensor, int]]] = {}
        self._due: set[Optimizer] = set()

    def start(self, optimizers: Iterable[Optimizer]) -> None:
        """Check the next step of each of these optimizers: other tensors are frozen now."""
        self._due = set(optimizers)
        self._versions = {}

    def before_step(self, optimizer: Optimizer, frozen: Iterable[torch.Tensor]) -> None:
        """Note the counts where a check is due."""
        if optimizer in self._due:
            self._versions[optimizer] = [(p, p._version) for p in frozen]

    def after_step(self, optimizer: Optimizer) -> None:
        """`ConfigError` when the step wrote to a tensor that is frozen."""
        self._due.discard(optimizer)
        before = self._versions.pop(optimizer, ())
        moved = [p for p, version in before if p._version != version]
        if moved:
            raise ConfigError(
                f"{type(optimizer).__name__} wrote to {len(moved)} tensors that rest (first: of "
                f"shape {tuple(moved[0].shape)}), although they have no gradient; choose an "
                "optimizer that leaves such tensors alone, as torch's do."
            )
