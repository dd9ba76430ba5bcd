"""On a GPU nothing waits for the device between two flushes, and the numbers are the same."""

import pytest
import torch
from helpers_recording import examples, llama

import lisa_train as lt
from lisa_analysis.rundir import load

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
