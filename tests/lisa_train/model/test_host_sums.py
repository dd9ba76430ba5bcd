"""Blocks shared out among threads: the same to the bit for any number, errors and all."""

import threading
import time

import numpy as np
import pytest
import torch

from lisa_train.model import host_sums
from lisa_train.model.host_sums import BLOCK, ROW, SMALL, Kernel

SIZES = [0, 1, ROW - 1, 5 * ROW, SMALL - 1, SMALL, SMALL + 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7]


@pytest.fixture
def threads(monkeypatch):
    """Let any amount of work be worth as many threads as are asked for."""
    monkeypatch.setattr(host_sums, "_WORTH", 1)

    def use(count):
        monkeypatch.setattr(torch, "get_num_threads", lambda: count)

    return use


def draw(size, dtype, seed):
    return (torch.randn(size, generator=torch.Generator().manual_seed(seed)) + 0.5).to(dtype)


def test_any_number_of_threads_finds_the_same_and_what_float64_does(threads):
    """Groups as they occur: all in fp32, all in half precision, weights in half precision alone."""
    kinds = [(torch.float32,) * 3, (torch.bfloat16,) * 3, (torch.float16,) * 2 + (torch.float32,)]
    groups = [
        [draw(size, dtype, 3 * size + n) for n, dtype in enumerate(kind)]
        for size in SIZES
        for kind in kinds
    ]
    found = []
    for count in (1, 2, 5):
        threads(count)
        found.append(host_sums.walk(groups, host_sums.CHANGE_AND_PRODUCT))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    exact = []
    for old, new, gradient in ([x.double() for x in group] for group in groups):
        moved = new - old
        exact.append([moved.square().sum(), new.square().sum(), (moved * gradient).sum()])
    exact = torch.tensor(exact, dtype=torch.float64)
    torch.testing.assert_close(found[0][:, :2], exact[:, :2], rtol=1e-6, atol=0)
    # Products have both signs: what is lost is a part of their magnitudes.
    size = torch.stack([((b.double() - a) * g).abs().sum() for a, b, g in groups])
    assert ((found[0][:, 2] - exact[:, 2]).abs() <= 1e-6 * size).all()


def test_rows_of_buffers_are_shared_out_too(threads):
    owners = torch.arange(300) % 7
    columns = [draw(300 * ROW, torch.float32, n).view(300, ROW) for n in range(2)]
    threads(1)
    alone = host_sums.walk_rows(columns, owners, 7, host_sums.PRODUCT)
    threads(4)
    assert torch.equal(alone, host_sums.walk_rows(columns, owners, 7, host_sums.PRODUCT))
    exact = torch.zeros(7, dtype=torch.float64)
    exact.index_add_(0, owners, (columns[0].double() * columns[1].double()).sum(1))
    torch.testing.assert_close(alone[:, 0], exact, rtol=1e-6, atol=0)


def test_what_is_not_finite_warns_in_no_thread(threads):
    threads(3)
    old, new = torch.zeros(3 * BLOCK), torch.zeros(3 * BLOCK)
    old[::BLOCK] = new[::BLOCK] = torch.inf
    found = host_sums.walk([[old, new]], host_sums.CHANGE)
    assert found[0, 0].isnan()
    assert found[0, 1].isinf()


def test_copies_are_those_of_torch(threads):
    threads(3)
    sources = [draw(size, torch.float32, size) for size in SIZES]
    sources += [draw(600, dtype, 1) for dtype in (torch.bfloat16, torch.float16, torch.float64)]
    sources += [draw(700 * 300, torch.float32, 2).view(700, 300).T, torch.tensor(3.0)]
    sources.append(torch.nn.Parameter(draw(5, torch.float32, 4)))
    targets = [torch.full_like(x, torch.nan).detach() for x in sources]
    host_sums.copy(targets, sources)
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target, source)


def test_an_error_of_another_thread_is_raised_here_and_no_thread_stays(threads):
    threads(2)
    before = threading.active_count()
    raised = threading.Event()

    def measure(scratch, rows, out):
        if threading.current_thread() is threading.main_thread():
            assert raised.wait(timeout=60)
            return
        raised.set()
        raise MemoryError("none left")

    with pytest.raises(MemoryError, match="none left"):
        host_sums.walk([[torch.zeros(4 * BLOCK)]], Kernel(measure, 1))
    assert threading.active_count() == before


def test_an_error_of_this_thread_ends_the_others(threads):
    threads(2)
    before = threading.active_count()
    began, interrupted = threading.Event(), threading.Event()
    blocks = []

    def measure(scratch, rows, out):
        if threading.current_thread() is threading.main_thread():
            assert began.wait(timeout=60)
            interrupted.set()
            raise KeyboardInterrupt
        blocks.append(len(rows[0]))
        began.set()
        assert interrupted.wait(timeout=60)
        time.sleep(0.01)  # until the others are told

    with pytest.raises(KeyboardInterrupt):
        host_sums.walk([[torch.zeros(400 * BLOCK)]], Kernel(measure, 1))
    assert threading.active_count() == before
    assert len(blocks) < 399


def test_nothing_to_sum():
    assert host_sums.walk([], host_sums.SQUARE).shape == (0, 1)
    assert host_sums.walk([[torch.zeros(0)]], host_sums.SQUARE).tolist() == [[0.0]]
    host_sums.copy([], [])
    assert np.isfinite(host_sums.walk([[torch.ones(1)]], host_sums.SQUARE).numpy()).all()
