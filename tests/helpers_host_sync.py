"""A device that nothing can be read from, and a watch on everything that would wait for it.

Torch's `meta` device has no data. The watch turns whatever would make the host wait for a CUDA
device into an error: reading a value, sizes that depend on data, and every blocking copy between
host and device, also that of a single number. A host scalar that takes part in arithmetic is an
argument of the kernel and no copy.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lisa_train
from lisa_train.measure.adapters import start as adapter_start
from lisa_train.measure.output import Output
from lisa_train.trainer.record_callback import RecordCallback

DEVICE = torch.device("meta")

_OURS = str(Path(lisa_train.__file__).parent)
_TORCH = str(Path(torch.__file__).parent)

# Sizes or answers that depend on the data: CUDA waits for them, whatever the arguments are.
_READS = frozenset(
    {
        "_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item", "masked_select",
        "_unique2", "unique_dim", "unique_consecutive", "bincount", "allclose",
    }
)  # fmt: skip
_COPIES = frozenset({"_to_copy", "copy_", "copy", "_copy_from", "_copy_from_and_resize"})


class HostSyncError(AssertionError):
    """The host would wait for the device."""


class DeviceWatch(TorchDispatchMode):
    """Refuses what waits for the device; copies what it may to the host as ones.

    Parameters
    ----------
    everyone
        Refuse it from any code; False refuses it from `lisa_train` alone.
    spared
        Name of a module that may wait.

    Attributes
    ----------
    allowed : bool
        Set while a flush or the end of a recording runs.
    waits : list of str
        What waited and was allowed, with the place that asked for it.
    """

    def __init__(self, everyone: bool, spared: str | None = None) -> None:
        super().__init__()
        self.allowed = False
        self.waits: list[str] = []
        self._everyone = everyone
        self._spared = spared

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        inputs = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        on_device = [x for x in inputs if x.device == DEVICE]
        target = kwargs.get("device")
        to_device = target is not None and torch.device(target) == DEVICE
        masked = name.startswith("index") and any(x.dtype == torch.bool for x in on_device[1:])
        if masked:
            self.waiting(f"{name} by a mask")
        if name in _READS and on_device:
            self.waiting(name)
            return torch.zeros((), dtype=on_device[0].dtype).item()
        if name in _COPIES:
            between = len({x.device for x in inputs}) > 1
            if target is not None:
                between = torch.device(target) != inputs[0].device
            arrives = to_device if target is not None else inputs[0].device == DEVICE
            unblocked = bool(kwargs.get("non_blocking")) or (
                name == "copy_" and args[2:] == (True,)
            )
            if between and not (arrives and unblocked):
                self.waiting(f"{name} to the {'device' if arrives else 'host'}")
                if not arrives:
                    return self._answer(name, args, kwargs)
        elif on_device and any(x.device != DEVICE and x.ndim for x in inputs):
            self.waiting(f"{name} of tensors of host and device")
        return function(*args, **kwargs)

    def waiting(self, what: str) -> None:
        """Refuse something that waits, or take note of it."""
        place = _place()
        spared = self._spared is not None and f"/{self._spared}:" in place
        if self.allowed or spared or not (self._everyone or place.startswith(_OURS)):
            self.waits.append(f"{what} at {place}")
            return
        raise HostSyncError(f"{what} at {place}")

    @staticmethod
    def _answer(name: str, args: Any, kwargs: Any) -> torch.Tensor:
        if name == "copy_":
            return args[0].zero_()
        return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)


def _place() -> str:
    """File and line of the innermost code that is neither torch's nor this module's."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        if file != __file__ and not file.startswith((_TORCH, "<")):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return "nowhere"


@contextmanager
def watched(
    monkeypatch: pytest.MonkeyPatch, *, everyone: bool = True, spared: str | None = None
) -> Iterator[DeviceWatch]:
    """Watch a block of code; what begin, flushes and end read is allowed, answered with ones.

    On `meta`, torch makes no copy of what `torch.tensor(1.0, device=…)` would copy on CUDA: the
    functions that make tensors of numbers are watched one by one.
    """
    watch = DeviceWatch(everyone, spared)

    def allowing(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before, watch.allowed = watch.allowed, True
            try:
                return method(*args, **kwargs)
            finally:
                watch.allowed = before

        return call

    def checked(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(data: Any, *args: Any, **kwargs: Any) -> Any:
            tensor = make(data, *args, **kwargs)
            new = torch.is_tensor(tensor) and not torch.is_tensor(data)
            if new and tensor.device == DEVICE and tensor.numel():
                watch.waiting("a number's copy to the device")
            return tensor

        return made

    with monkeypatch.context() as patch:
        patch.setattr(Output, "write", allowing(Output.write))
        patch.setattr(adapter_start, "begin", allowing(adapter_start.begin))
        patch.setattr(RecordCallback, "close", allowing(RecordCallback.close))
        for name in ("tensor", "as_tensor", "asarray"):
            patch.setattr(torch, name, checked(getattr(torch, name)))
        # AdamW's fused kernel has an implementation for meta, but asks for a list of devices.
        name = "_get_fused_kernels_supported_devices"
        module = importlib.import_module("torch.optim.optimizer")
        supported = [*getattr(module, name)(), DEVICE.type]
        patch.setattr(module, name, lambda: supported)
        with watch:
            yield watch
