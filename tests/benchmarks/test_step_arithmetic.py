"""Step time against arithmetic: what LISA skips must save its time.

All methods run in one process, their steps interleaved, and processor time is taken of forward and
backward passes. LISA is allowed what full fine-tuning takes, less the time of the weight gradients
that it skips, which are computed by themselves in the same rounds. The ratio of the operations in
all matrix products, counted while the methods run, is printed beside it.
"""

import statistics
import time
import warnings
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import lisa_train as lt

pytestmark = pytest.mark.benchmark

LAYERS, TOKENS, ROUNDS = 8, 512, 4
SEED, DRAWN = 8, (3,)
METHODS = ("full", "LoRA r=16", "LISA E+H+1L", "LISA 1L")


def build(attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=1536, intermediate_size=4096, num_hidden_layers=LAYERS,
        num_attention_heads=12, num_key_value_heads=4, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def prepared(name: str, attention: str = "sdpa") -> tuple[Any, Any]:
    """Model and optimizer of a method, with what trains in its first interval."""
    model = build(attention)
    if name.startswith("LoRA"):
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    if name.startswith("LISA"):
        always = ("norm",) if name == "LISA 1L" else ("embed", "head", "norm")
        engine = lt.Lisa(model, optimizer, lt.LisaConfig(1, 10, seed=SEED, always_active=always))
        engine.begin_step(0)
        assert engine.active_layers == DRAWN
    return model, optimizer


def seconds_of(work: Any) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


class Skipped:
    """The weight gradients of the linear maps that a model does not train."""

    def __init__(self, model: Any) -> None:
        self.pairs = [
            (torch.randn(TOKENS, module.out_features), torch.randn(TOKENS, module.in_features))
            for module in model.modules()
            if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad
        ]

    def __call__(self) -> None:
        for gradient, entered in self.pairs:
            torch.mm(gradient.t(), entered)


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, float]]:
    ids = torch.randint(3, 4096, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    operations = {}
    with warnings.catch_warnings():
        # 2026-11-25: raised inside peft and torch, nothing that is called here directly
        warnings.simplefilter("ignore")
        for name in METHODS:
            model, _ = prepared(name, "eager")  # whose products torch counts
            with FlopCounterMode(display=False) as counter:
                model(input_ids=ids, labels=ids).loss.backward()
            operations[name] = counter.get_total_flops()
        trained = {name: prepared(name) for name in METHODS}
    skipped = {n: Skipped(model) for n, (model, _) in trained.items() if n.startswith("LISA")}
    passes: dict[str, list[float]] = {name: [] for name in METHODS}
    saved: dict[str, list[float]] = {name: [] for name in skipped}
    for _ in range(ROUNDS + 1):
        for name, (model, optimizer) in trained.items():
            passes[name].append(
                seconds_of(lambda model=model: model(input_ids=ids, labels=ids).loss.backward())
            )
            optimizer.step()
            optimizer.zero_grad()
        for name, work in skipped.items():
            saved[name].append(seconds_of(work))
    full = statistics.median(passes["full"][1:])
    table = {}
    for name in METHODS:
        table[name] = {
            "time": statistics.median(passes[name][1:]) / full,
            "allowed": 1 - statistics.median(saved[name][1:]) / full if name in saved else 1.0,
            "arithmetic": operations[name] / operations["full"],
        }
    print(f"\n{'of full fine-tuning':22}{'time':>8}{'allowed':>9}{'arithmetic':>12}")
    for name, row in table.items():
        allowed = f"{row['allowed']:9.2f}" if name in saved else f"{'–':>9}"
        print(f"{name:22}{row['time']:8.2f}{allowed}{row['arithmetic']:12.2f}")
    return table


@pytest.mark.parametrize("name", ["LISA E+H+1L", "LISA 1L"])
def test_what_is_skipped_saves_its_time(measured, name):
    assert measured[name]["time"] <= 1.1 * measured[name]["allowed"]


def test_lisa_is_faster_than_lora(measured):
    """Layers alone are; with embedding and head, whose gradients LoRA never takes, the two tie."""
    lora = measured["LoRA r=16"]["time"]
    assert measured["LISA 1L"]["time"] < lora
    assert measured["LISA E+H+1L"]["time"] < 1.05 * lora
