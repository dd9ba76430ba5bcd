"""A run's opening and end: what becomes of them in one process and in others."""

import warnings
from types import SimpleNamespace

import pytest

import lisa_train as lt
from lisa_analysis.contract.errors import RunDirectoryError
from lisa_train.measure.disk.storage import UnwritableError
from lisa_train.measure.disk.writer import SilentWriter
from lisa_train.measure.session import RunSession


class Writer(SilentWriter):
    """Keeps what it is told."""

    def __init__(self, segment=0):
        super().__init__(segment)
        self.events, self.manifest = [], {}

    def event(self, name, step, **fields):
        self.events.append((name, step, fields))

    def update_manifest(self, **fields):
        self.manifest |= fields

    def close(self, status="finished", **fields):
        super().close()
        self.manifest |= {"status": status, **fields}


def processes(*, first, others=(0, 0, 0)):
    """One of two processes; `others` is what the other one brings."""
    return SimpleNamespace(
        first=first,
        count=2,
        highest=lambda *values: tuple(max(pair) for pair in zip(values, others, strict=True)),
    )


def session(choice="warn", **of):
    return RunSession(lt.RecordConfig("runs/a", on_record_error=choice), processes(**of))


def refused():
    raise RunDirectoryError("holds a run")


def full():
    raise UnwritableError("no room")


def never():
    raise AssertionError("only the first process opens")


def test_the_first_process_opens_and_the_others_follow_its_segment():
    one = session(first=True)
    writer = Writer(3)
    assert one.open(lambda: writer)
    assert one.writer is writer
    other = session(first=False, others=(0, 0, 3))
    assert other.open(never)
    assert isinstance(other.writer, SilentWriter)
    assert other.writer.segment == 3


@pytest.mark.parametrize(
    ("make", "choice", "also", "stops"),
    [
        (refused, "warn", False, True),
        (full, "raise", False, True),
        (full, "warn", True, True),
        (full, "warn", False, False),
    ],
)
def test_all_processes_stop_or_go_on_unrecorded_together(make, choice, also, stops):
    told = []
    one = session(choice, first=True)
    settings = {"also_refused": lambda error: also, "unless": told.append}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if stops:
            with pytest.raises(RunDirectoryError, match=r"holds a run|no room"):
                one.open(make, **settings)
        else:
            assert not one.open(make, **settings)
    assert ["unrecorded" in str(w.message) for w in said] == ([] if stops else [True])
    assert len(told) == 1
    assert isinstance(told[0], RunDirectoryError)
    other = session(choice, first=False, others=(1, int(stops), 0))
    if stops:
        with pytest.raises(RunDirectoryError, match="runs/a is not recorded to: the first process"):
            other.open(never, unless=told.append)
    else:
        assert not other.open(never, unless=told.append)  # and no second warning
    assert told[1:] == [None]
    assert not one.writer.closed
    assert isinstance(one.writer, SilentWriter)


def opened(writer=None):
    made = session(first=True)
    made.open(lambda: writer or Writer())
    return made


def test_everything_that_is_left_is_tried_and_the_first_error_is_named():
    run, done = opened(), []

    def part(name, error=None):
        done.append(name)
        if error is not None:
            raise error

    first = RuntimeError("device lost")
    problem = run.write_last(
        7, lambda: part("census", first), lambda: part("rows", OSError("later"))
    )
    assert problem is first
    assert done == ["census", "rows"]
    ((name, step, fields),) = run.writer.events
    text = "recording ended early: RuntimeError: device lost"
    assert (name, step, fields["message"]) == ("warning", 7, text)
    assert run.close("finished", None, {"steps": 7}) is None
    assert run.writer.manifest == {"status": "failed", "error": text, "result": {"steps": 7}}


def test_a_disk_that_refuses_is_no_early_end_but_lost_rows_are():
    run = opened()
    assert isinstance(run.write_last(1, full), UnwritableError)
    assert run.writer.events == []
    run.writer.lost_rows = 12
    run.close("finished", None, {})
    error = "12 rows were lost while the disk refused them"
    assert run.writer.manifest == {"status": "failed", "error": error}


def test_the_trainings_own_error_comes_first():
    run = opened()
    run.problem = "recording stopped after step 2: x"
    run.close("interrupted", "KeyboardInterrupt", {})
    assert run.writer.manifest == {"status": "interrupted", "error": "KeyboardInterrupt"}


def test_an_end_is_restated_only_if_it_is_another():
    run = opened()
    run.close("finished", None, {})
    run.writer.manifest.clear()
    run.restate("finished", None)
    assert run.writer.manifest == {}
    run.restate("failed", "OSError: no room")
    assert run.writer.manifest == {"status": "failed", "error": "OSError: no room"}

    def refuse(**fields):
        raise OSError("gone")

    run.writer.update_manifest = refuse
    with pytest.warns(RuntimeWarning, match="Recording: OSError: gone"):
        run.restate("failed", "another")
