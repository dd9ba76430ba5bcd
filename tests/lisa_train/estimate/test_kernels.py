"""Functions of other libraries that an estimate replaces: in its own thread, and put back."""

import threading

import torch
from transformers import masking_utils

from lisa_train.estimate.kernels import one_sequence_per_row

# Two sequences in one row: a packed one, as the function itself tells.
PACKED = torch.tensor([[0, 1, 2, 0, 1]])


def asked():
    return masking_utils.find_packed_sequence_indices(PACKED)


def test_another_thread_is_answered_as_ever_while_an_estimate_runs():
    original = masking_utils.find_packed_sequence_indices
    assert asked().tolist() == [[0, 0, 0, 1, 1]]
    answers = []
    with one_sequence_per_row():
        assert asked() is None
        other = threading.Thread(target=lambda: answers.append(asked()))
        other.start()
        other.join()
    assert answers[0].tolist() == [[0, 0, 0, 1, 1]]
    assert masking_utils.find_packed_sequence_indices is original


def test_two_estimates_at_once_leave_the_original_behind():
    """The second would otherwise put back what the first had put there."""
    original = masking_utils.find_packed_sequence_indices
    first_is_in, second_asks = threading.Event(), threading.Event()
    order = []

    def first():
        with one_sequence_per_row():
            first_is_in.set()
            assert second_asks.wait(10)
            order.append("first")

    def second():
        assert first_is_in.wait(10)
        second_asks.set()
        with one_sequence_per_row():
            order.append("second")

    threads = [threading.Thread(target=each) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order == ["first", "second"]
    assert masking_utils.find_packed_sequence_indices is original
