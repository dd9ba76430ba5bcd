"""Train with LoRA, LISA or full fine-tuning, and record what every layer did.

>>> import lisa_train as lt
>>> lt.attach(trainer, lisa=lt.LisaConfig(), record=lt.RecordConfig("runs/a"))  # doctest: +SKIP

Everything is loaded when it is first used: importing this package does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lisa_analysis.errors import LisaError as LisaError
from lisa_train.config import LisaConfig as LisaConfig
from lisa_train.config import RecordConfig as RecordConfig
from lisa_train.config import TrainConfig as TrainConfig

if TYPE_CHECKING:
    from lisa_train.integration import LisaCallback as LisaCallback
    from lisa_train.integration import RecordCallback as RecordCallback
    from lisa_train.integration import attach as attach
    from lisa_train.layermap import LayerMap as LayerMap
    from lisa_train.layermap import find_layers as find_layers
    from lisa_train.lisa import Lisa as Lisa
    from lisa_train.memory.estimate import estimate_memory as estimate_memory
    from lisa_train.memory.result import MemoryEstimate as MemoryEstimate
    from lisa_train.recorder import NormRecorder as NormRecorder
    from lisa_train.step_in_backward import StepInBackward as StepInBackward
    from lisa_train.training import train as train

_HOME = {
    "LisaCallback": "integration",
    "RecordCallback": "integration",
    "attach": "integration",
    "LayerMap": "layermap",
    "find_layers": "layermap",
    "Lisa": "lisa",
    "estimate_memory": "memory.estimate",
    "MemoryEstimate": "memory.result",
    "NormRecorder": "recorder",
    "StepInBackward": "step_in_backward",
    "train": "training",
}
__all__ = ["LisaConfig", "LisaError", "RecordConfig", "TrainConfig", *sorted(_HOME)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"lisa_train.{_HOME[name]}"), name)
    raise AttributeError(f"module 'lisa_train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
