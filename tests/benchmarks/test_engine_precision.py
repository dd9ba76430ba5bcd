"""How much of a small update each precision mode keeps, on the demo's real model."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lisa_train as lt
from lisa_train.command.demo.smollm2 import smollm2_folder
from lisa_train.methods.lisa.engine import Lisa
from lisa_train.model.master_copies import exact

pytestmark = pytest.mark.benchmark

STEPS, RATE = 4, 2e-5
TEXT = (
    "The sea was calm that morning, and the boats went out early. By noon the wind had turned, "
    "and those who knew the coast were already on their way home with what they had caught."
)
MODES = {  # name -> (precision of the stored weights, precision of LISA's active layers)
    "fp32": (torch.float32, "model"),
    "bf16": (torch.bfloat16, "model"),
    "bf16, fp32_active": (torch.bfloat16, "fp32_active"),
}


def train(folder, dtype, precision):
    """Train two layers for one interval; their movement while active, and once frozen again."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(dtype)
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids[:, :16]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    config = lt.LisaConfig(2, STEPS, always_active=(), precision=precision)
    with Lisa(model, optimizer, config, seed=1) as engine:
        engine.begin_step(0)
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        before = weights(model, names)
        for step in range(STEPS):
            engine.begin_step(step)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        active = weights(model, names) - before  # of the fp32 copies, where they are held
    return active, weights(model, names) - before


def weights(model, names):
    parameters = dict(model.named_parameters())
    return torch.cat([exact(parameters[n]).detach().double().flatten() for n in names])


@pytest.fixture(scope="module")
def kept():
    folder = smollm2_folder()
    moved = {name: train(folder, *mode) for name, mode in MODES.items()}
    reference = moved["fp32"][0]
    table = {}
    print(f"\n{'':20}{'kept, active':>14}{'kept, frozen':>14}{'weights moved':>15}")
    for name, (active, frozen) in moved.items():
        # the part of the fp32 movement that the mode makes
        shares = [float(m @ reference / (reference @ reference)) for m in (active, frozen)]
        table[name] = (*shares, float((active != 0).double().mean()))
        print(f"{name:20}{shares[0]:14.3f}{shares[1]:14.3f}{table[name][2]:15.3f}")
    return table


def test_pure_bf16_loses_most_of_the_update_and_active_fp32_keeps_it(kept):
    assert kept["bf16"][0] < 0.7
    assert kept["bf16, fp32_active"][0] > 0.9
    assert kept["bf16, fp32_active"][2] > 0.95


def test_stochastic_rounding_keeps_the_update_when_the_layer_is_frozen(kept):
    assert kept["bf16, fp32_active"][1] == pytest.approx(kept["bf16, fp32_active"][0], abs=0.05)
