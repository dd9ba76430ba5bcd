"""On a GPU: the peak of every memory option, and stepping inside backward to the bit."""

import gc

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lisa_train as lt
from lisa_train.methods.lisa.engine import Lisa
from lisa_train.optim import paged_state
from lisa_train.optim.eight_bit import set_eight_bit_states
from lisa_train.optim.step_in_backward import StepInBackward

pytestmark = pytest.mark.gpu

TOKENS = 256


def build(**changes):
    settings = {
        "vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1408,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).to("cuda", torch.bfloat16)


def batch(step=0, tokens=TOKENS):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 32_000, (1, tokens), generator=generator).cuda()
    return {"input_ids": ids, "labels": ids}


def size_of(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def peak(model, optimizer, *, engine=None, inside=False, tokens=TOKENS, extra=None, steps=3):
    """Bytes allocated at most in the last of a few steps; the state is there by then."""
    stepping = StepInBackward(optimizer) if inside else None
    for step in range(steps):
        if engine is not None:
            engine.begin_step(step)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        model(**batch(tokens=tokens), **(extra or {})).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
    if stepping is not None:
        stepping.close()
    return torch.cuda.max_memory_allocated()


def fused(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


@pytest.mark.parametrize("kind", ["fused", "foreach"])
@pytest.mark.parametrize("tied", [False, True])
def test_stepping_inside_backward_is_the_same_to_the_bit(kind, tied):
    results = []
    for inside in (False, True):
        # eager: the backward pass of fused attention kernels may add in any order
        model = build(num_hidden_layers=2, tie_word_embeddings=tied, attn_implementation="eager")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **{kind: True})
        stepping = StepInBackward(optimizer) if inside else None
        for step in range(4):
            model(**batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if stepping is not None:
            stepping.close()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *results))


def test_one_gradient_at_a_time():
    model = build()
    gradients = [p.numel() * 2 for p in model.parameters()]
    # few tokens: otherwise logits and activations make the peak, not gradients
    ordinary = peak(model, fused(model), tokens=16)
    model = build()
    inside = peak(model, fused(model), tokens=16, inside=True)
    assert ordinary - inside > 0.5 * (sum(gradients) - max(gradients))


def test_foreach_steps_hold_a_copy_of_everything_that_trains():
    model = build()
    alone = peak(model, fused(model), tokens=16)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
    assert peak(model, optimizer, tokens=16) - alone > 0.8 * size_of(model.parameters())


@pytest.mark.parametrize("policy", ["reset", "offload"])
def test_frozen_layers_hold_no_state_on_the_device(policy):
    model = build()
    optimizer = fused(model)
    config = lt.LisaConfig(1, 1, "cyclic", always_active=("norm",), optimizer_state=policy)
    held = []
    with Lisa(model, optimizer, config) as engine:
        for step in range(8):
            engine.begin_step(step)
            model(**batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            gc.collect()
            held.append(torch.cuda.memory_allocated())
    assert max(held) - min(held) < 2**20


def test_resting_embeddings_end_the_backward_pass_at_the_lowest_active_layer():
    peaks = {}
    for groups in (("embed", "head", "norm"), ("head", "norm"), ("norm",)):
        model = build()
        optimizer = fused(model)
        config = lt.LisaConfig(1, 10, always_active=groups, seed=0)
        with Lisa(model, optimizer, config) as engine:
            peaks[groups] = peak(model, optimizer, engine=engine)
    state_of_one = 2 * 32_000 * 512 * 2
    first, second, third = peaks.values()
    assert first - second > 0.9 * state_of_one
    assert second - third > 0.9 * state_of_one


def test_checkpointing_lowers_the_peak_with_lisa():
    peaks = []
    for checkpointing in (False, True):
        model = build(num_hidden_layers=16)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        optimizer = fused(model)
        with Lisa(model, optimizer, lt.LisaConfig(2, 10, always_active=("norm",))) as engine:
            peaks.append(peak(model, optimizer, engine=engine))
    assert peaks[1] < peaks[0]


def test_eight_bit_embeddings_and_head():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    held = {}
    for groups in ((), ("embed", "head")):
        model = build()
        optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-4)
        set_eight_bit_states(optimizer, model, lt.find_layers(model), groups)
        peak(model, optimizer, steps=1)
        gc.collect()
        held[groups] = torch.cuda.memory_allocated() - size_of(model.parameters())
        del model, optimizer
    saved = 2 * 32_000 * 512 * (8 - 2 - 2 * 4 / 256)
    assert held[()] - held["embed", "head"] == pytest.approx(saved, rel=0.02)


def test_paged_states_are_not_held_by_torch():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = build()
    optimizer = bitsandbytes.optim.PagedAdamW8bit(model.parameters(), lr=1e-4)
    set_eight_bit_states(optimizer, model, lt.find_layers(model), ("layers", "embed", "head"))
    # The workspaces of matrix products stay once they are there (32 MiB each on Hopper).
    model(**batch()).loss.backward()
    optimizer.zero_grad()
    gc.collect()
    before = torch.cuda.memory_allocated()
    peak(model, optimizer, steps=1)
    gc.collect()
    # the scales, and the states of small tensors
    assert torch.cuda.memory_allocated() - before < 0.2 * size_of(model.parameters())


@pytest.mark.parametrize("policy", ["reset", "keep"])
def test_managed_memory_serves_every_draw(policy, monkeypatch):
    functional = pytest.importorskip("bitsandbytes.functional")
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    monkeypatch.setattr(paged_state, "_pool", paged_state._Pool())
    allocate, taken = functional.get_paged, []

    def counted(*shape, dtype, device):
        taken.append(dtype.itemsize * torch.Size(shape).numel())
        return allocate(*shape, dtype=dtype, device=device)

    monkeypatch.setattr(functional, "get_paged", counted)
    config = lt.LisaConfig(2, 1, always_active=(), sampling="cyclic", optimizer_state=policy)
    trained, held = [], []
    for kind in (PagedAdamW8bit, AdamW8bit):
        model = build()
        optimizer = kind(model.parameters(), lr=1e-4)
        with Lisa(model, optimizer, config) as engine:
            for step in range(12):
                engine.begin_step(step)
                model(**batch()).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                held.append(sum(taken))
        trained.append([p.detach().clone() for p in model.parameters()])
    # Every layer has had its turn after half of the steps, and memory has stopped growing.
    assert held[0] > 0
    assert held[len(held) // 4] == held[-1]
    for paged, plain in zip(*trained, strict=True):
        torch.testing.assert_close(paged, plain)


def test_logits_in_tiles_do_not_grow_with_the_vocabulary():
    from trl.trainer.utils import add_fused_lm_head

    growth = []
    for tiles in (False, True):
        peaks = []
        for vocabulary in (70_000, 140_000):
            model = build(vocab_size=vocabulary, num_hidden_layers=1)
            model.lm_head.requires_grad_(False)  # its fp32 gradient would hide the logits
            model.model.embed_tokens.requires_grad_(False)
            if tiles:
                add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
            optimizer = fused(model)
            extra = {"fused_lm_head": True} if tiles else None
            peaks.append(peak(model, optimizer, extra=extra) - size_of(model.parameters()))
            del model, optimizer
        growth.append(peaks[1] - peaks[0])
    assert growth[0] > 2 * TOKENS * 70_000 * 4
    assert growth[1] < 0.1 * growth[0]
