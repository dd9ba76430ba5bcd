"""A policy for the optimizer state of frozen layers, added from outside the package."""

import pytest
import torch

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_train.methods.lisa.config import OptimizerState
from lisa_train.methods.lisa.engine import Lisa
from lisa_train.optim.frozen_state import FrozenState
from lisa_train.optim.policies import POLICIES, SetAside, StatePolicy, register

CONFIG = lt.LisaConfig(1, 2, "cyclic", always_active=(), seed=0)


class Halved(StatePolicy):
    """Holds the state on the device in half of its bytes."""

    name = "halved"
    place = "device"

    def put_aside(self, state):
        return SetAside({k: v.bfloat16() if v.ndim else v for k, v in state.items()})

    def bring_back(self, aside):
        return {k: v.float() for k, v in aside.state.items()}


@pytest.fixture
def halved():
    yield register(Halved)
    del POLICIES["halved"]


def train(model, optimizer, config, steps):
    with Lisa(model, optimizer, config) as engine:
        for step in range(steps):
            engine.begin_step(step)
            ids = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(step))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield engine


def moments(optimizer):
    states = optimizer.state_dict()["state"].values()
    return [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")]


def test_the_engine_follows_a_policy_from_elsewhere(make_llama, halved):
    """After every layer has trained once, all but the drawn one hold half of their moments."""
    config = lt.LisaConfig(1, 2, "cyclic", always_active=(), seed=0, optimizer_state="halved")
    model = make_llama(layers=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    for step, engine in enumerate(train(model, optimizer, config, 8)):
        kinds = [m.dtype for m in moments(optimizer)]
        tensors = len(list(model.model.layers[0].parameters()))
        begun = min(step // 2 + 1, 3)
        assert kinds.count(torch.float32) == 2 * tensors
        assert kinds.count(torch.bfloat16) == 2 * tensors * (begun - 1)
        counts = 4 * tensors * begun  # the step of every tensor
        expected = 8 * layer + 4 * layer * (begun - 1) + counts
        assert engine._state.bytes() == expected
    # On the device: all of it goes back when LISA ends.
    assert {m.dtype for m in moments(optimizer)} == {torch.float32}
    assert len(optimizer.state) == 3 * tensors


def test_the_state_that_comes_back_is_the_rounded_one(halved):
    parameter = torch.nn.Parameter(torch.randn(64))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.randn(64)
    optimizer.step()
    before = optimizer.state[parameter]["exp_avg"].clone()
    held = FrozenState([optimizer], "halved")
    held.freeze(parameter)
    assert parameter not in optimizer.state
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], before.bfloat16())
    held.thaw(parameter)
    assert torch.equal(optimizer.state[parameter]["exp_avg"], before.bfloat16().float())


def test_the_estimate_counts_the_state_where_the_policy_leaves_it(make_llama, halved):
    """By its place: as `keep` does, for the same optimizer and layers."""
    config = make_llama(layers=3).config
    peaks = {}
    for policy in ("keep", "halved", "reset"):
        lisa = lt.LisaConfig(1, optimizer_state=policy)
        peaks[policy] = lt.estimate_memory(config, "lisa", lisa=lisa).total
    assert peaks["halved"] == peaks["keep"] > peaks["reset"]


def test_a_name_is_known_once_it_is_registered():
    with pytest.raises(ConfigError, match="'halved', but must be one of reset, keep, offload"):
        lt.LisaConfig(optimizer_state="halved")
    register(Halved)
    try:
        assert lt.LisaConfig(optimizer_state="halved").optimizer_state == "halved"
    finally:
        del POLICIES["halved"]


def test_what_loses_state_does_not_fit_an_optimizer_that_keeps_its_weights_there(make_llama):
    class Dropped(Halved):
        name, place = "dropped", "nowhere"

        def put_aside(self, state):
            return None

    register(Dropped)
    model = make_llama(layers=2)
    try:
        config = lt.LisaConfig(1, optimizer_state="dropped")
        with pytest.raises(ConfigError, match="optimizer_state='dropped' throws away"):
            Lisa(model, torch.optim.ASGD(model.parameters()), config)
    finally:
        del POLICIES["dropped"]


def test_a_built_in_name_is_taken():
    class Mine(Halved):
        name = "keep"

    with pytest.raises(ConfigError, match="optimizer_state 'keep' is built in"):
        register(Mine)


def test_the_setting_lists_every_built_in_policy():
    assert set(OptimizerState.__args__) == set(POLICIES)
