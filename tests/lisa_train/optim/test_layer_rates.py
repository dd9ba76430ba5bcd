"""Learning rates by layer: groups split by a file, in a loop and in Trainer, for every method."""

import json

import pytest
import torch
from helpers_recording import arguments, examples, llama
from transformers import Trainer

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_train.optim.layer_rates import set_layer_rates

LAYERS, RATES = 4, (2.0, 0.5, 1.0, 0.0)


@pytest.fixture
def file(tmp_path):
    multipliers = {str(i): rate for i, rate in enumerate(RATES)} | {"head": 3.0}
    path = tmp_path / "lr.json"
    path.write_text(json.dumps({"schema": "lr-multipliers/1", "multipliers": multipliers}))
    return path


def expected(name):
    for i, rate in enumerate(RATES):
        if f"layers.{i}." in name:
            return rate
    return 3.0 if "lm_head" in name else 1.0


def rates_of(optimizer, model):
    names = {p: n for n, p in model.named_parameters()}
    return {
        names[p]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_every_tensor_has_the_rate_of_its_layer_and_keeps_the_rest(file):
    model = llama(layers=LAYERS)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=0.2,
    )
    set_layer_rates(optimizer, model, lt.find_layers(model), file)
    found = rates_of(optimizer, model)
    shapes = {n: p.ndim for n, p in model.named_parameters()}
    assert found == {
        n: (0.2 * expected(n), 0.1 if ndim == 2 else 0.0) for n, ndim in shapes.items()
    }
    assert optimizer.param_groups[0]["lr"] == 0.2  # what a scheduler reports


def test_groups_alone_are_of_any_model(tmp_path):
    path = tmp_path / "head.json"
    path.write_text('{"schema": "lr-multipliers/1", "multipliers": {"head": 30, "embed": 0}}')
    for layers in (2, 5):
        model = llama(layers=layers)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.2)
        set_layer_rates(optimizer, model, lt.find_layers(model), path)
        found = {name: rate for name, (rate, _) in rates_of(optimizer, model).items()}
        groups = {"lm_head.weight": 0.2 * 30, "model.embed_tokens.weight": 0.0}
        assert found == {name: groups.get(name, 0.2) for name, _ in model.named_parameters()}


def test_a_group_that_the_model_does_not_have_is_refused(tmp_path):
    path = tmp_path / "head.json"
    path.write_text('{"schema": "lr-multipliers/1", "multipliers": {"head": 30}}')
    model = llama(layers=2, tied=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.2)
    with pytest.raises(ConfigError, match="its head is tied to the embeddings, as 'embed'"):
        set_layer_rates(optimizer, model, lt.find_layers(model), path)


@pytest.mark.parametrize("method", ["full", "lisa", "lora"])
def test_in_trainer_under_a_schedule(file, tmp_path, method):
    model = llama(layers=LAYERS)
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    trainer = Trainer(
        model,
        arguments(tmp_path / "out", max_steps=4, learning_rate=1e-2, lr_scheduler_type="linear"),
        train_dataset=examples(16),
    )
    lisa = lt.LisaConfig(2, 1) if method == "lisa" else None
    lt.attach(trainer, lisa=lisa, lr_multipliers=str(file))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    seen = []
    step = trainer.training_step

    def watched(*args, **kwargs):
        seen.append(rates_of(trainer.optimizer.optimizer, model))
        return step(*args, **kwargs)

    trainer.training_step = watched
    trainer.train()
    for n, found in enumerate(seen):
        for name, (rate, _) in found.items():
            assert rate == pytest.approx(1e-2 * (4 - n) / 4 * expected(name)), name
    for name, parameter in model.named_parameters():
        if "layers.3." in name:
            assert torch.equal(parameter, before[name])


def test_what_does_not_fit_is_refused(file, tmp_path):
    model = llama(layers=LAYERS)
    layers = lt.find_layers(model)
    other = llama(layers=3)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="made for 4 layers"):
        set_layer_rates(optimizer, other, lt.find_layers(other), file)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(ConfigError, match="has made steps or has a scheduler"):
        set_layer_rates(optimizer, model, layers, file)
    trainer = Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=examples(8))
    with pytest.raises(ConfigError, match="does not exist"):
        lt.attach(trainer, lr_multipliers=str(tmp_path / "none.json"))
