"""What is measured at one optimizer step: gradients before clipping, the update, the weights."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from lisa_train.measure.adapter_search import find_lora_pairs
from lisa_train.measure.base_weights import BaseWeights
from lisa_train.measure.buffers import MetricBuffer
from lisa_train.measure.config import RecordConfig
from lisa_train.measure.gradient_noise import GradientNoise
from lisa_train.measure.lora_products import LoraPair, product_squares
from lisa_train.measure.measuring_pass import Probe
from lisa_train.measure.processes import Processes
from lisa_train.measure.recording_time import RecordingTime
from lisa_train.model.norms import changes, local, squares, squares_and_magnitudes, stacked, wide
from lisa_train.model.sharding import local_slices
from lisa_train.model.tensor_table import TensorTable

_OF_PRODUCTS = frozenset({"delta_norm", "merged_norm"})
_OF_UPDATES = frozenset({"update_norm", "descent"})


class StepMeasure:
    """Reads a model's tensors around an optimizer step and puts sums into a buffer.

    Copies that it keeps between `gradients` and `update` are of the tensors that train in this
    very step, and of no others.

    Attributes
    ----------
    active : list of (int, Parameter)
        Numbers and tensors of the step in progress: those with a gradient.
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
        due: Callable[[], bool] = lambda: True,
        time: RecordingTime | None = None,
    ) -> None:
        self.active: list[tuple[int, nn.Parameter]] = []
        self._optimizer = optimizer
        self._want = frozenset(config.quantities)
        self._table = table
        self._buffer = buffer
        self._processes = processes or Processes(table)
        self._probe = Probe(model, table, self._processes)
        self._noise: GradientNoise | None = None
        if config.grad_noise and not self._processes.sharded:
            self._noise = GradientNoise(table, self._processes, due, time)
        self.pairs = _pairs(model, table) if self._want & _OF_PRODUCTS else []
        self._base = BaseWeights(model) if config.base_delta else None
        self._cpu = table.tensors[0][1].device.type == "cpu"
        self._snapshots: dict[int, torch.Tensor] = {}
        self._kinds: dict[int, torch.dtype] = {}  # at the tensors' last measured step
        self._gradients: dict[int, torch.Tensor] = {}
        self._gradient_factor: float | torch.Tensor = 1.0

    # ------------------------------------------------------------------ around the step

    @property
    def second_gradients(self) -> bool:
        """Whether a micro-batch of the step in progress made more than one backward pass."""
        return self._noise is not None and bool(self._noise.twice)

    def micro_batch(self) -> None:
        """Take note of a micro-batch that is done, for the gradient noise."""
        if self._noise is not None:
            self._noise.micro_batch()

    def gradients(
        self,
        step: int,
        scale: float | torch.Tensor,
        undo: bool,
        tensors: list[tuple[int, nn.Parameter]] | None = None,
    ) -> None:
        """Measure the accumulated gradients; keep what the update is measured against.

        `tensors` names those that step now; None stands for all that have a gradient.
        """
        self.active = self._with_gradient() if tensors is None else tensors
        if not self.active:
            return
        scale = _beside(scale, self.active[0][1])
        ids = _numbers(self.active)
        gradients = [p.grad.detach() for _, p in self.active if p.grad is not None]
        square = self._gradient_norms(step, ids, gradients, scale)
        if self._noise is not None and tensors is None:
            noise = self._noise.variance(ids, square, scale)
            if noise is not None:
                self._buffer.add(step, "grad_noise", *noise)
        if self._want & _OF_UPDATES:
            self._snapshots = _copies(self._snapshots, self.active)
        self._gradients = {}
        if "descent" in self._want:
            # In fp32 the factor of clipping can be taken out again; in half precision its
            # rounding stays.
            pairs = zip(ids.tolist(), gradients, strict=True)
            self._gradients = {
                i: g.clone() for i, g in pairs if not undo or g.dtype != torch.float32
            }
            self._gradient_factor = 1 / scale

    def update(self, step: int, clip_coef: Any) -> None:
        """Measure what the optimizer did to the active tensors."""
        if not self.active or not self._want & _OF_UPDATES:
            return
        ids = _numbers(self.active)
        before = [self._snapshots[i] for i, _ in self.active]
        after = [p.detach() for _, p in self.active]
        gradients = None
        if "descent" in self._want:
            gradients = [self._gradients.get(i, p.grad) for i, p in self.active]
        self._kinds = {**self._kinds, **{i: p.dtype for i, p in self.active}}
        update, weight, product = changes(before, after, gradients)  # type: ignore[arg-type]
        if "update_norm" in self._want:
            self._buffer.add(step, "update_norm", ids, update)
        if "weight_norm" in self._want:
            self._buffer.add(step, "weight_norm", ids, weight)
        if product is not None:
            self._buffer.add(step, "descent", ids, -self._before_clipping(product, clip_coef))

    def state(self, step: int) -> None:
        """Measure weights that the update did not give, LoRA's products and the step counts."""
        if "weight_norm" in self._want:
            done = self._buffer.measured(step, "weight_norm")
            self._weights(step, [(i, p) for i, p in self.active if i not in done])
        if "opt_steps" in self._want:
            self._optimizer_steps(step)
        if "delta_norm" in self._want:
            active = {i for i, _ in self.active}
            pairs = [p for p in self.pairs if self._table.ids[p.name_b] in active]
            self._products(step, pairs, census=False)

    def forget(self) -> None:
        """Let go of the step's copies.

        On the CPU the copies of the weights are kept for the next time: there fresh pages cost
        more than the copy itself.
        """
        self.active = []
        self._gradients = {}
        if self._noise is not None:
            self._noise.forget()
        if not self._cpu:
            self._snapshots = {}

    # ------------------------------------------------------------------ all tensors

    def census(self, step: int) -> None:
        """Measure the weights of every tensor that this step has not measured yet."""
        done = self._buffer.measured(step, "weight_norm")
        # A tensor in another precision than at its step has been rounded since: what it is now
        # counts, and stands later in the buffer.
        changed = {i for i, p in self._table.tensors if self._kinds.get(i, p.dtype) != p.dtype}
        self._weights(
            step, [(i, p) for i, p in self._table.tensors if i not in done or i in changed]
        )
        self._products(step, self.pairs, census=True)
        if self._base is not None:
            found = self._base.deltas(self._table)
            ids = np.array([i for i, _ in found], dtype=np.int64)
            if found:
                self._buffer.add(step, "delta_norm", ids, stacked([s for _, s in found]))

    def probe(
        self, step: int, backward: Callable[[], object], scale: float | torch.Tensor = 1.0
    ) -> None:
        """Run one backward pass with all tensors and keep nothing of it but their norms."""
        ids, square = self._probe.run(backward)
        if not len(ids):
            raise RuntimeError("the pass brought no gradient to any of the measured tensors")
        self._buffer.add(step, "probe_grad_norm", ids, square / _beside(scale, square) ** 2)

    def close(self) -> None:
        """Listen to gradients no more, and let go of all copies."""
        self.forget()
        self._snapshots = {}
        if self._noise is not None:
            self._noise.close()

    # ------------------------------------------------------------------ parts

    def _with_gradient(self) -> list[tuple[int, nn.Parameter]]:
        return [(i, p) for i, p in self._table.tensors if p.grad is not None and p.requires_grad]

    def _gradient_norms(
        self, step: int, ids: np.ndarray, gradients: list[torch.Tensor], scale: Any
    ) -> torch.Tensor:
        if "grad_norm_l1" in self._want:
            square, magnitude = squares_and_magnitudes(gradients)
            self._buffer.add(step, "grad_norm_l1", ids, magnitude / scale)
        else:
            square = squares(gradients)
        square = square / scale**2
        if "grad_norm" in self._want:
            self._buffer.add(step, "grad_norm", ids, square)
        return square

    def _before_clipping(self, product: torch.Tensor, clip_coef: Any) -> torch.Tensor:
        """⟨g, Δθ⟩ with the gradient as it was before clipping."""
        coefficient = 1.0 if clip_coef is None else _beside(clip_coef, product)
        undone, copied = product / coefficient, product * self._gradient_factor
        if not self._gradients:
            return undone
        if len(self._gradients) == len(self.active):
            return copied
        chosen = [copied if i in self._gradients else undone for i, _ in self.active]
        return torch.stack([values[n] for n, values in enumerate(chosen)])

    def _weights(self, step: int, tensors: list[tuple[int, nn.Parameter]]) -> None:
        if tensors:
            square = squares([p for _, p in tensors])
            self._buffer.add(step, "weight_norm", _numbers(tensors), square)

    def _products(self, step: int, pairs: list[LoraPair], *, census: bool) -> None:
        if not pairs:
            return
        ids = np.array([self._table.ids[pair.name_b] for pair in pairs])
        # Reading the weights under the adapters is not for every step: they are many times
        # larger. At step 0 it is the W₀ that changes are measured from and compared with.
        first = step == 0 and any(pair.start is not None for pair in pairs)
        merged = census and ("merged_norm" in self._want or first)
        products = product_squares(pairs, merged, self._processes, dense=census)
        known = self._buffer.measured(step, "delta_norm")
        products.deltas = [
            None if i in known or "delta_norm" not in self._want else delta
            for i, delta in zip(ids.tolist(), products.deltas, strict=True)
        ]
        for column in sorted(_OF_PRODUCTS):
            places, values = products.measured(column)
            if places:
                self._buffer.add(step, column, ids[places], values)

    def _optimizer_steps(self, step: int) -> None:
        # Where they are counted, on the host or on each device: bringing them together would wait.
        found: dict[torch.device, dict[int, torch.Tensor]] = {}
        states = self._optimizer.state
        for i, p in self.active:
            state = states.get(p)
            count = state.get("step") if isinstance(state, dict) else None
            if count is not None:
                count = count if torch.is_tensor(count) else torch.tensor(count)
                found.setdefault(count.device, {})[i] = count
        for device, counts in found.items():
            values = [count.reshape(()) if count.ndim else count for count in counts.values()]
            joined = torch.stack(values).to(wide(device))
            self._buffer.add(step, "opt_steps", np.array(list(counts)), joined)


def _numbers(tensors: Iterable[tuple[int, Any]]) -> np.ndarray:
    return np.array([i for i, _ in tensors], dtype=np.int64)


def _beside(value: Any, tensor: torch.Tensor) -> Any:
    """Return a number to calculate with next to `tensor`.

    One that lies on the host stays there, as an argument of the kernel: copying it to an
    accelerator would wait for everything that runs there.
    """
    if not torch.is_tensor(value):
        return float(value)
    value = value.detach().reshape(())
    return value if value.device.type == "cpu" else value.to(tensor.device)


def _copies(
    buffers: dict[int, torch.Tensor], tensors: Iterable[tuple[int, torch.Tensor]]
) -> dict[int, torch.Tensor]:
    """Copy the tensors into the buffers of the last time; drop buffers that are out of use."""
    copies: dict[int, torch.Tensor] = {}
    again: list[tuple[torch.Tensor, torch.Tensor]] = []
    for i, tensor in tensors:
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


def _pairs(model: nn.Module, table: TensorTable) -> list[LoraPair]:
    measured = {i for i, _ in table.tensors}
    return [
        pair
        for pair in find_lora_pairs(model)
        if table.ids.get(pair.name_b) in measured
        and local_slices(pair.a) is not None
        and local_slices(pair.b) is not None
    ]
