"""The parts of a step's measurement: one small class per group of quantities read together.

A part measures what one pass over the tensors gives at once (an update, its product with the
gradient and the new weight are read together, for example). `StepMeasure` calls every part at
every moment; a part overrides the moments that concern it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from lisa_train.measure.buffers import MetricBuffer
from lisa_train.measure.step.gradient_noise import GradientNoise
from lisa_train.model.norms import changes, squares, squares_and_magnitudes, wide
from lisa_train.model.tensor_table import TensorTable

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
        Copies of the weights as they were, by number, if a part asks for them.
    """

    step: int
    tensors: Numbered
    scale: Any = 1.0
    undo: bool = False
    whole: bool = True
    before: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.numbers = numbers(self.tensors)
        self.gradients = [p.grad.detach() for _, p in self.tensors if p.grad is not None]


class Part:
    """Measures some quantities into a buffer; each method is one moment, and may be left as it is.

    Attributes
    ----------
    measures : frozenset of str
        Every quantity that the part knows how to measure.
    copies_weights : bool
        Whether it needs the weights as they were before the step.
    """

    measures: ClassVar[frozenset[str]] = frozenset()
    copies_weights = False

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
        if "grad_norm_l1" in self.want:
            square, magnitude = squares_and_magnitudes(now.gradients)
            self.buffer.add(now.step, "grad_norm_l1", now.numbers, magnitude / now.scale)
        else:
            square = squares(now.gradients)
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
            pairs = zip(now.numbers.tolist(), now.gradients, strict=True)
            self._gradients = {
                i: g.clone() for i, g in pairs if not now.undo or g.dtype != torch.float32
            }

    def update(self, now: StepTensors, clip_coef: Any) -> None:
        """Measure what the optimizer did to the tensors."""
        if not self.copies_weights:
            return
        before = [now.before[i] for i, _ in now.tensors]
        after = [p.detach() for _, p in now.tensors]
        gradients: Any = None
        if "descent" in self.want:
            gradients = [self._gradients.get(i, p.grad) for i, p in now.tensors]
        update, weight, product = changes(before, after, gradients)
        if "update_norm" in self.want:
            self.buffer.add(now.step, "update_norm", now.numbers, update)
        if "weight_norm" in self.want:
            self.buffer.add(now.step, "weight_norm", now.numbers, weight)
        if product is not None:
            descent = -self._before_clipping(product, now, clip_coef)
            self.buffer.add(now.step, "descent", now.numbers, descent)

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
        if len(self._gradients) == len(now.tensors):
            return copied
        chosen = [copied if i in self._gradients else undone for i, _ in now.tensors]
        return torch.stack([values[n] for n, values in enumerate(chosen)])


class Weights(Part):
    """‖θ‖² of what trained, where the update did not give it, and of everything in a census."""

    measures = frozenset({"weight_norm"})

    def __init__(self, want: frozenset[str], table: TensorTable, buffer: MetricBuffer) -> None:
        super().__init__(want, table, buffer)
        self._dtypes: dict[int, torch.dtype] = {}  # at the tensors' last measured step

    def state(self, step: int, active: Numbered) -> None:
        """Measure the tensors that trained in the step, after it."""
        if self.want:
            self._dtypes |= {i: p.dtype for i, p in active}
            done = self.buffer.measured(step, "weight_norm")
            self._add(step, [(i, p) for i, p in active if i not in done])

    def census(self, step: int) -> None:
        """Measure every tensor that this step has not measured yet."""
        done = self.buffer.measured(step, "weight_norm")
        # A tensor in another precision than at its step has been rounded since: what it is now
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

    def _add(self, step: int, tensors: Numbered) -> None:
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
            joined = torch.stack(values).to(wide(device))
            self.buffer.add(step, "opt_steps", np.array(list(counts)), joined)


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
