"""The visit in progress: numbers of its steps, and what they come to when it ends."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lisa_train.methods.lisa.learning.evidence import Array
from lisa_train.methods.lisa.learning.step_metrics import StepMetric, Tensors
from lisa_train.model.norms import stacked

# First part of a visit that is left out after a state reset, when steps are larger than later on.
_LEFT_OUT = 0.2


class Visits:
    """Collects the numbers of a metric, step by step, for the layers of one draw.

    Numbers stay on their device until a visit ends or is saved: no step waits for an accelerator.

    Parameters
    ----------
    metric
        What is measured.
    units
        Tensors of every layer.
    layers
        Number of layers.
    sharded
        Whether the tensors are split over processes, each of which sees its part.
    """

    def __init__(
        self,
        metric: StepMetric,
        units: Mapping[Any, Sequence[nn.Parameter]],
        layers: int,
        *,
        sharded: bool = False,
    ) -> None:
        self._metric = metric
        self._sharded = sharded
        self._sizes = [sum(p.numel() for p in units[i]) for i in range(layers)]
        self._fresh: frozenset[int] = frozenset()
        self._now: dict[int, list[torch.Tensor]] = {}
        self._skipped: Any = None
        # Layers of a step, their numbers, and whether the step was skipped for an overflow.
        self._steps: list[tuple[tuple[int, ...], Any, Any]] = []

    def start(self, fresh: Collection[int]) -> None:
        """Begin the visits of a draw, whose `fresh` layers have lost their optimizer state."""
        self._fresh = frozenset(fresh)
        self._steps = []

    def before_step(self, optimizer: Optimizer, tensors: Tensors) -> None:
        """Measure the gradients of `tensors` just before an optimizer uses them."""
        if tensors:
            self._note(optimizer, self._metric.before(optimizer, tensors))

    def after_step(self, optimizer: Optimizer) -> None:
        """Measure what the step did."""
        self._note(optimizer, self._metric.after())

    def _note(self, optimizer: Optimizer, numbers: Mapping[int, torch.Tensor]) -> None:
        # A fused optimizer takes off the loss scale of fp16 itself, and skips what overflowed.
        scale = getattr(optimizer, "grad_scale", None)
        self._skipped = getattr(optimizer, "found_inf", None)
        if self._sharded and numbers:
            # Sums over parts of tensors; all processes step at the same time.
            sums = stacked([numbers[layer] for layer in numbers])
            dist.all_reduce(sums)
            numbers = dict(zip(numbers, sums.unbind(), strict=True))
        for layer, number in numbers.items():
            if scale is not None:
                number = number / scale.to(number.device).double() ** self._metric.degree
            self._now.setdefault(layer, []).append(number)

    def end_step(self) -> None:
        """Close the step that was measured since the last call, if there was one."""
        self._metric.forget()
        if not self._now:
            return
        layers = tuple(sorted(self._now))
        sums = stacked([_total(self._now[layer]) for layer in layers])
        self._steps.append((layers, sums, self._skipped))
        self._now, self._skipped = {}, None

    def take(self) -> Array | None:
        """End the visits: what they show, shape (L,), NaN for layers that were not drawn.

        Infinite for a layer with a number that is not finite; None when no step was measured.
        """
        steps, self._steps = _resolved(self._steps), []
        if not steps:
            return None
        found: dict[int, list[float]] = {}
        for layers, numbers in steps:
            for layer, number in zip(layers, numbers, strict=True):
                found.setdefault(layer, []).append(number)
        result = np.full(len(self._sizes), np.nan)
        for layer, numbers in found.items():
            values = np.array(numbers)
            if not np.isfinite(values).all():
                result[layer] = np.inf
                continue
            first = int(_LEFT_OUT * values.size) if layer in self._fresh else 0
            result[layer] = self._metric.of_visit(values[first:], self._sizes[layer])
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the numbers of the visit in progress, as JSON values."""
        if self._now:
            self.end_step()  # a step was made, and the next one has not begun
        self._steps = [(layers, numbers, None) for layers, numbers in _resolved(self._steps)]
        return {
            "fresh": sorted(self._fresh),
            "steps": [
                [list(layers), [_word(x) for x in numbers]] for layers, numbers, _ in self._steps
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._fresh = frozenset(state["fresh"])
        self._steps = [(tuple(layers), list(map(float, x)), None) for layers, x in state["steps"]]
        self._now = {}

    def close(self) -> None:
        """Stop measuring."""
        self._metric.close()


def _total(numbers: list[torch.Tensor]) -> torch.Tensor:
    return numbers[0] if len(numbers) == 1 else stacked(numbers).sum()


def _resolved(
    steps: list[tuple[tuple[int, ...], Any, Any]],
) -> list[tuple[tuple[int, ...], list[float]]]:
    """Numbers on the host; what an accelerator still holds is fetched at once."""
    waiting = [x for _, numbers, skipped in steps for x in (numbers, skipped) if torch.is_tensor(x)]
    fetched: dict[int, Any] = {}
    if waiting:
        joined = torch.cat([x.reshape(-1).to(waiting[0].device).double() for x in waiting]).cpu()
        for x, part in zip(waiting, joined.split([x.numel() for x in waiting]), strict=True):
            fetched[id(x)] = part.tolist()
    result = []
    for layers, numbers, skipped in steps:
        if skipped is None or not any(fetched[id(skipped)]):
            result.append((layers, fetched.get(id(numbers), numbers)))
    return result


def _word(number: float) -> float | str:
    """JSON has no infinity; Python reads the words."""
    return number if np.isfinite(number) else str(number)
