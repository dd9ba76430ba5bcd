"""What an optimizer step shows of the layers that train: one number each, without waiting."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lisa_analysis.contract.errors import ConfigError
from lisa_train.methods.lisa.learning.evidence import Array
from lisa_train.model.master_copies import exact
from lisa_train.model.norms import (
    changes,
    common_device,
    inner_products,
    squares,
    squares_and_magnitudes,
    widest_float,
)
from lisa_train.model.parallel import processes

# Tensors of layers, by layer.
Tensors = Mapping[int, Sequence[nn.Parameter]]
Numbers = dict[int, torch.Tensor]

# The least that a mean of signed numbers counts, as a part of their mean size: scores are positive.
_LEAST = 0.01


class StepMetric(ABC):
    """Takes numbers of gradients around an optimizer's step; they add up over a layer's tensors.

    Called with the tensors that have a gradient: all of them, those of one of several optimizers,
    or one alone where the step is made inside the backward pass.
    """

    name: ClassVar[str]
    # Power of the gradient's scale in a number.
    degree: ClassVar[int] = 2

    def watch(self, tensors: Tensors) -> None:  # noqa: B027
        """Look at the gradients of these tensors as they arrive, where that is needed."""

    @abstractmethod
    def before(self, optimizer: Optimizer, tensors: Tensors) -> Numbers:
        """Numbers of the gradients that the step is about to use."""

    def after(self) -> Numbers:
        """Numbers of the step, once it is made."""
        return {}

    def forget(self) -> None:  # noqa: B027
        """Let go of what belongs to a step that is over, made or not."""

    def close(self) -> None:  # noqa: B027
        """Stop looking."""

    @abstractmethod
    def of_visit(self, values: Array, size: int) -> float:
        """Return what a visit shows; NaN for nothing.

        Parameters
        ----------
        values
            Shape (steps,), finite.
        size
            Elements of the layer's tensors.
        """


class GradRms(StepMetric):
    """‖g‖/√N, the gradient as the optimizer gets it; geometric mean over steps."""

    name = "grad_rms"

    def before(self, optimizer: Optimizer, tensors: Tensors) -> Numbers:
        """‖g‖²."""
        flat = [p.grad for some in tensors.values() for p in some if p.grad is not None]
        return _by_layer(squares(flat), tensors)

    def of_visit(self, values: Array, size: int) -> float:
        """Geometric mean of ‖g‖/√N."""
        return float(np.sqrt(_geometric(values) / size))


class L1Descent(StepMetric):
    """η‖g‖₁, the first-order loss decrease of a step of Adam; geometric mean over steps."""

    name = "l1_descent"
    degree = 1

    def before(self, optimizer: Optimizer, tensors: Tensors) -> Numbers:
        """η‖g‖₁."""
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        flat = [p for some in tensors.values() for p in some]
        _, sizes = squares_and_magnitudes([p.grad for p in flat if p.grad is not None])
        each = [rates[id(p)] for p in flat]
        if each and all(rate is each[0] or rate == each[0] for rate in each):
            return _by_layer(sizes * each[0], tensors)
        scaled = [size * rate for size, rate in zip(sizes, each, strict=True)]
        return _by_layer(torch.stack(scaled), tensors) if scaled else {}

    def of_visit(self, values: Array, size: int) -> float:
        """Geometric mean of η‖g‖₁; steps of rate 0 say nothing."""
        return _geometric(values)


class Descent(StepMetric):
    """−⟨g, θ′−θ⟩, the first-order loss decrease of the step that was made; mean over steps."""

    name = "descent"
    degree = 1

    def __init__(self) -> None:
        self._before: dict[int, list[tuple[nn.Parameter, torch.Tensor]]] = {}

    def before(self, optimizer: Optimizer, tensors: Tensors) -> Numbers:
        """Nothing yet; the weights are kept."""
        self._before = {
            layer: [(p, exact(p).detach().clone()) for p in some] for layer, some in tensors.items()
        }
        return {}

    def after(self) -> Numbers:
        """−⟨g, θ′−θ⟩."""
        moved = [(p, old) for some in self._before.values() for p, old in some]
        tensors = {layer: [p for p, _ in some] for layer, some in self._before.items()}
        self._before = {}
        if not moved or any(p.grad is None for p, _ in moved):
            return {}
        gradients = [p.grad for p, _ in moved if p.grad is not None]
        _, _, products = changes([old for _, old in moved], [exact(p) for p, _ in moved], gradients)
        assert products is not None
        return _by_layer(-products, tensors)

    def forget(self) -> None:
        """Let go of weights."""
        self._before = {}

    def of_visit(self, values: Array, size: int) -> float:
        """Mean; steps that go uphill take away."""
        return _positive_mean(values)


class Signal(StepMetric):
    """√(‖E g‖²/N): what the micro-batches of a step have in common.

    Their gradients Gᵢ, each 1/n of its own, are multiplied with each other as they arrive:
    2n/(n−1)·Σ_{i<j}⟨Gᵢ, Gⱼ⟩ is ‖E g‖² on average, however noisy they are. Before clipping, whose
    factor all layers share. With several processes it is the mean over them.
    """

    name = "signal"

    def __init__(self) -> None:
        self._products: dict[int, torch.Tensor] = {}
        self._arrived: dict[int, int] = {}
        self._handles: list[Any] = []

    def watch(self, tensors: Tensors) -> None:
        """Hear of every gradient before it is added to what is there."""
        for some in tensors.values():
            for p in some:
                flag = p.requires_grad
                p.requires_grad_(True)  # torch takes hooks of such tensors only
                self._handles.append(p.register_hook(_Arrival(self, p)))
                p.requires_grad_(flag)

    @torch.no_grad()
    def arrived(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """Take what a micro-batch brought, before it is added."""
        key = id(parameter)
        self._arrived[key] = self._arrived.get(key, 0) + 1
        if parameter.grad is None or self._arrived[key] == 1:
            return
        product = inner_products([parameter.grad], [gradient])[0]
        self._products[key] = product + self._products.get(key, torch.zeros_like(product))

    def before(self, optimizer: Optimizer, tensors: Tensors) -> Numbers:
        """‖E g‖²."""
        passes = max(self._arrived.get(id(p), 0) for some in tensors.values() for p in some)
        if passes == 1:
            raise ConfigError(
                "lisa.learn.metric is 'signal', which compares the micro-batches of a step, but a "
                "step made 1 backward pass: set gradient_accumulation_steps to 2 or more (and the "
                "batch size to a part), give the engine two functions as `probe` that make a pass "
                "of half a batch each, or choose 'grad_rms'."
            )
        home = common_device([p for some in tensors.values() for p in some])
        zero = torch.zeros((), dtype=widest_float(home), device=home)
        sums = torch.stack([self._of_layer(some, zero) for some in tensors.values()])
        if processes() > 1:
            dist.all_reduce(sums)
            sums /= processes()
        return dict(zip(tensors, sums.unbind(), strict=True))

    def _of_layer(self, some: Sequence[nn.Parameter], zero: torch.Tensor) -> torch.Tensor:
        total = zero
        for p in some:
            n, product = self._arrived.get(id(p), 0), self._products.get(id(p))
            if product is not None:
                total = total + product.to(zero.device) * (2 * n / (n - 1))
        return total

    def forget(self) -> None:
        """Start the next step."""
        self._products.clear()
        self._arrived.clear()

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def of_visit(self, values: Array, size: int) -> float:
        """Root of the mean, in which chance may make steps negative."""
        return float(np.sqrt(_positive_mean(values) / size))


class _Arrival:
    """Hook of one tensor."""

    def __init__(self, metric: Signal, parameter: nn.Parameter) -> None:
        self._metric = metric
        self._parameter = parameter

    def __call__(self, gradient: torch.Tensor) -> None:
        self._metric.arrived(self._parameter, gradient)


STEP_METRICS: dict[str, type[StepMetric]] = {
    metric.name: metric for metric in (GradRms, L1Descent, Descent, Signal)
}


def _by_layer(values: torch.Tensor, tensors: Tensors) -> Numbers:
    """Add up one number per tensor within layers."""
    counts = [len(some) for some in tensors.values()]
    parts = values.split(counts) if sum(counts) else ()
    return {layer: part.sum() for layer, part in zip(tensors, parts, strict=False) if len(part)}


def _geometric(values: Array) -> float:
    positive = values[values > 0]
    return float(np.exp(np.log(positive).mean())) if positive.size else float("nan")


def _positive_mean(values: Array) -> float:
    if not values.size or not np.abs(values).any():
        return float("nan")
    return float(max(values.mean(), _LEAST * np.abs(values).mean()))
