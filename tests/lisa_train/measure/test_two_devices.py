"""A model that is spread over two devices, as by `device_map`; `meta` stands for the first one."""

import pytest
import torch
from helpers_host_sync import DEVICE, watched
from helpers_loops import CASES, build, measured

import lisa_train as lt
from lisa_analysis.rundir.opening import load
from lisa_train.optim.step_in_backward import StepInBackward


def train(model, folder, kind, probe):
    """Gradients are made by hand: no forward pass goes through a device without data."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3, foreach=False)
    config = lt.RecordConfig(
        str(folder), every=1, grad_noise=True, flush_seconds=1e9, on_record_error="raise"
    )
    inside = StepInBackward(optimizer) if kind == "inside" else None

    def backward():
        for p in model.parameters():
            if p.requires_grad:
                (p * 2).sum().backward()

    with lt.NormRecorder(model, optimizer, config, step_in_backward=inside) as recorder:
        for step in range(1, 4):
            backward()
            if kind != "inside":
                recorder.micro_batch(step)
                backward()
            recorder.before_step(step, undo=True)
            norm = coefficient = None
            if kind != "inside":
                norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
                coefficient = (1 / (norm + 1e-6)).clamp(max=1.0)
            optimizer.step()
            recorder.after_step(step, grad_norm=norm, clip_coef=coefficient, loss=1.0)
            optimizer.zero_grad()
            if probe:
                recorder.probe(step, backward)
    return load(folder)


@pytest.mark.parametrize("first", ["first on the accelerator", "first on the host"])
@pytest.mark.parametrize("kind", ["full", "LoRA", "inside"])
def test_everything_is_measured(tmp_path, monkeypatch, kind, first):
    case = CASES["LoRA" if kind == "LoRA" else "full"]
    probe = kind != "inside"
    expected = train(build(case, "cpu"), tmp_path / "cpu", kind, probe)
    model = build(case, "cpu")
    layers = model.get_submodule("base_model.model.model" if kind == "LoRA" else "model").layers
    layers[:2].to(DEVICE)
    if first == "first on the accelerator":
        model.get_input_embeddings().to(DEVICE)
    with watched(monkeypatch) as watch:
        watch.allowed = True  # between two accelerators nothing would wait
        run = train(model, tmp_path / "spread", kind, probe)
    for ours, theirs in zip(measured(run), measured(expected), strict=True):
        assert ours.equals(theirs)
