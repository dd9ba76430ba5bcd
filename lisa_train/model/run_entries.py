"""What run.json says of the method that trains a model, whichever way the run was started.

`lisa-train`, `attach`, bare callbacks and plain loops take it from here. An engine that changes
what trains makes itself known with `announce`, so that a recorder need not know it.
"""

import dataclasses
import gc
import weakref
from collections.abc import Mapping, Set
from typing import Any, Protocol

import torch
from torch import nn


class Engine(Protocol):
    """What decides which tensors of a model train, and can say by which settings."""

    def rules(self, tensors: Set[torch.Tensor]) -> bool:
        """Whether it is open and decides about any of `tensors`."""

    def run_entries(self) -> dict[str, Any]:
        """Entries of run.json."""


_engines: "weakref.WeakSet[Any]" = weakref.WeakSet()


def announce(engine: Engine) -> None:
    """Make an engine known for as long as it is open."""
    _engines.add(engine)


def method_entries(model: nn.Module) -> dict[str, Any]:
    """Entries `method`, `lisa`, `lora` or `peft`, and `seeds` of run.json, as the model shows."""
    tensors = set(model.parameters())
    if any(engine.rules(tensors) for engine in _engines):
        gc.collect()  # an engine and its hooks refer to each other, and may be garbage already
    for engine in _engines:
        if engine.rules(tensors):
            return dict(engine.run_entries())
    adapter = _adapter(model)
    if adapter is None:
        return {"method": "full"}
    kind = getattr(adapter, "peft_type", "peft")
    method = "lora" if str(getattr(kind, "value", kind)).upper() == "LORA" else "peft"
    shown = {k: getattr(v, "value", v) for k, v in adapter.to_dict().items()}  # of its enums
    settings = {k: as_lists(v) for k, v in shown.items() if _is_plain(v)}
    return {"method": method, method: settings}


def lisa_entries(config: Any, seed: int) -> dict[str, Any]:
    """Entries of a run with LISA; `seed` is that of the training, unless the config has its own."""
    return {
        "method": "lisa",
        "lisa": as_lists(dataclasses.asdict(config)),
        "seeds": {"lisa_seed": seed if config.seed is None else config.seed},
    }


def joined(entries: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return `entries` with `more` over them; what is a mapping in both is joined, not replaced."""
    result = dict(entries)
    for name, value in more.items():
        before = result.get(name)
        both = isinstance(value, Mapping) and isinstance(before, Mapping)
        result[name] = {**before, **value} if both else value  # type: ignore[dict-item]
    return result


def as_lists(value: Any) -> Any:
    """Replace tuples and sets by lists, as YAML and JSON hold them."""
    if isinstance(value, dict):
        return {key: as_lists(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return [as_lists(entry) for entry in sorted(value, key=str)]
    if isinstance(value, list | tuple):
        return [as_lists(entry) for entry in value]
    return value


def _adapter(model: nn.Module) -> Any:
    """Configuration of the adapter that trains; None without any."""
    adapters = getattr(model, "peft_config", None)
    if not isinstance(adapters, dict) or not adapters:
        return None
    active = getattr(model, "active_adapter", None)
    if isinstance(active, str) and active in adapters:
        return adapters[active]
    return next(iter(adapters.values()))


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | list | set | tuple)
