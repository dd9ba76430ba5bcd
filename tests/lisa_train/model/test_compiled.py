"""The compiled sums: those of float64, whatever the threads; and what happens without them."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lisa_train.model import compiled
from lisa_train.model.compiled import BLOCK, Kind
from lisa_train.model.norms import changes, inner_products, squares

SIZES = [0, 1, 7, 1023, 1024, 1025, 5000, BLOCK, BLOCK + 1]
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")


@pytest.fixture
def anew(monkeypatch):
    """The kernel is looked for again, and again after the test."""
    compiled._function.cache_clear()
    yield monkeypatch
    compiled._function.cache_clear()


def draw(count, size, seed=0):
    return list(torch.randn(count, size, generator=torch.Generator().manual_seed(seed)))


@needs_compiler
def test_it_is_used_here():
    assert compiled.prepare()


@needs_compiler
@given(
    sizes=st.lists(st.sampled_from(SIZES), min_size=1, max_size=6),
    narrow=st.sampled_from([(), (0,), (1, 2), (0, 1, 2)]),
)
def test_sums_of_all_kinds_are_those_of_float64(sizes, narrow):
    """fp32 and bf16 side by side in one group too: bf16 weights with fp32 gradients."""
    groups = []
    for seed, size in enumerate(sizes):
        rows = draw(3, size, seed)
        groups.append([x.bfloat16() if i in narrow else x for i, x in enumerate(rows)])
    for kind, width in zip(Kind, (1, 1, 2, 3, 2), strict=True):
        found = compiled.sums(kind, [group[:width] for group in groups])
        assert found.shape == (len(groups), 3)
        for row, group in zip(found, groups, strict=True):
            x, y, z = (part.float().double() for part in group)
            moved = (group[1].float() - group[0].float()).double()
            terms = {
                Kind.SQUARE: [x * x],
                Kind.SQUARE_AND_MAGNITUDE: [x * x, x.abs()],
                Kind.CHANGE: [moved * moved, y * y],
                Kind.CHANGE_AND_PRODUCT: [moved * moved, y * y, moved * z],
                Kind.PRODUCT: [x * y],
            }[kind]
            for value, expected in zip(row, terms, strict=False):
                assert abs(value - expected.sum()) <= 1e-6 * expected.abs().sum()
            assert not row[len(terms) :].any()


@needs_compiler
def test_threads_change_nothing():
    before, after, gradients = ([x] for x in draw(3, 9 * BLOCK + 5))
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            found.append(torch.stack(list(changes(before, after, gradients))))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(other, found[0]) for other in found)


@needs_compiler
def test_tensors_it_does_not_read_go_by_torch_in_their_places():
    """fp16, fp64 and transposed ones between others."""
    x = draw(4, 6000)
    first = [x[0], x[1].half(), x[2].double(), x[3].view(60, 100).t()]
    second = [x[1], x[2].half(), x[3].double(), x[0].view(60, 100).t()]
    expected = [(a.double() * b.double()).sum() for a, b in zip(first, second, strict=True)]
    torch.testing.assert_close(
        inner_products(first, second), torch.stack(expected), rtol=1e-5, atol=1e-5
    )


@needs_compiler
def test_small_numbers_stay_what_they_are_in_this_process():
    """As -ffast-math would not have it: linked into a library, it flushes them to zero for all."""
    compiled.prepare()
    assert torch.tensor([1e-40]).mul(1.0).item() > 0


@needs_compiler
def test_it_is_compiled_once_for_a_processor(anew, tmp_path):
    anew.setenv("LISA_CACHE", str(tmp_path))
    assert compiled.prepare()
    (kept,) = (tmp_path / "compiled").iterdir()
    when = kept.stat().st_mtime_ns
    compiled._function.cache_clear()
    assert compiled.prepare()
    assert [(path, path.stat().st_mtime_ns) for path in kept.parent.iterdir()] == [(kept, when)]
    compiled._function.cache_clear()
    anew.setattr(compiled, "_processor", lambda: ["another"])
    assert compiled.prepare()
    assert len(list(kept.parent.iterdir())) == 2


@needs_compiler
def test_a_cache_that_cannot_be_written_is_done_without(anew, tmp_path):
    (tmp_path / "file").touch()
    anew.setenv("LISA_CACHE", str(tmp_path / "file"))
    anew.setenv("TMPDIR", str(tmp_path))
    anew.setattr(compiled.tempfile, "tempdir", None)
    assert compiled.prepare()
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@needs_compiler
def test_processes_that_begin_at_once_do_not_meet(tmp_path):
    words = [sys.executable, "-c", "from lisa_train.model import compiled as c; print(c.prepare())"]
    started = [
        subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "LISA_CACHE": str(tmp_path)},
        )
        for _ in range(3)
    ]
    assert [process.communicate()[0].strip() for process in started] == ["True"] * 3
    assert len(list((tmp_path / "compiled").iterdir())) == 1


@pytest.mark.parametrize("variables", [
    {"LISA_COMPILE": "0"}, {"CC": "no-such-compiler"}, {"CC": "false"}, {"CC": "true"},
])  # fmt: skip
def test_without_a_compiler_torch_sums(anew, tmp_path, variables):
    """None, one that fails, and one that does nothing and says that all is well."""
    anew.setenv("LISA_CACHE", str(tmp_path))
    for name, value in variables.items():
        anew.setenv(name, value)
    assert not compiled.prepare()
    x = draw(2, 5000)
    expected = torch.stack([part.double().square().sum() for part in x])
    torch.testing.assert_close(squares(x), expected, rtol=2e-6, atol=0)


@needs_compiler
def test_a_kernel_that_is_wrong_is_not_used_and_said(anew, tmp_path, caplog):
    anew.setenv("LISA_CACHE", str(tmp_path))
    wrong = tmp_path / "wrong.c"
    source = Path(compiled.__file__).with_name("sums.c").read_text()
    wrong.write_text(source.replace("b += y[i] * y[i];", "b += y[i];"))
    anew.setattr(compiled, "_SOURCE", wrong)
    with caplog.at_level(logging.WARNING):
        assert not compiled.prepare()
    assert "not those of torch, and are not used (wrong.c)" in caplog.text
