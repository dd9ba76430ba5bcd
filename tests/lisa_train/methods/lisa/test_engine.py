"""The engine in plain PyTorch loops: the algorithm, freezing, state, resume, refusals."""

import copy
import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers.optimization import Adafactor

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError, ProbabilitiesError
from lisa_analysis.plans.sampling import SamplingProbabilities
from lisa_train.methods.lisa.engine import Lisa
from lisa_train.optim.frozen_state import unwrap_optimizer


def adamw(parameters, **kwargs):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, **kwargs)


def schedule_free(parameters):
    import schedulefree

    optimizer = schedulefree.AdamWScheduleFree(parameters, lr=1e-2, weight_decay=0.1)
    optimizer.train()
    return optimizer


def eight_bit(parameters):
    import bitsandbytes

    # min_8bit_size: the test's tensors are smaller than the default threshold
    return bitsandbytes.optim.AdamW8bit(parameters, lr=1e-2, weight_decay=0.1, min_8bit_size=16)


OPTIMIZERS = {
    "adamw_foreach": lambda p: adamw(p, foreach=True),
    "adamw_fused": lambda p: adamw(p, fused=True),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda p: Adafactor(
        p, lr=1e-2, scale_parameter=False, relative_step=False, weight_decay=0.1, beta1=0.9
    ),
    "torch_adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
    "schedule_free": schedule_free,
    "adamw_8bit": eight_bit,
}

# Every optimizer with the default policy, and every policy with two quite different optimizers.
CASES = [(name, "reset") for name in OPTIMIZERS]
CASES += [
    (name, policy) for name in ("adamw_fused", "schedule_free") for policy in ("keep", "offload")
]


def batch(step, micro=0):
    generator = torch.Generator().manual_seed(1000 * step + micro)
    ids = torch.randint(3, 64, (2, 8), generator=generator)
    return {"input_ids": ids, "labels": ids}


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(before, model):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def train(model, optimizer, engine, steps, *, set_to_none=True, each=lambda step: None):
    losses = []
    for step in steps:
        if engine is not None:
            engine.begin_step(step)
        loss = model(**batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        losses.append(loss.item())
        each(step)
    return losses


def state_bytes(optimizer):
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    )


# ---------------------------------------------------------------------- the algorithm


def test_exactly_the_drawn_layers_and_the_always_active_groups_train(make_llama):
    model = make_llama()
    optimizer = adamw(model.parameters())
    draws = []
    config = lt.LisaConfig(activated_layers=2, interval_steps=5)
    with Lisa(model, optimizer, config, on_draw=draws.append) as engine:
        for step in range(23):
            before = snapshot(model)
            train(model, optimizer, engine, [step])
            expected = {n for i in engine.active_layers for n in engine.layer_map.layers[i]}
            for group in ("embed", "head", "norm"):
                expected |= set(engine.layer_map.groups[group])
            assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
            assert changed(before, model) == expected
        visits = engine.visits
    assert [draw.step for draw in draws] == [0, 5, 10, 15, 20]
    assert [draw.index for draw in draws] == [0, 1, 2, 3, 4]
    assert all(len(draw.layers) == 2 for draw in draws)
    counted = np.bincount([i for draw in draws for i in draw.layers], minlength=8)
    np.testing.assert_array_equal(visits, counted)
    np.testing.assert_array_equal(draws[-1].visits, counted)
    assert draws[0].inclusion_probabilities == (0.25,) * 8


def test_the_layers_ever_active_are_the_layers_ever_changed(make_llama):
    model = make_llama()
    optimizer = adamw(model.parameters())
    before, ever = snapshot(model), set()
    config = lt.LisaConfig(activated_layers=1, interval_steps=2, always_active=())
    with Lisa(model, optimizer, config) as engine:
        train(model, optimizer, engine, range(10), each=lambda _: ever.update(engine.active_layers))
        moved = changed(before, model)
        assert moved == {name for i in ever for name in engine.layer_map.layers[i]}
    assert 1 < len(ever) < 8


def test_the_published_bernoulli_version_varies_in_size(make_llama):
    model = make_llama()
    config = lt.LisaConfig(activated_layers=2, interval_steps=1, sampling="bernoulli")
    sizes = set()
    with Lisa(model, adamw(model.parameters()), config) as engine:
        for step in range(40):
            engine.begin_step(step)
            sizes.add(len(engine.active_layers))
    assert 0 in sizes
    assert len(sizes) >= 4


@pytest.mark.parametrize(
    "settings",
    [{"embed_probability": 1.0}, {"activated_layers": 3}, {"probabilities": (1, 0.5, 0.5)}],
)
def test_bernoulli_needs_no_group_where_something_always_trains(make_llama, settings):
    model = make_llama(layers=3)
    optimizer = adamw(model.parameters())
    settings = {"activated_layers": 2, **settings}
    config = lt.LisaConfig(interval_steps=1, sampling="bernoulli", always_active=(), **settings)
    with Lisa(model, optimizer, config) as engine:
        assert all(np.isfinite(train(model, optimizer, engine, range(8))))


def test_bernoulli_without_any_certain_unit_is_refused(make_llama):
    model = make_llama(layers=3)
    config = lt.LisaConfig(2, 1, "bernoulli", always_active=(), embed_probability=0.9)
    with pytest.raises(ConfigError, match="draws no layer at all"):
        Lisa(model, adamw(model.parameters()), config)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_layers_active_and_state_kept_is_full_fine_tuning_bit_for_bit(make_llama, name):
    full, rotated = make_llama(layers=3), make_llama(layers=3)
    plain = OPTIMIZERS[name](full.parameters())
    engaged = OPTIMIZERS[name](rotated.parameters())
    config = lt.LisaConfig(activated_layers=3, interval_steps=2, optimizer_state="keep")
    with Lisa(rotated, engaged, config) as engine:
        assert train(full, plain, None, range(7)) == train(rotated, engaged, engine, range(7))
    assert changed(snapshot(full), rotated) == set()


def test_gradient_accumulation_draws_between_optimizer_steps_only(make_llama):
    model, reference = make_llama(), make_llama()
    optimizer, plain = adamw(model.parameters()), adamw(reference.parameters())
    config = lt.LisaConfig(activated_layers=1, interval_steps=1)
    with Lisa(model, optimizer, config) as engine:
        for step in range(4):
            seen = set()
            engine.begin_step(step)
            for micro in range(3):
                engine.begin_step(step)  # a loop that calls it for every micro-batch
                (model(**batch(step, micro)).loss / 3).backward()
                seen.add(engine.active_layers)
            optimizer.step()
            optimizer.zero_grad()
            assert len(seen) == 1
            # the same steps by hand: gradients of everything, then drop those of frozen tensors
            for micro in range(3):
                (reference(**batch(step, micro)).loss / 3).backward()
            frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
            for parameter in (dict(reference.named_parameters())[n] for n in frozen):
                parameter.grad = None
                plain.state.pop(parameter, None)
            plain.step()
            plain.zero_grad()
            assert changed(snapshot(reference), model) == set()


# ---------------------------------------------------------------------- frozen means frozen


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize(("name", "policy"), CASES)
def test_frozen_layers_are_bit_identical_over_their_period(make_llama, name, set_to_none, policy):
    model = make_llama(layers=4)
    optimizer = OPTIMIZERS[name](model.parameters())
    config = lt.LisaConfig(activated_layers=1, interval_steps=3, optimizer_state=policy)
    refrozen, seen, held = 0, set(), {}
    with Lisa(model, optimizer, config) as engine:
        for step in range(18):
            engine.begin_step(step)
            if step % 3 == 0:
                held = {
                    n: p.detach().clone()
                    for n, p in model.named_parameters()
                    if not p.requires_grad
                }
                refrozen += len({engine.layer_map.layer_of(n) for n in held} & seen)
                seen.update(engine.active_layers)
            assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
            if not set_to_none:  # a loop that hands every tensor a gradient of zeros
                for parameter in model.parameters():
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
            train(model, optimizer, None, [step], set_to_none=set_to_none)
            if name == "schedule_free":
                optimizer.eval()  # moves every tensor that has state, in place
                optimizer.train()
            now = dict(model.named_parameters())
            assert all(torch.equal(now[n], value) for n, value in held.items())
    assert refrozen > 3


# ---------------------------------------------------------------------- optimizer state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reset_leaves_state_on_exactly_the_active_tensors(make_llama, name, tmp_path):
    model = make_llama(layers=8)
    optimizer = OPTIMIZERS[name](model.parameters())
    config = lt.LisaConfig(activated_layers=1, interval_steps=2)
    measured, last = {}, 200

    def measure(step):
        if step + 1 not in (2, last):
            return
        holders = {p for p, state in optimizer.state.items() if state}
        active = {p for p in model.parameters() if p.requires_grad}
        assert holders == active
        gradients = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
        file = tmp_path / "optimizer.pt"
        torch.save(optimizer.state_dict(), file)
        assert len(torch.load(file, weights_only=False)["state"]) == len(active)
        measured[step + 1] = (state_bytes(optimizer), gradients, file.stat().st_size)

    with Lisa(model, optimizer, config) as engine:
        train(model, optimizer, engine, range(last), set_to_none=False, each=measure)
    assert measured[2][:2] == measured[last][:2]
    # the file's size varies by the digits of its offsets and counters
    assert abs(measured[2][2] - measured[last][2]) < 0.02 * measured[2][2]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_kept_and_offloaded_state_returns_with_its_layer(make_llama, name):
    runs = []
    for policy in ("keep", "offload"):
        model = make_llama(layers=3)
        optimizer = OPTIMIZERS[name](model.parameters())
        config = lt.LisaConfig(
            activated_layers=1, interval_steps=2, optimizer_state=policy, sampling="cyclic"
        )
        left = {}
        with Lisa(model, optimizer, config) as engine:
            for step in range(12):
                was = engine.active_layers
                states = {
                    n: copy.deepcopy(optimizer.state[p])
                    for i in was
                    for n, p in engine.layer_map.parameters(model, i)
                }
                engine.begin_step(step)
                if engine.active_layers != was:
                    left.update(states)
                    for i in engine.active_layers:
                        for n, p in engine.layer_map.parameters(model, i):
                            if n in left:
                                assert_same_state(optimizer.state[p], left[n])
                train(model, optimizer, None, [step])
            assert len(optimizer.state_dict()["state"]) == sum(1 for _ in model.parameters())
        runs.append(model)
    assert changed(snapshot(runs[0]), runs[1]) == set()


def assert_same_state(state, expected):
    assert state.keys() == expected.keys()
    for key, value in state.items():
        if isinstance(value, dict):  # as bitsandbytes packs it for saving
            assert_same_state(value, expected[key])
        elif torch.is_tensor(value):
            assert torch.equal(value, expected[key]), key
        else:
            assert value == expected[key], key


def test_keeping_state_differs_from_resetting_it(make_llama):
    models = {}
    for policy in ("keep", "reset"):
        models[policy] = model = make_llama(layers=2)
        optimizer = adamw(model.parameters())
        config = lt.LisaConfig(1, 2, sampling="cyclic", optimizer_state=policy)
        with Lisa(model, optimizer, config) as engine:
            train(model, optimizer, engine, range(8))
    assert changed(snapshot(models["keep"]), models["reset"])


def test_after_closing_kept_state_is_back_in_a_plain_optimizer(make_llama):
    model = make_llama(layers=3)
    optimizer = adamw(model.parameters())
    with Lisa(model, optimizer, lt.LisaConfig(1, 1, "cyclic", optimizer_state="keep")) as engine:
        train(model, optimizer, engine, range(3))
    assert {p for p, s in optimizer.state.items() if s} == set(model.parameters())
    before = snapshot(model)
    train(model, optimizer, None, [3])
    assert changed(before, model) == set(before)


def test_a_late_layer_of_a_schedule_free_optimizer_starts_with_a_step_of_adams_size(make_llama):
    model = make_llama(layers=4)
    optimizer = schedule_free(model.parameters())
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    config = lt.LisaConfig(1, 100, sampling="cyclic")
    with Lisa(model, optimizer, config) as engine:
        train(model, optimizer, engine, range(101))
        steps = [
            (optimizer.state[p]["z"] - p).abs().median().item() / 1e-2
            for _, p in engine.layer_map.parameters(model, engine.active_layers[0])
        ]
    # z moves by lr in the first step of any Adam; y follows by 1 − β₁ of it
    assert max(steps) < 1.0
    assert min(steps) > 0.5


# ---------------------------------------------------------------------- warm-up


def test_warmup_shortens_the_first_updates_of_a_layer_after_each_activation(make_llama):
    model, plain = make_llama(layers=2), make_llama(layers=2)
    optimizer, other = adamw(model.parameters()), adamw(plain.parameters())
    config = lt.LisaConfig(1, 4, "cyclic", warmup_steps=2, always_active=("head",))
    unheated = lt.LisaConfig(1, 4, "cyclic", warmup_steps=0, always_active=("head",))
    with Lisa(model, optimizer, config) as engine, Lisa(plain, other, unheated) as reference:
        for step in range(16):
            plain.load_state_dict(model.state_dict())
            before = snapshot(model)
            train(model, optimizer, engine, [step])
            # the same step without warm-up, from the same weights and moments
            train(plain, other, reference, [step])
            factor = {0: 1 / 3, 1: 2 / 3}.get(step % 4, 1.0)
            full = dict(plain.named_parameters())
            for name, p in model.named_parameters():
                scale = factor if engine.layer_map.layer_of(name) is not None else 1.0
                expected = before[name] + scale * (full[name] - before[name])
                torch.testing.assert_close(p, expected, rtol=0, atol=5e-7)


def test_warmup_is_refused_where_the_optimizer_averages_its_weights(make_llama):
    model = make_llama(layers=2)
    with pytest.raises(ConfigError, match=r"warmup_steps is 3.*AdamWScheduleFree"):
        Lisa(model, schedule_free(model.parameters()), lt.LisaConfig(1, 4, warmup_steps=3))


# ---------------------------------------------------------------------- always-active groups


@pytest.mark.parametrize(
    "groups", [(), ("embed",), ("head",), ("norm",), ("head", "norm"), ("embed", "head", "norm")]
)
def test_any_subset_of_the_groups_trains_and_nothing_else(make_llama, groups):
    model = make_llama(layers=4)
    optimizer = adamw(model.parameters())
    before = snapshot(model)
    with Lisa(model, optimizer, lt.LisaConfig(1, 3, always_active=groups)) as engine:
        train(model, optimizer, engine, range(3))
        expected = {n for g in groups for n in engine.layer_map.groups[g]}
        expected |= set(engine.layer_map.layers[engine.active_layers[0]])
    assert changed(before, model) == expected


def test_embeddings_and_head_can_be_drawn_like_layers(make_llama):
    model = make_llama(layers=4)
    optimizer = adamw(model.parameters())
    config = lt.LisaConfig(
        1, 1, always_active=("norm",), embed_probability=0.3, head_probability=0.7
    )
    counts = {"embed": 0, "head": 0}
    draws = 800
    with Lisa(model, optimizer, config) as engine:
        for step in range(draws):
            engine.begin_step(step)
            for group in counts:
                active = group in engine.active_groups
                counts[group] += active
                for p in engine.layer_map.units(model)[group]:
                    assert p.requires_grad == active
    for group, probability in (("embed", 0.3), ("head", 0.7)):
        error = np.sqrt(probability * (1 - probability) / draws)
        assert abs(counts[group] / draws - probability) < 4 * error


@pytest.mark.parametrize("groups", [("embed",), ("head",), ("embed", "head")])
def test_tied_embeddings_are_one_tensor_with_one_state(make_llama, groups, tmp_path):
    model = make_llama(layers=3, tie_word_embeddings=True)
    optimizer = adamw(model.parameters())
    before = snapshot(model)
    with Lisa(model, optimizer, lt.LisaConfig(1, 2, always_active=groups)) as engine:
        train(model, optimizer, engine, range(4))
        assert engine.layer_map.tied == {"lm_head.weight": "model.embed_tokens.weight"}
        model.save_pretrained(tmp_path)
        assert len(optimizer.state) == 1 + 9
    assert "model.embed_tokens.weight" in changed(before, model)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    torch.testing.assert_close(loaded.lm_head.weight, model.lm_head.weight, rtol=0, atol=0)


def test_a_tied_head_has_no_probability_of_its_own(make_llama):
    model = make_llama(layers=3, tie_word_embeddings=True)
    config = lt.LisaConfig(1, 2, always_active=("norm",), head_probability=0.5)
    with pytest.raises(ConfigError, match=r"0\.5.*tied.*embed_probability"):
        Lisa(model, adamw(model.parameters()), config)


# ---------------------------------------------------------------------- backward length


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("embed", [False, True])
def test_without_embeddings_backward_stops_at_the_lowest_active_layer(
    make_llama, checkpointing, embed
):
    model = make_llama(layers=6)
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable()
        assert model._require_grads_hooks
    groups = ("embed", "head", "norm") if embed else ("head", "norm")
    optimizer = adamw(model.parameters())
    visited = set()

    def watch(i, output):
        if output.requires_grad:
            output.register_hook(lambda _: visited.add(i))

    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *args, i=i: watch(i, args[-1]))
    before = snapshot(model)
    with Lisa(model, optimizer, lt.LisaConfig(2, 1, always_active=groups)) as engine:
        for step in range(8):
            visited.clear()
            train(model, optimizer, engine, [step])
            lowest = 0 if embed else min(engine.active_layers)
            assert visited == set(range(lowest, 6))
            assert changed(before, model) >= set(engine.layer_map.layers[engine.active_layers[0]])
    if checkpointing:
        assert model._require_grads_hooks  # as it was found


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_weight(make_llama, reentrant):
    plain, saving = make_llama(), make_llama()
    # the reentrant kind trains nothing below an input without gradient: it keeps its hooks
    saving.activation_checkpointing_enable({"use_reentrant": reentrant})
    for model in (plain, saving):
        model.train()
        optimizer = adamw(model.parameters())
        with Lisa(model, optimizer, lt.LisaConfig(2, 2, always_active=("norm",))) as engine:
            train(model, optimizer, engine, range(6))
    assert changed(snapshot(plain), saving) == set()


@pytest.mark.parametrize(
    ("reentrant", "groups", "warned"),
    [(True, (), True), (True, ("embed",), False), (False, (), False)],
)
def test_reentrant_checkpointing_that_visits_all_layers_is_announced_once(
    make_llama, caplog, reentrant, groups, warned
):
    model = make_llama(layers=3)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    optimizer = adamw(model.parameters())
    config = lt.LisaConfig(1, 1, always_active=groups)
    with caplog.at_level(logging.WARNING), Lisa(model, optimizer, config) as engine:
        train(model, optimizer, engine, range(3))
    assert caplog.text.count("through all layers") == int(warned)
    assert ("use_reentrant to False" in caplog.text) == warned


# ---------------------------------------------------------------------- probabilities files


def write_probabilities(path, names, pi):
    document = SamplingProbabilities(
        model="test", layer_names=tuple(names), activated_layers=round(sum(pi)),
        inclusion_probabilities=tuple(pi), scores=tuple(pi), metric="test", gamma=1.0, mix=0.0,
        floor=0.0, cap=4.0, n_eff=None, source_runs=(), verdict="test", created="2026-11-23",
    )  # fmt: skip
    return str(document.save(path))


def test_a_probabilities_file_alone_is_obeyed(make_llama, tmp_path):
    model = make_llama(layers=4)
    pi = (1.0, 0.6, 0.3, 0.1)
    file = write_probabilities(tmp_path / "p.json", [f"model.layers.{i}" for i in range(4)], pi)
    draws = 4000
    config = lt.LisaConfig(2, 1, probabilities=file)
    with Lisa(model, adamw(model.parameters()), config, seed=1) as engine:
        np.testing.assert_allclose(engine.inclusion_probabilities, pi)
        for step in range(draws):
            engine.begin_step(step)
        error = np.sqrt(np.array(pi) * (1 - np.array(pi)) / draws)
        assert (np.abs(engine.visits / draws - pi) <= 4 * error).all()


def test_a_file_of_another_model_or_number_is_refused_naming_both(make_llama, tmp_path):
    model = make_llama(layers=4)
    optimizer = adamw(model.parameters())
    names = [f"model.layers.{i}" for i in range(5)]
    other = write_probabilities(tmp_path / "a.json", names, [0.4] * 5)
    with pytest.raises(ProbabilitiesError, match="made for 5 layers, this model has 4"):
        Lisa(model, optimizer, lt.LisaConfig(2, probabilities=other))
    renamed = write_probabilities(tmp_path / "b.json", [f"h.{i}" for i in range(4)], [0.5] * 4)
    with pytest.raises(ProbabilitiesError, match=r"h\.0 against model\.layers\.0"):
        Lisa(model, optimizer, lt.LisaConfig(2, probabilities=renamed))
    fitting = write_probabilities(tmp_path / "c.json", names[:4], [0.5] * 4)
    with pytest.raises(ProbabilitiesError, match="activates 2 layers, but activated_layers is 1"):
        Lisa(model, optimizer, lt.LisaConfig(1, probabilities=fitting))


# ---------------------------------------------------------------------- resume


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_a_run_resumed_inside_a_period_is_bit_identical(make_llama, name, policy, tmp_path):
    config = lt.LisaConfig(
        1, 4, "balanced", optimizer_state=policy, warmup_steps=0 if name == "schedule_free" else 2
    )
    model = make_llama(layers=4)
    optimizer = OPTIMIZERS[name](model.parameters())
    with Lisa(model, optimizer, config, seed=5) as engine:
        train(model, optimizer, engine, range(10))
        saved = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "engine": json.loads(json.dumps(engine.state_dict())),
        }
        torch.save(saved, tmp_path / "checkpoint.pt")
        losses = train(model, optimizer, engine, range(10, 21))
        visits, final = engine.visits, copy.deepcopy(optimizer.state_dict()["state"])
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    again = make_llama(layers=4, seed=9)
    again.load_state_dict(saved["model"])
    resumed = OPTIMIZERS[name](again.parameters())
    with Lisa(again, resumed, config, seed=5) as engine:
        engine.load_state_dict(saved["engine"])
        resumed.load_state_dict(saved["optimizer"])
        assert train(again, resumed, engine, range(10, 21)) == losses
        np.testing.assert_array_equal(engine.visits, visits)
        assert changed(snapshot(model), again) == set()
        states = resumed.state_dict()["state"]
        assert states.keys() == final.keys()
        for position, state in states.items():
            assert_same_state(state, final[position])


@pytest.mark.parametrize("first", ["optimizer", "engine"])
@pytest.mark.parametrize("policy", ["reset", "keep", "offload"])
def test_going_back_to_a_checkpoint_in_a_running_engine_is_exact(make_llama, policy, first):
    model = make_llama(layers=6)
    optimizer = adamw(model.parameters())
    config = lt.LisaConfig(1, 4, "cyclic", optimizer_state=policy)
    with Lisa(model, optimizer, config) as engine:
        train(model, optimizer, engine, range(6))  # in the middle of the second interval
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), engine.state_dict()))
        losses = train(model, optimizer, engine, range(6, 14))  # ends in the fourth
        final = snapshot(model)
        model.load_state_dict(saved[0])
        loads = [(optimizer, saved[1]), (engine, saved[2])]
        for target, state in loads if first == "optimizer" else loads[::-1]:
            target.load_state_dict(state)
        assert train(model, optimizer, engine, range(6, 14)) == losses
        assert changed(final, model) == set()
        frozen = [p for p in model.parameters() if not p.requires_grad]
        assert not any(optimizer.state.get(p) for p in frozen)


def test_a_run_that_starts_late_without_saved_state_trains_the_layers_of_its_interval(make_llama):
    model = make_llama()
    config = lt.LisaConfig(2, 10)
    with Lisa(model, adamw(model.parameters()), config, seed=3) as engine:
        engine.begin_step(15)
        late = engine.active_layers
    with Lisa(model, adamw(model.parameters()), config, seed=3) as engine:
        for step in range(16):
            engine.begin_step(step)
        assert engine.active_layers == late


def test_saved_state_of_other_settings_is_refused_with_the_numbers(make_llama):
    model = make_llama(layers=4)
    engine = Lisa(model, adamw(model.parameters()), lt.LisaConfig(1, 5))
    engine.begin_step(0)
    state = engine.state_dict()
    engine.close()
    other = Lisa(model, adamw(model.parameters()), lt.LisaConfig(1, 6))
    with pytest.raises(ConfigError, match="interval_steps = 5, this run 6"):
        other.load_state_dict(state)
    other.close()
    bigger = make_llama(layers=5)
    with (
        Lisa(bigger, adamw(bigger.parameters()), lt.LisaConfig(1, 5)) as engine,
        pytest.raises(ConfigError, match=r"of 4 layers .* has 5"),
    ):
        engine.load_state_dict(state)


OTHER_SETTINGS = [
    ({"always_active": ("norm",)}, "always_active"),
    ({"optimizer_state": "keep"}, "optimizer_state = 'reset', this run 'keep'"),
    ({"warmup_steps": 3}, "warmup_steps = 0, this run 3"),
    ({"precision": "fp32_active"}, "precision = 'model', this run 'fp32_active'"),
    ({"always_active": ("head", "norm"), "embed_probability": 0.5}, "always_active"),
]


@pytest.mark.parametrize(("changes", "words"), OTHER_SETTINGS)
def test_settings_that_would_change_the_run_are_refused_on_resuming(make_llama, changes, words):
    model = make_llama(layers=4).to(torch.bfloat16)
    with Lisa(model, adamw(model.parameters()), lt.LisaConfig(1, 5)) as engine:
        engine.begin_step(0)
        state = json.loads(json.dumps(engine.state_dict()))
    with Lisa(model, adamw(model.parameters()), lt.LisaConfig(1, 5, **changes)) as other:
        with pytest.raises(ConfigError, match=words):
            other.load_state_dict(state)
        del state["settings"]  # states that were saved before this was noted
        other.load_state_dict(state)
        assert other.active_layers == engine.active_layers


def test_another_probability_of_the_embeddings_is_refused_on_resuming(make_llama):
    model, groups = make_llama(layers=4), ("head", "norm")
    configs = [lt.LisaConfig(1, 5, always_active=groups, embed_probability=p) for p in (0.25, 0.5)]
    with Lisa(model, adamw(model.parameters()), configs[0]) as engine:
        engine.begin_step(0)
        state = engine.state_dict()
    with (
        Lisa(model, adamw(model.parameters()), configs[1]) as other,
        pytest.raises(ConfigError, match=r"embed_probability = 0.25, this run 0.5"),
    ):
        other.load_state_dict(state)


def test_a_loop_that_forgets_begin_step_is_told(make_llama):
    model = make_llama(layers=3)
    optimizer = adamw(model.parameters())
    with Lisa(model, optimizer, lt.LisaConfig(1)), pytest.raises(ConfigError, match="begin_step"):
        train(model, optimizer, None, [0])


def test_steps_that_begin_anew_with_an_epoch_are_refused(make_llama):
    """The draws of the first epoch would be made again, and the other layers never train."""
    model = make_llama(layers=6)
    optimizer = adamw(model.parameters())
    with Lisa(model, optimizer, lt.LisaConfig(1, interval_steps=3)) as engine:
        for step in range(4):
            engine.begin_step(step)
        state = engine.state_dict()
        for step in (4, 5, 6):
            engine.begin_step(step)
        with pytest.raises(ConfigError, match=r"begin_step\(0\) after begin_step\(6\)"):
            engine.begin_step(0)
        engine.load_state_dict(state)  # back to an earlier state, on purpose
        engine.begin_step(3)
        assert engine.active_layers


# ---------------------------------------------------------------------- seeds and coverage


def test_the_training_seed_changes_the_schedule_and_a_fixed_one_does_not(make_llama):
    model = make_llama()

    def schedule(config, seed):
        with Lisa(model, adamw(model.parameters()), config, seed=seed) as engine:
            drawn = []
            for step in range(12):
                engine.begin_step(step)
                drawn.append(engine.active_layers)
            return drawn

    free, fixed = lt.LisaConfig(2, 1), lt.LisaConfig(2, 1, seed=7)
    assert schedule(free, 1) == schedule(free, 1) != schedule(free, 2)
    assert schedule(fixed, 1) == schedule(fixed, 2) == schedule(free, 7)


def test_no_random_stream_of_torch_is_read_or_advanced(make_llama):
    model = make_llama()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    config = lt.LisaConfig(2, 1, always_active=("norm",), embed_probability=0.5)
    with Lisa(model, adamw(model.parameters()), config) as engine:
        for step in range(5):
            engine.begin_step(step)
    assert torch.equal(torch.rand(3), expected)


def test_layers_that_the_schedule_never_reaches_are_announced_before_training(make_llama, caplog):
    model = make_llama()
    with caplog.at_level(logging.INFO, logger="lisa_train"):
        config = lt.LisaConfig(1, 10)
        with Lisa(model, adamw(model.parameters()), config, total_steps=35) as engine:
            announced = caplog.records[0].getMessage()
            assert caplog.records[0].levelno == logging.WARNING
            drawn = set()
            for step in range(35):
                engine.begin_step(step)
                drawn.update(engine.active_layers)
    missing = sorted(set(range(8)) - drawn)
    assert f"{len(missing)} of 8 layers ({', '.join(map(str, missing))}) will never" in announced
    assert f"{len(drawn)} of 8 layers visited so far" in caplog.records[-1].getMessage()
    caplog.clear()
    with Lisa(model, adamw(model.parameters()), lt.LisaConfig(1, 1, "cyclic"), total_steps=8):
        assert not caplog.records


# ---------------------------------------------------------------------- flags and refusals


def test_flags_are_restored_after_an_exception_and_frozen_stays_frozen(make_llama):
    model = make_llama()
    model.model.norm.weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    norm = model.model.norm.weight.detach().clone()
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])

    def interrupt(step):
        assert torch.equal(model.model.norm.weight, norm)
        raise RuntimeError

    with pytest.raises(RuntimeError), Lisa(model, optimizer, lt.LisaConfig(1, 1)) as engine:
        train(model, optimizer, engine, range(3), each=interrupt)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    with pytest.raises(ConfigError, match="closed"):
        engine.begin_step(3)


def test_an_optimizer_that_lacks_layers_is_an_error_and_leaves_the_model_alone(make_llama):
    model = make_llama()
    some = [*model.model.embed_tokens.parameters(), *model.lm_head.parameters()]
    with pytest.raises(ConfigError, match=r"lacks 73 of the 75 tensors.*model\.layers\.0"):
        Lisa(model, adamw(some), lt.LisaConfig())
    assert all(p.requires_grad for p in model.parameters())
    optimizer = adamw(model.parameters())
    optimizer.param_groups.append(dict(optimizer.param_groups[0], params=[some[0]]))
    with pytest.raises(ConfigError, match="1 tensors are in more than one parameter group"):
        Lisa(model, optimizer, lt.LisaConfig())


def test_a_second_engine_is_refused_until_the_first_is_closed(make_llama):
    model = make_llama(layers=3)
    optimizer = adamw(model.parameters())
    first = Lisa(model, optimizer, lt.LisaConfig(1))
    first.begin_step(0)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ConfigError, match=r"another LISA engine is open .*engine\.close"):
        Lisa(model, adamw(model.parameters()), lt.LisaConfig(2))
    with pytest.raises(ConfigError, match="another LISA engine"):
        Lisa(model, optimizer, lt.LisaConfig(1))
    assert [p.requires_grad for p in model.parameters()] == flags
    with Lisa(other := make_llama(layers=3), adamw(other.parameters()), lt.LisaConfig(1)):
        first.close()
    with Lisa(model, optimizer, lt.LisaConfig(1)) as second:
        assert train(model, optimizer, second, [0])


def test_an_engine_that_nobody_holds_any_more_is_no_obstacle(make_llama):
    model = make_llama(layers=3)
    Lisa(model, adamw(model.parameters()), lt.LisaConfig(1))
    with Lisa(model, adamw(model.parameters()), lt.LisaConfig(1)) as engine:
        engine.begin_step(0)


def test_something_that_is_no_torch_optimizer_is_refused(make_llama):
    with pytest.raises(ConfigError, match=r"torch\.optim\.Optimizer.*got object"):
        Lisa(make_llama(layers=2), object(), lt.LisaConfig(1))


def test_tensors_that_never_train_need_not_be_in_the_optimizer(make_llama):
    model = make_llama()
    layers = adamw(model.model.layers.parameters())
    with Lisa(model, layers, lt.LisaConfig(1, 1, always_active=())) as engine:
        train(model, layers, engine, range(2))


def test_numbers_that_do_not_fit_the_model_are_refused(make_llama):
    model = make_llama(layers=4)
    optimizer = adamw(model.parameters())
    with pytest.raises(ConfigError, match="activated_layers is 5, but the model has 4 layers"):
        Lisa(model, optimizer, lt.LisaConfig(activated_layers=5))
    with pytest.raises(ProbabilitiesError, match=r"3 inclusion probabilities .* 4 layers"):
        Lisa(model, optimizer, lt.LisaConfig(2, probabilities=(0.5, 0.5, 1.0)))
    with pytest.raises(ConfigError, match="bernoulli"):
        Lisa(model, optimizer, lt.LisaConfig(2, sampling="bernoulli", always_active=()))
    model.model.layers[2].requires_grad_(False)
    with pytest.raises(ConfigError, match=r"model\.layers\.2 has no parameter"):
        Lisa(model, optimizer, lt.LisaConfig(2))


# 2026-11-23: peft asks for a property that transformers 5.23 renamed
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_and_quantized_weights_are_refused_in_words(make_llama):
    import peft

    adapted = peft.get_peft_model(make_llama(layers=2), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match=r"PEFT adapters.*lora_A.*merge_and_unload"):
        Lisa(adapted, adamw(adapted.parameters()), lt.LisaConfig(1))
    packed = make_llama(layers=2)
    weight = torch.zeros(8, 1, dtype=torch.uint8)
    packed.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ConfigError, match=r"quantized .*up_proj"):
        Lisa(packed, adamw([p for p in packed.parameters() if p.requires_grad]), lt.LisaConfig(1))


def test_the_engine_knows_no_trainer():
    code = "import sys, lisa_train.lisa; print({'transformers', 'peft', 'trl'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_wrapped_optimizers_are_looked_into(make_llama):
    from accelerate import Accelerator

    model = make_llama(layers=3)
    inner = adamw(model.parameters())
    wrapped = Accelerator(cpu=True).prepare(inner)
    assert unwrap_optimizer(wrapped) is inner
    with Lisa(model, wrapped, lt.LisaConfig(1, 1)) as engine:
        train(model, wrapped, engine, range(3))
        assert len(inner.state) == 3 + 9
