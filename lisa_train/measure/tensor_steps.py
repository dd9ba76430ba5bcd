"""Measuring a step whose tensors move one by one, while the backward pass runs."""

import torch
from torch import nn

from lisa_train.measure.step_measure import StepMeasure
from lisa_train.model.tensor_table import TensorTable


class TensorSteps:
    """Gives a `StepMeasure` one tensor at a time and remembers which have been.

    Parameters
    ----------
    measure
        What measures; it keeps a copy of the one tensor that is about to step.
    table
        The numbers of the tensors.
    """

    def __init__(self, measure: StepMeasure, table: TensorTable) -> None:
        self._measure = measure
        self._numbers = {tensor: number for number, tensor in table.tensors}
        self._seen: list[tuple[int, nn.Parameter]] = []

    @property
    def begun(self) -> bool:
        """Whether a tensor of the step in progress has been measured."""
        return bool(self._seen)

    def before(self, step: int, parameter: torch.Tensor) -> None:
        """Measure a complete gradient, unless the tensor is not among the selected ones."""
        number = self._numbers.get(parameter)  # type: ignore[call-overload]
        if number is not None:
            self._measure.gradients(step, 1.0, True, [(number, parameter)])  # type: ignore[list-item]

    def after(self, step: int) -> None:
        """Measure how far the tensor of the last `before` went."""
        self._measure.update(step, None)
        self._seen += self._measure.active
        self._measure.active = []

    def take(self) -> list[tuple[int, nn.Parameter]]:
        """Return what stepped since the last call, in the order of the table."""
        seen, self._seen = sorted(self._seen, key=lambda pair: pair[0]), []
        return seen
