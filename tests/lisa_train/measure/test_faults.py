"""Bugs of the recorder's own: raised in tests, reported to users, and no end of a training."""

import gc
import weakref

import pytest
import torch
from helpers_recording import arguments, examples, llama
from transformers import Trainer

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError, RunDirectoryError
from lisa_analysis.rundir.opening import load
from lisa_train.measure import faults
from lisa_train.measure.disk.storage import UnwritableError
from lisa_train.measure.step.checkpoint_conversions import Conversion
from lisa_train.measure.step.step_measure import StepMeasure

FAULTS = [
    TypeError("one argument too many"), AttributeError("no such thing"), KeyError("layer"),
    IndexError("beyond"), NameError("unheard of"), AssertionError(), ZeroDivisionError("by 0"),
    ValueError("shapes differ"),
]  # fmt: skip
NO_FAULTS = [
    RuntimeError("CUDA error"), torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
    OSError(28, "No space left"), ImportError("no package"), NotImplementedError("no kernel"),
    ConfigError("bad"), UnwritableError("full"),
]  # fmt: skip


def name(error):
    return type(error).__name__


@pytest.fixture(params=["strict", "lenient"])
def mode(request, monkeypatch):
    if request.param == "lenient":
        monkeypatch.setenv(faults.STRICT, "0")
    return request.param


@pytest.fixture
def lenient(monkeypatch):
    monkeypatch.delenv(faults.STRICT)


def broken(error, monkeypatch, where="update", at=3):
    """Let the recorder raise `error` at one step, in a line that is called like its own."""
    original = getattr(StepMeasure, where)

    def fail(self, step, *args):
        if step == at:
            raise error
        return original(self, step, *args)

    monkeypatch.setattr(StepMeasure, where, fail)


def trained(tmp_path, steps=5, **record):
    trainer = Trainer(
        llama(), arguments(tmp_path / "out", max_steps=steps), train_dataset=examples()
    )
    record = {"run_dir": str(tmp_path / "run"), "every": 1, **record}
    lt.attach(trainer, record=lt.RecordConfig(**record))
    trainer.train()
    return trainer


def looped(tmp_path, steps=5, **record):
    """Train in a plain loop; return the number of steps."""
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batch = {key: value[None] for key, value in examples(1)[0].items()}
    config = lt.RecordConfig(**{"run_dir": str(tmp_path / "run"), "every": 1, **record})
    with lt.NormRecorder(model, optimizer, config) as recorder:
        for step in range(1, steps + 1):
            model(**batch).loss.backward()
            recorder.before_step(step)
            optimizer.step()
            recorder.after_step(step)
            optimizer.zero_grad()
    return step


@pytest.mark.parametrize("error", FAULTS, ids=name)
def test_a_fault_comes_through_in_tests(tmp_path, monkeypatch, error):
    broken(error, monkeypatch)
    with pytest.raises(type(error)) as caught:
        looped(tmp_path)
    assert caught.value is error
    assert faults.PLEASE_REPORT in caught.value.__notes__[0]
    run = load(tmp_path / "run")
    assert run.status == "failed"
    assert run.scalars["step"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("loop", "error"),
    [("Trainer", TypeError("one argument too many")), *(("plain", error) for error in FAULTS)],
    ids=str,
)
def test_a_user_hears_of_a_fault_and_trains_on(tmp_path, monkeypatch, lenient, error, loop):
    broken(error, monkeypatch)
    with pytest.warns(RuntimeWarning, match=faults.PLEASE_REPORT) as caught:
        steps = looped(tmp_path) if loop == "plain" else trained(tmp_path).state.global_step
    assert steps == 5
    [warning] = [str(w.message) for w in caught]
    assert "training goes on" in warning
    # The traceback is kept, on the terminal and in the run.
    assert f'File "{__file__}"' in warning
    assert "in fail" in warning
    run = load(tmp_path / "run")
    assert run.status == "failed"
    assert faults.PLEASE_REPORT in run.manifest["error"]
    assert type(error).__name__ in run.manifest["error"]
    assert "recorder.py, line" in run.manifest["error"]
    assert run.scalars["step"].tolist() == [1, 2]
    [event] = run.events.loc[run.events["event"] == "warning"].itertuples()
    assert event.traceback.startswith("Traceback (most recent call last)")
    assert faults.PLEASE_REPORT in event.message
    assert "Traceback" not in event.message


@pytest.mark.parametrize("error", NO_FAULTS[:6], ids=name)
def test_the_machines_errors_are_nobodys_fault(tmp_path, monkeypatch, error):
    broken(error, monkeypatch)
    with pytest.warns(RuntimeWarning, match="training goes on") as caught:
        assert looped(tmp_path) == 5
    assert not [w for w in caught if faults.PLEASE_REPORT in str(w.message)]
    assert load(tmp_path / "run").status == "failed"


@pytest.mark.parametrize("error", [*FAULTS, *NO_FAULTS], ids=name)
def test_whose_fault_it_is(error):
    assert faults.is_fault(error) == any(error is known for known in FAULTS)
    assert not faults.is_fault(error, foreign=True)  # no line of the toolkit raised it


def test_raise_stops_training_and_says_whose_fault_it_is(tmp_path, monkeypatch, lenient):
    broken(TypeError("one argument too many"), monkeypatch)
    with pytest.raises(TypeError) as caught:
        looped(tmp_path, on_record_error="raise")
    assert faults.PLEASE_REPORT in caught.value.__notes__[0]


@pytest.mark.parametrize("error", [KeyError("layer"), RuntimeError("CUDA error")], ids=name)
def test_what_fails_inside_the_backward_pass_ends_no_training(
    tmp_path, monkeypatch, lenient, error
):
    def fail(*args):
        raise error

    monkeypatch.setattr("lisa_train.measure.step.gradient_noise.squares", fail)
    with pytest.warns(RuntimeWarning, match="training goes on"):
        assert looped(tmp_path, grad_noise=True) == 5
    run = load(tmp_path / "run")
    assert run.status == "failed"
    assert (faults.PLEASE_REPORT in run.manifest["error"]) == isinstance(error, KeyError)


def test_what_fails_inside_the_backward_pass_comes_through_in_tests(tmp_path, monkeypatch):
    def fail(*args):
        raise KeyError("layer")

    monkeypatch.setattr("lisa_train.measure.step.gradient_noise.squares", fail)
    with pytest.raises(KeyError):
        looped(tmp_path, grad_noise=True)


def test_a_recording_that_stopped_holds_no_copies(tmp_path, monkeypatch, lenient):
    """Copies of all that trains would stay for the rest of the training."""
    copies = []
    original = StepMeasure.update

    def fail(self, step, clip_coef):
        copies.extend(weakref.ref(tensor) for tensor in self._snapshots.values())
        original(self, step, clip_coef)
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(StepMeasure, "update", fail)
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batch = {key: value[None] for key, value in examples(1)[0].items()}
    config = lt.RecordConfig(str(tmp_path / "run"), every=1, grad_noise=True)
    recorder = lt.NormRecorder(model, optimizer, config)
    model(**batch).loss.backward()
    recorder.before_step(1)
    with pytest.warns(RuntimeWarning, match="training goes on"):
        recorder.after_step(1)
    gc.collect()
    assert len(copies) == len(list(model.parameters()))
    assert not [copy for copy in copies if copy() is not None]
    recorder.close()


@pytest.mark.parametrize(
    ("part", "mode"),
    [
        ("gradients_ready", "strict"), ("gradients_ready", "lenient"),
        ("clipped", "lenient"), ("on_optimizer_step", "lenient"),
        ("on_step_end", "lenient"), ("on_save", "lenient"), ("on_evaluate", "lenient"),
        ("_result", "lenient"), ("_result", "strict"),
    ],
    indirect=["mode"],
)  # fmt: skip
def test_a_fault_around_the_recorder_ends_no_training(tmp_path, monkeypatch, mode, part):
    """What the callback does by itself: the first line of it fails."""
    from lisa_train.trainer import record_callback

    wrapped = getattr(record_callback.RecordCallback, part)

    def fail(self, *args, **kwargs):
        raise KeyError("not thought of")

    monkeypatch.setattr(
        record_callback.RecordCallback, part, record_callback._recording(fail)
    )  # as the class is decorated
    assert wrapped.__wrapped__ is not None

    def run():
        trainer = Trainer(
            llama(),
            arguments(
                tmp_path / "out", max_steps=3, max_grad_norm=1.0, save_strategy="steps",
                save_steps=2, eval_strategy="steps", eval_steps=2,
            ),
            train_dataset=examples(), eval_dataset=examples(2),
        )  # fmt: skip
        lt.attach(trainer, record=lt.RecordConfig(str(tmp_path / "run"), every=1))
        trainer.train()
        return trainer

    if mode == "strict":
        with pytest.raises(KeyError):
            run()
        return
    with pytest.warns(RuntimeWarning, match=faults.PLEASE_REPORT):
        trainer = run()
    assert trainer.state.global_step == 3
    found = load(tmp_path / "run")
    assert found.status == "failed"
    assert faults.PLEASE_REPORT in found.manifest["error"]


def test_a_fault_at_the_begin(tmp_path, monkeypatch, mode):
    def fail(*args):
        raise AttributeError("no such thing")

    monkeypatch.setattr("lisa_train.trainer.trainer_run.describe_run", fail)
    if mode == "strict":
        with pytest.raises(AttributeError):
            trained(tmp_path, 2)
        return
    with pytest.warns(RuntimeWarning, match=f"goes on unrecorded: {faults.PLEASE_REPORT}") as said:
        trainer = trained(tmp_path, 2)
    assert trainer.state.global_step == 2
    assert "Traceback (most recent call last)" in str(said[0].message)


@pytest.mark.parametrize("where", ["census", "rows"])
def test_a_fault_at_the_end(tmp_path, monkeypatch, mode, where):
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = lt.NormRecorder(model, optimizer, lt.RecordConfig(str(tmp_path), every=1))
    recorder.after_step(1, loss=1.0)

    def fail(*args):
        raise AttributeError("no such thing")

    if where == "census":
        monkeypatch.setattr("lisa_train.measure.step.step_measure.StepMeasure.census", fail)
    else:
        monkeypatch.setattr("lisa_train.measure.disk.writer.fact_table", fail)
    if mode == "strict":
        with pytest.raises(AttributeError):
            recorder.close()
    else:
        with pytest.warns(RuntimeWarning, match=faults.PLEASE_REPORT):
            recorder.close()
    run = load(tmp_path)
    assert run.status == "failed"
    assert faults.PLEASE_REPORT in run.manifest["error"]
    if where == "census":
        assert run.scalars["loss"].tolist() == [1.0]
        assert "AttributeError" in run.events["traceback"].iloc[-1]


def test_the_trainings_own_error_matters_more_than_a_fault_at_the_end(tmp_path, monkeypatch):
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def fail(*args):
        raise AttributeError("no such thing")

    recorder = lt.NormRecorder(model, optimizer, lt.RecordConfig(str(tmp_path)))
    recorder.after_step(1, loss=1.0)
    monkeypatch.setattr("lisa_train.measure.step.step_measure.StepMeasure.census", fail)
    with pytest.warns(RuntimeWarning, match=faults.PLEASE_REPORT):
        recorder.close("failed", "MemoryError")
    assert load(tmp_path).manifest["error"] == "MemoryError"


def test_what_the_user_passes_to_a_probe_is_not_the_toolkits_fault(tmp_path):
    """Strict or not: a backward pass that raises TypeError is the user's."""
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def backward():
        raise TypeError("loss of the user")

    with lt.NormRecorder(model, optimizer, lt.RecordConfig(str(tmp_path), every=1)) as recorder:
        recorder.after_step(1, loss=1.0)
        with pytest.warns(RuntimeWarning, match="probed any more: TypeError: loss") as caught:
            recorder.probe(1, backward)
    assert faults.PLEASE_REPORT not in str(caught[0].message)
    assert load(tmp_path).status == "finished"


def test_a_fault_of_the_probe_itself(tmp_path, monkeypatch, mode):
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def fail(*args):
        raise TypeError("one argument too many")

    monkeypatch.setattr("lisa_train.measure.probe.measuring_pass.stacked", fail)
    batch = {key: value[None] for key, value in examples(1)[0].items()}
    with lt.NormRecorder(model, optimizer, lt.RecordConfig(str(tmp_path), every=1)) as recorder:
        recorder.after_step(1, loss=1.0)
        if mode == "strict":
            with pytest.raises(TypeError, match="one argument"):
                recorder.probe(1, lambda: model(**batch).loss.backward())
        else:
            with pytest.warns(RuntimeWarning, match=faults.PLEASE_REPORT):
                recorder.probe(1, lambda: model(**batch).loss.backward())


@pytest.mark.parametrize("where", ["lines", "conversions", "elsewhere"])
def test_a_fault_in_reading_the_base_weights(tmp_path, monkeypatch, where):
    """Transformers' rules may fail in any way; what is built on them may not."""
    from transformers import AutoModelForCausalLM

    llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if where == "lines":  # a line of the toolkit's own: the conversion's first source is None
        monkeypatch.setattr(
            "lisa_train.measure.step.base_weights.conversions",
            lambda *args: [Conversion("model.norm.weight", sources=[])],
        )
    else:

        def fail(*args, **kwargs):
            raise AttributeError("another version")

        target = {
            "conversions": "transformers.core_model_loading.rename_source_key",
            "elsewhere": "transformers.core_model_loading.dot_natural_key",
        }
        monkeypatch.setattr(target[where], fail)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = lt.RecordConfig(str(tmp_path / "run"), base_delta=True)
    if where == "lines":
        with pytest.raises(IndexError):
            lt.NormRecorder(model, optimizer, config)
        monkeypatch.setenv(faults.STRICT, "")
        config = lt.RecordConfig(str(tmp_path / "again"), base_delta=True)
        with pytest.warns(RuntimeWarning, match=f"no tensor for 1 of .*{faults.PLEASE_REPORT}"):
            lt.NormRecorder(model, optimizer, config).close()
        return
    with lt.NormRecorder(model, optimizer, config):
        pass
    frame = load(tmp_path / "run").metrics(["delta_norm"])
    assert (frame["delta_norm"] == 0).all()  # by their names


def test_bad_input_is_refused_before_training_whatever_the_setting(tmp_path, mode):
    looped(tmp_path, 1)
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        looped(tmp_path, 1)


@pytest.mark.parametrize(("value", "strict"), [("1", True), ("0", False), ("", False)])
def test_the_environment_decides(monkeypatch, value, strict):
    monkeypatch.setenv(faults.STRICT, value)
    assert faults.strict() == strict
    monkeypatch.delenv(faults.STRICT)
    assert not faults.strict()
