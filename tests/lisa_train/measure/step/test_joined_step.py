"""Many small tensors, joined or not: the same numbers and the same training."""

import pytest
import torch
from helpers_recording import VOCABULARY, llama
from peft import LoraConfig, get_peft_model

import lisa_train as lt
from lisa_analysis.rundir.opening import load
from lisa_train.measure.step import step_measure


def model(kind):
    torch.manual_seed(0)
    if kind == "full":
        return llama()
    return get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear"))


def recorded(path, kind, *, scale=1.0, undo=True, record=True):
    """Weights after three steps, and the rows of the run."""
    network = model(kind)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3)
    config = lt.RecordConfig(str(path), every=1)
    recorder = lt.NormRecorder(network, optimizer, config) if record else None
    torch.manual_seed(1)
    for step in range(1, 4):
        ids = torch.randint(0, VOCABULARY, (2, 8))
        (network(input_ids=ids, labels=ids).loss * scale).backward()
        if recorder:
            recorder.before_step(step, gradient_scale=scale, undo=undo)
        for parameter in trained:
            parameter.grad /= scale
        norm = torch.nn.utils.clip_grad_norm_(trained, 0.1)
        optimizer.step()
        if recorder:
            factor = (0.1 / (norm + 1e-6)).clamp(max=1) if undo else None
            recorder.after_step(step, clip_coef=factor, loss=1.0)
        optimizer.zero_grad()
    if recorder:
        recorder.close()
    weights = [p.detach().clone() for p in trained]
    return weights, load(path).metrics() if record else None


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(("scale", "undo"), [(1.0, True), (1.0, False), (64.0, False)])
def test_numbers_are_those_of_tensors_by_themselves(tmp_path, monkeypatch, kind, scale, undo):
    weights, rows = recorded(tmp_path / "joined", kind, scale=scale, undo=undo)
    monkeypatch.setattr(step_measure, "_MANY", 10**9)
    same, alone = recorded(tmp_path / "alone", kind, scale=scale, undo=undo)
    assert all(map(torch.equal, weights, same))
    assert list(rows.columns) == list(alone.columns)
    keys = ["step", "param_id"]
    rows, alone = rows.sort_values(keys), alone.sort_values(keys)
    for name in rows.columns:
        first, second = (torch.tensor(x[name].astype(float).values) for x in (rows, alone))
        # A product's terms cancel, and clipping has rounded one of the two.
        near = 2e-5 if name == "descent" else 2e-6
        torch.testing.assert_close(first, second, rtol=near, atol=1e-9, equal_nan=True)
    assert rows.loc[rows["step"] > 0, "descent"].notna().any()
    assert rows["delta_norm"].notna().any() == (kind == "lora")


def test_training_is_that_of_a_run_without_recorder(tmp_path):
    weights, _ = recorded(tmp_path / "run", "lora")
    plain, _ = recorded(None, "lora", record=False)
    assert all(map(torch.equal, weights, plain))


def test_the_small_tensors_are_joined(tmp_path):
    network = model("lora")
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3)
    recorder = lt.NormRecorder(network, optimizer, lt.RecordConfig(str(tmp_path), every=1))
    ids = torch.randint(0, VOCABULARY, (2, 8))
    network(input_ids=ids, labels=ids).loss.backward()
    recorder.before_step(1)
    now = recorder._measure._now
    assert now.small == len(trained) > 16
    assert now.before == {}
    recorder.close()
