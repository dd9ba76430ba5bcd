"""Signals that wait until something is whole."""

import signal
import threading

import pytest

from lisa_train.measure.stops import undisturbed


class StopError(Exception):
    pass


def _stop(number, frame):
    raise StopError(number)


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def handled(request):
    before = signal.signal(request.param, _stop)
    yield request.param
    assert signal.getsignal(request.param) is _stop
    signal.signal(request.param, before)


def _twice(number, done):
    with undisturbed():
        signal.raise_signal(number)
        done.append("first")
        signal.raise_signal(number)
        done.append("second")


def _once(number, done, error=None):
    with undisturbed():
        signal.raise_signal(number)
        done.append("written")
        if error:
            raise error


def test_a_signal_comes_when_the_block_is_through(handled):
    done = []
    with pytest.raises(StopError):
        _once(handled, done)
    assert done == ["written"]


def test_a_second_one_comes_at_once_and_only_once(handled):
    done = []
    with pytest.raises(StopError):
        _twice(handled, done)
    assert done == ["first"]


def test_an_error_of_the_block_does_not_lose_the_signal(handled):
    with pytest.raises(StopError) as caught:
        _once(handled, [], OSError("full"))
    assert isinstance(caught.value.__context__, OSError)


def test_what_nothing_handles_and_other_threads_are_left_alone(handled):
    found = []

    def elsewhere():
        with undisturbed():
            found.append(signal.getsignal(handled))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [_stop]
    before = signal.signal(handled, signal.SIG_DFL)
    with undisturbed():
        assert signal.getsignal(handled) == signal.SIG_DFL
    signal.signal(handled, before)
