"""Optimizer step inside backward: every gradient is used and freed as soon as it is complete."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch.optim import LBFGS, Optimizer

from lisa_analysis.contract.errors import ConfigError
from lisa_train.model.parallel import processes
from lisa_train.optim.frozen_state import optimizers_of
from lisa_train.optim.schedule_free import is_schedule_free
from lisa_train.private_names import check


class TensorWatcher(Protocol):
    """Looks at every tensor's gradient and step, because afterwards the gradient is gone."""

    def before_tensor(self, parameter: torch.Tensor) -> None:
        """Look at a complete gradient; the tensor has not moved yet."""

    def after_tensor(self, parameter: torch.Tensor) -> None:
        """Look at the tensor after its step; its gradient is still there."""


class StepInBackward:
    """Steps every tensor of an optimizer within `loss.backward()`, and frees its gradient.

    At no time is there more than the gradient of one tensor, instead of those of all. The
    optimizer stays the ordinary one, with its groups, hooks, scheduler and `state_dict`;
    `optimizer.step()` after the backward pass finds nothing left to do and ends the step. Weights
    and state are those of the ordinary step bit for bit, for every optimizer that treats its
    tensors one by one. A tensor that is used several times (tied embeddings) steps once, when its
    whole gradient is there.

    One backward pass makes one step: no accumulation, no clipping to a global norm, no loss
    scale, one process. Whoever clips sees no gradients. An exception inside backward leaves the
    model between two steps.

    Parameters
    ----------
    optimizer
        The optimizer of all tensors that may train; wrappers are looked through.

    Attributes
    ----------
    watchers : list of TensorWatcher
        Called around the step of every tensor.

    Raises
    ------
    ConfigError
        For an optimizer that cannot step its tensors one by one.

    Examples
    --------
    >>> with StepInBackward(optimizer):  # doctest: +SKIP
    ...     for batch in batches:
    ...         model(**batch).loss.backward()  # the weights move here
    ...         optimizer.step()
    """

    def __init__(self, optimizer: Any) -> None:
        several = optimizers_of(optimizer)
        if len(several) != 1:
            raise ConfigError(
                f"stepping inside backward takes one optimizer, got {len(several)} (of "
                f"{', '.join(type(o).__name__ for o in several)}); turn step_in_backward off."
            )
        optimizer = several[0]
        _check_optimizer(optimizer)
        self.watchers: list[TensorWatcher] = []
        self._optimizer: Optimizer = optimizer
        self._places = {
            parameter: (number, place)
            for number, group in enumerate(optimizer.param_groups)
            for place, parameter in enumerate(group["params"])
        }
        self._stepped: set[torch.Tensor] = set()
        self._inside = False
        self._paused = False
        # Layers on several devices: each device has its own backward thread.
        self._lock = threading.Lock()
        if hasattr(optimizer, "check_overrides"):
            optimizer.check_overrides()  # bitsandbytes asks once, in a step of all tensors
        self._handles: list[Any] = [optimizer.register_step_post_hook(self._after_any_step)]
        self._handles += [self._listen(parameter) for parameter in self._places]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave gradients alone: for a backward pass that is no training step."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def close(self) -> None:
        """Go back to ordinary steps."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.watchers = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _listen(self, parameter: torch.Tensor) -> Any:
        flag = parameter.requires_grad
        parameter.requires_grad_(True)  # torch takes hooks of such tensors only
        handle = parameter.register_post_accumulate_grad_hook(self._arrived)
        parameter.requires_grad_(flag)
        return handle

    def _arrived(self, parameter: torch.Tensor) -> None:
        """Step a tensor whose gradient is complete, and let go of the gradient."""
        if self._paused:
            return
        with self._lock:
            if parameter in self._stepped:
                raise ConfigError(
                    f"a tensor of shape {tuple(parameter.shape)} got a second gradient before "
                    "optimizer.step(), but stepping inside backward has used the first one: make "
                    "one backward pass per step and call optimizer.step() after it, without "
                    "accumulation and without reentrant checkpointing of shared layers."
                )
            self._stepped.add(parameter)
            for watcher in self.watchers:
                watcher.before_tensor(parameter)
            self._step(parameter)
            for watcher in self.watchers:
                watcher.after_tensor(parameter)
            parameter.grad = None

    def _step(self, parameter: torch.Tensor) -> None:
        """Let the optimizer step one tensor, whatever gradients others have."""
        groups = self._optimizer.param_groups
        number, place = self._places[parameter]
        group = groups[number]
        tensors, options = group["params"], _options(group)
        # Positions stay what they are: bitsandbytes looks its settings up by them.
        group["params"] = [*[_NO_GRADIENT] * place, parameter]
        self._optimizer.param_groups = [*({**g, "params": []} for g in groups[:number]), group]
        self._inside = True
        try:
            self._optimizer.step()
        finally:
            self._inside = False
            group["params"] = tensors
            self._optimizer.param_groups = groups
        if changed := [key for key, value in _options(group).items() if value is not options[key]]:
            raise ConfigError(
                f"{type(self._optimizer).__name__} changes {changed[0]!r} of a whole parameter "
                "group in every step, so that its tensors cannot step one by one; turn "
                "step_in_backward off or choose another optimizer."
            )

    def _after_any_step(self, *_: Any) -> None:
        if not self._inside:
            self._stepped.clear()


_NO_GRADIENT = torch.zeros(())


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _check_optimizer(optimizer: Any) -> None:
    """`ConfigError` for an optimizer that cannot step its tensors one by one."""
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"stepping inside backward needs a torch.optim.Optimizer, got "
            f"{type(optimizer).__name__}; turn step_in_backward off."
        )
    if processes() > 1:
        raise ConfigError(
            f"stepping inside backward with {processes()} processes would use gradients before the "
            "processes have exchanged them; train with one process, or turn step_in_backward off."
        )
    kind = type(optimizer).__name__
    ours = type(optimizer).__module__.startswith("bitsandbytes")
    check("step in backward", *(["bitsandbytes"] if ours else []))
    if hasattr(optimizer, "optimizer_dict"):
        raise ConfigError(
            f"{kind} already steps inside the backward pass by itself; turn step_in_backward off."
        )
    if isinstance(optimizer, LBFGS) or is_schedule_free(optimizer):
        raise ConfigError(
            f"{kind} makes its step for all tensors together and cannot step them one by one; "
            "turn step_in_backward off or choose another optimizer."
        )
