"""Kernels against float64: exact for every precision and size, shards add up, factors agree."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lisa_train.measure.adapters.factor_norms import gram_square, merged_square, rescaled_squares
from lisa_train.model import compiled
from lisa_train.model.norms import CHUNK, changes, squares, squares_and_magnitudes

SHAPES = [(), (1,), (7,), (3, 5), (CHUNK - 1,), (CHUNK,), (CHUNK + 1,), (5, CHUNK), (0, 33)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def route(request, monkeypatch):
    """Sums come from the compiled kernel, where there is a compiler, and from those of torch."""
    if request.param == "torch":
        monkeypatch.setattr(compiled, "_function", lambda: None)
    elif not compiled.prepare():
        pytest.skip("no C compiler here")


def draw(shape, dtype, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    # A mean far from zero: sums of one sign are where flat fp32 accumulation drifts.
    return ((torch.randn(shape, generator=generator) + 2) * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_agree_with_float64(dtype):
    tensors = [draw(shape, dtype, seed) for seed, shape in enumerate(SHAPES)]
    expected_squares = torch.stack([x.double().square().sum() for x in tensors])
    expected_magnitudes = torch.stack([x.double().abs().sum() for x in tensors])
    torch.testing.assert_close(squares(tensors), expected_squares, rtol=2e-6, atol=0)
    square, magnitude = squares_and_magnitudes(tensors)
    torch.testing.assert_close(square, expected_squares, rtol=2e-6, atol=0)
    torch.testing.assert_close(magnitude, expected_magnitudes, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_route_of_accelerators_agrees_too(monkeypatch, dtype):
    """Their kernels as torch has them for the CPU; none of theirs can run here."""
    monkeypatch.setattr("lisa_train.model.norms._on_cpu", lambda tensors: False)
    # The CPU's kernels add flatly, those of accelerators in blocks: no long tensors here.
    shapes = [(), (1,), (7,), (3, 5), (4096,), (4097,), (0, 33)]
    tensors = [draw(shape, dtype, seed) for seed, shape in enumerate(shapes)]
    expected = torch.stack([x.double().square().sum() for x in tensors])
    torch.testing.assert_close(squares(tensors), expected, rtol=1e-5, atol=0)
    square, magnitude = squares_and_magnitudes(tensors)
    torch.testing.assert_close(square, expected, rtol=1e-5, atol=0)
    expected = torch.stack([x.double().abs().sum() for x in tensors])
    torch.testing.assert_close(magnitude, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("first", ["cpu", "meta"])
def test_tensors_on_two_devices_are_summed_on_the_accelerator(first):
    """As of a model that is spread over them; `meta` stands for an accelerator."""
    devices = ["cpu", "meta"] if first == "cpu" else ["meta", "cpu"]
    tensors = [torch.ones(3, 5, dtype=torch.bfloat16, device=device) for device in devices]
    results = [squares(tensors), *squares_and_magnitudes(tensors)]
    results += changes(tensors, tensors, tensors)
    for result in results:
        assert (result.device.type, result.shape, result.dtype) == ("meta", (2,), torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_changes_agree_with_float64_of_the_stored_values(dtype):
    before = [draw(shape, dtype, seed) for seed, shape in enumerate(SHAPES)]
    after = [(x.float() * 1.01).to(dtype) for x in before]
    gradients = [draw(shape, dtype, seed + 50) for seed, shape in enumerate(SHAPES)]
    update, weight, product = changes(before, after, gradients)
    exact = [b.double() - a.double() for a, b in zip(before, after, strict=True)]
    expected = torch.stack([d.square().sum() for d in exact])
    torch.testing.assert_close(update, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(weight, squares(after), rtol=2e-6, atol=0)
    expected = torch.stack([(g.double() * d).sum() for g, d in zip(gradients, exact, strict=True)])
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=0)
    assert changes(before, after)[2] is None


def test_tensors_that_are_not_contiguous_are_paired_element_by_element():
    old, gradient = draw((6, 4), torch.float32).T, draw((4, 6), torch.float32, 1)
    new = old + draw((4, 6), torch.float32, 2, 0.1)
    _, _, product = changes([old], [new], [gradient])
    torch.testing.assert_close(product[0], (gradient.double() * (new - old).double()).sum())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so(bad):
    x = torch.ones(3 * CHUNK)
    x[CHUNK + 5] = bad
    square, magnitude = squares_and_magnitudes([x, torch.ones(4)])
    assert not square[0].isfinite()
    assert not magnitude[0].isfinite()
    assert square[1] == 4


def test_a_half_precision_norm_beyond_its_range_is_finite():
    x = torch.full((100, 300), 300.0, dtype=torch.float16)
    assert squares([x])[0].sqrt() == pytest.approx(300 * (100 * 300) ** 0.5)


def test_no_tensors():
    assert squares([]).shape == (0,)
    assert changes([], [], [])[2].shape == (0,)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hundred_million_elements(dtype):
    x = draw((10_000, 10_000), dtype)
    y = draw((10_000, 10_000), dtype, 1)
    square, magnitude = squares_and_magnitudes([x])
    exact = sum(row.double().square().sum() for row in x)
    assert abs(float(square[0] / exact) - 1) < 2e-6
    assert abs(float(magnitude[0] / sum(row.double().abs().sum() for row in x)) - 1) < 2e-6
    update, _, product = changes([x], [y], [y])
    pairs = list(zip(x, y, strict=True))
    exact = sum((b.double() - a.double()).square().sum() for a, b in pairs)
    assert abs(float(update[0] / exact) - 1) < 2e-6
    exact = sum((b.double() * (b.double() - a.double())).sum() for a, b in pairs)
    assert abs(float(product[0] / exact) - 1) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "r"), [(40, 30, 4), (300, 500, 16), (3, 3, 8)])
def test_gram_matrices_give_the_norm_of_the_product(m, n, r, dtype):
    a, b = draw((r, n), dtype), draw((m, r), dtype, 1)
    exact = (b.double() @ a.double()).square().sum()
    torch.testing.assert_close(gram_square(a, b), exact, rtol=1e-9, atol=0)


def test_gram_matrices_of_a_zero_factor_are_exactly_zero():
    assert gram_square(torch.randn(4, 30), torch.zeros(40, 4)) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_norm_agrees_with_the_dense_sum(dtype):
    weight, a, b = draw((300, 500), dtype), draw((8, 500), dtype, 1), draw((300, 8), dtype, 2)
    for scale in (0.5, -2.0):
        exact = (weight.double() + scale * (b.double() @ a.double())).square().sum()
        found = merged_square(weight, squares([weight])[0], a, b, scale)
        torch.testing.assert_close(found, exact, rtol=2e-6, atol=0)


def test_merged_norm_survives_cancellation():
    """An adapter that undoes most of its weight: the expansion loses digits, not the meaning."""
    a, b = draw((8, 200), torch.float32, 1), draw((100, 8), torch.float32, 2)
    weight = (b.double() @ a.double()).float() + draw((100, 200), torch.float32, 3, 0.1)
    exact = (weight.double() - b.double() @ a.double()).square().sum()
    found = merged_square(weight, squares([weight])[0], a, b, -1.0)
    assert float(exact / weight.double().square().sum()) < 1e-2
    torch.testing.assert_close(found.sqrt(), exact.sqrt(), rtol=1e-5, atol=0)


class Products(TorchDispatchMode):
    """Notes what matrix products are taken of, and torch's setting at that moment."""

    def __init__(self):
        super().__init__()
        self.taken = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "mm" in str(function):
            setting = torch.backends.mkldnn.matmul.fp32_precision
            self.taken |= {(x.dtype, setting) for x in args if torch.is_tensor(x)}
        return function(*args, **(kwargs or {}))


@contextmanager
def precision(value):
    """Torch's setting for fp32 products, the old one or that of CPUs alone, for a while."""
    matmul = torch.backends.mkldnn.matmul
    old = value in ("highest", "high", "medium")
    before = torch.get_float32_matmul_precision() if old else matmul.fp32_precision

    def put(value):
        if old:
            torch.set_float32_matmul_precision(value)
        else:
            matmul.fp32_precision = value

    put(value)
    try:
        yield lambda: torch.get_float32_matmul_precision() if old else matmul.fp32_precision
    finally:
        put(before)


@pytest.mark.parametrize("value", ["highest", "high", "medium", "bf16"])
def test_products_keep_their_digits_whatever_the_setting(value):
    """TF32 on GPUs and bf16 on CPUs cut fp32 factors to ten and seven bits, never fp64's."""
    weight, a = draw((300, 500), torch.float32), draw((8, 500), torch.float32, 1)
    b, magnitude = draw((300, 8), torch.float32, 2), draw((300,), torch.float32, 3).abs()
    product = b.double() @ a.double()
    undone = -product.float()
    with precision(value) as now, Products() as seen:
        gram = gram_square(a, b)
        merged = merged_square(weight, squares([weight])[0], a, b, 0.5)
        merged_square(undone, squares([undone])[0], a, b, 1.0)
        moved, _ = rescaled_squares(weight, (magnitude, (a, b)), (magnitude, None))
        assert now() == value
        with pytest.raises(RuntimeError):
            merged_square(weight, squares([weight])[0], a[:, :3], b, 0.5)
        assert now() == value
    assert {setting for kind, setting in seen.taken if kind == torch.float32} <= {"none", "ieee"}
    assert (torch.float32 in {kind for kind, _ in seen.taken}) == (value == "highest")
    torch.testing.assert_close(gram, product.square().sum(), rtol=1e-9, atol=0)
    exact = (weight.double() + 0.5 * product).square().sum()
    torch.testing.assert_close(merged, exact, rtol=1e-6, atol=0)
    m, w = magnitude.double()[:, None], weight.double()
    after = m * (w + product) / (w + product).norm(dim=1, keepdim=True)
    exact = (after - m * w / w.norm(dim=1, keepdim=True)).square().sum()
    torch.testing.assert_close(moved, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_gram_squares_of_a_batch_are_those_of_float64(size):
    from lisa_train.measure.adapters.factor_norms import gram_squares

    generator = torch.Generator().manual_seed(4)
    first = [torch.randn(16, 700, generator=generator) for _ in range(5)]
    second = [size * torch.randn(300, 16, generator=generator) for _ in range(5)]
    exact = [(b.double() @ a.double()).square().sum() for a, b in zip(first, second, strict=True)]
    torch.testing.assert_close(gram_squares(first, second), torch.stack(exact), rtol=5e-6, atol=0)
    half = [x.bfloat16() for x in first]
    exact = [(b.double() @ a.double()).square().sum() for a, b in zip(half, second, strict=True)]
    torch.testing.assert_close(gram_squares(half, second), torch.stack(exact), rtol=5e-6, atol=0)


def test_gram_squares_that_cancel_are_taken_in_double_precision():
    from lisa_train.measure.adapters.factor_norms import gram_squares

    generator = torch.Generator().manual_seed(4)
    a, b = (torch.randn(n, 8, generator=generator) for n in (500, 300))
    # Sixteen columns of which the second eight take away what the first ones bring.
    first = torch.cat([a.T, a.T + 1e-4 * torch.randn(8, 500, generator=generator)])
    second = torch.cat([b, -b], dim=1)
    plain = torch.randn(16, 500, generator=generator)
    exact = torch.stack([(second.double() @ x.double()).square().sum() for x in (first, plain)])
    assert exact[0] < 1e-7 * exact[1]
    found = gram_squares([first, plain], [second, second])
    torch.testing.assert_close(found, exact, rtol=5e-6, atol=0)
    nothing = gram_squares([plain], [torch.zeros(300, 16)])
    assert nothing.tolist() == [0.0]


def test_a_long_factor_is_taken_in_double_precision():
    from lisa_train.measure.adapters.factor_norms import gram_square, gram_squares

    a, b = torch.full((2, 70_000), 1 / 3), torch.randn(10, 2)
    found = gram_squares([a], [b])
    torch.testing.assert_close(found[0], gram_square(a, b), rtol=1e-9, atol=0)
