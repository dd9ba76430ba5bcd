"""What learning costs a step: measuring the drawn layers, and passes over all of them.

Steps with and without learning are interleaved in one process; the ratios hold on any machine.
"""

import statistics
import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lisa_train as lt
from lisa_train.methods.lisa.engine import Lisa

pytestmark = pytest.mark.benchmark

LAYERS, ACTIVE, INTERVAL, STEPS, EVERY = 12, 2, 2, 24, 4


class Arm:
    """One training."""

    def __init__(self, learn):
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=2000, hidden_size=256, intermediate_size=704, num_hidden_layers=LAYERS,
                num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
            )
        )  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.batch = None
        config = lt.LisaConfig(ACTIVE, INTERVAL, "balanced", learn=learn)
        passes = learn is not None and learn.metric == "probe"
        probe = self.backward if passes else None
        self.engine = Lisa(self.model, self.optimizer, config, probe=probe)
        self.seconds = []

    def backward(self):
        self.model(input_ids=self.batch, labels=self.batch).loss.backward()

    def step(self, step, batch):
        self.batch = batch
        start = time.perf_counter()
        self.engine.begin_step(step)
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)


def timed(metric):
    """Return the share that learning adds to a step, measured inside the learned run."""
    passes = {"probe_every": EVERY} if metric == "probe" else {}
    arm = Arm(lt.LearnConfig(metric=metric, start_after=0, **passes))
    learning, spent = arm.engine._learning, [0.0]
    for name in ("before_step", "after_step", "finish", "start"):
        call = getattr(learning, name)

        def watched(*args, call=call):
            start = time.perf_counter()
            result = call(*args)
            spent[0] += time.perf_counter() - start
            return result

        setattr(learning, name, watched)
    shares = []
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        before = spent[0]
        arm.step(step, torch.randint(3, 2000, (8, 128), generator=generator))
        shares.append((spent[0] - before, arm.seconds[-1]))
    own, whole = (sum(column) for column in zip(*shares, strict=True))
    return own / (whole - own), statistics.median(arm.seconds)


def test_measuring_costs_below_half_a_percent_of_a_step():
    for metric in ("grad_rms", "l1_descent"):
        share, seconds = timed(metric)
        print(f"\nlearn {metric}: {share:.2%} of a step of {seconds:.3f} s (1,024 tokens)")
        assert share < 0.005, metric


def test_passes_cost_no_more_than_their_number():
    """A pass over all layers is at most a full step, so 1/(M·K) of the steps, and some."""
    share, seconds = timed("probe")
    most = 1 / (EVERY * INTERVAL)
    print(f"\nlearn probe: {share:.2%} of a step of {seconds:.3f} s; a pass in {1 / most:g}")
    assert share < 1.25 * most
