"""The parts of a step's measurement: one small class per group of quantities read together.

A part measures what one pass over the tensors gives at once (an update, its product with the
gradient and the new weight are read together, for example). `StepMeasure` calls every part at
every moment; a part overrides the moments that concern it.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from lisa_train.measure.buffers import MetricBuffer
from lisa_train.measure.step.gradient_noise import GradientNoise
from lisa_train.measure.step.step_tensors import Numbered, StepTensors, beside, numbers
from lisa_train.model.master_copies import exact
from lisa_train.model.norms import squares, widest_float
from lisa_train.model.tensor_table import TensorTable


class Part:
    """Measures some quantities into a buffer; each method is one moment, and may be left as it is.

    Attributes
    ----------
    measures : frozenset of str
        Every quantity that the part knows how to measure.
    copies_weights : bool
        Whether it needs the weights as they were before the step.
    looks_at_each : bool
        Whether it needs every copy as a tensor of its own.
    """

    measures: ClassVar[frozenset[str]] = frozenset()
    copies_weights = False
    looks_at_each = False

    def __init__(self, want: frozenset[str], table: TensorTable, buffer: MetricBuffer) -> None:
        self.want = want & self.measures
        self.table = table
        self.buffer = buffer

    def gradients(self, now: StepTensors) -> None:
        """Measure accumulated gradients, before clipping."""

    def update(self, now: StepTensors, clip_coef: Any) -> None:
        """Measure what the optimizer did to the tensors."""

    def state(self, step: int, active: Numbered) -> None:
        """Measure the tensors that trained in the step, after it."""

    def census(self, step: int) -> None:
        """Measure all tensors."""

    def forget(self) -> None:
        """Let go of what belongs to the step."""

    def close(self) -> None:
        """Let go of everything."""


class Gradients(Part):
    """‖g‖², Σ|g| and the variance between micro-batches."""

    measures = frozenset({"grad_norm", "grad_norm_l1", "grad_noise"})

    def __init__(
        self,
        want: frozenset[str],
        table: TensorTable,
        buffer: MetricBuffer,
        noise: GradientNoise | None,
    ) -> None:
        super().__init__(want, table, buffer)
        self._noise = noise

    def gradients(self, now: StepTensors) -> None:
        """Measure accumulated gradients, before clipping."""
        if not self.want and self._noise is None:
            return
        square, magnitude = now.gradient_sums(magnitudes="grad_norm_l1" in self.want)
        if magnitude is not None:
            self.buffer.add(now.step, "grad_norm_l1", now.numbers, magnitude / now.scale)
        square = square / now.scale**2
        if "grad_norm" in self.want:
            self.buffer.add(now.step, "grad_norm", now.numbers, square)
        if self._noise is not None and now.whole:
            noise = self._noise.variance(now.numbers, square, now.scale)
            if noise is not None:
                self.buffer.add(now.step, "grad_noise", *noise)

    def forget(self) -> None:
        """Let go of what belongs to the step."""
        if self._noise is not None:
            self._noise.forget()

    def close(self) -> None:
        """Remove the hooks of the gradient noise."""
        if self._noise is not None:
            self._noise.close()


class Updates(Part):
    """‖θ′ − θ‖², −⟨g, θ′ − θ⟩ and, since the same pass reads it, ‖θ′‖²."""

    measures = frozenset({"update_norm", "descent", "weight_norm"})

    def __init__(self, want: frozenset[str], table: TensorTable, buffer: MetricBuffer) -> None:
        super().__init__(want, table, buffer)
        self.copies_weights = bool(self.want - {"weight_norm"})
        self._gradients: dict[int, torch.Tensor] = {}

    def gradients(self, now: StepTensors) -> None:
        """Keep the gradients that clipping or the optimizer will change for good."""
        self._gradients = {}
        if "descent" in self.want:
            # In fp32 the factor of clipping can be taken out again; in half precision its
            # rounding stays.
            self._gradients = {
                i: p.grad.clone()
                for i, p in now.apart
                if p.grad is not None and not (now.undo and p.grad.dtype == torch.float32)
            }

    def update(self, now: StepTensors, clip_coef: Any) -> None:
        """Measure what the optimizer did to the tensors."""
        if not self.copies_weights:
            return
        gradients: Any = None
        if "descent" in self.want:
            gradients = [self._gradients.get(i, p.grad) for i, p in now.apart]
        joined, apart = now.joined_changes(), now.changes(gradients)
        update, weight, product = apart
        if product is not None:
            product = self._before_clipping(product, now, clip_coef)
        if joined is not None:
            update, weight = torch.cat([joined[0], update]), torch.cat([joined[1], weight])
            if product is not None:
                product = torch.cat([joined[2] / now.scale, product])
        if "update_norm" in self.want:
            self.buffer.add(now.step, "update_norm", now.numbers, update)
        if "weight_norm" in self.want:
            self.buffer.add(now.step, "weight_norm", now.numbers, weight)
        if product is not None:
            self.buffer.add(now.step, "descent", now.numbers, -product)

    def forget(self) -> None:
        """Let go of the gradients."""
        self._gradients = {}

    def _before_clipping(
        self, product: torch.Tensor, now: StepTensors, clip_coef: Any
    ) -> torch.Tensor:
        """⟨g, Δθ⟩ with the gradient as it was before clipping."""
        coefficient = 1.0 if clip_coef is None else beside(clip_coef, product)
        undone, copied = product / coefficient, product * (1 / now.scale)
        if not self._gradients:
            return undone
        if len(self._gradients) == len(now.apart):
            return copied
        chosen = [copied if i in self._gradients else undone for i, _ in now.apart]
        return torch.stack([values[n] for n, values in enumerate(chosen)])


class Weights(Part):
    """‖θ‖² of what trained, unless the update brought it, and of everything in a census."""

    measures = frozenset({"weight_norm"})

    def __init__(self, want: frozenset[str], table: TensorTable, buffer: MetricBuffer) -> None:
        super().__init__(want, table, buffer)
        self._dtypes: dict[int, torch.dtype] = {}  # at the tensors' last measured step

    def state(self, step: int, active: Numbered) -> None:
        """Measure the tensors that trained in the step, after it."""
        if self.want:
            self._dtypes |= {i: exact(p).dtype for i, p in active}
            done = self.buffer.measured(step, "weight_norm")
            self._add(step, [(i, exact(p)) for i, p in active if i not in done])

    def census(self, step: int) -> None:
        """Measure every tensor that this step has not measured yet."""
        done = self.buffer.measured(step, "weight_norm")
        # Where the step moved an fp32 copy, the tensor is its rounding: what the model holds
        # counts, and stands later in the buffer.
        kinds = self._dtypes
        self._add(
            step,
            [
                (i, p)
                for i, p in self.table.tensors
                if i not in done or kinds.get(i, p.dtype) != p.dtype
            ],
        )

    def _add(self, step: int, tensors: Sequence[tuple[int, torch.Tensor]]) -> None:
        if tensors:
            square = squares([p for _, p in tensors])
            self.buffer.add(step, "weight_norm", numbers(tensors), square)


class OptimizerSteps(Part):
    """The optimizer's own count of steps, tensor by tensor."""

    measures = frozenset({"opt_steps"})

    def __init__(
        self, want: frozenset[str], table: TensorTable, buffer: MetricBuffer, optimizer: Any
    ) -> None:
        super().__init__(want, table, buffer)
        self._optimizer = optimizer

    def state(self, step: int, active: Numbered) -> None:
        """Read the counts of what trained in the step."""
        if not self.want:
            return
        # Where they are counted, on the host or on each device: bringing them together would wait.
        found: dict[torch.device, dict[int, torch.Tensor]] = {}
        states = self._optimizer.state
        for i, p in active:
            state = states.get(p)
            count = state.get("step") if isinstance(state, dict) else None
            if count is not None:
                count = count if torch.is_tensor(count) else torch.tensor(count)
                found.setdefault(count.device, {})[i] = count
        for device, counts in found.items():
            values = [count.reshape(()) if count.ndim else count for count in counts.values()]
            joined = torch.stack(values).to(widest_float(device))
            self.buffer.add(step, "opt_steps", np.array(list(counts)), joined)
