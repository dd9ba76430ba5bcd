"""Updates corrected for how often a layer is drawn: exactly ((k/L)/π)^ρ of the plain ones."""

import numpy as np
import pytest
import torch

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_train.methods.lisa.engine import Lisa

PI = (0.05, 0.35, 0.4, 0.2)


def moved(make_llama, rho, *, warmup=0, optimizer=torch.optim.AdamW):
    """What one step moved every tensor by, the draw, and who drew."""
    model = make_llama(layers=4)
    before = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    config = lt.LisaConfig(
        1, 1, "balanced", probabilities=PI, seed=1, correct_lr=rho, warmup_steps=warmup
    )
    draws = []
    with Lisa(model, optimizer(model.parameters(), lr=1e-2), config, on_draw=draws.append) as e:
        ids = torch.arange(3, 19).reshape(2, 8)
        e.begin_step(0)
        model(input_ids=ids, labels=ids).loss.backward()
        e._optimizers[0].step()
    return {n: p.detach().double() - before[n] for n, p in model.named_parameters()}, draws[0]


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("rho", [0.5, 1.0])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adagrad])
def test_updates_of_drawn_layers_are_scaled_and_no_others(make_llama, rho, warmup, optimizer):
    plain, draw = moved(make_llama, 0.0, warmup=warmup, optimizer=optimizer)
    corrected, same = moved(make_llama, rho, warmup=warmup, optimizer=optimizer)
    assert draw.update_factors is None
    assert same.layers == draw.layers
    (layer,) = draw.layers
    factor = min(4.0, max(0.25, 0.25 / PI[layer])) ** rho
    assert same.update_factors == pytest.approx((factor,))
    for name, change in plain.items():
        expected = change * factor if f"layers.{layer}." in name else change
        np.testing.assert_allclose(corrected[name], expected, rtol=2e-3, atol=2e-8)
    assert any(change.abs().max() > 0 for n, change in plain.items() if f"layers.{layer}." in n)


def test_on_average_every_layer_moves_alike(make_llama):
    """At ρ = 1, π times the factor is k/L, as far as the bound allows."""
    config = lt.LisaConfig(1, 1, "balanced", probabilities=PI, correct_lr=1.0)
    model = make_llama(layers=4)
    with Lisa(model, torch.optim.SGD(model.parameters(), lr=0.1), config) as engine:
        schedule = engine._schedule
        factors = np.array([schedule.update_factor(i) for i in range(4)])
        assert schedule.update_factor("embed") == 1.0
    np.testing.assert_allclose((factors * PI)[1:], 0.25)
    assert factors[0] == 4.0  # 0.25/0.05 = 5 is beyond


def test_refusals(make_llama):
    with pytest.raises(ConfigError, match="there is nothing to correct"):
        lt.LisaConfig(correct_lr=0.5)
    with pytest.raises(ConfigError, match="must be a number from 0 to 1"):
        lt.LisaConfig(probabilities=(1.0, 1.0), correct_lr=2)
    from schedulefree import AdamWScheduleFree

    model = make_llama(layers=4)
    config = lt.LisaConfig(1, 1, "balanced", probabilities=PI, correct_lr=1.0)
    with pytest.raises(ConfigError, match="scaled updates would break"):
        Lisa(model, AdamWScheduleFree(model.parameters(), lr=0.1), config)
