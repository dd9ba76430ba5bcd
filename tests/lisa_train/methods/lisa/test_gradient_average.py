"""Two processes without DDP: LISA averages what trains, and they equal one process."""

from pathlib import Path

import pytest
import torch
from helpers_allocations import Allocations
from helpers_processes import ranks
from helpers_ranks import batch, build
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_train.methods.lisa import gradient_average
from lisa_train.methods.lisa.engine import Lisa
from lisa_train.methods.lisa.gradient_average import GradientAverage

pytestmark = pytest.mark.processes

WORLD, STEPS = 2, 6
CLIP = 0.05
# name -> settings of LISA, how it trains, dtype of the model
CASES = {
    "plain": ({}, {}, torch.float32),
    "recomputed, accumulated": ({}, {"micro": 2, "checkpointing": True}, torch.float32),
    "fp32_active": ({"precision": "fp32_active"}, {}, torch.bfloat16),
    "groups drawn": (
        {"always_active": ("norm",), "embed_probability": 0.5, "head_probability": 0.5}, {},
        torch.float32,
    ),
    "nobody calls": ({}, {"clip": False}, torch.float32),
    "modules": (
        {"by": "module", "sampling": "balanced", "recompute": "frozen"}, {"checkpointing": True},
        torch.float32,
    ),
    "halves, fp32_active": ({"by": "half", "precision": "fp32_active"}, {}, torch.bfloat16),
}  # fmt: skip


def train(name, model, shares, micro=1, *, checkpointing=False, clip=True):
    """Train on the batches of `shares`; return what was drawn, norms before clipping, weights."""
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    drawn, norms, draws = [], [], []
    config = lt.LisaConfig(1, 2, **CASES[name][0])
    with Lisa(model, optimizer, config, seed=3, on_draw=draws.append) as engine:
        for step in range(STEPS):
            engine.begin_step(step)
            drawn.append((draws[-1].layers, draws[-1].units, engine.active_groups))
            for number in range(micro):
                for rank in shares:
                    ids = batch(step, number, rank)
                    loss = model(input_ids=ids, labels=ids).loss
                    (loss / micro / len(shares)).backward()
            if clip:
                engine.average_gradients()
                norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP))
            optimizer.step()
            optimizer.zero_grad()
    return {"drawn": drawn, "norms": torch.tensor(norms), "model": model.state_dict()}


def process(rank, folder):
    folder = Path(folder)
    for name, (_, how, dtype) in CASES.items():
        copy = build(seed=rank).to(dtype)  # the first one's weights are everybody's
        torch.save(train(name, copy, [rank], **how), folder / f"{name}-{rank}.pt")
    torch.save(parts(rank), folder / f"parts-{rank}.pt")


def parts(rank):
    """The exchange alone: missing gradients, sizes, statistics, and what is not for it."""
    parameters = [nn.Parameter(torch.zeros(n)) for n in (5, 7, 3, 400, 2)]
    model = nn.ParameterList(parameters)
    average = GradientAverage(model)

    def gradients(value):
        average.begin_step()
        for i, parameter in enumerate(parameters):
            missing = i == 2 or (i == 1 and rank == 1)  # of nobody, of one process
            parameter.grad = None if missing else torch.full_like(parameter, value + i)

    found = {}
    for size in (25 * 2**20, 64):  # all in one buffer; several, and one tensor as it is
        gradient_average.BUCKET_BYTES = size
        gradients(10.0 * rank)
        with Allocations(p.grad for p in parameters if p.grad is not None) as allocated:
            average.average(parameters)
        found[size] = [None if p.grad is None else p.grad.clone() for p in parameters]
        found[f"{size} bytes"] = allocated.peak
    parameters[0].grad = torch.full_like(parameters[0], float(rank))
    average.average(parameters)  # the second call of a step
    found["again"] = parameters[0].grad.clone()

    normalised = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    average = GradientAverage(normalised)
    normalised(torch.full((2, 3), float(rank))).sum().backward()
    average.average(list(normalised.parameters()))
    found["statistics"] = normalised[1].running_mean.clone()

    wrapped = DistributedDataParallel(nn.Linear(2, 2))
    found["on"] = [GradientAverage(wrapped).on, GradientAverage(nn.Linear(2, 2), wanted=False).on]
    embedding = nn.Embedding(4, 2, sparse=True)
    average = GradientAverage(embedding)
    embedding(torch.tensor([1])).sum().backward()
    try:
        average.average(list(embedding.parameters()))
    except ConfigError as error:
        found["sparse"] = str(error)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes left; launched once for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks(process, folder)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return [torch.load(folder / f"parts-{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one_that_sees_both_batches(folder, name):
    first, second = (torch.load(folder / f"{name}-{rank}.pt") for rank in range(WORLD))
    assert first["drawn"] == second["drawn"]
    assert torch.equal(first["norms"], second["norms"])
    for key, value in first["model"].items():
        assert torch.equal(value, second["model"][key]), key

    _, how, dtype = CASES[name]
    start = build().to(dtype)
    begun = {key: value.clone() for key, value in start.state_dict().items()}
    alone = train(name, start, range(WORLD), **how)
    assert alone["drawn"] == first["drawn"]
    torch.testing.assert_close(first["norms"], alone["norms"], rtol=2e-5, atol=0)
    moved = 0
    for key, value in alone["model"].items():
        moved += not torch.equal(value, begun[key])
        if dtype == torch.float32:
            torch.testing.assert_close(first["model"][key], value, rtol=2e-5, atol=2e-6)
        else:  # a difference of 1e-7 may be rounded the other way
            same = (first["model"][key] == value).float().mean()
            assert same > 0.995, (key, same)
    assert moved > 10


def of_four(rank, folder):
    for name in FOUR:
        _, how, dtype = CASES[name]
        found = train(name, build(seed=rank).to(dtype), [rank], **how)
        torch.save(found, Path(folder) / f"{name}-{rank}.pt")


FOUR = ("recomputed, accumulated", "groups drawn")


@pytest.mark.slow
def test_four_processes_equal_one_that_sees_all_batches(tmp_path):
    ranks(of_four, tmp_path, world=4)
    for name in FOUR:
        found = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(4)]
        alone = train(name, build(), range(4), **CASES[name][1])
        assert all(each["drawn"] == alone["drawn"] for each in found)
        torch.testing.assert_close(found[0]["norms"], alone["norms"], rtol=2e-5, atol=0)
        for key, value in alone["model"].items():
            assert all(torch.equal(found[0]["model"][key], each["model"][key]) for each in found)
            torch.testing.assert_close(found[0]["model"][key], value, rtol=2e-5, atol=2e-6)


def test_a_gradient_that_a_process_lacks_counts_as_zero(found):
    for size in (25 * 2**20, 64):
        for said in found:
            a, b, nobody, large, e = said[size]
            assert torch.equal(a, torch.full((5,), 5.0))
            assert torch.equal(b, torch.full((7,), 0.5))
            assert nobody is None
            assert torch.equal(large, torch.full((400,), 8.0))
            assert torch.equal(e, torch.full((2,), 9.0))


def test_memory_is_that_of_the_small_gradients_at_most(found):
    active = 4 * (5 + 7 + 400 + 2)
    flags_and_stand_ins = 4 * (5 + 2 * 7 + 3)
    for said in found:
        assert said[f"{25 * 2**20} bytes"] <= 1.3 * active + flags_and_stand_ins
        assert said["64 bytes"] <= 2 * 64 + 2 * flags_and_stand_ins  # the large one is not copied


def test_a_second_call_in_a_step_changes_nothing(found):
    for rank, said in enumerate(found):
        assert torch.equal(said["again"], torch.full((5,), float(rank)))


def test_running_statistics_are_those_of_the_first_process(found):
    assert torch.equal(found[0]["statistics"], found[1]["statistics"])


def test_nothing_is_done_where_a_wrapper_averages(found):
    assert [said["on"] for said in found] == [[False, False]] * WORLD


def test_a_sparse_gradient_is_refused(found):
    for said in found:
        assert "make the embedding with sparse=False" in said["sparse"]


def test_one_process_exchanges_nothing():
    model = nn.Linear(2, 2)
    model.weight.grad = torch.ones(2, 2)
    average = GradientAverage(model)
    average.average(list(model.parameters()))
    assert not average.on
    assert model.bias.grad is None
