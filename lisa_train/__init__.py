"""Train with LoRA, LISA or full fine-tuning, and record what every layer did.

>>> import lisa_train as lt
>>> lt.attach(trainer, lisa=lt.LisaConfig(), record=lt.RecordConfig("runs/a"))  # doctest: +SKIP

Everything is loaded when it is first used: importing this package does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import LisaError as LisaError
from lisa_analysis.contract.moved import redirect
from lisa_train.config import LearnConfig as LearnConfig
from lisa_train.config import LisaConfig as LisaConfig
from lisa_train.config import ProbeConfig as ProbeConfig
from lisa_train.config import RecordConfig as RecordConfig
from lisa_train.config import SelectConfig as SelectConfig

if TYPE_CHECKING:
    from lisa_train.command.ablate_restore import restore as restore
    from lisa_train.command.ablate_run import ablate as ablate
    from lisa_train.command.config import TrainConfig as TrainConfig
    from lisa_train.command.training import train as train
    from lisa_train.estimate.memory import estimate_memory as estimate_memory
    from lisa_train.estimate.result import MemoryEstimate as MemoryEstimate
    from lisa_train.measure.probe.probing import probe as probe
    from lisa_train.measure.quantities import Quantity as Quantity
    from lisa_train.measure.recorder import NormRecorder as NormRecorder
    from lisa_train.methods import METHODS as METHODS
    from lisa_train.methods.lisa.engine import Lisa as Lisa
    from lisa_train.methods.lisa.samplers import Sampler as Sampler
    from lisa_train.methods.lisa.schedule import Draw as Draw
    from lisa_train.model.layer_map import LayerMap as LayerMap
    from lisa_train.model.layer_map import find_layers as find_layers
    from lisa_train.optim.saved_shards import load_saved_state as load_saved_state
    from lisa_train.optim.step_in_backward import StepInBackward as StepInBackward
    from lisa_train.trainer import LisaCallback as LisaCallback
    from lisa_train.trainer import RecordCallback as RecordCallback
    from lisa_train.trainer import attach as attach

_HOME = {
    "Attachment": "trainer",
    "LisaCallback": "trainer",
    "RecordCallback": "trainer",
    "attach": "trainer",
    "LayerMap": "model.layer_map",
    "find_layers": "model.layer_map",
    "probe": "measure.probe.probing",
    "METHODS": "methods",
    "Lisa": "methods.lisa.engine",
    "Draw": "methods.lisa.schedule",
    "Sampler": "methods.lisa.samplers",
    "estimate_memory": "estimate.memory",
    "MemoryEstimate": "estimate.result",
    "NormRecorder": "measure.recorder",
    "Quantity": "measure.quantities",
    "StepInBackward": "optim.step_in_backward",
    "load_saved_state": "optim.saved_shards",
    "TrainConfig": "command.config",
    "train": "command.training",
    "ablate": "command.ablate_run",
    "restore": "command.ablate_restore",
}
__all__ = [  # noqa: PLE0604
    "LearnConfig",
    "LisaConfig",
    "LisaError",
    "ProbeConfig",
    "RecordConfig",
    "SelectConfig",
    *sorted(_HOME),
]

# Where modules were before they moved into rooms.
redirect(
    __name__,
    {
        "adapters": "measure.adapters.lora_products",
        "aggregates": "measure.output",
        "averaging": "measure.probe.averaged_gradients",
        "base_weights": "measure.step.base_weights",
        "buffers": "measure.buffers",
        "checkpoint_recipes": "measure.step.checkpoint_conversions",
        "cli": "command.cli",
        "conditional_poisson": "methods.lisa.samplers.conditional_poisson",
        "command.tasks.literal_path": "command.tasks.literal_paths",
        "data": "command.tasks.data",
        "demo": "command.demo",
        "eight_bit": "optim.eight_bit",
        "encoding": "measure.disk.encoding",
        "environment": "measure.disk.manifest",
        "estimate.estimate": "estimate.memory",
        "gradient_noise": "measure.step.gradient_noise",
        "head_gradient": "trainer.trl_head",
        "inclusion": "methods.lisa.inclusion",
        "input_gradients": "methods.lisa.input_gradients",
        "integration": "trainer",
        "integration.attachment": "trainer.attachment",
        "integration.eight_bit_callback": "trainer.optimizer_callbacks",
        "integration.lisa_callback": "trainer.lisa_callback",
        "integration.record_callback": "trainer.record_callback",
        "integration.step_callback": "trainer.optimizer_callbacks",
        "integration.unwinding": "trainer.events",
        "integration.wraps": "trainer.events",
        "layermap": "model.layer_map",
        "lisa": "methods.lisa.engine",
        "measure.adapter_search": "measure.adapters.search",
        "measure.adapter_start": "measure.adapters.start",
        "measure.averaged_gradients": "measure.probe.averaged_gradients",
        "measure.base_weights": "measure.step.base_weights",
        "measure.batch_gradients": "measure.probe.batch_gradients",
        "measure.change_parts": "measure.step.change_parts",
        "measure.checkpoint_conversions": "measure.step.checkpoint_conversions",
        "measure.disk.outcome": "measure.disk.run_file",
        "measure.disk.silent_writer": "measure.disk.writer",
        "measure.factor_norms": "measure.adapters.factor_norms",
        "measure.gradient_noise": "measure.step.gradient_noise",
        "measure.lora_products": "measure.adapters.lora_products",
        "measure.measuring_pass": "measure.probe.measuring_pass",
        "measure.own_quantities": "measure.step.own_quantities",
        "measure.probe_result": "measure.probe.result",
        "measure.sketch": "measure.probe.sketch",
        "measure.stand_ins": "model.side_pass",
        "measure.step_measure": "measure.step.step_measure",
        "measure.step_parts": "measure.step.parts",
        "measure.tensor_steps": "measure.step.step_measure",
        "measure.tokens": "measure.scalar_lines",
        "measure.tracker_numbers": "measure.output",
        "memory": "estimate",
        "memory.cards": "estimate.cards",
        "memory.command": "command.estimate",
        "memory.estimate": "estimate.memory",
        "memory.kernels": "estimate.kernels",
        "memory.optimizers": "estimate.optimizers",
        "memory.patterns": "estimate.patterns",
        "memory.result": "estimate.result",
        "memory.setting": "estimate.setting",
        "memory.spread": "estimate.spread",
        "memory.stage": "estimate.stage",
        "memory.step": "estimate.step",
        "memory.table": "estimate.table",
        "memory.trace": "estimate.trace",
        "model.known_layers": "model.layer_cache",
        "model.stand_ins": "model.side_pass",
        "modeling": "command.tasks.text",
        "module_tree": "model.module_tree",
        "norms": "model.norms",
        "optimizer_state": "optim.frozen_state",
        "outcome": "measure.disk.run_file",
        "output": "command.output",
        "precision": "methods.lisa.precision",
        "preconditions": "methods.lisa.checks",
        "probe": "measure.probe.measuring_pass",
        "processes": "measure.processes",
        "progress": "trainer.progress",
        "progress_html": "trainer.progress_html",
        "recomputation": "methods.lisa.recomputation",
        "recorder": "measure.recorder",
        "samplers": "methods.lisa.samplers",
        "schedule": "methods.lisa.schedule",
        "shards": "model.sharding",
        "silent_writer": "measure.disk.writer",
        "stand_ins": "model.side_pass",
        "step_conditions": "optim.settings",
        "step_in_backward": "optim.step_in_backward",
        "storage": "measure.disk.storage",
        "tensor_steps": "measure.step.step_measure",
        "tensor_table": "model.tensor_table",
        "training": "command.training",
        "warmup": "optim.warmup",
        "writer": "measure.disk.writer",
    },
)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"lisa_train.{_HOME[name]}"), name)
    raise AttributeError(f"module 'lisa_train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
