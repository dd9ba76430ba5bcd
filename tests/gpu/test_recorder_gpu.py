"""On a GPU nothing waits for the device between two flushes, and the numbers are the same."""

import functools

import numpy as np
import pytest
import torch
from helpers_loops import ADAMW, CASES, build, measured, train
from helpers_recording import examples, llama

import lisa_train as lt
from lisa_analysis.rundir.opening import load
from lisa_train.measure.recorder import NormRecorder

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_synchronisation_outside_a_flush(tmp_path, dtype):
    model = llama().to("cuda", dtype)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    config = lt.RecordConfig(str(tmp_path), every=1, flush_seconds=1e9)
    exact = {}
    rows = examples(4)
    ids = torch.stack([row["input_ids"] for row in rows]).cuda()
    with lt.NormRecorder(model, optimizer, config) as recorder:
        for step in range(1, 5):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            exact[step] = {n: float(p.grad.double().norm()) for n, p in model.named_parameters()}
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                recorder.before_step(step, undo=True)
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=True)
                optimizer.step()
                coefficient = (0.1 / (norm + 1e-6)).clamp(max=1)
                recorder.after_step(step, loss=loss, grad_norm=norm, clip_coef=coefficient)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            optimizer.zero_grad()
    run = load(tmp_path)
    assert run.events.empty
    names = dict(zip(run.parameters["param_id"], run.parameters["name"], strict=True))
    frame = run.metrics(["grad_norm"]).dropna()
    assert len(frame) == 4 * 30
    for row in frame.itertuples():
        assert row.grad_norm == pytest.approx(exact[row.step][names[row.param_id]], rel=1e-5)


@pytest.mark.parametrize("optimizer", ADAMW)
@pytest.mark.parametrize("name", CASES)
def test_every_loop(tmp_path, monkeypatch, name, optimizer):
    """The loops of `tests/lisa_train/measure/test_host_sync.py`, on a device that computes."""
    case = CASES[name]
    if torch.is_tensor(case.rate) and optimizer == "foreach":
        pytest.skip("torch takes no tensor there")
    expected = train(case, build(case, "cpu"), tmp_path / "cpu", optimizer)

    def strict(method):
        @functools.wraps(method)
        def call(*args, **kwargs):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return method(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    for method in ("micro_batch", "before_step", "before_tensor", "after_tensor", "after_step"):
        monkeypatch.setattr(NormRecorder, method, strict(getattr(NormRecorder, method)))
    run = train(case, build(case, "cuda"), tmp_path / "cuda", optimizer)
    for ours, theirs in zip(measured(run), measured(expected), strict=True):
        assert ours.equals(theirs)
    first = [r.metrics(["weight_norm", "grad_norm"], steps=[1]) for r in (run, expected)]
    tolerance = 0.02 if case.half else 1e-3
    for column in ("weight_norm", "grad_norm"):
        np.testing.assert_allclose(first[0][column], first[1][column], rtol=tolerance)


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_does_not_reach_merged_norms(monkeypatch, allowed):
    """Products of fp32 matrices have ten bits where TF32 is allowed: 1e-3 off, not 1e-5."""
    from lisa_train.measure.adapters.factor_norms import merged_square
    from lisa_train.model.norms import squares

    torch.manual_seed(0)
    weight, a, b = torch.randn(700, 900), torch.randn(8, 900), torch.randn(700, 8)
    weight = weight - 0.9 * b @ a  # the mixed term decides
    exact = (weight.double() + b.double() @ a.double()).norm()
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
    weight, a, b = weight.cuda(), a.cuda(), b.cuda()
    found = merged_square(weight, squares([weight])[0], a, b, 1.0).sqrt().cpu()
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=0)
    assert torch.backends.cuda.matmul.allow_tf32 is allowed
