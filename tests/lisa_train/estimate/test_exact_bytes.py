"""Weights, gradients and optimizer state: to the byte those of a real step on the CPU."""

import itertools

import helpers_memory as small
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lisa_train as lt
from lisa_train.methods.adapter_heads import train_heads_whole
from lisa_train.model.master_copies import exact
from lisa_train.model.module_tree import task_type_of

LISA = lt.LisaConfig(activated_layers=2)


def optimizer_of(name, parameters):
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=1e-3)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(parameters, lr=1e-3, scale_parameter=False, relative_step=False)
    return torch.optim.AdamW(parameters, lr=1e-3, fused=name == "adamw_torch_fused")


def real_step(config, method, optim, dtype, lora=None, lisa=LISA):
    """Train one step; return bytes of weights, gradients and state, and the active layers."""
    model = small.real_model(config, dtype=dtype)
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            **{"target_modules": "all-linear", "task_type": task_type_of(model), **lora}
        )
        train_heads_whole(config, model)
        model = get_peft_model(model, config)
    optimizer = optimizer_of(optim, [p for p in model.parameters() if p.requires_grad])
    engine = lt.Lisa(model, optimizer, lisa) if method == "lisa" else None
    if engine is not None:
        engine.begin_step(0)
    batch = small.batch_for(getattr(model, "get_base_model", lambda: model)(), 2, 16)
    model(**batch).loss.backward()
    weights = small.stored((*model.parameters(), *model.buffers()))
    gradients = small.stored(p.grad for p in model.parameters() if p.grad is not None)
    optimizer.step()
    layers = engine.active_layers if engine is not None else None
    return weights, gradients, small.state_bytes(optimizer), layers


def kinds():
    """All of the first family; of the others what depends on shapes: AdamW's state, Adafactor's."""
    optims = ("adamw_torch", "adamw_torch_fused", "sgd", "adafactor")
    for optim, dtype in itertools.product(optims, (torch.float32, torch.bfloat16)):
        for method, family in itertools.product(("full", "lora", "lisa"), small.FAMILIES):
            of_shapes = optim in ("adamw_torch_fused", "adafactor") and dtype == torch.float32
            marks = () if family == "llama" or of_shapes else pytest.mark.slow
            yield pytest.param(family, method, optim, dtype, marks=marks)


@pytest.mark.parametrize(("family", "method", "optim", "dtype"), list(kinds()))
def test_bytes_are_those_of_a_real_step(family, method, optim, dtype):
    config = small.FAMILIES[family]()
    lora = {"r": 8, "fan_in_fan_out": family == "gpt2"} if method == "lora" else None
    weights, gradients, state, layers = real_step(config, method, optim, dtype, lora)
    found = lt.estimate_memory(
        config, method, dtype=str(dtype).removeprefix("torch."), optim=optim,
        batch_size=2, sequence_length=16, lora=lora or {}, active_layers=layers, lisa=LISA,
    )  # fmt: skip
    device = found.fullest
    assert (device.weights, device.gradients, device.optimizer) == (weights, gradients, state)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_worst_layers_are_not_exceeded_by_any_draw(family):
    # All layers are equal here: every draw costs the same gradients and state.
    config = small.FAMILIES[family]()
    weights, gradients, state, _ = real_step(config, "lisa", "adamw_torch_fused", torch.float32)
    device = lt.estimate_memory(config, "lisa", batch_size=2, sequence_length=16, lisa=LISA).fullest
    assert (device.weights, device.gradients, device.optimizer) == (weights, gradients, state)


@settings(max_examples=12, deadline=None)
@given(
    layers=st.integers(1, 4),
    heads=st.sampled_from([1, 2, 4]),
    vocabulary=st.integers(10, 90),
    tied=st.booleans(),
    k=st.integers(1, 4),
    always=st.sets(st.sampled_from(["embed", "head", "norm"])),
)
def test_any_llama_any_lisa(layers, heads, vocabulary, tied, k, always):
    config = small.llama(
        num_hidden_layers=layers, num_key_value_heads=heads, vocab_size=max(vocabulary, 33),
        tie_word_embeddings=tied, hidden_size=32, intermediate_size=48,
    )  # fmt: skip
    lisa = lt.LisaConfig(min(k, layers), always_active=tuple(sorted(always)), seed=k)
    model = small.real_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with lt.Lisa(model, optimizer, lisa) as engine:
        engine.begin_step(0)
        ids = torch.ones(1, 8, dtype=torch.long)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients = small.stored(p.grad for p in model.parameters() if p.grad is not None)
        optimizer.step()
        state, active = small.state_bytes(optimizer), engine.active_layers
    found = lt.estimate_memory(
        config, "lisa", sequence_length=8, lisa=lisa, active_layers=active
    ).fullest
    assert (found.gradients, found.optimizer) == (gradients, state)
    assert found.weights == small.stored((*model.parameters(), *model.buffers()))


def test_a_module_counts_like_its_configuration_and_is_left_alone():
    config = small.llama(tie_word_embeddings=True)
    model = small.real_model(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = {"sequence_length": 16, "dtype": "bfloat16", "lisa": LISA}
    found = lt.estimate_memory(model, "lisa", **options)
    assert found == lt.estimate_memory(config, "lisa", **options)
    assert all(torch.equal(p, before[n]) and p.dtype == torch.float32
               for n, p in model.named_parameters())  # fmt: skip
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("always", [lt.LisaConfig().always_active, (), ("head", "other")], ids=str)
def test_projections_outside_the_layers_count_where_they_train(always):
    lisa = lt.LisaConfig(2, always_active=always)
    weights, gradients, state, layers = real_step(
        small.opt(), "lisa", "adamw_torch", torch.float32, lisa=lisa
    )
    found = lt.estimate_memory(
        small.opt(), "lisa", dtype="float32", optim="adamw_torch", batch_size=2,
        sequence_length=16, active_layers=layers, lisa=lisa,
    ).fullest  # fmt: skip
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, state)


def test_what_is_frozen_in_a_module_stays_frozen():
    model = small.real_model(small.llama())
    model.model.embed_tokens.requires_grad_(False)
    embedding = model.model.embed_tokens.weight
    full = lt.estimate_memory(model, "full", sequence_length=16)
    everything = sum(p.numel() for p in model.parameters())
    assert full.trainable == everything - embedding.numel()


@pytest.mark.parametrize("policy", ["reset", "keep", "offload"])
def test_state_of_refrozen_layers(policy):
    config = small.llama()
    lisa = lt.LisaConfig(1, interval_steps=1, sampling="cyclic", optimizer_state=policy)
    model = small.real_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with lt.Lisa(model, optimizer, lisa) as engine:
        for step in range(8):  # every layer has had its turn
            engine.begin_step(step)
            ids = torch.ones(1, 8, dtype=torch.long)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        on_device = small.state_bytes(optimizer)
        aside = small.stored(
            value
            for held in engine._state._aside.values()
            for key, value in held.state.items()
            if torch.is_tensor(value)
        )
    found = lt.estimate_memory(config, "lisa", sequence_length=8, lisa=lisa)
    if policy == "keep":
        assert found.fullest.optimizer == on_device + aside
        assert found.host == 0
    else:
        assert (found.fullest.optimizer, found.host) == (on_device, aside)
    assert (aside > 0) == (policy != "reset")


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_active_layers_in_fp32(micro_batches):
    config = small.llama()
    lisa = lt.LisaConfig(2, precision="fp32_active")
    model = small.real_model(config, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with lt.Lisa(model, optimizer, lisa) as engine:
        engine.begin_step(0)
        ids = torch.ones(1, 8, dtype=torch.long)
        for _ in range(micro_batches):
            model(input_ids=ids, labels=ids).loss.backward()
        copies = [exact(p) for p in model.parameters() if exact(p) is not p]
        assert copies
        weights = small.stored((*model.parameters(), *model.buffers(), *copies))
        gradients = small.stored(p.grad for p in model.parameters() if p.grad is not None)
        gradients += engine._active._master_weights._sums.bytes()  # the digits of their sums
        optimizer.step()
        state, layers = small.state_bytes(optimizer), engine.active_layers
    found = lt.estimate_memory(
        config,
        "lisa",
        dtype="bfloat16",
        sequence_length=8,
        lisa=lisa,
        active_layers=layers,
        gradient_accumulation_steps=micro_batches,
    ).fullest
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, state)
