"""Layers with a probability of 0: never drawn, no gradient, no state, announced, exact as ever."""

import json
import logging

import pytest
import torch

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_analysis.plans.sampling import SamplingProbabilities
from lisa_train.methods.lisa.engine import Lisa

POOL = (0.0, 0.5, 0.5, 0.0, 0.5, 0.0, 0.5, 0.0)
INSIDE = {1, 2, 4, 6}


def settings(**changes):
    return lt.LisaConfig(activated_layers=2, interval_steps=3, probabilities=POOL, **changes)


def train(model, optimizer, engine, steps):
    for step in steps:
        engine.begin_step(step)
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(3, 64, (2, 8), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        yield step
        optimizer.step()
        optimizer.zero_grad()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("policy", ["reset", "keep", "offload"])
@pytest.mark.parametrize("sampling", ["uniform", "balanced", "cyclic", "conditional_poisson"])
def test_neither_gradient_nor_state_nor_change(make_llama, sampling, policy):
    model = make_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    before, drawn = weights(model), set()
    with Lisa(model, optimizer, settings(sampling=sampling, optimizer_state=policy)) as engine:
        resting = {n for i in range(8) if i not in INSIDE for n in engine.layer_map.layers[i]}
        named = dict(model.named_parameters())
        for _ in train(model, optimizer, engine, range(24)):
            drawn.update(engine.active_layers)
            assert all(named[n].grad is None and not named[n].requires_grad for n in resting)
            assert not any(optimizer.state.get(named[n]) for n in resting)
        assert engine.inclusion_probabilities.tolist() == list(POOL)
        assert engine.coverage["layers_never_drawn"] == [0, 3, 5, 7]
    assert drawn == INSIDE
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert not changed & resting
    assert changed == set(named) - resting
    assert all(p.requires_grad for p in model.parameters())


def test_a_run_resumed_inside_a_period_is_bit_identical(make_llama):
    def start(model):
        return torch.optim.AdamW(model.parameters(), lr=1e-2)

    straight = make_llama()
    optimizer = start(straight)
    with Lisa(straight, optimizer, settings(sampling="balanced")) as engine:
        list(train(straight, optimizer, engine, range(14)))
    first = make_llama()
    optimizer = start(first)
    with Lisa(first, optimizer, settings(sampling="balanced")) as engine:
        list(train(first, optimizer, engine, range(7)))
        saved = json.loads(json.dumps(engine.state_dict()))
        state = optimizer.state_dict()
    second = make_llama(seed=1)
    second.load_state_dict(first.state_dict())
    optimizer = start(second)
    with Lisa(second, optimizer, settings(sampling="balanced")) as engine:
        engine.load_state_dict(saved)
        optimizer.load_state_dict(state)
        list(train(second, optimizer, engine, range(7, 14)))
    for name, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_they_are_announced_once_and_not_as_missed(make_llama, caplog):
    model = make_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        caplog.at_level(logging.WARNING, logger="lisa_train"),
        Lisa(model, optimizer, settings(sampling="cyclic"), total_steps=30),
    ):
        [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith("4 of 8 layers (0, 3, 5, 7) have probability 0 and are never drawn")


def test_they_may_be_frozen_and_out_of_the_optimizer(make_llama):
    model = make_llama()
    for i in (0, 3):
        model.model.layers[i].requires_grad_(False)
    out = {p for i in (0, 3, 5, 7) for p in model.model.layers[i].parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p not in out], lr=1e-2)
    with Lisa(model, optimizer, settings()) as engine:
        list(train(model, optimizer, engine, range(4)))
    model.model.layers[1].requires_grad_(False)
    with pytest.raises(ConfigError, match=r"layer model.layers.1 has no parameter"):
        Lisa(model, optimizer, settings())


def test_from_a_file(make_llama, tmp_path):
    model = make_llama()
    record = {
        "schema_version": "1.0", "layer_names": [f"model.layers.{i}" for i in range(8)],
        "activated_layers": 2, "inclusion_probabilities": list(POOL),
    }  # fmt: skip
    path = tmp_path / "probabilities.json"
    path.write_text(json.dumps(record))
    assert SamplingProbabilities.load(path).inclusion_probabilities == POOL
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Lisa(model, optimizer, lt.LisaConfig(probabilities=str(path))) as engine:
        list(train(model, optimizer, engine, range(1)))
        assert set(engine.active_layers) <= INSIDE


def test_the_estimate_leaves_them_out(make_llama, tmp_path):
    """The costly layers cost nothing where they are never drawn."""
    folder = tmp_path / "model"
    make_llama().save_pretrained(folder)
    common = {"method": "lisa", "batch_size": 2, "sequence_length": 16}
    top = (0.0,) * 6 + (1.0, 1.0)
    low = (1.0, 1.0) + (0.0,) * 6
    found = {}
    for name, pi in (("low", low), ("top", top), ("any", None)):
        config = lt.LisaConfig(probabilities=pi, always_active=())
        found[name] = lt.estimate_memory(str(folder), lisa=config, **common)
    assert found["top"].active_layers == (6, 7)
    assert found["low"].active_layers == (0, 1)
    assert found["top"].total < found["any"].total
    assert found["low"].total == found["any"].total
