"""Training under a loss scale (fp16): which steps were skipped, and passes that must not underflow.

fp16 in Trainer needs an accelerator. A stand-in for the CPU: torch's own `GradScaler("cpu")` in
the place where accelerate keeps its own, and accelerate's autocast switched to fp16.
"""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from helpers_recording import Witness, arguments, examples, llama

import lisa_train as lt
from lisa_analysis.rundir.opening import load

SCALE = 1024.0


class ShrunkLoss(Witness):
    """A loss of another size; huge in the steps of `overflow`."""

    factor = 1.0
    overflow = ()

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * (1e38 if self.state.global_step + 1 in self.overflow else self.factor)


def half(monkeypatch, folder, record=None, **changes):
    changes = {"max_steps": 6, "logging_nan_inf_filter": False, **changes}
    trainer = ShrunkLoss(llama(), arguments(folder / "out", **changes), train_dataset=examples())
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=2)
    trainer.accelerator.native_amp = True
    monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
    config = lt.RecordConfig(
        str(folder / "run"), every=1, on_record_error="raise", **(record or {})
    )
    lt.attach(trainer, record=config)
    return trainer


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd"])
def test_a_skipped_step_is_recorded_as_one(tmp_path, monkeypatch, optim, clip):
    """The fused AdamW is called in every step and skips on the device: only the scale tells."""
    trainer = half(monkeypatch, tmp_path, optim=optim, max_grad_norm=clip)
    trainer.overflow = (1, 4)
    trainer.train()
    run = load(tmp_path / "run")
    skipped = {1, 4}
    assert run.scalars["skipped"].tolist() == [step in skipped for step in range(1, 7)]
    names = dict(zip(run.parameters["param_id"], run.parameters["name"], strict=True))
    # A scale that halves when a step is skipped, and doubles after two that are not.
    scale = dict(zip(range(1, 7), np.array([1, 0.5, 0.5, 1, 0.5, 0.5]) * SCALE, strict=True))
    rows = run.metrics(steps=slice(1, 7))
    assert len(rows) == 6 * len(names)
    for row in rows.itertuples():
        seen, name = trainer.seen[row.step], names[row.param_id]
        gradient = seen["gradient"][name] / scale[row.step]
        update = seen["after"][name] - seen["before"][name]
        assert row.weight_norm == pytest.approx(float(seen["after"][name].norm()), rel=1e-5)
        if row.step in skipped:
            assert not update.any()
            assert not np.isfinite(row.grad_norm)
            assert np.isnan(row.update_norm)
            assert np.isnan(row.descent)
        else:
            assert row.grad_norm == pytest.approx(float(gradient.norm()), rel=1e-5)
            assert row.update_norm == pytest.approx(float(update.norm()), rel=1e-5)
            bound = float((gradient * update).abs().sum())
            assert row.descent == pytest.approx(-float((gradient * update).sum()), abs=1e-5 * bound)
    # Null, and not a NaN that was measured.
    assert nulls(tmp_path / "run", "descent") == nulls(tmp_path / "run", "update_norm")
    assert nulls(tmp_path / "run", "descent") >= len(skipped) * len(names)


def nulls(run_dir, column):
    tables = [pq.read_table(path) for path in (run_dir / "metrics").glob("*.parquet")]
    return sum(table[column].null_count for table in tables if column in table.column_names)


def test_a_measuring_pass_does_not_underflow(tmp_path, monkeypatch):
    """A loss so small that its gradients vanish in fp16 unless it is scaled as in training."""
    trainer = half(
        monkeypatch, tmp_path, {"probe_every": 1}, max_steps=3, learning_rate=0.0, max_grad_norm=0
    )  # fmt: skip
    trainer.factor = 1e-6
    probed = []
    pass_of = trainer._prepare_inputs
    monkeypatch.setattr(
        trainer, "_prepare_inputs", lambda x: probed.append(pass_of(x)) or probed[-1]
    )
    trainer.train()
    run = load(tmp_path / "run")
    rows = run.metrics(columns=["probe_grad_norm"], steps=slice(1, 4))
    names = dict(zip(run.parameters["param_id"], run.parameters["name"], strict=True))
    model = llama().double()
    assert len(rows) == 3 * len(names)
    for step, found in rows.groupby("step"):
        model.zero_grad()
        (model(**probed[2 * step - 1]).loss * trainer.factor).backward()
        exact = {n: float(p.grad.norm()) for n, p in model.named_parameters()}
        for row in found.itertuples():
            assert row.probe_grad_norm == pytest.approx(exact[names[row.param_id]], rel=0.02)
    unscaled = llama()
    with torch.autocast("cpu", torch.float16):
        loss = unscaled(**probed[1]).loss
    (loss * trainer.factor).backward()
    lost = [n for n, p in unscaled.named_parameters() if not p.grad.any()]
    assert len(lost) > len(names) / 2  # the plant works: this is what was recorded


def test_a_loop_may_leave_it_to_the_device_what_was_skipped(tmp_path):
    """A tensor is as good as a word, and nothing is read from it before the rows are."""
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with lt.NormRecorder(model, optimizer, lt.RecordConfig(str(tmp_path), every=1)) as recorder:
        for step, skipped in ((1, False), (2, True), (3, False)):
            model(**batch()).loss.backward()
            recorder.before_step(step)
            if not skipped:
                optimizer.step()
            recorder.after_step(step, skipped=torch.tensor(skipped))
            optimizer.zero_grad()
    run = load(tmp_path)
    assert run.scalars["skipped"].tolist() == [False, True, False]
    frame = run.metrics(columns=["update_norm", "descent", "grad_norm"], steps=slice(1, 4))
    frame["known"] = frame["update_norm"].notna() & frame["descent"].notna()
    assert frame.groupby("step")["known"].sum().tolist() == [30, 0, 30]
    assert frame["grad_norm"].notna().all()


def batch():
    rows = examples(2)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
