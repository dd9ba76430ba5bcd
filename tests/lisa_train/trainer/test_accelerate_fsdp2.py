"""LISA in a Trainer whose model accelerate splits (fsdp): as one process, and taken up again.

Accelerate splits on accelerators only; `helpers_accelerate` tells it that a CPU is one.
"""

import functools

import numpy as np
import pytest
import torch
from helpers_accelerate import (
    CASES,
    RECORDED,
    SLOW,
    near,
    others,
    process,
    recording,
    taken_up_to_the_bit,
    train,
)
from helpers_processes import ranks

import lisa_analysis as la

pytestmark = pytest.mark.processes


def cases(names):
    return [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in names]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Where two processes have left a case; launched once for all ordinary ones."""

    @functools.cache
    def launch(names):
        folder = tmp_path_factory.mktemp("accelerate")
        ranks(process, folder, names)
        return folder

    return lambda name: launch(SLOW if name in SLOW else tuple(n for n in CASES if n not in SLOW))


@pytest.mark.parametrize("name", cases(CASES))
def test_two_processes_train_as_one(folder_of, name, tmp_path):
    folder = folder_of(name)
    first, second = (torch.load(folder / f"{name}-{rank}.pt")["done"] for rank in range(2))
    assert first["drawn"] == second["drawn"]
    assert CASES[name][0] is None or len({layers for layers, _ in first["drawn"]}) > 1
    assert all(torch.equal(value, second["model"][key]) for key, value in first["model"].items())
    near(first, train(name, tmp_path, 1, split=False), name)


@pytest.mark.parametrize("name", cases(CASES))
def test_a_checkpoint_is_taken_up_to_the_bit(folder_of, name):
    for rank in range(2):
        taken_up_to_the_bit(torch.load(folder_of(name) / f"{name}-{rank}.pt"))


def test_layers_that_rest_have_no_state(folder_of):
    state = torch.load(folder_of("reset") / "reset-0.pt")["again"]["state"]
    assert len({name.split(".")[2] for name in state if ".layers." in name}) == 1


@pytest.mark.parametrize(
    "name", ["fp32_active", pytest.param("keep, whole, accumulated", marks=pytest.mark.slow)]
)
def test_another_number_of_processes_takes_up_a_checkpoint(folder_of, name):
    folder = folder_of(name)
    ranks(others, folder, (name,), world=3)
    done = torch.load(folder / f"{name}-0.pt")["done"]
    found = [torch.load(folder / f"{name}-of-3-{rank}.pt") for rank in range(3)]
    for key, value in found[0]["model"].items():
        assert all(torch.equal(value, each["model"][key]) for each in found), key
    done["drawn"] = done["drawn"][-len(found[0]["drawn"]) :]
    near(found[0], done, name)


@pytest.mark.parametrize("name", cases(RECORDED))
def test_such_a_run_is_recorded(folder_of, tmp_path, name):
    folder = folder_of(name)
    train(name, tmp_path, 1, split=False, record=recording(tmp_path, name))
    columns = ["grad_norm", "update_norm", "weight_norm", "probe_grad_norm"]
    columns += ["delta_norm"] if name == "lora" else []
    runs = [la.load(path / f"run-{name}") for path in (folder, tmp_path)]
    assert [run.status for run in runs] == ["finished", "finished"]
    found, one = (
        run.metrics().merge(run.parameters[["param_id", "name"]]).set_index(["step", "name"])
        for run in runs
    )
    found = found.reindex(one.index)
    if name == "reset":  # also of layers that rest
        assert found["probe_grad_norm"].notna().sum() > 2 * 9
    for column in columns:
        assert one[column].notna().any()
        np.testing.assert_allclose(found[column], one[column], rtol=1e-4, atol=1e-9)
