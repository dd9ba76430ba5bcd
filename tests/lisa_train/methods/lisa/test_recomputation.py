"""Which layers run again under gradient checkpointing, and that it changes no number."""

import pytest
import torch
from helpers_allocations import Allocations, tensors_of
from helpers_recording import arguments, examples, llama
from transformers import Trainer

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_train.methods.lisa.engine import Lisa

IDS = torch.randint(3, 64, (2, 32), generator=torch.Generator().manual_seed(0))


def one_pass(make_llama, recompute, always):
    """Gradients, peak bytes, and layers that ran again, of one pass with layers 2 and 4 of 6."""
    model = make_llama(layers=6, hidden_size=32)
    if recompute is not None:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = lt.LisaConfig(2, 1, always_active=always, seed=3, recompute=recompute or "all")
    runs = []
    with Lisa(model, optimizer, config) as engine:
        engine.begin_step(0)
        assert engine.active_layers == (2, 4)
        for i, layer in enumerate(model.model.layers):
            layer.mlp.register_forward_pre_hook(lambda *_, i=i: runs.append(i))
        with Allocations(tensors_of(model)) as seen:
            model(input_ids=IDS, labels=IDS).loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flags = {getattr(layer, "gradient_checkpointing", None) for layer in model.model.layers}
    assert flags == {recompute is not None}  # as before, once the engine is closed
    return gradients, seen.peak, sorted(runs[6:])


@pytest.mark.parametrize("always", [("embed", "head", "norm"), ("norm",)], ids=["E+H", "alone"])
def test_layers_that_train_are_spared_the_second_pass(make_llama, always):
    kept = one_pass(make_llama, None, always)
    everything = one_pass(make_llama, "all", always)
    frozen = one_pass(make_llama, "frozen", always)
    lowest = 0 if "embed" in always else 2
    assert everything[2] == list(range(lowest, 6))
    assert frozen[2] == [i for i in range(lowest, 6) if i not in (2, 4)]
    assert everything[1] < frozen[1] < kept[1]
    for gradients in (everything[0], frozen[0]):
        assert all(map(torch.equal, gradients, kept[0]))


def test_a_trainer_trains_the_same_and_every_draw_spares_its_own(tmp_path):
    weights, spared = {}, []
    for recompute in ("all", "frozen"):
        model = llama(layers=4)
        folder = tmp_path / recompute
        trainer = Trainer(
            model, arguments(folder, max_steps=4, activation_checkpointing=True),
            train_dataset=examples(),
        )  # fmt: skip
        config = lt.LisaConfig(1, 1, "cyclic", recompute=recompute)
        attached = lt.attach(trainer, lisa=config)
        step = trainer.training_step

        def training_step(
            *args, step=step, model=model, attached=attached, recompute=recompute, **kwargs
        ):
            resting = [not layer.gradient_checkpointing for layer in model.model.layers]
            if recompute == "frozen":
                spared.append((tuple(i for i, x in enumerate(resting) if x),
                               attached.active_layers()))  # fmt: skip
            else:
                assert not any(resting)
            return step(*args, **kwargs)

        trainer.training_step = training_step
        trainer.train()
        assert all(layer.gradient_checkpointing for layer in model.model.layers)
        weights[recompute] = [p.detach().clone() for p in model.parameters()]
    assert all(found == drawn for found, drawn in spared)
    assert {layer for _, (layer,) in spared} == {0, 1, 2, 3}
    assert all(map(torch.equal, weights["all"], weights["frozen"]))


def test_without_checkpointing_it_is_refused_in_words(make_llama):
    model = make_llama(layers=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = lt.LisaConfig(1, 1, recompute="frozen")
    words = "no layer of the model checkpoints: turn gradient_"
    with Lisa(model, optimizer, config) as engine, pytest.raises(ConfigError, match=words):
        engine.begin_step(0)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ConfigError, match="gradient_checkpointing is false: set it to true"):
        lt.TrainConfig("m", "d", lisa=lt.LisaConfig(recompute="frozen"))
    with pytest.raises(ConfigError, match=r"lisa.recompute is 'frozn'.*Did you mean 'frozen'"):
        lt.LisaConfig(recompute="frozn")
    with pytest.raises(ConfigError, match="no layer of the model checkpoints"):
        lt.estimate_memory(
            model.config, "lisa", sequence_length=16, lisa=lt.LisaConfig(1, recompute="frozen")
        )
