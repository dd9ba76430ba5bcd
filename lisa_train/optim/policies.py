"""What becomes of the optimizer state of a tensor that is frozen, until it trains again."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch

from lisa_train.checks import refuse_built_in


@dataclass
class SetAside:
    """State of a frozen tensor: as a checkpoint takes it, and where its tensors were before."""

    state: dict[str, Any]
    devices: Mapping[str, torch.device] = field(default_factory=dict)


class StatePolicy(ABC):
    """What is done with the state; under `register`, `LisaConfig.optimizer_state` can name it.

    Attributes
    ----------
    name : str
        Its name among the `POLICIES`.
    place : {"nowhere", "device", "host"}
        Where the state lies while its tensor is frozen. What is nowhere is lost; what is on the
        device goes back into the optimizer when LISA ends, what is on the host is dropped then:
        bringing all of it back at once is what offloading avoids.
    """

    name: ClassVar[str]
    place: ClassVar[Literal["nowhere", "device", "host"]]

    @abstractmethod
    def put_aside(self, state: dict[str, Any]) -> SetAside | None:
        """Return what is kept of the state of a tensor that is being frozen."""

    def bring_back(self, aside: SetAside) -> dict[str, Any]:
        """Return the state for a tensor that trains again."""
        return aside.state


POLICIES: dict[str, type[StatePolicy]] = {}
"""Policies by the name that `LisaConfig.optimizer_state` gives them."""

_Kind = TypeVar("_Kind", bound=type[StatePolicy])


def register(policy: _Kind) -> _Kind:
    """Add a class of policies to `POLICIES` under its name; a decorator.

    One of your own may be registered again; `ConfigError` for the name of a built-in.
    """
    refuse_built_in("optimizer_state", policy.name, POLICIES)
    POLICIES[policy.name] = policy
    return policy


@register
class Reset(StatePolicy):
    """Frees the state: the tensor starts anew.

    Paged state of bitsandbytes cannot be freed; its memory serves the next layers drawn.
    """

    name = "reset"
    place = "nowhere"

    def put_aside(self, state: dict[str, Any]) -> SetAside | None:
        """Keep nothing."""
        return None


@register
class Keep(StatePolicy):
    """Holds the state where it is."""

    name = "keep"
    place = "device"

    def put_aside(self, state: dict[str, Any]) -> SetAside | None:
        """Keep it as it is."""
        return SetAside(dict(state))


@register
class Offload(StatePolicy):
    """Moves the state to host memory, and back."""

    name = "offload"
    place = "host"

    def put_aside(self, state: dict[str, Any]) -> SetAside | None:
        """Copy it to the host."""
        tensors = {key: value for key, value in state.items() if torch.is_tensor(value)}
        moved = {key: value.to("cpu") for key, value in tensors.items()}
        return SetAside(state | moved, {key: value.device for key, value in tensors.items()})

    def bring_back(self, aside: SetAside) -> dict[str, Any]:
        """Copy every tensor to where it was."""
        moved = {key: aside.state[key].to(device) for key, device in aside.devices.items()}
        return aside.state | moved
