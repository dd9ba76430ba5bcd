"""A sampler that learns, added from outside the package: draws, π in force, resume, refusals."""

import json

import numpy as np
import pytest
import torch

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_train.methods.lisa.config import BUDGETED, Sampling
from lisa_train.methods.lisa.engine import Lisa
from lisa_train.methods.lisa.samplers import (
    SAMPLERS,
    Sampler,
    SystematicSampler,
    make_sampler,
    never_drawn,
    register,
)

LAYERS, K, INTERVAL = 6, 2, 2
CONFIG = {"activated_layers": K, "interval_steps": INTERVAL, "always_active": ("norm",), "seed": 3}


class ByScore(Sampler):
    """π partly equal, partly in proportion to a mean of scores that forgets, anew at every draw.

    The draws of the settled π are those of the systematic scheme.
    """

    scheme = "by_score"

    def __init__(self, pi, k, seed):
        super().__init__(pi, k, seed)
        self._scores = np.ones(self.inclusion_probabilities.size)
        self._latest = -1  # the last draw made, and the π that it was made by
        self._in_force = self.inclusion_probabilities

    def probabilities(self, index):
        return self._in_force if index <= self._latest else self._next()

    def draw(self, index):
        self._in_force, self._latest = self.probabilities(index), index
        return SystematicSampler(self._in_force, self.k, self.seed).draw(index)

    def learn(self, step, layer_scores):
        known = np.isfinite(layer_scores)
        self._scores[known] = 0.5 * self._scores[known] + 0.5 * layer_scores[known]

    def state_dict(self):
        learned = {"scores": self._scores.tolist(), "in_force": self._in_force.tolist()}
        return super().state_dict() | learned | {"latest": self._latest}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self._scores = np.array(state["scores"])
        self._in_force = np.array(state["in_force"])
        self._latest = state["latest"]

    def _next(self):
        return by_hand(self._scores)


def by_hand(scores):
    return K * (0.6 / scores.size + 0.4 * scores / scores.sum())  # at most 0.2 + 0.8


@pytest.fixture
def by_score():
    yield register(ByScore)
    del SAMPLERS["by_score"]


def build(make_llama):
    model = make_llama(layers=LAYERS)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model, optimizer, engine, steps):
    """Train, and give the engine the gradient norms of the layers that it trains."""
    for step in steps:
        engine.begin_step(step)
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(3, 64, (2, 8), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        scores = np.full(LAYERS, np.nan)
        for i in engine.active_layers:
            tensors = [p for _, p in engine.layer_map.parameters(model, i)]
            scores[i] = sum(float(p.grad.square().sum()) for p in tensors) ** 0.5
        optimizer.step()
        optimizer.zero_grad()
        engine.learn(step + 1, scores)


def test_every_draw_is_made_by_what_was_learned_before_it(make_llama, by_score):
    model, optimizer = build(make_llama)
    draws, expected, scores = [], [], np.ones(LAYERS)
    with Lisa(model, optimizer, lt.LisaConfig(sampling="by_score", **CONFIG),
              on_draw=draws.append) as engine:  # fmt: skip
        # Layer 4 is worth more at every step, and the others ever less.
        for step in range(16):
            if step % INTERVAL == 0:
                expected.append(by_hand(scores))
            engine.begin_step(step)
            before = engine.inclusion_probabilities
            np.testing.assert_allclose(before, expected[-1], atol=1e-12)
            found = np.full(LAYERS, 0.1)
            found[4] = 1.0 + step
            engine.learn(step + 1, found)
            scores = 0.5 * scores + 0.5 * found
            # What is learned within an interval rules the next one only.
            np.testing.assert_array_equal(engine.inclusion_probabilities, before)
    assert len(draws) == 8
    for draw, pi in zip(draws, expected, strict=True):
        np.testing.assert_allclose(draw.inclusion_probabilities, pi, atol=1e-12)
        assert draw.layers == make_sampler("systematic", pi, K, 3).draw(draw.index)
    assert draws[0].inclusion_probabilities == pytest.approx([K / LAYERS] * LAYERS)
    assert draws[-1].inclusion_probabilities[4] > 0.9
    assert sum(4 in draw.layers for draw in draws[2:]) >= 5


@pytest.mark.parametrize("stop", [4, 5], ids=["between draws", "inside an interval"])
def test_a_resumed_run_draws_and_trains_as_the_uninterrupted_one(make_llama, by_score, stop):
    config = lt.LisaConfig(sampling="by_score", optimizer_state="keep", **CONFIG)
    whole, draws = build(make_llama), []
    with Lisa(*whole, config, on_draw=draws.append) as engine:
        train(*whole, engine, range(12))
        end = engine.state_dict()
    first, again = build(make_llama), []
    with Lisa(*first, config, on_draw=again.append) as engine:
        train(*first, engine, range(stop))
        saved = json.loads(json.dumps(engine.state_dict()))
        weights, state = first[0].state_dict(), first[1].state_dict()
        in_force = engine.inclusion_probabilities
    resumed = build(make_llama)
    resumed[0].load_state_dict(weights)
    resumed[1].load_state_dict(state)
    with Lisa(*resumed, config, on_draw=again.append) as engine:
        engine.load_state_dict(saved)
        np.testing.assert_array_equal(engine.inclusion_probabilities, in_force)
        train(*resumed, engine, range(stop, 12))
        assert engine.state_dict() == end
    kept = [(d.step, d.layers, d.inclusion_probabilities, d.visits) for d in again]
    assert kept == [(d.step, d.layers, d.inclusion_probabilities, d.visits) for d in draws]
    assert len({d.inclusion_probabilities for d in draws}) == len(draws)
    for ours, theirs in zip(resumed[0].parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_nothing_is_said_of_draws_that_are_not_settled(make_llama, by_score):
    """Layers that start certain may rest later, and whoever is never drawn is not known."""
    pi = [1.0, 0.2, 0.2, 0.2, 0.2, 0.2]
    sampler = make_sampler("by_score", pi, K, 0)
    assert sampler.learns
    assert never_drawn(sampler, 1) == ()
    assert sampler.always_drawn() == ()
    assert make_sampler("systematic", pi, K, 0).always_drawn() == (0,)
    told = []
    model, optimizer = build(make_llama)
    everything = ("embed", "head", "norm", "other")
    certain = lt.LisaConfig(1, sampling="by_score", probabilities=(1.0,), always_active=everything)
    one = make_llama(layers=1)
    with Lisa(one, torch.optim.SGD(one.parameters(), 0.1), certain) as engine:
        assert not engine.rotates
    config = lt.LisaConfig(K, 1, "by_score", probabilities=tuple(pi), always_active=everything)
    with Lisa(model, optimizer, config, total_steps=1, on_notice=told.append) as engine:
        assert engine.rotates
    assert told == []


def test_scores_are_one_number_per_layer(make_llama, by_score):
    model, optimizer = build(make_llama)
    with Lisa(model, optimizer, lt.LisaConfig(sampling="by_score", **CONFIG)) as engine:
        engine.begin_step(0)
        with pytest.raises(ConfigError, match=r"shape \(5,\), but the model has 6 layers"):
            engine.learn(1, np.ones(5))


def test_built_in_samplers_ignore_what_is_measured(make_llama):
    draws = []
    for scores in (np.ones(LAYERS), np.arange(LAYERS) * 100.0):
        model, optimizer = build(make_llama)
        with Lisa(model, optimizer, lt.LisaConfig(**CONFIG), on_draw=draws.append) as engine:
            for step in range(8):
                engine.begin_step(step)
                engine.learn(step + 1, scores)
    assert [d.layers for d in draws[:4]] == [d.layers for d in draws[4:]]


def test_another_scheme_or_seed_is_not_continued(by_score):
    pi = np.full(LAYERS, K / LAYERS)
    state = make_sampler("by_score", pi, K, seed=1).state_dict()
    with pytest.raises(ConfigError, match="seed = 1, this run has 2"):
        make_sampler("by_score", pi, K, seed=2).load_state_dict(state)
    with pytest.raises(ConfigError, match="scheme = 'by_score', this run has 'balanced'"):
        make_sampler("balanced", pi, K, seed=1).load_state_dict(state)


def test_a_name_is_known_once_it_is_registered():
    with pytest.raises(ConfigError, match=r"'by_score', but must be one of uniform, bernoulli"):
        lt.LisaConfig(sampling="by_score")
    register(ByScore)
    try:
        assert lt.LisaConfig(sampling="by_score").sampling == "by_score"
        register(ByScore)  # the cell of a notebook, run again
    finally:
        del SAMPLERS["by_score"]


def test_a_built_in_name_is_taken():
    class Mine(ByScore):
        scheme = "uniform"

    with pytest.raises(ConfigError, match="sampler 'uniform' is built in"):
        register(Mine)
    assert SAMPLERS["uniform"] is not Mine


def test_the_setting_lists_every_built_in_sampler():
    assert set(Sampling.__args__) == set(SAMPLERS)
    assert set(BUDGETED) == {name for name, kind in SAMPLERS.items() if kind.keeps_budget}
