"""Live numbers in a Trainer: every layer in its own log, and alerts of its trackers."""

import sys
from types import SimpleNamespace

import pytest
from helpers_recording import arguments, examples, llama
from transformers import Trainer, TrainerCallback

import lisa_train as lt
from lisa_analysis.rundir.opening import load


def make(folder, *, layers=3, lisa=None, callbacks=(), record=None, **changes):
    settings = {"run_dir": str(folder / "run"), "every": 1, "flush_seconds": 0, **(record or {})}
    trainer = Trainer(
        llama(layers=layers),
        arguments(folder / "run" / "checkpoints", **changes),
        train_dataset=examples(),
        callbacks=list(callbacks),
    )
    lt.attach(trainer, lisa=lisa, record=lt.RecordConfig(**settings))
    trainer.args.report_to = ["some_tracker"]
    return trainer


def test_every_layer_goes_through_the_trainers_own_log(tmp_path):
    lisa = lt.LisaConfig(activated_layers=2, interval_steps=2)
    trainer = make(tmp_path, layers=11, lisa=lisa, max_steps=6, record={"report_layers": True})
    trainer.train()
    logs = [line for line in trainer.state.log_history if "recorded_step" in line]
    assert [line["recorded_step"] for line in logs] == [1, 2, 3, 4]
    names = [name for name in logs[0] if name.startswith("trained/")]
    assert sorted(names) == [f"trained/layer_{layer:02d}" for layer in range(11)]  # names sort
    run = load(tmp_path / "run")
    norms = run.norms("grad_norm")
    for line in logs:
        step = int(line["recorded_step"])
        drawn = {layer for layer in range(11) if line[f"trained/layer_{layer:02d}"]}
        assert drawn == set(norms.columns[:11][norms.loc[step].iloc[:11].notna()])
        assert len(drawn) == 2
        for layer in drawn:
            name = f"grad_norm/layer_{layer:02d}"
            assert line[name] == pytest.approx(norms.loc[step, layer], rel=1e-5)
        assert len([name for name in line if name.startswith("grad_norm/layer_")]) == 2
        assert "grad_norm/layers_first" not in line


def test_layers_that_are_asked_for_need_no_tracker(tmp_path):
    """The Trainer's log has readers of its own: callbacks, and trainer_state.json."""
    for asked in (True, False):
        trainer = make(tmp_path / f"{asked}", max_steps=3, record={"report_layers": asked})
        trainer.args.report_to = []
        trainer.train()
        logged = [line for line in trainer.state.log_history if "grad_norm/layer_1" in line]
        assert bool(logged) == asked


class TensorBoardCallback(TrainerCallback):
    """Stands in for transformers' of that name: tensorboard need not be installed."""

    def __init__(self):
        self.texts = []
        self.tb_writer = SimpleNamespace(add_text=lambda *text: self.texts.append(text))


class WandbCallback(TrainerCallback):
    """The same."""


class TrackioCallback(TrainerCallback):
    """The same."""


class SpoilsAt2(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:  # the second step's gradients are infinite from here on
            model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("inf")


def test_a_finding_is_an_alert_of_the_tracker(tmp_path, monkeypatch):
    alerts = []
    levels = SimpleNamespace(WARN="warn", ERROR="error")

    def alert(title, text, level):
        alerts.append((title, text, level))

    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(alert=alert, AlertLevel=levels, run=object())
    )
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(alert=alert, AlertLevel=levels))
    board = TensorBoardCallback()
    callbacks = [SpoilsAt2(), board, WandbCallback(), TrackioCallback()]
    make(tmp_path, callbacks=callbacks, max_steps=5, max_grad_norm=0.0).train()
    found = [a for a in alerts if a[0].startswith("Non-finite values (step ")]
    assert len(found) == 2  # one of each tracker, and no more
    assert {level for _, _, level in found} == {"error"}
    assert " Try: " in found[0][1]
    assert [tag for tag, _, _ in board.texts] == ["findings"] * len(board.texts)
    assert any("Non-finite" in text for _, text, _ in board.texts)


def test_without_a_tracker_nothing_is_asked_of_one(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=object()))  # not this trainer's
    make(tmp_path, callbacks=[SpoilsAt2()], max_steps=5, max_grad_norm=0.0).train()
    assert load(tmp_path / "run").status == "finished"
