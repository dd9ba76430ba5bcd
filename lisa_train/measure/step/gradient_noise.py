"""Gradient noise: how much the gradient varies between the micro-batches of a step."""

from typing import Any

import numpy as np
import torch
from torch import nn

from lisa_train.measure.cadence import Cadence
from lisa_train.measure.processes import Processes
from lisa_train.measure.recording_time import RecordingTime
from lisa_train.model.norms import squares, stacked
from lisa_train.model.tensor_table import TensorTable


class GradientNoise:
    """tr Σ of one micro-batch gradient, unbiased: (N²Σ‖Gᵢ‖² − N‖ΣGᵢ‖²)/(N−1).

    Gᵢ is what micro-batch i brings into the gradient of the step, 1/N of its own gradient. With
    several processes the micro-batches are those of all of them: n of each of W make N = nW, and
    already one each will do.

    Every Gᵢ is looked at as it arrives, before it is added to what is there: no copy of the
    gradients is needed, no precision is lost in the sum, and DDP has not averaged it yet. That
    takes one backward pass per micro-batch.

    Parameters
    ----------
    table
        The tensors to measure.
    processes
        The processes that train them.
    cadence
        Tells whether the step in progress is to be measured.
    time
        Where the time of looking at gradients, inside the backward pass, is counted.

    Attributes
    ----------
    twice : set of int
        Tensors of which a micro-batch of this step brought a second gradient: of what it brought
        in all the norm is not known.
    micro_batches : int or None
        How many there were in this step, those of all processes; None before it is measured.
    """

    def __init__(
        self,
        table: TensorTable,
        processes: Processes,
        cadence: Cadence,
        time: RecordingTime | None = None,
    ) -> None:
        self._count = processes.count
        self._cadence = cadence
        self._time = time or RecordingTime()
        self.twice: set[int] = set()
        self.micro_batches: int | None = None
        self._arrived: dict[int, torch.Tensor] = {}
        self._batches: list[tuple[np.ndarray, torch.Tensor]] = []
        self._error: Exception | None = None
        self._handles = [self._hook(i, p) for i, p in table.tensors]

    def micro_batch(self) -> None:
        """Take note of a micro-batch that is done; what failed inside its backward pass is raised.

        There it would have ended the training, whatever the recorder makes of errors.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        order = sorted(self._arrived)
        values = [self._arrived[i] for i in order]
        joined = stacked(values) if values else torch.zeros(0, dtype=torch.float64)
        self._batches.append((np.array(order, dtype=np.int64), joined))
        self._arrived = {}

    def variance(
        self, numbers: np.ndarray, square: torch.Tensor, scale: Any
    ) -> tuple[np.ndarray, torch.Tensor, torch.Tensor | None] | None:
        """Return tensors, their tr Σ and where it is not known, or None for one micro-batch.

        Parameters
        ----------
        numbers, square
            The tensors, and ‖g‖² of the gradient of the step.
        scale
            Factor on the gradients that `square` is free of (fp16 loss scale).
        """
        self.micro_batch()
        self.micro_batches = n = len(self._batches) * self._count
        if n < 2:
            return None
        parts = [self._aligned(numbers, *batch).to(square.device) for batch in self._batches]
        # The processes' values are averaged later: W times this one's part of Σ‖Gᵢ‖², in which
        # what it brought counts 1/W.
        total = torch.stack(parts).sum(0) / scale**2 / self._count
        values = (n * n * total - n * square) / (n - 1)
        return numbers, values, self._missing(numbers, values)

    def forget(self) -> None:
        """Let go of everything that belongs to the step."""
        self.twice, self._arrived, self._batches = set(), {}, []
        self.micro_batches = None

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _missing(self, numbers: np.ndarray, values: torch.Tensor) -> torch.Tensor | None:
        """Return 1 where a second gradient came. All processes must ask for the same collective."""
        if not self.twice:
            return torch.zeros_like(values) if self._count > 1 else None
        # Fills: a list as an index, or a copy of it, would wait for an accelerator.
        flags = [float(i in self.twice) for i in numbers.tolist()]
        return torch.stack([torch.full_like(values[0], flag) for flag in flags])

    def _hook(self, number: int, parameter: nn.Parameter) -> Any:
        flag = parameter.requires_grad
        parameter.requires_grad_(True)  # torch takes hooks of such tensors only
        handle = parameter.register_hook(lambda gradient: self._arrive(number, gradient))
        parameter.requires_grad_(flag)
        return handle

    def _arrive(self, number: int, gradient: torch.Tensor) -> None:
        try:
            self._note(number, gradient)
        except Exception as error:
            self._error = self._error or error

    def _note(self, number: int, gradient: torch.Tensor) -> None:
        if not self._cadence.due_now:
            return
        self._time.begin_step()
        with self._time.running():
            square = squares([gradient])[0]
            if number in self._arrived:
                self.twice.add(number)
                square = torch.full_like(square, torch.nan)
            self._arrived[number] = square

    def _aligned(
        self, numbers: np.ndarray, found: np.ndarray, values: torch.Tensor
    ) -> torch.Tensor:
        """Return one micro-batch's values of the tensors `numbers`: zero where it reached none."""
        if np.array_equal(numbers, found):
            return values
        place = {int(i): n for n, i in enumerate(found)}
        zero = torch.zeros((), dtype=values.dtype, device=values.device)
        return torch.stack([values[place[i]] if i in place else zero for i in numbers.tolist()])
