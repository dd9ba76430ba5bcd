"""Findings while training, in a plain loop: said once, by the rules of `la.diagnose`."""

import logging

import pytest
import torch
from helpers_recording import VOCABULARY, llama

import lisa_train as lt
from lisa_analysis.rundir.opening import load


def loop(folder, spoil, steps=8, **record):
    """Train a few steps; `spoil(model, step)` does something to the gradients."""
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    config = lt.RecordConfig(str(folder), every=1, **{"flush_seconds": 0, **record})
    recorder = lt.NormRecorder(model, optimizer, config)
    heard = []
    recorder.on_finding.append(lambda step, finding: heard.append((step, finding.id)))
    generator = torch.Generator().manual_seed(0)
    with recorder:
        for step in range(1, steps + 1):
            ids = torch.randint(3, VOCABULARY, (2, 8), generator=generator)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            spoil(model, step)
            recorder.before_step(step)
            optimizer.step()
            recorder.after_step(step, loss=loss)
            optimizer.zero_grad()
    return recorder, heard


def nothing(model, step):
    """A healthy run."""


def no_gradient_in_layer_1(model, step):
    for parameter in model.model.layers[1].parameters():
        parameter.grad.zero_()


def infinite_at_3(model, step):
    if step == 3:
        model.model.layers[2].mlp.up_proj.weight.grad[0, 0] = float("inf")


def warnings_of(folder):
    events = load(folder).events
    return events[events["event"] == "warning"] if len(events) else events


def test_a_healthy_run_says_nothing(tmp_path, caplog):
    _, heard = loop(tmp_path / "run", nothing)
    assert heard == []
    assert not caplog.records
    assert not len(warnings_of(tmp_path / "run"))


@pytest.mark.parametrize(
    ("spoil", "rule", "words", "flushed"),
    [
        (no_gradient_in_layer_1, "dead_layers", "layer 1: the gradient is 0", 4),
        (infinite_at_3, "non_finite", "First grad_norm at step 3: model.layers.2.mlp.up_proj", 4),
    ],
)
def test_a_fault_is_said_once_and_soon(tmp_path, caplog, spoil, rule, words, flushed):
    with caplog.at_level(logging.WARNING):
        _, heard = loop(tmp_path / "run", spoil)
    # The newest step waits for a census that may come: the third is written when the fifth begins.
    assert (flushed, rule) in heard
    assert len(heard) == len(set(heard))
    lines = [r.getMessage() for r in caplog.records if words in r.getMessage()]
    assert len(lines) == 1
    assert "\n" not in lines[0]
    assert " Try: " in lines[0]
    events = warnings_of(tmp_path / "run")
    assert rule in set(events["rule"])
    assert any(words in message for message in events["message"])


def test_nothing_is_looked_at_between_two_flushes(tmp_path, monkeypatch):
    from lisa_analysis.runs.diagnostics import live

    monkeypatch.setattr(live, "judge", lambda *args: pytest.fail("looked"))
    loop(tmp_path / "run", infinite_at_3, flush_seconds=1000)
    loop(tmp_path / "off", infinite_at_3, watch=False)


def test_a_fault_of_the_watch_ends_the_watch_alone(tmp_path, monkeypatch, caplog):
    from lisa_analysis.runs.diagnostics import live

    monkeypatch.setenv("LISA_TOOLKIT_STRICT", "0")
    monkeypatch.setattr(live, "judge", lambda *args: 1 / 0)
    loop(tmp_path / "run", nothing)
    assert [r.getMessage()[:31] for r in caplog.records] == ["Nothing is watched any more: a "]
    run = load(tmp_path / "run")
    assert run.status == "finished"
    assert run.metrics(["grad_norm"])["step"].max() == 8


def test_a_loop_can_show_every_layer(tmp_path):
    recorder, _ = loop(tmp_path / "run", nothing, report_layers=True)
    shown = recorder.aggregates
    assert shown["recorded_step"] == 8
    assert sorted(n for n in shown if n.startswith("trained/")) == [
        "trained/layer_0", "trained/layer_1", "trained/layer_2",
    ]  # fmt: skip
    frame = load(tmp_path / "run").norms("grad_norm")
    for layer in range(3):
        assert shown[f"grad_norm/layer_{layer}"] == pytest.approx(frame.loc[8, layer], rel=1e-5)
