"""Small tensors side by side, against each tensor by itself in float64."""

import pytest
import torch

from lisa_train.model.joined import ROW, SMALL, Joined, Layout, is_small
from lisa_train.model.norms import changes_of_rows, squares_and_magnitudes_of_rows

SHAPES = [(16, 64), (7,), (64, 16), (3, 5, 2), (16, 64), (1,), (2, 700), (7,), (300, 200)]


@pytest.fixture
def parameters():
    torch.manual_seed(0)
    found = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    for parameter in found:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    found[2].grad = torch.randn(16, 64).T  # as backward passes leave them, too
    return found


def test_sums_are_those_of_every_tensor(parameters):
    joined = Joined(parameters)
    square, magnitude = squares_and_magnitudes_of_rows(joined.layout, joined.gradients)
    gradients = [p.grad.double() for p in parameters]
    exact = torch.stack([g.square().sum() for g in gradients])
    torch.testing.assert_close(square, exact, rtol=1e-6, atol=0)
    sizes = torch.stack([g.abs().sum() for g in gradients])
    torch.testing.assert_close(magnitude, sizes, rtol=1e-6, atol=0)


def test_changes_are_those_of_every_tensor(parameters):
    joined = Joined(parameters)
    old = [p.detach().double() for p in parameters]
    gradients = [p.grad.double().clone() for p in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.grad.mul_(0.1)  # clipping, which must not show
            parameter.add_(torch.randn_like(parameter) * 1e-2)
    joined.layout.fill(parameters, joined.after)
    found = changes_of_rows(joined.layout, joined.before, joined.after, joined.gradients)
    moved = [p.detach().double() - o for p, o in zip(parameters, old, strict=True)]
    exact = (
        [m.square().sum() for m in moved],
        [p.detach().double().square().sum() for p in parameters],
        [(m * g).sum() for m, g in zip(moved, gradients, strict=True)],
    )
    for values, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(values, torch.stack(expected), rtol=1e-5, atol=1e-7)


def test_tensors_of_one_shape_are_one_batch(parameters):
    joined = Joined(parameters)
    for shape in {p.shape for p in parameters}:
        batch = joined.layout.batch(joined.before, shape)
        alike = [i for i, p in enumerate(parameters) if p.shape == shape]
        assert [joined.layout.beside[i] for i in alike] == list(range(len(alike)))
        assert torch.equal(batch, torch.stack([parameters[i] for i in alike]))
        assert batch.untyped_storage().data_ptr() == joined.before.untyped_storage().data_ptr()


def test_memory_is_used_again_for_the_same_shapes_only(parameters):
    first = Joined(parameters)
    again = Joined(parameters, first)
    assert again.before is first.before
    assert again.layout is first.layout
    other = Joined(parameters[1:], first)
    assert other.layout.shapes == [p.shape for p in parameters[1:]]
    assert other.before is not first.before


def test_rows_of_a_large_layout_are_cut_into_blocks():
    layout = Layout([torch.Size((ROW * 50,))] * 12)
    assert layout.blocks[0][0] == 0
    assert layout.blocks[-1][1] == layout.rows == 600
    assert all(a[1] == b[0] for a, b in zip(layout.blocks, layout.blocks[1:], strict=False))
    assert layout.owners.tolist() == sorted([*range(12)] * 50)


@pytest.mark.parametrize(
    ("tensor", "small"),
    [
        (torch.zeros(4), True),
        (torch.nn.Parameter(torch.zeros(4)), True),
        (torch.zeros(SMALL), False),
        (torch.zeros(4, dtype=torch.bfloat16), False),
        (torch.zeros(4, dtype=torch.float64), False),
        (torch.eye(4).to_sparse(), False),
        (torch.zeros(4, device="meta"), False),
        (None, False),
    ],
)
def test_which_tensors_are_small(tensor, small):
    assert is_small(tensor) is small
