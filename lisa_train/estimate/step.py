"""One training step on fake tensors: what lives when."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from lisa_analysis.contract.errors import ConfigError
from lisa_train.estimate.kernels import CudaKernels, one_sequence_per_row, tiles_in_place
from lisa_train.estimate.setting import Setting
from lisa_train.estimate.stage import Stage, quiet
from lisa_train.estimate.trace import ACTIVATIONS, GRADIENTS, LOGITS, WEIGHTS, StorageLog, Trace
from lisa_train.methods.lisa.recomputation import Recomputation
from lisa_train.trainer.trl_head import sliced_head_gradient


@dataclass(frozen=True)
class Pattern:
    """Which parameters train, and which of them have an fp32 copy for it."""

    trainable: frozenset[str]
    raised: frozenset[str] = frozenset()


def record_step(
    stage: Stage,
    setting: Setting,
    pattern: Pattern,
    *,
    backward: bool = True,
    scratch: Callable[[nn.Parameter], int] | None = None,
) -> Trace:
    """Run forward and backward and log every storage.

    Marks of the trace: ``start``, ``forward`` (its end: what lives is what backward needs) and
    ``end``. With `scratch` every gradient is used and freed as soon as it is there, and the bytes
    that the optimizer then needs besides are `scratch` of its parameter.
    """
    names = {id(p): name for name, p in stage.model.named_parameters()}
    spared = _spared(stage, setting, pattern)
    with stage.mode, _training(stage.model, pattern), spared, _hooks() as handles:
        batch = stage.batch(setting)
        log = StorageLog()
        for name, parameter in stage.model.named_parameters():
            label = stage.label(name)
            log.note(parameter, WEIGHTS, label)
            if setting.gradient_accumulation_steps > 1 and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
                log.note(parameter.grad, GRADIENTS, label)
        for name, buffer in stage.model.named_buffers():
            number = log.note(buffer, WEIGHTS, stage.label(name))
            log.rows[number] = 1  # never sharded
        _label_places(stage, log, handles)
        for parameter in stage.model.parameters():
            if parameter.requires_grad:
                use = _use(log, stage.label(names[id(parameter)]), scratch)
                handles.append(parameter.register_post_accumulate_grad_hook(use))
        marks = {"start": log.clock}
        log.label, log.kind = -1, ACTIVATIONS
        with log, _route(setting):
            loss = _loss(stage, setting, batch)
            marks["forward"] = log.clock
            if backward:
                loss.backward()
            marks["end"] = log.clock
        trace = log.freeze(marks)
        for parameter in stage.model.parameters():
            parameter.grad = None
    return trace


def _loss(stage: Stage, setting: Setting, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Run the forward pass; only the loss outlives it, as in Trainer."""
    cast = setting.autocast
    kind = getattr(torch, cast) if cast else torch.bfloat16
    try:
        with torch.autocast("cpu", dtype=kind, enabled=cast is not None):
            if setting.chunked_loss:
                return stage.model(**batch, fused_lm_head=True).loss
            return stage.model(**batch).loss
    except (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedOperatorException,
    ) as error:
        what = type(stage.base).__name__
        advice = "for experts set experts_implementation='grouped_mm' in the configuration"
        if "peft_type" in setting.peft:
            what += f" with {setting.peft['peft_type']}"
            advice = "estimate another adapter of that size"
        raise ConfigError(
            f"{what} chooses its path by the values of its inputs ({type(error).__name__}: "
            f"{error}), so that shapes alone do not tell its memory; {advice}."
        ) from error


@contextlib.contextmanager
def _route(setting: Setting) -> Any:
    """CUDA's kernels, and TRL's chunked head as we train with it where it is asked for."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(one_sequence_per_row())
        if setting.chunked_loss:
            stack.enter_context(sliced_head_gradient())
            stack.enter_context(tiles_in_place())
        stack.enter_context(CudaKernels())
        yield


@contextlib.contextmanager
def _training(model: nn.Module, pattern: Pattern) -> Any:
    """Set `requires_grad`; undo it."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in pattern.trainable)
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def _spared(stage: Stage, setting: Setting, pattern: Pattern) -> Any:
    """Let the layers that train keep their activations, as `lisa.recompute` says."""
    if setting.rotation is None or setting.rotation.recompute != "frozen":
        yield
        return
    recomputation = Recomputation(stage.base, stage.layer_map)
    recomputation.spare({stage.label(name) for name in pattern.trainable})
    try:
        yield
    finally:
        recomputation.restore()


@contextlib.contextmanager
def _hooks() -> Any:
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def _use(
    log: StorageLog, label: int, scratch: Callable[[nn.Parameter], int] | None
) -> Callable[[nn.Parameter], None]:
    """What happens to a gradient that is complete."""

    def complete(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        log.is_gradient(parameter.grad, label)
        if scratch is not None:
            room = torch.empty(scratch(parameter), dtype=torch.uint8)
            del room
            parameter.grad = None

    return complete


def _label_places(stage: Stage, log: StorageLog, handles: list[Any]) -> None:
    """Tell the log in which layer it is, in the forward and in the backward pass.

    Backward enters a layer with the gradient of the layer's output. What comes after the last
    layer (final norm, head, loss) counts as logits.
    """
    count = len(stage.blocks)

    def place(label: int) -> None:
        log.label = label
        log.kind = LOGITS if label == count else ACTIVATIONS

    def mark(value: Any, label: int) -> None:
        for tensor in value if isinstance(value, tuple | list) else (value,):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: place(label))

    def entered(label: int) -> Callable[..., None]:
        return lambda *_: place(label)

    def left(label: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            mark(output, label)
            if label == count - 1 and not torch._C._current_graph_task_id() >= 0:
                place(count)

        return hook

    for i, block in enumerate(stage.blocks):
        handles.append(block.register_forward_pre_hook(entered(i)))
        handles.append(block.register_forward_hook(left(i)))
    embedding = stage.base.get_input_embeddings()
    handles.append(embedding.register_forward_hook(lambda m, a, output: mark(output, -1)))
