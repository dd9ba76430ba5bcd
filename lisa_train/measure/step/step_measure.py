"""What is measured at one optimizer step: gradients before clipping, the update, the weights."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lisa_train.measure.adapters.lora_pairs import LoraPair
from lisa_train.measure.buffers import MetricBuffer
from lisa_train.measure.cadence import Cadence
from lisa_train.measure.config import RecordConfig
from lisa_train.measure.probe.measuring_pass import Passes, Probe
from lisa_train.measure.probe.result import Probed, probed_batches
from lisa_train.measure.processes import Processes
from lisa_train.measure.recording_time import RecordingTime
from lisa_train.measure.step.change_parts import AdapterProducts, BaseDeltas
from lisa_train.measure.step.gradient_noise import GradientNoise
from lisa_train.measure.step.own_quantities import OwnQuantities
from lisa_train.measure.step.parts import Gradients, OptimizerSteps, Part, Updates, Weights
from lisa_train.measure.step.step_tensors import Numbered, StepTensors, beside
from lisa_train.model import compiled
from lisa_train.model.joined import Joined, is_small
from lisa_train.model.master_copies import exact
from lisa_train.model.norms import local
from lisa_train.model.tensor_table import TensorTable

# So many small tensors are worth being joined.
_MANY = 16


class StepMeasure:
    """Reads a model's tensors around an optimizer step and puts sums into a buffer.

    It says which tensors are read at which moment; what is measured of them its parts know.
    Copies that it keeps between `gradients` and `update` are of the tensors that train in this
    very step, and of no others.

    Attributes
    ----------
    active : list of (int, Parameter)
        Numbers and tensors that step now: those with a gradient, or the one that steps inside
        the backward pass.
    pairs : list of LoraPair
        The LoRA adapters whose products are measured.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        config: RecordConfig,
        table: TensorTable,
        buffer: MetricBuffer,
        processes: Processes | None = None,
        cadence: Cadence | None = None,
        time: RecordingTime | None = None,
    ) -> None:
        self._table = table
        self._buffer = buffer
        processes = processes or Processes(table)
        self._model = model
        self._processes = processes
        self._probe = Probe(model, table, processes)
        self._noise: GradientNoise | None = None
        if config.grad_noise and not processes.sharded:
            self._noise = GradientNoise(table, processes, cadence or Cadence(), time)
        want = frozenset(config.quantities)
        products = AdapterProducts(want, table, buffer, model, processes)
        self.pairs: list[LoraPair] = products.pairs
        self._parts: list[Part] = [
            Gradients(want, table, buffer, self._noise),
            Updates(want, table, buffer),
            OwnQuantities(want, table, buffer),
            Weights(want, table, buffer),
            OptimizerSteps(want, table, buffer, optimizer),
            products,
        ]
        nobody = want.difference(*(part.want for part in self._parts))
        if nobody:
            raise NotImplementedError(f"no part measures {', '.join(sorted(nobody))}")
        if config.base_delta:
            self._parts.append(BaseDeltas(want, table, buffer, model))
        self._copies_weights = any(part.copies_weights for part in self._parts)
        self._cpu = table.tensors[0][1].device.type == "cpu"
        if self._cpu:
            compiled.prepare()
        # What looks at every tensor by itself gains nothing.
        alone = self._noise is not None or any(part.looks_at_each for part in self._parts)
        self._joins = self._cpu and self._copies_weights and not alone
        self._joined: Joined | None = None
        self._snapshots: dict[int, torch.Tensor] = {}
        self._now: StepTensors | None = None
        self._numbers = {tensor: number for number, tensor in table.tensors}
        self._stepped: Numbered = []  # inside backward

    @property
    def active(self) -> Numbered:
        """Numbers and tensors that step now, see the class."""
        return [] if self._now is None else self._now.tensors

    def take_up_base(self, name: str | None) -> None:
        """Measure ‖W − W₀‖ from the W₀ of a run that goes on; None measures it no more."""
        for part in self._parts:
            if isinstance(part, BaseDeltas):
                part.take_up(name)

    # ------------------------------------------------------------------ around the step

    @property
    def second_gradients(self) -> bool:
        """Whether a micro-batch of the step in progress made more than one backward pass."""
        return self._noise is not None and bool(self._noise.twice)

    @property
    def micro_batches(self) -> int | None:
        """Micro-batches of this step, of all processes, where they are counted."""
        return None if self._noise is None else self._noise.micro_batches

    def micro_batch(self) -> None:
        """Take note of a micro-batch that is done, for the gradient noise."""
        if self._noise is not None:
            self._noise.micro_batch()

    def gradients(
        self,
        step: int,
        scale: float | torch.Tensor,
        undo: bool,
        tensors: Numbered | None = None,
    ) -> None:
        """Measure the accumulated gradients; keep what the update is measured against.

        `tensors` names those that step now; None stands for all that have a gradient.
        """
        whole = tensors is None
        tensors = self._with_gradient() if tensors is None else tensors
        self._now = None
        if not tensors:
            return
        joined = None
        if whole and self._joins:
            tensors, joined = self._join(tensors)
        factor = beside(scale, tensors[0][1])
        self._now = StepTensors(step, tensors, factor, undo, whole, joined=joined)
        if self._copies_weights:
            self._now.before = self._snapshots = _copies(self._snapshots, self._now.apart)
        for part in self._parts:
            part.gradients(self._now)
        self._now.gradients = []  # whoever lets go of a gradient frees its memory

    def update(self, step: int, clip_coef: Any) -> None:
        """Measure what the optimizer did to the active tensors."""
        if self._now is not None:
            for part in self._parts:
                part.update(self._now, clip_coef)

    def before_tensor(self, step: int, parameter: torch.Tensor) -> None:
        """Measure a gradient inside backward, unless the tensor is not among the selected ones."""
        number = self._numbers.get(parameter)  # type: ignore[call-overload]
        if number is not None:
            self.gradients(step, 1.0, True, [(number, parameter)])  # type: ignore[list-item]

    def after_tensor(self, step: int) -> None:
        """Measure how far the tensor of the last `before_tensor` went."""
        self.update(step, None)
        self._stepped += self.active
        self._now = None

    def state(self, step: int) -> None:
        """Measure what trained in the step as it is now: weights, products, step counts."""
        trained = self.active + sorted(self._stepped, key=lambda pair: pair[0])
        for part in self._parts:
            part.state(step, trained)

    def forget(self) -> None:
        """Let go of the step's copies.

        On the CPU the copies of the weights are kept for the next time: there fresh pages cost
        more than the copy itself.
        """
        self._now, self._stepped = None, []
        for part in self._parts:
            part.forget()
        if not self._cpu:
            self._snapshots = {}

    # ------------------------------------------------------------------ all tensors

    def census(self, step: int) -> None:
        """Measure every tensor, whether it trains or not."""
        for part in self._parts:
            part.census(step)

    def probe(self, step: int, passes: Passes, scale: float | torch.Tensor = 1.0) -> Probed | None:
        """Run backward passes with all tensors and keep nothing of them but their numbers.

        One pass is of all processes together; of several, each is a batch of this process's own,
        and what they have in common is returned.
        """
        if len(passes) > 1:
            return probed_batches(self._model, self._table, self._processes, passes, scale)
        ids, square = self._probe.run(passes[0])
        if not len(ids):
            raise RuntimeError("the pass brought no gradient to any of the measured tensors")
        self._buffer.add(step, "probe_grad_norm", ids, square / beside(scale, square) ** 2)
        return None

    def close(self) -> None:
        """Remove the hooks and free all copies."""
        self.forget()
        self._snapshots, self._joined = {}, None
        for part in self._parts:
            part.close()

    def _join(self, tensors: Numbered) -> tuple[Numbered, Joined | None]:
        """Put the small tensors first, and together, where there are many of them."""
        small: Numbered = []
        others: Numbered = []
        for pair in tensors:
            fits = is_small(pair[1]) and is_small(pair[1].grad)
            (small if fits else others).append(pair)
        if len(small) < _MANY:
            self._joined = None
            return tensors, None
        self._joined = Joined([p for _, p in small], self._joined)
        return small + others, self._joined

    def _with_gradient(self) -> Numbered:
        return [(i, p) for i, p in self._table.tensors if p.grad is not None and p.requires_grad]


def _copies(
    buffers: dict[int, torch.Tensor], tensors: Iterable[tuple[int, torch.Tensor]]
) -> dict[int, torch.Tensor]:
    """Copy the tensors into the buffers of the last time; drop buffers that are out of use."""
    copies: dict[int, torch.Tensor] = {}
    again: list[tuple[torch.Tensor, torch.Tensor]] = []
    for i, parameter in tensors:
        tensor = exact(parameter)
        kept = buffers.get(i)
        if kept is not None and kept.shape == tensor.shape and kept.dtype == tensor.dtype:
            copies[i] = kept
            again.append((local(kept), local(tensor)))
        else:
            copies[i] = tensor.detach().clone()
    if again:
        targets, sources = map(list, zip(*again, strict=True))
        torch._foreach_copy_(targets, sources)
    return copies
