"""An optimizer's step of fp32 copies in the place of its bf16 tensors, a few tensors at a time."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import LBFGS, Optimizer

from lisa_train.model.norms import local

# Elements whose gradients are in fp32 at once (64 MiB), unless one tensor has more.
TOGETHER = 1 << 24
# Where the optimizers are made that are known to treat every tensor for itself.
_APART = ("torch.optim.", "bitsandbytes.", "transformers.optimization")

# Stands in a group for a tensor that does not step now; bitsandbytes knows tensors by their places.
_NOBODY = torch.zeros(())


@dataclass
class _Pair:
    """A place in an optimizer's groups, the parameter there, and its copy."""

    group: list[torch.Tensor]
    place: int
    parameter: torch.Tensor
    copy: torch.Tensor


@dataclass
class CopyStep:
    """One step of an optimizer, by copies of some of its tensors.

    A gradient in fp32 takes twice the memory of the bf16 one that it is made of. So that not all
    exist at once, the tensors step in groups of bounded size wherever the optimizer is known to
    treat each for itself (those of torch, bitsandbytes, and transformers' Adafactor); the last
    group steps in the step that the caller has asked for, and with it whatever has no copy.
    Nobody's hooks see the other groups.
    """

    optimizer: Optimizer
    _last: list[_Pair] = field(default_factory=list)
    _done: list[tuple[_Pair, torch.Tensor]] = field(default_factory=list)

    @torch.no_grad()
    def begin(self, copies: Mapping[torch.Tensor, torch.Tensor]) -> None:
        """Step all groups but the last, and put the last one's copies where it will step.

        Parameters
        ----------
        copies
            Parameter -> its copy in fp32. Those without a gradient stay where they are.
        """
        optimizer = self.optimizer
        if hasattr(optimizer, "check_overrides"):
            optimizer.check_overrides()  # bitsandbytes looks its tensors up once, by identity
        pairs = [
            _Pair(group["params"], place, parameter, copy)
            for group in optimizer.param_groups
            for place, parameter in enumerate(group["params"])
            if parameter.grad is not None and (copy := copies.get(parameter)) is not None
        ]
        step = _step_alone(optimizer)
        groups = list(_groups(pairs)) if step is not None else [pairs]
        try:
            for group in groups[:-1]:
                assert step is not None
                self._step_now(step, group)
        except BaseException:
            self.end()
            raise
        self._last = groups[-1] if groups else []
        for pair in self._last:
            pair.group[pair.place] = pair.copy
            self._enter(pair)

    def end(self) -> list[torch.Tensor]:
        """Put everything back; return the parameters whose copies have moved.

        After a step that failed, too: what is left is an optimizer of its own tensors.
        """
        for pair in self._last:
            pair.group[pair.place] = pair.parameter
            self._leave(pair)
        for pair, gradient in self._done:
            pair.parameter.grad = gradient
        moved = [pair.parameter for pair, _ in self._done]
        moved += [pair.parameter for pair in self._last]
        self._last, self._done = [], []
        return moved

    def _step_now(self, step: Callable[[Any], Any], pairs: list[_Pair]) -> None:
        chosen = {pair.parameter: pair.copy for pair in pairs}
        with _only(self.optimizer, chosen):
            for pair in pairs:
                self._enter(pair)
            try:
                step(self.optimizer)
            finally:
                for pair in pairs:
                    self._leave(pair)
        for pair in pairs:
            gradient = pair.parameter.grad
            assert gradient is not None
            self._done.append((pair, gradient))
            pair.parameter.grad = None  # the caller's step is to leave it alone

    def _enter(self, pair: _Pair) -> None:
        state = self.optimizer.state
        assert pair.parameter.grad is not None
        pair.copy.grad = pair.parameter.grad.float()
        if pair.parameter in state:
            state[pair.copy] = _in_fp32(state.pop(pair.parameter))

    def _leave(self, pair: _Pair) -> None:
        state = self.optimizer.state
        pair.copy.grad = None
        if pair.copy in state:
            state[pair.parameter] = state.pop(pair.copy)


@contextmanager
def _only(optimizer: Optimizer, chosen: Mapping[torch.Tensor, torch.Tensor]) -> Iterator[None]:
    """Leave nothing in the optimizer's groups but these copies, at their parameters' places."""
    whole = [list(group["params"]) for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["params"][:] = [chosen.get(p, _NOBODY) for p in group["params"]]
        yield
    finally:
        for group, tensors in zip(optimizer.param_groups, whole, strict=True):
            group["params"][:] = tensors


def _step_alone(optimizer: Optimizer) -> Callable[[Any], Any] | None:
    """Return the optimizer's step without anybody's hooks; None where it takes all tensors."""
    kind = type(optimizer)
    if isinstance(optimizer, LBFGS) or not f"{kind.__module__}.".startswith(_APART):
        return None
    step: Any = kind.step
    # torch puts the hooks around the step of the class, once.
    return getattr(step, "__wrapped__", None) if getattr(step, "hooked", False) else None


def _groups(pairs: list[_Pair]) -> Iterator[list[_Pair]]:
    """Cut the pairs, in their order, into groups of at most `TOGETHER` elements, or one tensor."""
    group: list[_Pair] = []
    size = 0
    for pair in pairs:
        elements = local(pair.copy).numel()
        if group and size + elements > TOGETHER:
            yield group
            group, size = [], 0
        group.append(pair)
        size += elements
    if group:
        yield group


def _in_fp32(state: Any) -> Any:
    """Return the state of a copy: what a checkpoint of a bf16 parameter has rounded is widened."""
    if not isinstance(state, dict):
        return state
    return {
        key: value.float() if torch.is_tensor(value) and value.dtype == torch.bfloat16 else value
        for key, value in state.items()
    }
