"""The recorder in a Trainer: events, status, resume, and a trainer left as it was found."""

import copy
import json
import os
import warnings
from collections import defaultdict

import numpy as np
import pytest
import torch
from helpers_recording import Witness, arguments, compare, examples, llama
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError, RunDirectoryError
from lisa_analysis.rundir.opening import load
from lisa_train.measure.disk.writer import RunWriter
from lisa_train.measure.probe import measuring_pass
from lisa_train.measure.step.step_measure import StepMeasure
from lisa_train.methods import METHODS


def make(folder, model=None, *, lisa=None, record=None, resume=False, manifest=None, **changes):
    trainer = Witness(
        model or llama(),
        arguments(folder / "run" / "checkpoints", **changes),
        train_dataset=examples(),
        eval_dataset=examples(8),
    )
    settings = {"run_dir": str(folder / "run"), "every": 1, **(record or {})}
    attached = lt.attach(
        trainer, lisa=lisa, record=lt.RecordConfig(**settings), resume=resume, manifest=manifest
    )
    return trainer, attached


def test_events_manifest_and_result(tmp_path):
    trainer, _ = make(
        tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2, eval_on_start=True, per_device_eval_batch_size=3,
        manifest={"dataset": {"name": "d"}, "method": "mine"},
    )  # fmt: skip
    exact = []
    trainer.add_callback(_Exact(examples(8), exact))
    trainer.train()
    trainer.evaluate()  # after the end: the run takes it still
    run = load(tmp_path / "run")
    assert run.status == "finished"
    kinds = list(zip(run.events["event"], run.events["step"], strict=True))
    assert kinds == [
        ("evaluate", 0), ("evaluate", 2), ("checkpoint", 2), ("evaluate", 4), ("checkpoint", 4),
        ("evaluate", 4),
    ]  # fmt: skip
    checkpoint = run.events.set_index("event").loc["checkpoint", "path"].iloc[0]
    assert (run.path / checkpoint / "trainer_state.json").exists()
    found = [m["eval_loss"] for m in run.events["metrics"].dropna()]
    assert found[:3] == pytest.approx(exact[:3], rel=1e-6)
    reported = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert reported[:3] != pytest.approx(found[:3], rel=1e-6)  # Trainer's: a mean of means
    assert found[3] == reported[3]
    losses = found
    result = run.manifest["result"]
    assert result["first_held_out_loss"] == losses[0]
    assert result["last_held_out_loss"] == losses[2]
    assert result["steps"] == 4
    assert result["tokens"] == trainer.tokens[4]
    assert run.manifest["dataset"] == {"name": "d"}
    assert run.method == "mine"
    assert run.manifest["model"]["architecture"] == "LlamaForCausalLM"
    assert run.manifest["recording"]["every"] == 1
    assert run.manifest["versions"]["torch"] == torch.__version__
    assert run.scalars["epoch"].tolist() == pytest.approx([2 * s / 64 for s in range(1, 5)])


class _Exact(TrainerCallback):
    """At every evaluation: the held-out loss per label, in float64, row by row."""

    def __init__(self, rows, found):
        self.rows, self.found = rows, found

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.found.append(_loss_per_label(model, self.rows))


def _loss_per_label(model, rows):
    model = copy.deepcopy(model).double().eval()
    total, labels = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(
                row["input_ids"][None], attention_mask=row["attention_mask"][None]
            ).logits
        wanted = row["labels"][1:]
        for position, label in enumerate(wanted.tolist()):
            if label != -100:
                total -= torch.log_softmax(logits[0, position], dim=-1)[label].item()
                labels += 1
    return total / labels if labels else None


def _masked(rows, *empty):
    """Rows of different length, those numbered `empty` without a label that counts."""
    for number, row in enumerate(rows):
        keep = 1 if number in empty else 3 + number % 8
        row["labels"] = torch.where(torch.arange(12) < keep, row["input_ids"], -100)
    return rows


@pytest.mark.parametrize("accepts", [True, False])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_losses_are_per_label_and_null_without_one(tmp_path, accepts, accumulation):
    """Step 2 has no label; step 3 one batch without any if it has two. Rate 0: one model."""
    rows = _masked(examples(8 * accumulation), *((1,) if accumulation == 1 else (2, 3, 4)))
    held_out = _masked(examples(9), 0, 1, 4)
    trainer = Trainer(
        llama(),
        arguments(
            tmp_path / "c", max_steps=4, per_device_train_batch_size=1, learning_rate=0.0,
            gradient_accumulation_steps=accumulation, train_sampling_strategy="sequential",
            eval_strategy="steps", eval_steps=4, per_device_eval_batch_size=2,
        ),
        train_dataset=rows, eval_dataset=held_out,
    )  # fmt: skip
    trainer.model_accepts_loss_kwargs = accepts
    lt.attach(trainer, record=lt.RecordConfig(str(tmp_path / "run"), every=1))
    trainer.train()
    run = load(tmp_path / "run")
    exact = [
        _loss_per_label(trainer.model, rows[accumulation * i : accumulation * (i + 1)])
        for i in range(4)
    ]
    found = [None if np.isnan(x) else x for x in run.scalars["loss"]]
    assert exact.count(None) == 1
    assert found == [None if x is None else pytest.approx(x, rel=1e-5) for x in exact]
    lines = [json.loads(x) for x in (run.path / "scalars.jsonl").read_text().splitlines()]
    assert ["loss" in line for line in lines] == [x is not None for x in exact]
    expected = pytest.approx(_loss_per_label(trainer.model, held_out), rel=1e-5)
    assert run.events["metrics"].dropna().iloc[0]["eval_loss"] == expected
    assert run.manifest["result"]["last_held_out_loss"] == expected
    assert "labels" not in run.scalars


class _OwnLoss(Trainer):
    """A `compute_loss` of one's own, which says whether it knows of accumulation."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.loss
        if self.loss_is_scaled_for_ga:  # a share of the step's mean over all labels
            loss = loss * (inputs["labels"][:, 1:] != -100).sum() / self.labels_of_step
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, *args):
        batches, items = super().get_batch_samples(*args)
        self.labels_of_step = sum((b["labels"][:, 1:] != -100).sum() for b in batches)
        return batches, items


@pytest.mark.parametrize("accepts", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_loss_that_says_whether_it_is_scaled_is_taken_at_its_word(tmp_path, accepts, scaled):
    rows = _masked(examples(8))
    trainer = _OwnLoss(
        llama(),
        arguments(
            tmp_path / "c", max_steps=2, per_device_train_batch_size=1, learning_rate=0.0,
            gradient_accumulation_steps=4, train_sampling_strategy="sequential",
        ),
        train_dataset=rows,
    )  # fmt: skip
    trainer.model_accepts_loss_kwargs, trainer.loss_is_scaled_for_ga = accepts, scaled
    lt.attach(trainer, record=lt.RecordConfig(str(tmp_path / "run"), every=1))
    trainer.train()
    exact = [_loss_per_label(trainer.model, rows[4 * i : 4 * i + 4]) for i in range(2)]
    assert load(tmp_path / "run").scalars["loss"].tolist() == pytest.approx(exact, rel=1e-5)


def test_an_evaluation_without_a_label_has_no_loss(tmp_path):
    trainer = Trainer(
        llama(), arguments(tmp_path / "c", max_steps=1, eval_on_start=True),
        train_dataset=examples(), eval_dataset=_masked(examples(3), 0, 1, 2),
    )  # fmt: skip
    lt.attach(trainer, record=lt.RecordConfig(str(tmp_path / "run"), every=1))
    trainer.train()
    run = load(tmp_path / "run")
    assert "eval_loss" not in run.events["metrics"].dropna().iloc[0]
    assert "first_held_out_loss" not in run.manifest["result"]


@pytest.mark.parametrize("stops", [False, True])
def test_the_last_census_is_of_the_last_weights_not_of_the_best(tmp_path, stops):
    """Whether the last step ended the training or a callback after an evaluation."""
    trainer, _ = make(
        tmp_path, max_steps=20 if stops else 4, eval_strategy="steps", eval_steps=1,
        save_strategy="best", load_best_model_at_end=True, greater_is_better=False,
        save_total_limit=1, metric_for_best_model="eval_loss", learning_rate=10.0,
        record={"every": 3},
    )  # fmt: skip
    if stops:
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    step = trainer.state.global_step
    assert trainer.state.best_global_step < step <= 4
    run = load(tmp_path / "run")
    names = dict(zip(run.parameters["param_id"], run.parameters["name"], strict=True))
    last = run.metrics(["weight_norm"], steps=[step])
    assert len(last) == 30
    for row in last.itertuples():
        exact = float(trainer.seen[step]["after"][names[row.param_id]].norm())
        assert row.weight_norm == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("resume", [False, True])
def test_the_result_says_which_step_s_weights_are_kept(tmp_path, resume):
    """The last held-out loss is of another model than the one that Trainer has loaded."""
    settings = {
        "max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps",
        "save_steps": 1, "load_best_model_at_end": True, "greater_is_better": False,
        "metric_for_best_model": "eval_loss", "learning_rate": 10.0,
    }  # fmt: skip
    trainer, _ = make(tmp_path, **settings)
    trainer.train()
    if resume:
        trainer, _ = make(tmp_path, **settings)
        trainer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoints/checkpoint-2"))
    best = trainer.state.best_global_step
    assert best < 4
    run = load(tmp_path / "run")
    result = run.manifest["result"]
    by_step = run.events.query("event == 'evaluate'").set_index("step")["metrics"]
    assert result["best_step"] == best
    assert result["best_held_out_loss"] == by_step[best]["eval_loss"] < result["last_held_out_loss"]
    kept = trainer.evaluate()["eval_loss"]
    assert kept == pytest.approx(result["best_held_out_loss"], rel=1e-6)
    assert f"kept is the model of step {best}, held-out loss" in METHODS["full"].outcome(result)


def test_the_best_weights_being_the_last_is_not_worth_a_word(tmp_path):
    trainer, _ = make(
        tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2, load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert "best_step" not in load(tmp_path / "run").manifest["result"]


def test_due_steps_and_censuses(tmp_path):
    trainer, _ = make(
        tmp_path, max_steps=10, record={"every": 4}, save_strategy="steps", save_steps=5
    )
    trainer.train()
    run = load(tmp_path / "run")
    counts = run.metrics(["weight_norm", "grad_norm"]).groupby("step").count()
    assert counts.index.tolist() == [0, 1, 4, 5, 8, 10]
    assert counts["grad_norm"].tolist() == [0, 30, 30, 0, 30, 0]
    assert (counts["weight_norm"] == 30).all()
    assert run.scalars["step"].tolist() == list(range(1, 11))


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), "interrupted"), (RuntimeError("out\nof luck"), "failed")],
)
def test_how_a_run_ended(tmp_path, error, status):
    trainer, _ = make(tmp_path, max_steps=6)
    original = trainer.compute_loss

    def compute_loss(*args, **kwargs):
        if trainer.state.global_step == 3:
            raise error
        return original(*args, **kwargs)

    trainer.compute_loss = compute_loss
    with pytest.raises(type(error)):
        trainer.train()
    run = load(tmp_path / "run")
    assert run.status == status
    assert run.manifest.get("error") == (
        "RuntimeError: out of luck" if status == "failed" else None
    )
    assert run.scalars["step"].tolist() == [1, 2, 3]
    assert run.metrics()["step"].unique().tolist() == [0, 1, 2, 3]
    trainer.compute_loss = original
    compare_steps = {s: v for s, v in trainer.seen.items() if s <= 3}
    trainer.seen = compare_steps
    compare(tmp_path / "run", trainer)


def test_what_fails_after_training_shows_in_the_status(tmp_path):
    trainer, attached = make(tmp_path, max_steps=2)

    def train_and_save():
        with attached:
            trainer.train()
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        train_and_save()
    run = load(tmp_path / "run")
    assert (run.status, run.manifest["error"]) == ("failed", "OSError: no room")


def test_the_trainer_is_left_as_it_was(tmp_path):
    trainer, _ = make(tmp_path, max_steps=2)
    wrapped = {"training_step", "save_model", "log"}
    before = set(vars(trainer)) & wrapped, set(vars(trainer.accelerator))
    trainer.train()
    assert (set(vars(trainer)) & wrapped, set(vars(trainer.accelerator))) == before
    assert trainer.training_step.__func__ is Witness.training_step
    assert all(p.grad is None for p in trainer.model.parameters())
    assert not any(p._backward_hooks for p in trainer.model.parameters())


def test_noise_of_a_lone_micro_batch_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="a step has one micro-batch, and nothing to compare"):
        make(tmp_path, max_steps=2, record={"grad_noise": True})


def test_recording_changes_nothing_of_the_training(tmp_path):
    recorded, _ = make(
        tmp_path, max_steps=6, record={"probe_every": 2, "grad_noise": True},
        gradient_accumulation_steps=2,
    )  # fmt: skip
    recorded.train()
    plain = Witness(
        llama(), arguments(tmp_path / "plain", max_steps=6, gradient_accumulation_steps=2),
        train_dataset=examples(),
    )  # fmt: skip
    plain.train()
    for (name, a), b in zip(
        recorded.model.named_parameters(), plain.model.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    losses = [line["loss"] for line in recorded.state.log_history if "loss" in line]
    assert losses == [line["loss"] for line in plain.state.log_history if "loss" in line]


# --- resume -------------------------------------------------------------------------------------


def test_a_resumed_run_is_one_run(tmp_path):
    lisa = lt.LisaConfig(activated_layers=1, interval_steps=3)
    first, _ = make(tmp_path, lisa=lisa, max_steps=10, save_strategy="steps", save_steps=4)
    original = first.compute_loss

    def fail(*args, **kwargs):
        if first.state.global_step == 7:
            raise RuntimeError("power cut")
        return original(*args, **kwargs)

    first.compute_loss = fail
    with pytest.raises(RuntimeError):
        first.train()
    second, _ = make(tmp_path, lisa=lisa, max_steps=10, save_strategy="steps", save_steps=4)
    second.train(resume_from_checkpoint=True)
    run = load(tmp_path / "run")
    assert run.status == "finished"
    assert "error" not in run.manifest
    assert run.manifest["segment"] == 1
    assert run.scalars["step"].tolist() == list(range(1, 11))
    resume = run.events[run.events["event"] == "resume"].iloc[0]
    assert (resume["step"], resume["checkpoint"]) == (4, "checkpoints/checkpoint-4")
    assert run.events.loc[run.events["event"] == "lisa_draw", "step"].tolist() == [0, 3, 6, 9]
    second.seen.update({s: v for s, v in first.seen.items() if s <= 4})
    compare(tmp_path / "run", second)

    straight, _ = make(tmp_path / "straight", lisa=lisa, max_steps=10)
    straight.train()
    whole = load(tmp_path / "straight" / "run")
    keys = ["step", "param_id"]
    merged = run.metrics().merge(whole.metrics(), on=keys, how="outer", suffixes=("", "_"))
    merged = merged[merged["grad_norm_"].notna()]
    for column in ("weight_norm", "grad_norm", "update_norm", "opt_steps"):
        assert np.allclose(merged[column], merged[f"{column}_"], rtol=1e-5), column
    assert run.scalars["tokens"].tolist() == whole.scalars["tokens"].tolist()


def test_a_second_run_in_the_same_directory_is_refused_before_anything_happens(tmp_path):
    make(tmp_path, max_steps=2)[0].train()
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    trainer, _ = make(tmp_path, max_steps=2)
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_a_retry_with_a_smaller_batch_is_a_new_segment(tmp_path):
    trainer, _ = make(
        tmp_path, max_steps=4, auto_find_batch_size=True, per_device_train_batch_size=4
    )
    original = trainer.training_step

    def training_step(model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) == 4 and trainer.state.global_step == 2:
            raise RuntimeError("CUDA out of memory.")
        return original(model, inputs, *args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    run = load(tmp_path / "run")
    assert run.manifest["segment"] == 1
    assert run.scalars["step"].tolist() == [1, 2, 3, 4]
    assert run.metrics(["grad_norm"]).groupby("step").size().tolist() == [30] * 5


def test_a_retry_that_cannot_be_recorded_ends_the_recording_only(tmp_path, monkeypatch):
    trainer, attached = make(
        tmp_path, max_steps=4, auto_find_batch_size=True, per_device_train_batch_size=4
    )
    original = trainer.training_step

    def training_step(model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) == 4 and trainer.state.global_step == 2:
            raise RuntimeError("CUDA out of memory.")
        return original(model, inputs, *args, **kwargs)

    def begin_segment(self, step, checkpoint=None, **_):
        raise OSError(28, "No space left on device")

    trainer.training_step = training_step
    monkeypatch.setattr("lisa_train.measure.disk.writer.RunWriter.begin_segment", begin_segment)
    with pytest.warns(RuntimeWarning, match="Training goes on unrecorded: OSError: .*No space"):
        trainer.train()
    assert trainer.state.global_step == 4
    assert attached.recorder_callback.recorder is None
    run = load(tmp_path / "run")
    assert run.status == "failed"
    assert "No space left" in run.manifest["error"]
    assert run.scalars["step"].tolist() == [1, 2]


# --- recording goes wrong -----------------------------------------------------------------------


def full_disk(monkeypatch, after):
    """No room from step `after` on."""
    import lisa_train.measure.disk.storage as storage

    original = storage.os.fsync
    calls = {"n": 0}

    def fsync(descriptor):
        calls["n"] += 1
        if calls["n"] > after:
            raise OSError(28, "No space left on device")
        return original(descriptor)

    monkeypatch.setattr(storage.os, "fsync", fsync)


def test_a_full_disk_lets_training_go_on(tmp_path, monkeypatch):
    trainer, _ = make(tmp_path, max_steps=6, record={"flush_seconds": 0})
    full_disk(monkeypatch, after=13)
    with pytest.warns(RuntimeWarning, match=r"Recording: .*No space left on device") as caught:
        trainer.train()
    assert len([w for w in caught if "No space" in str(w.message)]) == 1
    assert trainer.state.global_step == 6
    monkeypatch.undo()
    run = load(tmp_path / "run")
    assert run.status == "interrupted"
    steps = run.metrics()["step"].unique().tolist()
    assert steps[:2] == [0, 1]
    assert len(steps) < 7


def test_a_full_disk_stops_training_if_asked_to(tmp_path, monkeypatch):
    trainer, _ = make(
        tmp_path, max_steps=6, record={"flush_seconds": 0, "on_record_error": "raise"}
    )
    full_disk(monkeypatch, after=13)
    with pytest.raises(RunDirectoryError, match="No space left on device"):
        trainer.train()
    assert 1 <= trainer.state.global_step < 6
    monkeypatch.undo()
    assert 1 in load(tmp_path / "run").metrics()["step"].tolist()


def test_a_disk_with_room_again_gets_everything(tmp_path, monkeypatch):
    import lisa_train.measure.disk.storage as storage

    trainer, _ = make(tmp_path, max_steps=6, record={"flush_seconds": 0})
    original = storage.os.fsync

    def fsync(descriptor):
        if trainer.state.global_step in (2, 3):
            raise OSError(28, "No space left on device")
        return original(descriptor)

    monkeypatch.setattr(storage.os, "fsync", fsync)
    with pytest.warns(RuntimeWarning, match="No space"):
        trainer.train()
    run = compare(tmp_path / "run", trainer)
    assert run.status == "finished"
    assert run.scalars["step"].tolist() == list(range(1, 7))
    assert run.events["event"].tolist() == ["warning"]


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "run").write_text("a file")

    def trainer(**record):
        made = Witness(llama(), arguments(tmp_path / "out", max_steps=2), train_dataset=examples())
        lt.attach(made, record=lt.RecordConfig(str(tmp_path / "run"), **record))
        return made

    with pytest.warns(RuntimeWarning, match="Training goes on unrecorded: .* cannot be written"):
        trainer().train()
    with pytest.raises(RunDirectoryError, match="cannot be written"):
        trainer(on_record_error="raise").train()


@pytest.fixture
def held(tmp_path):
    """A run directory that somebody else is writing."""
    from lisa_analysis.contract.schema import LOCK
    from lisa_train.measure.disk.storage import RunLock

    (tmp_path / "run").mkdir()
    lock = RunLock(tmp_path / "run" / LOCK)
    yield tmp_path
    lock.release()


def test_a_directory_that_another_process_writes(held):
    trainer = Witness(llama(), arguments(held / "out", max_steps=2), train_dataset=examples())
    attached = lt.attach(trainer, record=lt.RecordConfig(str(held / "run")))
    with pytest.warns(RuntimeWarning, match="unrecorded: .* written by another") as caught:
        trainer.train()
    assert len([w for w in caught if "unrecorded" in str(w.message)]) == 1
    assert trainer.state.global_step == 2
    assert attached.latest_scalars() == {}
    assert not (held / "run" / "run.json").exists()
    trainer = Witness(llama(), arguments(held / "out", max_steps=2), train_dataset=examples())
    lt.attach(trainer, record=lt.RecordConfig(str(held / "run"), on_record_error="raise"))
    with pytest.raises(RunDirectoryError, match="written by another process"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_checkpoints_never_go_among_those_of_another_process(held):
    trainer, _ = make(held, max_steps=2, save_strategy="steps", save_steps=1)
    with pytest.raises(RunDirectoryError, match="written by another process"):
        trainer.train()
    assert not list((held / "run").rglob("checkpoint-*"))


def test_an_unforeseen_error_at_the_begin(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("not thought of")

    monkeypatch.setattr("lisa_train.trainer.trainer_run.describe_run", fail)
    trainer, _ = make(tmp_path, max_steps=2)
    with pytest.warns(RuntimeWarning, match="goes on unrecorded: RuntimeError: not thought of"):
        trainer.train()
    assert trainer.state.global_step == 2
    trainer, _ = make(tmp_path, max_steps=2, record={"on_record_error": "raise"})
    with pytest.raises(RuntimeError, match="not thought of"):
        trainer.train()


def test_an_unforeseen_error_at_the_end(tmp_path, monkeypatch):
    original = RunWriter._save_manifest

    def fail(self, **fields):
        if fields.get("status") != "running":
            raise RuntimeError("not thought of")
        original(self, **fields)

    monkeypatch.setattr("lisa_train.measure.disk.writer.RunWriter._save_manifest", fail)
    trainer, _ = make(tmp_path, max_steps=2)
    with pytest.warns(RuntimeWarning, match="training goes on: RuntimeError: not thought of"):
        trainer.train()
    run = load(tmp_path / "run")
    assert run.status == "interrupted"  # it says running, and nobody writes it any more
    assert run.scalars["step"].tolist() == [1, 2]


def test_a_directory_whose_name_is_no_utf8(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/run-\xff")
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this file system takes no such name")
    trainer, _ = make(
        tmp_path, max_steps=2, save_strategy="steps", save_steps=2, record={"run_dir": folder},
        manifest={"command": f"lisa-train --run-dir {folder}"},
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        trainer.train()
    readable = tmp_path / "moved"
    os.rename(folder, readable)
    for name in ("run.json", "events.jsonl", "scalars.jsonl"):
        (readable / name).read_bytes().decode("utf-8")
    run = load(readable)
    assert run.status == "finished"
    assert run.manifest["command"].endswith("/run-\\udcff")
    assert run.metrics()["step"].unique().tolist() == [0, 1, 2]


def test_an_error_in_the_recorder_itself_stops_the_recording_only(tmp_path, monkeypatch):
    trainer, _ = make(tmp_path, max_steps=6)
    original = StepMeasure.update

    def update(self, step, clip_coef):
        if step == 3:
            raise RuntimeError("not thought of")
        return original(self, step, clip_coef)

    monkeypatch.setattr("lisa_train.measure.step.step_measure.StepMeasure.update", update)
    with pytest.warns(RuntimeWarning, match="Recording stopped, training goes on: RuntimeError"):
        trainer.train()
    run = load(tmp_path / "run")
    assert trainer.state.global_step == 6
    assert run.scalars["step"].tolist() == [1, 2]
    assert "not thought of" in run.events.loc[run.events["event"] == "warning", "message"].iloc[0]
    assert (run.status, run.manifest["error"]) == (
        "failed", "recording stopped after step 3: RuntimeError: not thought of",
    )  # fmt: skip
    assert run.manifest["result"]["steps"] == 6


def test_rows_that_a_full_disk_cost_are_told_of(tmp_path, monkeypatch):
    import lisa_train.measure.disk.storage as storage

    monkeypatch.setattr("lisa_train.measure.disk.writer.MAX_WAITING_ROWS", 30)
    trainer, _ = make(tmp_path, max_steps=6, record={"flush_seconds": 0})
    original = storage.os.fsync

    def fsync(descriptor):
        if trainer.state.global_step in (2, 3, 4):
            raise OSError(28, "No space left on device")
        return original(descriptor)

    monkeypatch.setattr(storage.os, "fsync", fsync)
    with pytest.warns(RuntimeWarning, match="No space"):
        trainer.train()
    run = load(tmp_path / "run")
    lost = 7 * 30 - len(run.metrics())
    assert lost > 0
    assert (run.status, run.manifest["error"]) == (
        "failed", f"{lost} rows were lost while the disk refused them",
    )  # fmt: skip


# --- what else can be recorded ------------------------------------------------------------------


def test_select_measures_a_part(tmp_path):
    trainer, _ = make(tmp_path, max_steps=2, record={"select": (0, "attn.q", r"embed_tokens")})
    trainer.train()
    run = load(tmp_path / "run")
    measured = set(run.metrics()["param_id"])
    table = run.parameters
    expected = table[
        (table["layer"] == 0) | (table["kind"] == "attn.q") | (table["kind"] == "embed")
    ]
    assert measured == set(expected["param_id"])
    assert len(table) == 30
    trainer, _ = make(tmp_path / "other", record={"select": ("attn.g",)})
    with pytest.raises(ConfigError, match=r"nothing in the model matches 'attn.g'.*Did you mean"):
        trainer.train()


@pytest.mark.parametrize("quantity", ["weight_norm", "grad_norm", "grad_norm_l1", "update_norm",
                                      "descent", "opt_steps"])  # fmt: skip
def test_one_quantity_alone(tmp_path, quantity):
    trainer, _ = make(tmp_path, max_steps=2, record={"quantities": (quantity,)})
    trainer.train()
    whole, _ = make(tmp_path / "whole", max_steps=2)
    whole.train()
    found = load(tmp_path / "run").metrics(steps=slice(1, 3))
    expected = load(tmp_path / "whole" / "run").metrics([quantity], steps=slice(1, 3))
    if quantity != "weight_norm":
        found = found[found[quantity].notna()]
    assert np.allclose(found[quantity], expected[quantity], rtol=1e-5)
    assert len(found) == len(expected)


def test_gradient_noise_is_the_variance_between_micro_batches(tmp_path):
    trainer, _ = make(
        tmp_path, max_steps=1, gradient_accumulation_steps=4, record={"grad_noise": True}
    )
    trainer.train()
    run = load(tmp_path / "run")
    names = dict(zip(run.parameters["param_id"], run.parameters["name"], strict=True))
    rows = run.metrics(["grad_noise"], steps=[1])
    assert len(rows) == 30
    for row in rows.itertuples():
        gradients = torch.stack([4 * micro[names[row.param_id]] for micro in trainer.micro])
        expected = float(gradients.var(dim=0, unbiased=True).sum())
        assert row.grad_noise == pytest.approx(expected, rel=1e-5)


def test_a_probe_sees_what_lisa_froze(tmp_path):
    lisa = lt.LisaConfig(activated_layers=1, interval_steps=2)
    trainer, _ = make(
        tmp_path, lisa=lisa, max_steps=4, record={"probe_every": 2}, per_device_train_batch_size=4
    )
    batches = {}
    original = trainer.training_step

    def training_step(model, inputs, *args, **kwargs):
        batches[trainer.state.global_step + 1] = inputs
        return original(model, inputs, *args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    run = load(tmp_path / "run")
    rows = run.metrics(["probe_grad_norm"]).dropna()
    assert sorted(rows["step"].unique()) == [2, 4]
    names = dict(zip(run.parameters["param_id"], run.parameters["name"], strict=True))
    for step, group in rows.groupby("step"):
        assert len(group) == 30
        model = llama().double()
        model.load_state_dict(trainer.seen[step]["after"])
        model(**batches[step]).loss.backward()
        gradients = {n: float(p.grad.norm()) for n, p in model.named_parameters()}
        for row in group.itertuples():
            assert row.probe_grad_norm == pytest.approx(gradients[names[row.param_id]], rel=1e-4)
    assert not any(p.grad is not None for p in trainer.model.parameters())


def test_a_probe_never_holds_two_gradients():
    from lisa_train.measure.buffers import MetricBuffer
    from lisa_train.measure.step.step_measure import StepMeasure
    from lisa_train.model.layer_map import find_layers
    from lisa_train.model.tensor_table import TensorTable

    model = llama()
    model.model.layers[0].requires_grad_(False)
    table = TensorTable(model, find_layers(model), None)
    buffer = MetricBuffer()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    probe = StepMeasure(model, optimizer, lt.RecordConfig("x"), table, buffer)
    held = []
    original = measuring_pass.squares

    def squares(tensors):
        held.append(sum(p.grad is not None for p in model.parameters()))
        return original(tensors)

    measuring_pass.squares = squares
    try:
        batch = {k: v[None] for k, v in examples(1)[0].items()}
        state = torch.random.get_rng_state()
        probe.probe(3, [lambda: (torch.rand(5), model(**batch).loss.backward())])
    finally:
        measuring_pass.squares = original
    assert len(held) == 30
    assert max(held) == 1
    assert torch.equal(state, torch.random.get_rng_state())
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert model.model.layers[1].mlp.up_proj.weight.requires_grad


class Counting(Witness):
    """Trains on ten times the loss, and counts in `compute_loss` as TRL's trainers do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._metrics = {"train": defaultdict(list)}
        self._total = 0
        self.batches = []

    def training_step(self, model, inputs, *args, **kwargs):
        self.batches.append(inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self._metrics["train"]["tokens"].append(int(inputs["attention_mask"].sum()))
        self._total += 1
        self._metrics["train"]["calls"] = [self._total]
        labels = inputs.pop("labels")  # what a trainer does to its batch is its own affair
        inputs["labels"] = labels
        return 10 * super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)


@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_probe_measures_the_loss_that_is_trained(tmp_path, accumulated):
    trainer = Counting(
        llama(),
        arguments(
            tmp_path / "out", max_steps=2, learning_rate=0.0,
            gradient_accumulation_steps=accumulated,
        ),
        train_dataset=examples(),
    )  # fmt: skip
    config = lt.RecordConfig(str(tmp_path / "run"), every=1, probe_every=1)
    lt.attach(trainer, record=config)
    trainer.train()
    run = load(tmp_path / "run")
    names = dict(zip(run.parameters["param_id"], run.parameters["name"], strict=True))
    rows = run.metrics(["grad_norm", "probe_grad_norm"], steps=slice(1, 3))
    assert len(rows) == 60
    if accumulated == 1:
        assert np.allclose(rows["probe_grad_norm"], rows["grad_norm"], rtol=1e-4)
    for step, group in rows.groupby("step"):
        model = llama().double()
        (10 * model(**trainer.batches[accumulated * step - 1]).loss).backward()
        gradients = {n: float(p.grad.norm()) for n, p in model.named_parameters()}
        for row in group.itertuples():
            assert row.probe_grad_norm == pytest.approx(gradients[names[row.param_id]], rel=1e-4)
    passes = 2 * accumulated
    assert trainer._total == passes
    assert trainer._metrics["train"]["calls"] == [passes]
    assert trainer._metrics["train"]["tokens"] == [
        int(batch["attention_mask"].sum()) for batch in trainer.batches
    ]
    assert trainer.current_gradient_accumulation_steps == accumulated


class OwnLoss(Witness):
    """Computes its loss where nobody else can: its batches have no labels."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = self._prepare_inputs(inputs)
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        self.accelerator.backward(loss)
        return loss.detach()


@pytest.mark.parametrize("choice", ["warn", "raise"])
def test_a_probe_without_a_loss_is_switched_off(tmp_path, choice):
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in examples()]
    trainer = OwnLoss(llama(), arguments(tmp_path / "out", max_steps=4), train_dataset=rows)
    trainer.callback_handler.callbacks = [
        cb for cb in trainer.callback_handler.callbacks if type(cb).__name__ != "_AfterStep"
    ]
    config = lt.RecordConfig(str(tmp_path / "run"), every=1, probe_every=1, on_record_error=choice)
    lt.attach(trainer, record=config)
    if choice == "raise":
        with pytest.raises(ValueError, match="did not return a loss"):
            trainer.train()
        return
    with pytest.warns(RuntimeWarning, match="nothing is probed any more: .*loss") as caught:
        trainer.train()
    assert len([w for w in caught if "probed" in str(w.message)]) == 1
    run = load(tmp_path / "run")
    assert run.status == "finished"
    assert run.metrics(["probe_grad_norm"])["probe_grad_norm"].isna().all()
    assert run.metrics(["grad_norm"]).groupby("step").size().tolist() == [30] * 5
    assert run.events["event"].tolist() == ["warning"]


def test_a_probe_leaves_out_what_it_reaches_twice():
    from lisa_train.measure.buffers import MetricBuffer
    from lisa_train.measure.step.step_measure import StepMeasure
    from lisa_train.model.layer_map import find_layers
    from lisa_train.model.tensor_table import TensorTable

    model = llama()
    table = TensorTable(model, find_layers(model), None)
    buffer = MetricBuffer()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    probe = StepMeasure(model, optimizer, lt.RecordConfig("x"), table, buffer)
    batch = {k: v[None] for k, v in examples(1)[0].items()}
    again = model.model.layers[1].mlp.up_proj
    number = next(i for i, p in table.tensors if p is again.weight)
    probe.probe(3, [lambda: (model(**batch).loss.backward(), again.weight.sum().backward())])
    (rows,) = buffer.take()
    assert sorted(rows["param_id"]) == sorted(i for i, _ in table.tensors if i != number)
    assert np.isfinite(rows["probe_grad_norm"].compressed()).all()
    assert len(rows["probe_grad_norm"].compressed()) == 29


def test_a_probe_of_some_tensors_leaves_no_gradient_on_the_others(tmp_path):
    """Else it would be part of the next step."""
    model = llama()
    before = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = lt.RecordConfig(str(tmp_path / "run"), select=("attn.q",))
    batch = {k: v[None] for k, v in examples(1)[0].items()}
    with lt.NormRecorder(model, optimizer, config) as recorder:
        recorder.probe(1, lambda: model(**batch).loss.backward())
    assert all(p.grad is None for p in model.parameters())
    assert all(p is before[name] for name, p in model.named_parameters())
    assert load(tmp_path / "run").metrics(["probe_grad_norm"]).dropna()["step"].tolist() == [1] * 3


def test_the_distance_from_the_base_checkpoint(tmp_path):
    from transformers import AutoModelForCausalLM

    llama(tied=True).save_pretrained(tmp_path / "base", max_shard_size="5KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    start = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    trainer, _ = make(tmp_path, model, max_steps=3, record={"base_delta": True, "every": 2})
    trainer.train()
    run = load(tmp_path / "run")
    names = dict(zip(run.parameters["param_id"], run.parameters["name"], strict=True))
    rows = run.metrics(["delta_norm"]).dropna()
    assert rows["step"].unique().tolist() == [0, 3]
    assert (rows.loc[rows["step"] == 0, "delta_norm"] == 0).all()
    last = rows[rows["step"] == 3]
    assert len(last) == len(start)
    for row in last.itertuples():
        name = names[row.param_id]
        exact = float((trainer.seen[3]["after"][name] - start[name]).norm())
        assert row.delta_norm == pytest.approx(exact, rel=1e-5)


def test_weights_that_the_base_checkpoint_lacks_are_named(tmp_path):
    from transformers import LlamaForSequenceClassification

    llama().save_pretrained(tmp_path / "base")
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", pad_token_id=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = lt.RecordConfig(str(tmp_path / "run"), base_delta=True)
    with pytest.warns(RuntimeWarning, match=r"no tensor for 1 of the model's .*score\.weight"):
        lt.NormRecorder(model, optimizer, config).close()
    census = load(tmp_path / "run").metrics(["delta_norm"])
    assert census["delta_norm"].isna().sum() == 1


def test_without_a_base_checkpoint_nothing_is_made_up(tmp_path):
    trainer, _ = make(tmp_path, max_steps=1, record={"base_delta": True})
    with pytest.warns(RuntimeWarning, match=r"base_delta: no safetensors checkpoint"):
        trainer.train()
    assert load(tmp_path / "run").metrics(["delta_norm"])["delta_norm"].isna().all()


def test_trackers_get_a_few_aggregates(tmp_path):
    trainer, _ = make(tmp_path, max_steps=4, record={"flush_seconds": 0})
    trainer.args.report_to = ["some_tracker"]
    trainer.train()
    # What was flushed last: the step before the one that the flush stood in front of.
    logs = [line for line in trainer.state.log_history if "loss" in line]
    shown = {key for key in logs[-1] if "/" in key}
    groups = ("layers_first", "layers_middle", "layers_last", "embed", "head", "norm")
    assert shown == {f"{c}/{g}" for c in ("grad_norm", "update_norm") for g in groups}
    run = load(tmp_path / "run")
    frame = run.metrics(["grad_norm"], layers=0, steps=[2])
    expected = np.sqrt((frame["grad_norm"].astype(float) ** 2).sum())
    assert logs[-1]["grad_norm/layers_first"] == pytest.approx(expected, rel=1e-5)


def test_an_sft_trainer_needs_one_line(tmp_path, tiny_model_dir):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(tiny_model_dir),
            args=SFTConfig(
                str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=2, use_cpu=True,
                report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True,
                gradient_accumulation_steps=2, bf16=False, gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_list([{"text": f"one two three {i}"} for i in range(32)]),
            processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
        )  # fmt: skip
        config = lt.RecordConfig(str(tmp_path / "run"), every=1, probe_every=1)
        lt.attach(trainer, record=config)
        trainer.train()
    run = load(tmp_path / "run")
    # The probe counts neither as tokens nor as metrics of the trainer.
    counted = [line["num_tokens"] for line in trainer.state.log_history if "loss" in line]
    assert counted == run.scalars["tokens"].tolist()
    probed = run.metrics(["probe_grad_norm"], steps=slice(1, 4))["probe_grad_norm"]
    assert (probed > 0).all()
    logged = {line["step"]: line for line in trainer.state.log_history if "loss" in line}
    squares = run.metrics(["grad_norm"]).groupby("step")["grad_norm"].agg(lambda x: (x**2).sum())
    for line in run.scalars.itertuples():
        assert line.loss == pytest.approx(logged[line.step]["loss"], rel=1e-6)
        assert np.sqrt(squares[line.step]) == pytest.approx(line.grad_norm, rel=1e-5)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["method"] == "full"


# --- wraps --------------------------------------------------------------------------------------


class OutOfLuckError(RuntimeError):
    pass


@pytest.mark.parametrize("ending", ["in peace", "by an exception"])
@pytest.mark.parametrize(
    "doors", ["attach", "lisa, then record", "record, then lisa", "inside backward"]
)
def test_no_wrap_is_left_after_any_number_of_trainings(tmp_path, doors, ending):
    """Both callbacks wrap `training_step`, and whichever ends first must not undo the other's."""
    trainer = Witness(
        llama(), arguments(tmp_path / "out", max_steps=2, max_grad_norm=0.0),
        train_dataset=examples(),
    )  # fmt: skip
    trainer.args.report_to = ["nothing"]  # so that `log` is wrapped too
    lisa, record = lt.LisaConfig(1, 1), lt.RecordConfig(str(tmp_path / "run"), every=1)
    run = tmp_path / "run"
    if doors == "attach":
        lt.attach(trainer, lisa=lisa, record=record)
    elif doors == "inside backward":
        lt.attach(trainer, lisa=lisa, record=record, step_in_backward=True)
    else:
        engine = lt.LisaCallback(lisa)
        recorder = lt.RecordCallback(trainer, record, lisa=engine)
        added = [engine, recorder]
        for callback in added if doors.startswith("lisa") else reversed(added):
            trainer.add_callback(callback)
    before = own_names(trainer), own_names(trainer.accelerator)
    original = trainer.compute_loss

    def compute_loss(*args, **kwargs):
        if ending == "by an exception" and trainer.state.global_step == 1:
            raise OutOfLuckError
        return original(*args, **kwargs)

    trainer.compute_loss = compute_loss
    before[0].add("compute_loss")
    for attempt in range(3):
        if ending == "in peace":
            trainer.train()
        else:
            with pytest.raises(OutOfLuckError):
                trainer.train()
        assert (own_names(trainer), own_names(trainer.accelerator)) == before, attempt
        assert load(run).status == ("finished" if ending == "in peace" else "failed")
        run.rename(tmp_path / f"run {attempt}")  # a run directory is never written twice
    assert all(p.requires_grad for p in trainer.model.parameters())


def own_names(owner):
    """Methods that an object has of its own, in the place of its class's."""
    return {name for name in vars(owner) if callable(getattr(type(owner), name, None))}


class _Stream(torch.utils.data.IterableDataset):
    """Rows whose number nobody knows before the end; none at all."""

    def __iter__(self):
        return iter(())


@pytest.mark.parametrize("steps", [{"max_steps": 3}, {"max_steps": -1, "num_train_epochs": 2}])
def test_data_without_a_batch_is_no_finished_run(tmp_path, steps):
    """Three rows and a batch of eight, `drop_last`; nothing has been claimed when it is said."""
    trainer = Trainer(
        llama(),
        arguments(
            tmp_path / "c", per_device_train_batch_size=8, dataloader_drop_last=True, **steps
        ),
        train_dataset=examples(3),
    )
    lt.attach(trainer, record=lt.RecordConfig(str(tmp_path / "run"), every=1))
    # With epochs Trainer itself says that it does not know how many steps to make.
    with pytest.raises(ValueError, match=r"give no batch|does not have a length"):
        trainer.train()
    assert not (tmp_path / "run").exists()


def test_a_stream_without_a_batch_is_no_finished_run(tmp_path):
    settings = arguments(
        tmp_path / "c", max_steps=3, accelerator_config={"dispatch_batches": False}
    )
    trainer = Trainer(llama(), settings, train_dataset=_Stream())
    lt.attach(trainer, record=lt.RecordConfig(str(tmp_path / "run"), every=1))
    with pytest.raises(ConfigError, match="no step was made"):
        trainer.train()
    run = load(tmp_path / "run")
    assert run.status == "failed"
    assert "no step was made" in run.manifest["error"]
