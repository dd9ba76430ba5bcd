"""What is measured at one optimizer step: gradients before clipping, the update, the weights."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from lisa_train.adapters import LoraPair, find_lora_pairs, product_squares
from lisa_train.base_weights import BaseWeights
from lisa_train.buffers import MetricBuffer
from lisa_train.config import RecordConfig
from lisa_train.norms import changes, squares, squares_and_magnitudes, wide
from lisa_train.tensor_table import TensorTable

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
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: RecordConfig,
        table: TensorTable,
        buffer: MetricBuffer,
    ) -> None:
        self.active: list[tuple[int, nn.Parameter]] = []
        self._optimizer = optimizer
        self._want = frozenset(config.quantities)
        self._noise = config.grad_noise
        self._table = table
        self._buffer = buffer
        self._pairs = _pairs(model, table) if self._want & _OF_PRODUCTS else []
        self._base = BaseWeights(model) if config.base_delta else None
        self._cpu = table.tensors[0][1].device.type == "cpu"
        self._snapshots: dict[int, torch.Tensor] = {}
        self._gradients: dict[int, torch.Tensor] = {}
        self._gradient_factor: float | torch.Tensor = 1.0
        self._micro_before: dict[int, torch.Tensor] = {}
        self._micro_squares: list[tuple[np.ndarray, torch.Tensor]] = []

    # ------------------------------------------------------------------ around the step

    def micro_batch(self) -> None:
        """Add the gradient that the micro-batch just done brought, for the gradient noise."""
        if not self._noise:
            return
        active = self._with_gradient()
        gradients = [p.grad.detach() for _, p in active if p.grad is not None]
        before = [
            self._micro_before.get(i, torch.zeros((), device=p.device).expand_as(p))
            for i, p in active
        ]
        increments, _, _ = changes(before, gradients)
        self._micro_squares.append((_numbers(active), increments))
        self._micro_before = {i: g.clone() for (i, _), g in zip(active, gradients, strict=True)}

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
        if self._noise and tensors is None:
            self._gradient_noise(step, ids, square, scale)
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
        active = {i for i, _ in self.active}
        self._products(step, [p for p in self._pairs if self._table.ids[p.name_b] in active])

    def forget(self) -> None:
        """Let go of the step's copies.

        On the CPU the copies of the weights are kept for the next time: there fresh pages cost
        more than the copy itself.
        """
        self.active = []
        self._gradients = {}
        self._micro_before = {}
        self._micro_squares = []
        if not self._cpu:
            self._snapshots = {}

    # ------------------------------------------------------------------ all tensors

    def census(self, step: int) -> None:
        """Measure the weights of every tensor that this step has not measured yet."""
        done = self._buffer.measured(step, "weight_norm")
        self._weights(step, [(i, p) for i, p in self._table.tensors if i not in done])
        known = self._buffer.measured(step, "delta_norm")
        self._products(step, [p for p in self._pairs if self._table.ids[p.name_b] not in known])
        if self._base is not None:
            found = self._base.deltas(self._table)
            ids = np.array([i for i, _ in found], dtype=np.int64)
            if found:
                self._buffer.add(step, "delta_norm", ids, torch.stack([s for _, s in found]))

    def probe(self, step: int, backward: Callable[[], object]) -> None:
        """Run one backward pass with all tensors and keep nothing of it but their norms.

        Every gradient goes as soon as its norm is taken. Flags, gradients and the random state
        are as before afterwards.
        """
        tensors = self._table.tensors
        flags = [(p, p.requires_grad, p.grad) for _, p in tensors]
        found: dict[int, torch.Tensor] = {}
        twice: set[int] = set()

        def take(number: int, tensor: torch.Tensor) -> None:
            if number in found:
                twice.add(number)
            elif tensor.grad is not None:
                found[number] = squares([tensor.grad])[0]
            tensor.grad = None

        handles = []
        devices = sorted({p.device.index for _, p in tensors if p.device.type == "cuda"})
        try:
            for i, p in tensors:
                p.grad = None
                p.requires_grad_(True)
                handles.append(
                    p.register_post_accumulate_grad_hook(lambda tensor, i=i: take(i, tensor))  # type: ignore[misc]
                )
            with torch.random.fork_rng(devices=devices), torch.enable_grad():
                backward()
        finally:
            for handle in handles:
                handle.remove()
            for p, flag, gradient in flags:
                p.requires_grad_(flag)
                p.grad = gradient
        # The norm of a gradient that came in two parts, the first gone by then, is not known.
        if ids := sorted(found.keys() - twice):
            self._buffer.add(
                step, "probe_grad_norm", np.array(ids), torch.stack([found[i] for i in ids])
            )

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

    def _gradient_noise(
        self, step: int, ids: np.ndarray, square: torch.Tensor, scale: Any
    ) -> None:
        """Tr Σ of one micro-batch gradient, unbiased: (n²Σ‖Gᵢ‖² − n‖ΣGᵢ‖²)/(n−1).

        Gᵢ is what micro-batch i added to the accumulated gradient, 1/n of its own gradient.
        """
        self.micro_batch()
        n = len(self._micro_squares)
        same = all(np.array_equal(ids, other) for other, _ in self._micro_squares)
        if n > 1 and same:
            total = torch.stack([s for _, s in self._micro_squares]).sum(0) / scale**2
            noise = (n * n * total - n * square) / (n - 1)
            self._buffer.add(step, "grad_noise", ids, noise.clamp_min(0))

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

    def _products(self, step: int, pairs: list[LoraPair]) -> None:
        if not pairs:
            return
        ids = np.array([self._table.ids[pair.name_b] for pair in pairs])
        deltas, indices, merged = product_squares(pairs, "merged_norm" in self._want)
        if "delta_norm" in self._want:
            self._buffer.add(step, "delta_norm", ids, deltas)
        self._buffer.add(step, "merged_norm", ids[indices], merged)

    def _optimizer_steps(self, step: int) -> None:
        # Where they are counted, on the host or on each device: bringing them together would wait.
        found: dict[torch.device, dict[int, torch.Tensor]] = {}
        for i, p in self.active:
            state = self._optimizer.state.get(p)
            count = state.get("step") if isinstance(state, dict) else None
            if count is not None:
                count = torch.as_tensor(count).reshape(())
                found.setdefault(count.device, {})[i] = count.to(wide(count.device))
        for counts in found.values():
            self._buffer.add(
                step, "opt_steps", np.array(list(counts)), torch.stack(list(counts.values()))
            )


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
    for i, tensor in tensors:
        kept = buffers.get(i)
        if kept is not None and kept.shape == tensor.shape and kept.dtype == tensor.dtype:
            copies[i] = kept.copy_(tensor.detach())
        else:
            copies[i] = tensor.detach().clone()
    return copies


def _pairs(model: nn.Module, table: TensorTable) -> list[LoraPair]:
    measured = {i for i, _ in table.tensors}
    # Factors that are sharded (FSDP) have no Gram matrix of their own on any one process.
    return [
        pair
        for pair in find_lora_pairs(model)
        if table.ids.get(pair.name_b) in measured
        and not hasattr(pair.a, "to_local")
        and not hasattr(pair.b, "to_local")
    ]
