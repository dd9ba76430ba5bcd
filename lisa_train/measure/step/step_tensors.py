"""The tensors that make an optimizer step, with what is kept of them until it is done."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from lisa_train.model.joined import Joined
from lisa_train.model.master_copies import exact
from lisa_train.model.norms import (
    changes,
    changes_of_rows,
    squares,
    squares_and_magnitudes,
    squares_and_magnitudes_of_rows,
)

Numbered = list[tuple[int, nn.Parameter]]


@dataclass
class StepTensors:
    """The tensors that step now.

    Attributes
    ----------
    step
        Number of the optimizer step.
    tensors
        Their numbers, and the tensors; all have a gradient.
    scale
        Factor on the gradients that the optimizer will not see (fp16 loss scale).
    undo
        Whether the factor of clipping will be known after the step.
    whole
        Whether these are all tensors of the step; else one of them, stepping inside backward.
    before
        Copies of the weights of `apart` as they were, by number, if a part asks for them.
    joined
        The first of the tensors, copied side by side, where there are many small ones.
    apart
        The others, with their numbers.
    """

    step: int
    tensors: Numbered
    scale: Any = 1.0
    undo: bool = False
    whole: bool = True
    before: dict[int, torch.Tensor] = field(default_factory=dict)
    joined: Joined | None = None

    def __post_init__(self) -> None:
        self.numbers = numbers(self.tensors)
        self.gradients = [p.grad.detach() for _, p in self.tensors if p.grad is not None]
        self.small = 0 if self.joined is None else len(self.joined.layout.shapes)
        self.apart = self.tensors[self.small :]

    def gradient_sums(self, *, magnitudes: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Σg² and, if asked for, Σ|g| of all tensors, in their order."""
        apart = self.gradients[self.small :]
        square, magnitude = squares_and_magnitudes(apart) if magnitudes else (squares(apart), None)
        if (joined := self.joined) is not None:
            first = squares_and_magnitudes_of_rows(joined.layout, joined.gradients)
            square = torch.cat([first[0], square])
            magnitude = None if magnitude is None else torch.cat([first[1], magnitude])
        return square, magnitude

    def changes(
        self, gradients: list[torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Σ(θ′−θ)², Σθ′² and Σg(θ′−θ) of the tensors that are not joined."""
        before = [self.before[i] for i, _ in self.apart]
        return changes(before, [exact(p).detach() for _, p in self.apart], gradients)

    def joined_changes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Return the same of the joined tensors, with the gradients of before clipping."""
        if (joined := self.joined) is None:
            return None
        after = [p for _, p in self.tensors[: self.small]]
        joined.layout.fill(after, joined.after)
        joined.is_after = True
        return changes_of_rows(joined.layout, joined.before, joined.after, joined.gradients)


def numbers(tensors: Iterable[tuple[int, Any]]) -> np.ndarray:
    """Return the numbers of numbered tensors."""
    return np.array([i for i, _ in tensors], dtype=np.int64)


def beside(value: Any, tensor: torch.Tensor) -> Any:
    """Return a number to calculate with next to `tensor`.

    One that lies on the host stays there, as an argument of the kernel: copying it to an
    accelerator would wait for everything that runs there.
    """
    if not torch.is_tensor(value):
        return float(value)
    value = value.detach().reshape(())
    return value if value.device.type == "cpu" else value.to(tensor.device)
