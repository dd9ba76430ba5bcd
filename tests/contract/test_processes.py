"""What a test of several processes says where one of them fails and another hangs."""

import time
from pathlib import Path

import helpers_processes
import pytest


def process(rank, folder):
    ready = Path(folder, "ready")
    if rank:
        ready.touch()
        within(60)
    while not ready.exists():
        time.sleep(0.01)
    raise ValueError("the first process cannot go on")


def within(calls):
    """Stand as deep as a training does."""
    within(calls - 1) if calls else stand_still()


def stand_still():
    while True:
        time.sleep(0.01)


@pytest.mark.processes
@pytest.mark.parametrize("start", [helpers_processes.ranks, helpers_processes.launched])
def test_each_is_named_with_where_it_stood(tmp_path, monkeypatch, start):
    monkeypatch.setattr(helpers_processes, "_GRACE", 1)
    with pytest.raises(AssertionError) as failure:
        start(process, tmp_path)
    said = str(failure.value)
    first = "process 0 ended with 1, process 1 did not end: ValueError: the first process cannot"
    assert said.startswith(first)
    assert " in stand_still" in said


def test_a_test_without_the_marker_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="mark this test with `processes`"):
        helpers_processes.ranks(process, tmp_path)
