"""Where the time of recording is counted: once, in one step's line, whose step time holds it."""

import time

import pytest
import torch
from helpers_recording import arguments, examples, llama
from transformers import Trainer

import lisa_train as lt
from lisa_analysis.rundir.opening import load
from lisa_train.measure.disk.writer import RunWriter
from lisa_train.measure.recording_time import RecordingTime
from lisa_train.measure.step.step_measure import StepMeasure
from lisa_train.model.norms import squares

PAUSE = 0.05


def slow(monkeypatch, owner, name, seconds=PAUSE):
    """Let a part of the recorder take a while."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        time.sleep(seconds)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


def trainer_run(folder, *, record=None, **changes):
    settings = {"max_steps": 4, **changes}
    trainer = Trainer(llama(), arguments(folder / "out", **settings), train_dataset=examples())
    attached = lt.attach(
        trainer, record=lt.RecordConfig(str(folder / "run"), every=1, **(record or {}))
    )
    began = time.perf_counter()
    trainer.train()
    wall = time.perf_counter() - began
    return load(folder / "run"), attached.recorder_callback.recorder, wall


def plain_run(folder, body=lambda recorder, step: None, **settings):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[
        torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)) for _ in range(3)
    ])  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    began = time.perf_counter()
    with lt.NormRecorder(model, optimizer, lt.RecordConfig(str(folder), every=1)) as recorder:
        for step in range(1, 5):
            model(torch.ones(2, 4)).sum().backward()
            recorder.before_step(step)
            optimizer.step()
            recorder.after_step(step, **settings)
            optimizer.zero_grad()
            body(recorder, step)
    return load(folder), recorder, time.perf_counter() - began


# Owner, method, and the lines (from 0) that count its pauses, in a run of four steps.
PARTS = {
    "opening": (RunWriter, "_open", [1, 0, 0, 0]),
    "gradients": (StepMeasure, "gradients", [1, 1, 1, 1]),
    "update": (StepMeasure, "update", [1, 1, 1, 1]),
    "census": (StepMeasure, "census", [1, 0, 0, 1]),
}


@pytest.mark.parametrize("loop", [trainer_run, plain_run])
@pytest.mark.parametrize("part", PARTS)
def test_time_is_counted_in_the_step_where_it_passes(tmp_path, monkeypatch, loop, part):
    owner, name, pauses = PARTS[part]
    slow(monkeypatch, owner, name)
    run, recorder, wall = loop(tmp_path)
    lines = run.scalars
    for line, count in zip(lines.itertuples(), pauses, strict=True):
        assert count * PAUSE <= line.recorder_seconds, (part, line.step)
        assert line.recorder_seconds <= line.step_seconds
    # Once: no pause is in two lines, and no line has what another process of the machine took.
    assert PAUSE * sum(pauses) <= lines["recorder_seconds"].sum() <= recorder.seconds
    assert lines["step_seconds"].sum() <= wall


def test_checkpoints_and_measuring_passes_belong_to_the_step_before(tmp_path, monkeypatch):
    slow(monkeypatch, StepMeasure, "census")
    slow(monkeypatch, StepMeasure, "probe")
    run, recorder, wall = trainer_run(
        tmp_path, record={"probe_every": 3}, save_strategy="steps", save_steps=2
    )
    spent = run.scalars["recorder_seconds"].to_numpy()
    # At the start, at the checkpoint of step 2, the pass of step 3, and the end.
    assert (spent >= PAUSE).all()
    assert spent.sum() <= recorder.seconds
    assert (spent <= run.scalars["step_seconds"]).all()
    assert run.scalars["step_seconds"].sum() <= wall
    # What puts the last line on the disk is in no line, but in the result.
    assert run.manifest["result"]["recorder_seconds"] >= round(spent.sum(), 3)


def test_gradients_that_are_looked_at_inside_backward_are_counted(tmp_path, monkeypatch):
    calls = []

    def counted(tensors):
        calls.append(1)
        time.sleep(0.002)
        return squares(tensors)

    monkeypatch.setattr("lisa_train.measure.step.gradient_noise.squares", counted)
    run, _, wall = trainer_run(
        tmp_path, record={"grad_noise": True}, gradient_accumulation_steps=2, max_steps=2
    )
    assert run.scalars["recorder_seconds"].sum() >= 0.002 * len(calls) > 0.1
    assert (run.scalars["recorder_seconds"] <= run.scalars["step_seconds"]).all()
    assert run.scalars["step_seconds"].sum() <= wall


def test_what_the_loop_measured_is_completed(tmp_path, monkeypatch):
    """A loop's own clock stops before the call that records the step."""
    slow(monkeypatch, StepMeasure, "update")
    run, _, _ = plain_run(tmp_path, step_seconds=0.001)
    assert (run.scalars["step_seconds"] >= PAUSE).all()
    assert (run.scalars["recorder_seconds"] <= run.scalars["step_seconds"]).all()


# ---------------------------------------------------------------------- with a clock of its own


class Clock:
    """Stands for the module `time`; moves when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("lisa_train.measure.recording_time.time", self)

    def perf_counter(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds

    def records(self, recording, seconds):
        with recording.running():
            self.now += seconds


def step(clock, recording, before, between, after, **line):
    """A step that trains and records; returns its line."""
    with recording.running():
        recording.begin_step()
        clock.passes(before)
    clock.passes(between)
    called = clock.now
    with recording.running():
        clock.passes(after)
        recording.finish_step(line, called)
    return line


def seconds(line):
    return line["recorder_seconds"], line["step_seconds"]


def test_the_first_line_counts_the_opening(monkeypatch):
    clock = Clock(monkeypatch)
    recording = RecordingTime(clock.now - 3)
    clock.records(recording, 2)  # within the opening
    recording.opened()
    clock.passes(10)
    assert seconds(step(clock, recording, 1, 20, 4)) == (5 + 5, 5 + 10 + 25)
    assert recording.total == 10


@pytest.mark.parametrize("own", [False, True])
def test_what_comes_after_a_step_belongs_to_it_until_its_line_is_written(monkeypatch, own):
    clock = Clock(monkeypatch)
    recording = RecordingTime()
    given = {"step_seconds": 21.0} if own else {}  # the loop's clock: from `before` to the call
    first = step(clock, recording, 1, 20, 4, **given)
    clock.records(recording, 30)  # a measuring pass
    clock.passes(100)  # an evaluation
    second = step(clock, recording, 1, 20, 4, **given)
    assert seconds(first) == (5 + 30, 25 + 30)
    assert seconds(second) == (5, 25 if own else 125)
    with recording.running():
        clock.passes(7)  # a census
        recording.settle()
        recording.written()
        clock.passes(2)  # the disk
    third = step(clock, recording, 1, 20, 4, **given)
    assert seconds(second) == (5 + 7, (25 if own else 125) + 7)
    assert seconds(third) == (5 + 2, 25 + 2)
    assert recording.total == sum(line["recorder_seconds"] for line in (first, second, third))


def test_a_step_that_the_loop_measured_from_earlier_on_is_not_counted_twice(monkeypatch):
    """A flush between two steps, which the loop's clock of the second one has seen."""
    clock = Clock(monkeypatch)
    recording = RecordingTime()
    step(clock, recording, 1, 20, 4)
    recording.written()
    clock.records(recording, 6)
    assert seconds(step(clock, recording, 1, 20, 4, step_seconds=27.0)) == (11, 31)


def test_only_the_outermost_of_nested_calls_counts(monkeypatch):
    clock = Clock(monkeypatch)
    recording = RecordingTime()
    with recording.running():
        clock.records(recording, 3)
        clock.passes(1)
    assert recording.total == 4
