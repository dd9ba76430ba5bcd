"""An optimizer's state out of a checkpoint in pieces or a whole one, in one process.

Several processes: `methods/lisa/test_fsdp2.py` and `trainer/test_accelerate_fsdp2.py`.
"""

import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

import lisa_train as lt
from lisa_analysis.contract.errors import RunDirectoryError


def build(width=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2, bias=False))


def make(model, groups=1):
    tensors = list(model.parameters())
    parts = [tensors] if groups == 1 else [tensors[:1], tensors[1:]]
    return torch.optim.AdamW(
        [{"params": part, "lr": 0.1 * (1 + i)} for i, part in enumerate(parts)]
    )


def stepped(model, optimizer, trained=(0, 1)):
    """Only some layers have gradients, and so state."""
    for number in trained:
        for p in model[number].parameters():
            p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.zero_grad()


def save(model, optimizer, path, *, whole):
    options = StateDictOptions(full_state_dict=True) if whole else None
    state = get_optimizer_state_dict(model, optimizer, options=options)
    if whole:
        torch.save(state, path)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save({"optimizer": state}, checkpoint_id=path)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_what_was_saved_comes_back_and_nothing_else(tmp_path, whole, groups):
    model = build()
    optimizer = make(model, groups)
    stepped(model, optimizer, trained=(1,))
    optimizer.param_groups[-1]["lr"] = 0.7
    save(model, optimizer, tmp_path / "saved", whole=whole)
    again = build()
    other = make(again, groups)
    stepped(again, other)  # what is there before goes
    lt.load_saved_state(again, other, tmp_path / "saved")
    assert set(other.state) == set(again[1].parameters())
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert optimizer.state.get(mine, {}).keys() == other.state.get(theirs, {}).keys()
        for part, value in optimizer.state.get(mine, {}).items():
            assert torch.equal(other.state[theirs][part], value), part
    assert [group["lr"] for group in other.param_groups] == [
        group["lr"] for group in optimizer.param_groups
    ]
    assert [group["betas"] for group in other.param_groups] == [(0.9, 0.999)] * groups


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("other", "groups", "words"),
    [
        (lambda: build(width=5), 1, "in the shape (3, 4), the tensor has (5, 4)"),
        (lambda: nn.Sequential(nn.Linear(4, 3)), 1, "of 1.weight, which the model does not have"),
        (build, 2, "holds 1 parameter groups, this optimizer has 2"),
    ],
)
def test_state_of_something_else_is_refused(tmp_path, whole, other, groups, words):
    model = build()
    optimizer = make(model)
    stepped(model, optimizer)
    save(model, optimizer, tmp_path / "saved", whole=whole)
    again = other()
    with pytest.raises(RunDirectoryError) as error:
        lt.load_saved_state(again, make(again, groups), tmp_path / "saved")
    assert words in str(error.value)
    assert str(tmp_path / "saved") in str(error.value)


def test_state_of_tensors_that_do_not_train_is_refused(tmp_path):
    model = build()
    optimizer = make(model)
    stepped(model, optimizer)
    save(model, optimizer, tmp_path / "saved", whole=False)
    part = torch.optim.AdamW(model[0].parameters())
    with pytest.raises(RunDirectoryError, match=r"state of 1\.weight, which this optimizer does"):
        lt.load_saved_state(model, part, tmp_path / "saved")
