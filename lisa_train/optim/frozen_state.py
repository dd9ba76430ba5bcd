"""The optimizer state of frozen tensors: freed, kept aside, or moved to host memory."""

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch.optim import Optimizer

from lisa_analysis.contract.errors import ConfigError
from lisa_train.model.parallel import INSTEAD_OF_DEEPSPEED
from lisa_train.model.sharding import split_as
from lisa_train.optim.paged_state import paged_state_of
from lisa_train.optim.policies import POLICIES, SetAside


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """Return the torch optimizer inside wrappers such as accelerate's `AcceleratedOptimizer`.

    Raises
    ------
    ConfigError
        For an optimizer of DeepSpeed's ZeRO: the one inside steps flat pieces of the tensors.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        if type(optimizer).__module__.startswith("deepspeed.runtime"):
            raise ConfigError(
                f"{type(optimizer).__name__} of DeepSpeed steps flat pieces of the tensors, which "
                f"nobody can tell apart; {INSTEAD_OF_DEEPSPEED}."
            )
        optimizer = inner
    return optimizer


def on_load(optimizer: Optimizer, hook: Callable[..., None]) -> Callable[[], None]:
    """Call `hook` whenever a state is loaded; return what ends it.

    bitsandbytes loads by a method of its own, which runs none of the hooks that torch registers:
    there the method is wrapped. A hook may run twice where such a method calls torch's.
    """
    handle = optimizer.register_load_state_dict_post_hook(hook)
    if type(optimizer).load_state_dict is Optimizer.load_state_dict:
        return handle.remove
    load: Any = optimizer.load_state_dict

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = load(*args, **kwargs)
        hook(optimizer)
        return result

    optimizer.load_state_dict = wrapped  # type: ignore[method-assign]

    def end() -> None:
        handle.remove()
        if optimizer.__dict__.get("load_state_dict") is wrapped:
            del optimizer.load_state_dict

    return end


def optimizers_of(optimizer: Any) -> tuple[Optimizer, ...]:
    """Return the torch optimizers that make the steps: of one, a list, or a wrapper of several.

    A wrapper is an object that holds them in `optimizers`, as a list or a dict. What is no
    optimizer is returned as it is.
    """
    held = optimizer
    if not isinstance(held, list | tuple | Mapping):
        optimizer = unwrap_optimizer(optimizer)
        held = getattr(optimizer, "optimizers", None)
    parts = list(held.values()) if isinstance(held, Mapping) else held
    if held is not optimizer and not _all_optimizers(parts):
        return (optimizer,)
    return tuple(inner for part in parts for inner in optimizers_of(part))


class Joined:
    """Several optimizers as one, to read from: their groups one after the other, their states."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = tuple(optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of all optimizers."""
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[torch.Tensor, Any]:
        """States of the tensors of all optimizers."""
        return {p: state for optimizer in self._optimizers for p, state in optimizer.state.items()}


def as_one(optimizers: Sequence[Optimizer]) -> Any:
    """Return the optimizer, or several as one to read from."""
    return optimizers[0] if len(optimizers) == 1 else Joined(optimizers)


def _all_optimizers(parts: Any) -> bool:
    return (
        isinstance(parts, list | tuple)
        and bool(parts)
        and all(isinstance(unwrap_optimizer(part), Optimizer) for part in parts)
    )


def tensors_of(optimizer: Optimizer) -> list[torch.Tensor]:
    """Tensors of an optimizer in the order of their positions in its `state_dict`."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def held_bytes(states: Iterable[tuple[torch.Tensor, Any]]) -> int:
    """Bytes of optimizer state that lie on the device of their tensor."""

    def size(value: Any, device: torch.device) -> int:
        if torch.is_tensor(value):
            return value.numel() * value.element_size() if value.device == device else 0
        if isinstance(value, Mapping):
            value = list(value.values())
        return sum(size(v, device) for v in value) if isinstance(value, list | tuple) else 0

    return sum(size(state, tensor.device) for tensor, state in states)


class FrozenState:
    """Takes the state of frozen tensors out of their optimizer and puts it back on their return.

    Nothing of a frozen tensor stays where the optimizer's step, its `train()` and `eval()`
    (schedule-free) or a loop that zeroes gradients could act on it. State that is kept or
    offloaded still appears in `optimizer.state_dict()`, so that a checkpoint is complete.

    Parameters
    ----------
    optimizers
        The optimizers, each of tensors of its own; often just one.
    policy
        Name of one of the `lisa_train.optim.policies.POLICIES`.

    Attributes
    ----------
    owners : dict
        Tensor -> the optimizer that holds it.
    """

    def __init__(self, optimizers: Sequence[Optimizer], policy: str) -> None:
        self.owners = {p: optimizer for optimizer in optimizers for p in tensors_of(optimizer)}
        self._optimizers = tuple(optimizers)
        self._policy = POLICIES[policy]()
        self._unsorted: set[Optimizer] = set()
        self._aside: dict[torch.Tensor, SetAside] = {}
        paged = {optimizer: paged_state_of(optimizer) for optimizer in optimizers}
        self._paged = {held: state for held, state in paged.items() if state is not None}
        self._handles = [
            optimizer.register_state_dict_post_hook(self._into_state_dict)
            for optimizer in optimizers
        ]

    def freeze(self, parameter: torch.Tensor) -> None:
        """Take the state of `parameter` out of its optimizer."""
        optimizer = self.owners.get(parameter)
        state = optimizer.state.pop(parameter, None) if optimizer is not None else None
        if state and (aside := self._policy.put_aside(state)) is not None:
            self._aside[parameter] = aside

    def thaw(self, parameter: torch.Tensor) -> None:
        """Give its optimizer back what was set aside for `parameter`, if anything was."""
        aside = self._aside.pop(parameter, None)
        if aside is not None:
            self.owners[parameter].state[parameter] = self._policy.bring_back(aside)

    def bytes(self) -> int:
        """Bytes of state, set aside or not, that lie where their tensors are.

        What is offloaded to a host does not count, unless the host is where the training runs.
        """
        held = [item for optimizer in self._optimizers for item in optimizer.state.items()]
        return held_bytes((*held, *((p, aside.state) for p, aside in self._aside.items())))

    def states(self) -> Any:
        """States by position, as `state_dict` numbers them; of several optimizers, a list."""
        found = [optimizer.state_dict()["state"] for optimizer in self._optimizers]
        return found[0] if len(found) == 1 else found

    def replace(self, saved: Any, active: Set[torch.Tensor]) -> None:
        """Take over what `states` returned, uncast."""
        parts = saved if isinstance(saved, list) else [saved]
        for optimizer, states in zip(self._optimizers, parts, strict=True):
            self.forget(optimizer)
            optimizer.state.clear()
            for position, parameter in enumerate(tensors_of(optimizer)):
                if position not in states:
                    continue
                optimizer.state[parameter] = {
                    key: split_as(value.to(parameter.device), parameter)
                    if torch.is_tensor(value) and value.ndim
                    else value
                    for key, value in states[position].items()
                }
                if (paged := self._paged.get(optimizer)) is not None:
                    paged.take_in(parameter)
                if parameter not in active:
                    self.freeze(parameter)

    def loaded(self, optimizer: Optimizer, *_: Any) -> None:
        """Take note that a checkpoint has brought other state of one optimizer.

        Which of it is of frozen tensors may be known only later: see `sort_loaded`.
        """
        self.forget(optimizer)
        self._unsorted.add(optimizer)
        if (paged := self._paged.get(optimizer)) is not None:
            paged.take_in()

    def sort_loaded(self, optimizer: Optimizer, frozen: Iterable[torch.Tensor]) -> None:
        """Take the state of frozen tensors out of what a checkpoint brought, if one did."""
        if optimizer in self._unsorted:
            self._unsorted.discard(optimizer)
            for parameter in frozen:
                self.freeze(parameter)

    def forget(self, optimizer: Optimizer) -> None:
        """Drop what is set aside for one optimizer: another checkpoint is about to replace it."""
        for parameter in [p for p in self._aside if self.owners[p] is optimizer]:
            del self._aside[parameter]

    def close(self) -> None:
        """Leave the optimizers as plain ones; state kept on the device goes back into them."""
        for handle in self._handles:
            handle.remove()
        if self._policy.place == "device":
            for parameter in list(self._aside):
                self.thaw(parameter)
        self._aside.clear()
        for paged in self._paged.values():
            paged.close()
        self._paged = {}

    def _into_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Add the set-aside state under the parameters' positions, as torch numbers them."""
        # schedule-free's train() and eval() leave empty entries for tensors without state
        packed = {key: value for key, value in state_dict["state"].items() if value}
        for position, parameter in enumerate(tensors_of(optimizer)):
            if parameter in self._aside:
                packed[position] = dict(self._aside[parameter].state)
        state_dict["state"] = packed
