"""Training loops of every kind on one small model, on any device, with everything recorded."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from helpers_recording import llama
from peft import LoraConfig, get_peft_model
from torch import nn

import lisa_train as lt
from lisa_analysis.rundir.opening import load
from lisa_analysis.rundir.run import Run
from lisa_train.optim.step_in_backward import StepInBackward

ADAMW = {
    "fused": {"fused": True},  # counts its steps on the device
    "foreach": {"foreach": True},  # counts them on the host
    "for-loop": {"foreach": False},
}


@dataclass
class Case:
    """One way to train."""

    method: str = "full"
    accumulation: int = 1
    clip: str | None = None
    undo: bool = False
    skip: int | None = None
    inside: bool = False
    scale: Any = 1.0
    rate: Any = 1e-3
    half: bool | str = False
    lisa: dict[str, Any] = field(default_factory=dict)


CASES = {
    "full": Case(),
    "half precision": Case(half=True, clip="tensor", undo=True),
    "some tensors in half precision": Case(half="layers.1", clip="tensor", undo=True),
    "a factor from the device": Case(clip="tensor", undo=True),
    "a factor that is a number": Case(clip="number", undo=True),
    "a factor from the host": Case(clip="host", undo=True),
    "copied gradients": Case(clip="number"),
    "gradient noise": Case(accumulation=3, clip="tensor", undo=True),
    "a skipped step": Case(skip=2),
    "a loss scale": Case(scale=1024.0, accumulation=2),
    "a loss scale on the device": Case(scale="device", accumulation=2),
    "a learning rate that is a tensor": Case(rate=torch.tensor(1e-3)),
    "LISA": Case(method="lisa"),
    "LISA that keeps state": Case(method="lisa", lisa={"optimizer_state": "keep"}),
    "LISA with warm-up": Case(method="lisa", lisa={"warmup_steps": 2}),
    "LoRA": Case(method="lora", clip="tensor", undo=True),
    "steps inside backward": Case(inside=True),
    "LISA inside backward": Case(method="lisa", inside=True),
}


def build(case: Case, device: torch.device | str) -> nn.Module:
    """Return the same small model on any device."""
    model = llama(layers=4)
    if case.method == "lora":
        targets = ["q_proj", "down_proj", "embed_tokens"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    for name, parameter in model.named_parameters():
        if case.half is True or (case.half and case.half in name):
            parameter.data = parameter.data.bfloat16()
    return model.to(device)


def _backward(model: nn.Module, ids: torch.Tensor, accumulation: int, mixed: bool) -> torch.Tensor:
    if mixed:  # layers of two precisions side by side: any loss that reaches all tensors does
        loss = sum((p.float() ** 2).sum() for p in model.parameters() if p.requires_grad)
    else:
        loss = model(input_ids=ids, labels=ids).loss
    (loss / accumulation).backward()
    return loss.detach()


def train(case: Case, model: nn.Module, folder: Path, optimizer: str, steps: int = 4) -> Run:
    """Train in a loop of one's own with everything switched on, and return the recording."""
    device = next(model.parameters()).device
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, case.rate, **ADAMW[optimizer])
    scale = torch.ones((), device=device) * 4 if case.scale == "device" else case.scale
    config = lt.RecordConfig(
        str(folder), every=1, grad_noise=True, flush_seconds=1e9, on_record_error="raise"
    )
    ids = torch.arange(24, device=device).reshape(2, 12)
    with ExitStack() as stack:
        engine = inside = None
        if case.method == "lisa":
            settings = lt.LisaConfig(1, 2, "cyclic", **case.lisa)
            engine = stack.enter_context(lt.Lisa(model, adamw, settings))
        if case.inside:
            inside = stack.enter_context(StepInBackward(adamw))
        recorder = lt.NormRecorder(model, adamw, config, step_in_backward=inside)
        stack.enter_context(recorder)
        tokens: Any = 0
        for step in range(1, steps + 1):
            if engine is not None:
                engine.begin_step(step - 1)
            for micro in range(case.accumulation):
                loss = _backward(model, ids, case.accumulation, isinstance(case.half, str))
                tokens = tokens + (ids >= 0).sum()
                if micro < case.accumulation - 1:
                    recorder.micro_batch(step)
            recorder.before_step(step, gradient_scale=scale, undo=case.undo)
            norm = coefficient = None
            if case.clip is not None:
                norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
                coefficient = {
                    "tensor": (1.0 / (norm + 1e-6)).clamp(max=1.0),
                    "number": 0.5,
                    "host": torch.tensor(0.5),
                }[case.clip]
            if step != case.skip:
                adamw.step()
            recorder.after_step(
                step, loss=loss, grad_norm=norm, clip_coef=coefficient, tokens=tokens,
                skipped=step == case.skip,
            )  # fmt: skip
            adamw.zero_grad()
            if step == 2 and not case.inside and not isinstance(case.half, str):
                recorder.probe(step, lambda: model(input_ids=ids, labels=ids).loss.backward())
    return load(folder)


def measured(run: Run) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tell which metrics and which scalars there are, whatever their values."""
    assert run.status == "finished"
    metrics = run.metrics()
    columns = [c for c in metrics if c not in ("step", "param_id")]
    places = metrics.set_index(["step", "param_id"])[columns].notna()
    scalars = run.scalars.notna()
    return places, scalars
