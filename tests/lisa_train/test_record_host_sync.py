"""Nothing waits for an accelerator outside a flush: shown on a device that has no data to read.

`tests/gpu/test_recorder_gpu.py` asks CUDA itself. Here every step is made on torch's `meta`
device, where the recorder takes the route of accelerators, under a watch that refuses whatever
makes the host wait. The rows of a run on the CPU tell which numbers must have been measured.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import PartialState
from helpers_host_sync import DEVICE, HostSyncError, watched
from helpers_recording import arguments, examples, llama
from peft import LoraConfig, get_peft_model
from transformers import Trainer

import lisa_train as lt
from lisa_analysis.rundir import load
from lisa_train.measure import StepMeasure
from lisa_train.step_in_backward import StepInBackward

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


def build(case, device):
    model = llama(layers=4)
    if case.method == "lora":
        targets = ["q_proj", "down_proj", "embed_tokens"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    for name, parameter in model.named_parameters():
        if case.half is True or (case.half and case.half in name):
            parameter.data = parameter.data.bfloat16()
    return model.to(device)


def backward(model, ids, accumulation, mixed):
    with torch.autocast("cpu" if ids.device.type == "cpu" else "cuda", enabled=False):
        if mixed:  # layers of two precisions side by side: any loss that reaches all tensors does
            loss = sum((p.float() ** 2).sum() for p in model.parameters() if p.requires_grad)
        else:
            loss = model(input_ids=ids, labels=ids).loss
    (loss / accumulation).backward()
    return loss.detach()


def train(case, model, folder, optimizer, steps=4):
    """The loop of the README with everything switched on."""
    device = next(model.parameters()).device
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, case.rate, **ADAMW[optimizer])
    scale = torch.ones((), device=device) * 4 if case.scale == "device" else case.scale
    config = lt.RecordConfig(
        str(folder), every=1, grad_noise=True, flush_seconds=1e9, on_record_error="raise"
    )
    ids = torch.zeros(2, 12, dtype=torch.long).to(device, non_blocking=True)
    with ExitStack() as stack:
        engine = None
        if case.method == "lisa":
            settings = lt.LisaConfig(1, 2, "cyclic", **case.lisa)
            engine = stack.enter_context(lt.Lisa(model, optimizer, settings))
        inside = stack.enter_context(StepInBackward(optimizer)) if case.inside else None
        recorder = lt.NormRecorder(model, optimizer, config, step_in_backward=inside)
        stack.enter_context(recorder)
        tokens = 0
        for step in range(1, steps + 1):
            if engine is not None:
                engine.begin_step(step - 1)
            for micro in range(case.accumulation):
                loss = backward(model, ids, case.accumulation, isinstance(case.half, str))
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
                optimizer.step()
            recorder.after_step(
                step, loss=loss, grad_norm=norm, clip_coef=coefficient, tokens=tokens,
                skipped=step == case.skip,
            )  # fmt: skip
            optimizer.zero_grad()
            if step == 2 and not case.inside and not isinstance(case.half, str):
                recorder.probe(step, lambda: model(input_ids=ids, labels=ids).loss.backward())
    return load(folder)


def measured(run):
    """Which numbers there are, whatever they are."""
    assert run.status == "finished"
    metrics = run.metrics()
    columns = [c for c in metrics if c not in ("step", "param_id")]
    places = metrics.set_index(["step", "param_id"])[columns].notna()
    scalars = run.scalars.notna()
    return places, scalars


def same_numbers(run, expected):
    for ours, theirs in zip(measured(run), measured(expected), strict=True):
        assert ours.equals(theirs)


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [(name, "fused") for name, case in CASES.items() if not torch.is_tensor(case.rate)]
    + [("a learning rate that is a tensor", "for-loop")]
    + [
        (name, optimizer)
        for name in ("full", "LISA", "LoRA", "steps inside backward")
        for optimizer in ("foreach", "for-loop")
    ],
)
def test_a_plain_loop(tmp_path, monkeypatch, name, optimizer):
    case = CASES[name]
    expected = train(case, build(case, "cpu"), tmp_path / "cpu", optimizer)
    model = build(case, DEVICE)
    with watched(monkeypatch) as watch:
        run = train(case, model, tmp_path / "meta", optimizer)
    same_numbers(run, expected)
    assert watch.waits  # the flushes at begin and end
    assert all("buffers.py" in wait for wait in watch.waits)


def test_only_offloaded_state_makes_the_engine_wait(tmp_path, monkeypatch):
    """That is what offloading is; the recorder beside it waits no more than ever."""
    case = Case(method="lisa", lisa={"optimizer_state": "offload"})
    model = build(case, DEVICE)
    with watched(monkeypatch, spared="optimizer_state.py") as watch:
        train(case, model, tmp_path, "fused", steps=10)
    waits = {wait.split("/")[-1].split(":")[0] for wait in watch.waits}
    assert waits == {"buffers.py", "optimizer_state.py"}


def index(x):
    return x.reshape(-1)[torch.zeros(1, dtype=torch.long)]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: float(x.sum()),
        lambda x: x.sum().cpu(),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: torch.allclose(x, x),
        lambda x: x[x > 0],
        lambda x: torch.as_tensor(1.0).to(x),
        lambda x: torch.as_tensor(1.0, device=x.device),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: torch.from_numpy(np.zeros(2)).to(x.device),
        lambda x: x.copy_(torch.zeros(x.shape)),
        lambda x: torch.zeros(x.shape).copy_(x),
        index,
    ],
)
def test_what_waits_is_seen_in_the_recorder(tmp_path, monkeypatch, wait):
    """The watch is worth something only if a slip in the recorder's own code ends the run."""
    update = StepMeasure.update

    def slip(self, step, clip_coef):
        wait(self.active[0][1].detach())
        update(self, step, clip_coef)

    model = build(CASES["full"], DEVICE)
    monkeypatch.setattr(StepMeasure, "update", slip)
    with watched(monkeypatch), pytest.raises(HostSyncError):
        train(CASES["full"], model, tmp_path, "fused")


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x * 2.0 + torch.tensor(1.0),
        lambda x: torch.full((), 2.0, device=x.device) * x,
        lambda x: torch.zeros(x.shape).to(x.device, non_blocking=True),
        lambda x: x.fill_(1.0),
        lambda x: torch.arange(3, device=x.device),
    ],
)
def test_what_does_not_wait_is_let_through(monkeypatch, work):
    with watched(monkeypatch) as watch:
        work(torch.zeros(2, 3, device=DEVICE))
    assert watch.waits == []


def on_meta(monkeypatch, args):
    """Let Trainer and accelerate place model and batches on `meta`, as they do on a GPU."""
    assert args.device.type == "cpu"
    args.__dict__["_setup_devices"] = DEVICE
    monkeypatch.setitem(PartialState._shared_state, "device", DEVICE)
    return args


def train_with_trainer(monkeypatch, method, device, folder):
    inside = method == "inside backward"
    args = arguments(
        folder / "out", max_steps=5, logging_strategy="no", logging_nan_inf_filter=False,
        gradient_accumulation_steps=1 if inside else 2, max_grad_norm=0 if inside else 0.5,
    )  # fmt: skip
    if device == DEVICE:
        on_meta(monkeypatch, args)
    trainer = Trainer(
        model=build(CASES["LoRA" if method == "LoRA" else "full"], device),
        args=args,
        train_dataset=examples(),
    )
    if method == "loss scale":
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    config = lt.RecordConfig(
        str(folder / "run"), every=1, grad_noise=True, probe_every=2, flush_seconds=1e9,
        on_record_error="raise",
    )  # fmt: skip
    lisa = lt.LisaConfig(1, 2) if method == "LISA" else None
    lt.attach(trainer, record=config, lisa=lisa, step_in_backward=inside)
    trainer.train()
    return load(folder / "run")


@pytest.mark.parametrize("method", ["full", "LISA", "LoRA", "inside backward", "loss scale"])
def test_a_trainer(tmp_path, monkeypatch, method):
    """Trainer itself waits here and there (for masks, say): only the recorder must not."""
    expected = train_with_trainer(monkeypatch, method, torch.device("cpu"), tmp_path / "cpu")
    with watched(monkeypatch, everyone=False) as watch:
        run = train_with_trainer(monkeypatch, method, DEVICE, tmp_path / "meta")
    same_numbers(run, expected)
    assert run.events.drop(columns="time").equals(expected.events.drop(columns="time"))
    assert any("trainer.py" in wait for wait in watch.waits)
    ours = [wait for wait in watch.waits if "lisa_train/" in wait and "tests/" not in wait]
    assert all("buffers.py" in wait for wait in ours)
    assert run.scalars["tokens"].notna().all()
