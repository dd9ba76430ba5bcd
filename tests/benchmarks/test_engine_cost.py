"""Step time and bytes of state and gradients: full, LoRA, LISA, and a plain requires_grad toggle.

All methods run in one process, their steps interleaved, so that the ratios hold on any machine.
The toggle is what public callbacks do: it draws layers and sets flags, and never touches the
optimizer, so that the moments of every layer ever active stay.
"""

import random
import statistics
import time
import warnings

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lisa_train as lt
from lisa_train.methods.lisa.engine import Lisa

pytestmark = pytest.mark.benchmark

LAYERS, ACTIVE, INTERVAL, STEPS = 8, 1, 5, 40


def build():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2000,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


class Full:
    """Every weight trains."""

    def __init__(self):
        self.model = build()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def prepare(self, step):
        """Choose what trains in this step."""

    def run(self, step, batch):
        """Make one optimizer step; returns its seconds and the bytes of gradients."""
        start = time.perf_counter()
        self.prepare(step)
        self.model(input_ids=batch, labels=batch).loss.backward()
        gradients = sum(
            p.grad.numel() * p.grad.element_size()
            for p in self.model.parameters()
            if p.grad is not None
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start, gradients

    def state_bytes(self):
        """Bytes of the optimizer's state."""
        return sum(
            value.numel() * value.element_size()
            for state in self.optimizer.state.values()
            for value in state.values()
            if torch.is_tensor(value)
        )


class LoRA(Full):
    """Rank 16 on all linear maps of the layers."""

    def __init__(self):
        import peft

        config = peft.LoraConfig(r=16, target_modules="all-linear")
        self.model = peft.get_peft_model(build(), config)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-4)


class LisaReset(Full):
    """The engine with its defaults."""

    always_active = ("embed", "head", "norm")

    def __init__(self):
        super().__init__()
        config = lt.LisaConfig(ACTIVE, INTERVAL, always_active=self.always_active)
        self.engine = Lisa(self.model, self.optimizer, config)

    def prepare(self, step):
        self.engine.begin_step(step)


class LisaWithoutEmbeddings(LisaReset):
    """The engine with the embeddings at rest: backward stops at the lowest active layer."""

    always_active = ("head", "norm")


class Toggle(Full):
    """A plain callback: flags are toggled, the optimizer keeps what it has."""

    def prepare(self, step):
        if step % INTERVAL:
            return
        self.model.model.layers.requires_grad_(False)
        for i in random.Random(step).sample(range(LAYERS), ACTIVE):
            self.model.model.layers[i].requires_grad_(True)


@pytest.fixture(scope="module")
def measured():
    with warnings.catch_warnings():
        # 2026-11-23: raised inside peft and torch, nothing that is called here directly
        warnings.simplefilter("ignore")
        methods = {
            "full": Full(),
            "LoRA r=16": LoRA(),
            "LISA": LisaReset(),
            "LISA, embeddings off": LisaWithoutEmbeddings(),
            "plain toggle": Toggle(),
        }
    seconds = {name: [] for name in methods}
    gradients, early = {}, {}
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        batch = torch.randint(3, 2000, (4, 64), generator=generator)
        for name, method in methods.items():
            elapsed, gradients[name] = method.run(step, batch)
            seconds[name].append(elapsed)
            if step + 1 == INTERVAL:
                early[name] = method.state_bytes()
    table = {
        name: {
            "seconds": statistics.median(seconds[name][INTERVAL:]),
            "early": early[name],
            "state": method.state_bytes(),
            "gradients": gradients[name],
        }
        for name, method in methods.items()
    }
    full = table["full"]
    print(f"\n{'':22}{'step ms':>9}{'/ full':>8}{'state MB':>10}{'/ full':>8}{'grad MB':>9}")
    for name, row in table.items():
        print(
            f"{name:22}{1e3 * row['seconds']:9.1f}{row['seconds'] / full['seconds']:8.2f}"
            f"{row['state'] / 1e6:10.2f}{row['state'] / full['state']:8.2f}"
            f"{row['gradients'] / 1e6:9.2f}"
        )
    return table


def test_state_of_lisa_is_flat_and_that_of_a_toggle_grows(measured):
    assert measured["LISA"]["state"] == measured["LISA"]["early"]
    assert measured["plain toggle"]["early"] == measured["LISA"]["early"]
    assert measured["plain toggle"]["state"] > 2 * measured["plain toggle"]["early"]
    assert measured["LISA"]["state"] < 0.35 * measured["full"]["state"]


def test_gradients_of_lisa_are_those_of_its_active_tensors(measured):
    assert measured["LISA"]["gradients"] == measured["plain toggle"]["gradients"]
    assert measured["LISA"]["gradients"] * 2 <= measured["LISA"]["state"] * 1.001
    assert measured["LISA, embeddings off"]["gradients"] < measured["LISA"]["gradients"]


def test_the_engine_costs_no_more_time_than_a_toggle(measured):
    assert measured["LISA"]["seconds"] < 1.15 * measured["plain toggle"]["seconds"]
    assert measured["LISA"]["seconds"] < measured["full"]["seconds"]
    assert measured["LISA, embeddings off"]["seconds"] < 1.05 * measured["LISA"]["seconds"]
