"""Quantities that users register with a function of their own (`lisa_train.Quantity`)."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from lisa_analysis.contract.errors import LisaError
from lisa_train.measure.buffers import MetricBuffer
from lisa_train.measure.disk.run_file import one_sentence
from lisa_train.measure.quantities import REGISTRY, Quantity
from lisa_train.measure.step.parts import Part
from lisa_train.measure.step.step_tensors import Numbered, StepTensors, numbers
from lisa_train.model.master_copies import exact
from lisa_train.model.norms import local, stacked, widest_float
from lisa_train.model.tensor_table import TensorTable


class OwnQuantities(Part):
    """Calls the function of each of them, tensor by tensor."""

    def __init__(self, want: frozenset[str], table: TensorTable, buffer: MetricBuffer) -> None:
        super().__init__(want, table, buffer)
        self._own = [q for q in REGISTRY.values() if q.name in want and q.measure is not None]
        self.want = frozenset(q.name for q in self._own)
        self.copies_weights = self.looks_at_each = any(q.when == "update" for q in self._own)

    def gradients(self, now: StepTensors) -> None:
        """Measure gradients, without the factor of a loss scaler."""
        unscaled = isinstance(now.scale, float) and now.scale == 1.0
        for quantity in self._of("gradients"):
            arguments = ((g if unscaled else g / now.scale,) for g in map(local, now.gradients))
            self._add(quantity, now.step, now.numbers, arguments)

    def update(self, now: StepTensors, clip_coef: Any) -> None:
        """Measure what the optimizer did to the tensors."""
        for quantity in self._of("update"):
            arguments = ((local(now.before[i]), local(exact(p))) for i, p in now.tensors)
            self._add(quantity, now.step, now.numbers, arguments)

    def state(self, step: int, active: Numbered) -> None:
        """Measure the weights that trained in the step."""
        for quantity in self._of("weights"):
            self._add(quantity, step, numbers(active), ((local(exact(p)),) for _, p in active))

    def census(self, step: int) -> None:
        """Measure all weights."""
        for quantity in self._of("weights", "census"):
            done = self.buffer.measured(step, quantity.name)
            tensors = [(i, p) for i, p in self.table.tensors if i not in done]
            self._add(quantity, step, numbers(tensors), ((local(p),) for _, p in tensors))

    def _of(self, *moments: str) -> list[Quantity]:
        return [quantity for quantity in self._own if quantity.when in moments]

    @torch.no_grad()
    def _add(
        self,
        quantity: Quantity,
        step: int,
        ids: np.ndarray,
        arguments: Iterable[Sequence[torch.Tensor]],
    ) -> None:
        assert quantity.measure is not None
        if len(ids):
            values = [_one_number(quantity, quantity.measure, tensors) for tensors in arguments]
            self.buffer.add(step, quantity.name, ids, stacked(values))


def _one_number(
    quantity: Quantity, measure: Callable[..., Any], tensors: Sequence[torch.Tensor]
) -> torch.Tensor:
    try:
        value = measure(*tensors)
    except Exception as error:
        raise LisaError(
            f"quantity {quantity.name!r}: its measure failed: {one_sentence(error)}"
        ) from error
    if not torch.is_tensor(value) or value.numel() != 1:
        what = f"a tensor of shape {tuple(value.shape)}" if torch.is_tensor(value) else repr(value)
        raise LisaError(
            f"quantity {quantity.name!r}: its measure returned {what}, expected a tensor of one "
            "element."
        )
    return value.detach().reshape(()).to(widest_float(value.device))
