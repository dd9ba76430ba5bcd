"""What LISA does with tensors outside the stack, layers that share weights, and LayerDrop."""

import logging

import helpers_architectures as known
import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_train.methods.lisa.config import ALWAYS_ACTIVE_GROUPS
from lisa_train.methods.lisa.engine import Lisa
from lisa_train.methods.select.choice import choose
from lisa_train.model.master_copies import exact
from lisa_train.model.towers import sense_towers


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def train(model, optimizer, engine, steps, inputs, **arguments):
    losses = []
    for step in steps:
        torch.manual_seed(step)  # dropout
        np.random.seed(step)  # noqa: NPY002  (masks of the speech models)
        if engine is not None:
            engine.begin_step(step)
        loss = model(**inputs, **arguments)
        loss = getattr(loss, "loss", loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", sorted(known.MODELS))
def test_all_layers_active_and_state_kept_is_full_fine_tuning_in_every_architecture(name):
    full, rotated = known.build(name), known.build(name)
    before = {n: p.detach().clone() for n, p in full.named_parameters()}
    inputs = known.inputs(name)
    layers = len(lt.find_layers(rotated))
    everything = (*ALWAYS_ACTIVE_GROUPS, "tower")
    config = lt.LisaConfig(layers, 2, optimizer_state="keep", always_active=everything)
    plain = train(full, adamw(full), None, range(3), inputs)
    optimizer = adamw(rotated)
    with Lisa(rotated, optimizer, config) as engine:
        assert train(rotated, optimizer, engine, range(3), inputs) == plain
    theirs = dict(full.named_parameters())
    assert {n for n, p in rotated.named_parameters() if not torch.equal(p, theirs[n])} == set()
    still = {n for n, p in theirs.items() if torch.equal(p, before[n]) and p.requires_grad}
    assert len(still) <= known.UNUSED.get(name, 0), still


@pytest.mark.parametrize("name", ["llava", "opt", "vit", "wav2vec2", "whisper"])
def test_what_is_unclassified_trains_in_fp32_beside_a_model_that_rests_in_bf16(name):
    model = known.build(name).bfloat16()
    inputs = {
        key: value.bfloat16() if value.is_floating_point() else value
        for key, value in known.inputs(name).items()
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = lt.LisaConfig(1, 1, precision="fp32_active", stacks="together")
    with Lisa(model, optimizer, config) as engine:
        others = [model.get_parameter(n) for n in engine.layer_map.groups["other"]]
        losses = train(model, optimizer, engine, range(2), inputs)
        assert all(exact(p).dtype == torch.float32 for p in others if p.requires_grad)
    assert np.isfinite(losses).all()
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


# ---------------------------------------------------------------------- heads of any name

HEADS = ("fc", "regressor", "projection", "out", "dense", "linear", "classifier")


class Regression(nn.Module):
    """A public encoder with a fresh head, as people write it."""

    def __init__(self, head):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = hf.BertModel(hf.BertConfig(**known.ENCODER), add_pooling_layer=False)
        setattr(self, head, nn.Linear(16, 1))
        self.head = head

    def forward(self, input_ids, labels):
        hidden = self.encoder(input_ids=input_ids).last_hidden_state[:, 0]
        return (getattr(self, self.head)(hidden).squeeze(-1) - labels).square().mean()


REGRESSION = {"input_ids": torch.arange(3, 19).reshape(2, 8), "labels": torch.tensor([0.5, -1.0])}


@pytest.mark.parametrize("head", HEADS)
def test_a_fresh_head_trains_whatever_its_name(head, caplog):
    model = Regression(head)
    weight = getattr(model, head).weight
    before = weight.detach().clone()
    optimizer = adamw(model)
    with Lisa(model, optimizer, lt.LisaConfig(1, 1)) as engine:
        for step in range(3):
            previous = weight.detach().clone()
            train(model, optimizer, engine, [step], REGRESSION)
            assert not torch.equal(weight, previous)
    assert not torch.equal(weight, before)
    said = [r.getMessage() for r in caplog.records if "in every period" in r.getMessage()]
    if head == "classifier":  # a name that is known
        assert not said
    else:
        assert len(said) == 1
        assert (
            "what is neither layer, embedding, head nor norm: 2 tensors, 17 parameters, 0.2% of "
            f"the model ({head}.weight 1x16, {head}.bias 1)"
        ) in said[0]


@pytest.mark.parametrize("groups", [(), ("embed", "head", "norm")])
def test_an_old_setting_keeps_its_meaning_and_what_never_trains_is_named(groups, caplog):
    model = Regression("fc")
    optimizer, before = adamw(model), model.fc.weight.detach().clone()
    with Lisa(model, optimizer, lt.LisaConfig(1, 1, always_active=groups)) as engine:
        train(model, optimizer, engine, range(2), REGRESSION)
    assert torch.equal(model.fc.weight, before)
    assert "LISA never trains what is neither layer, embedding, head nor norm: 2" in caplog.text
    assert "(fc.weight 1x16, fc.bias 1)" in caplog.text
    assert "put 'other' into lisa.always_active" in caplog.text


def test_what_is_frozen_before_rests_without_a_word(caplog):
    model = Regression("fc").requires_grad_(True)
    model.fc.requires_grad_(False)
    with Lisa(model, adamw(model), lt.LisaConfig(1, 1)) as engine:
        engine.begin_step(0)
        assert not model.fc.weight.requires_grad
    assert "neither layer" not in caplog.text


TOWERS = {
    "llava": "model.vision_tower", "qwen2_vl": "model.visual", "idefics2": "model.vision_model",
    "qwen2_audio": "model.audio_tower",
}  # fmt: skip


def seeing(name):
    """A tiny model that reads pictures or sounds beside text."""
    torch.manual_seed(0)
    text = hf.LlamaConfig(**known.DECODER)
    if name == "idefics2":
        perceiver = {"hidden_size": 16, "resampler_n_latents": 2, "resampler_depth": 2,
                     "resampler_n_heads": 2, "resampler_head_dim": 8,
                     "num_key_value_heads": 1}  # fmt: skip
        config = hf.Idefics2Config(
            text_config=text, vision_config=known.VISION, perceiver_config=perceiver
        )
        return hf.Idefics2ForConditionalGeneration(config)
    if name == "qwen2_audio":
        audio = {"num_mel_bins": 8, "encoder_layers": 2, "encoder_attention_heads": 2,
                 "encoder_ffn_dim": 24, "d_model": 16, "max_source_positions": 10}  # fmt: skip
        config = hf.Qwen2AudioConfig(
            audio_config=audio, text_config=hf.Qwen2Config(**known.DECODER)
        )
        return hf.Qwen2AudioForConditionalGeneration(config)
    if name == "dinov2":
        return hf.Dinov2ForImageClassification(hf.Dinov2Config(**known.VISION))
    return known.build(name)


@pytest.mark.parametrize("name", sorted(TOWERS))
def test_a_tower_of_images_or_sounds_rests_unless_it_is_named(name, caplog):
    model = seeing(name)
    path = TOWERS[name]
    inside = [
        p for n, p in model.named_parameters() if n.startswith(f"{path}.") and p.requires_grad
    ]  # Qwen2-Audio's positions are frozen from the start
    size = sum(p.numel() for p in inside)
    with Lisa(model, adamw(model), lt.LisaConfig(1, 1)) as engine:
        engine.begin_step(0)
        assert not any(p.requires_grad for p in inside)
        other = [n for n in engine.layer_map.groups["other"] if not n.startswith(f"{path}.")]
        resting = engine.run_entries()["lisa"]["resting_towers"]
        for n in other:  # what joins the tower to the language model trains, but a resampler
            trains = not any(n.startswith(f"{tower}.") for tower in resting)
            assert model.get_parameter(n).requires_grad == trains
    assert resting[0] == path
    assert "rest" in caplog.text
    assert path in caplog.text
    if len(resting) == 1:
        assert f"the tower of images or sounds rests under LISA, {path}: {size:,}" in caplog.text
    assert "put 'tower' into lisa.always_active" in caplog.text
    caplog.clear()
    named = lt.LisaConfig(1, 1, always_active=(*ALWAYS_ACTIVE_GROUPS, "tower"))
    with Lisa(model, adamw(model), named) as engine:
        engine.begin_step(0)
        assert all(p.requires_grad for p in inside)
        assert "resting_towers" not in engine.run_entries()["lisa"]
    assert "trains in every period the tower" in caplog.text.replace("towers", "tower")
    assert all(p.requires_grad for p in inside)


def test_a_resting_tower_keeps_its_bits_and_what_it_sees_still_counts():
    model, optimizer = (made := known.build("llava")), adamw(made)
    inputs = known.inputs("llava")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with Lisa(model, optimizer, lt.LisaConfig(2, 1)) as engine:
        losses = train(model, optimizer, engine, range(6), inputs)
    assert losses[-1] < losses[0]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert not any(n.startswith("model.vision_tower.") for n in moved)
    assert any("multi_modal_projector" in n for n in moved)
    assert not any(p in optimizer.state for n, p in model.named_parameters() if "vision_tow" in n)


@pytest.mark.parametrize("name", ["vit", "dinov2", "whisper", "wav2vec2", "hubert", "opt"])
def test_models_whose_layers_read_images_or_sounds_have_no_resting_tower(name, caplog):
    model = seeing(name)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    layers = len(lt.find_layers(model))
    with Lisa(model, adamw(model), lt.LisaConfig(layers, 1)) as engine:
        engine.begin_step(0)
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
        assert sense_towers(model, engine.layer_map) == ()
    assert "tower" not in caplog.text


def test_layers_that_are_named_take_turns_whatever_they_read():
    model = known.build("llava")
    path = "model.vision_tower.encoder.layers"
    with Lisa(model, adamw(model), lt.LisaConfig(1, 1, layers=path)) as engine:
        engine.begin_step(0)
        assert sense_towers(model, engine.layer_map) == ()  # the text is no tower of a sense
        assert model.get_parameter("model.language_model.layers.0.mlp.up_proj.weight").requires_grad
    both = lt.LisaConfig(2, 1, layers=f"model.language_model.layers, {path}")
    with Lisa(model, adamw(model), both) as engine:
        engine.begin_step(0)
        stacks = [engine.layer_map.stacks[i] for i in engine.active_layers]
        assert len(set(stacks)) == 2


def test_a_tower_is_known_by_its_name_where_nothing_says_what_it_reads():
    class Seeing(nn.Module):
        def __init__(self):
            super().__init__()

            def block():
                return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

            self.vision_model = nn.Sequential(block(), block())
            self.text_model = nn.Sequential(block(), block(), block())

    model = Seeing()
    layer_map = lt.find_layers(model, "text_model")
    assert sense_towers(model, layer_map) == ("vision_model",)
    assert sense_towers(model, lt.find_layers(model, "vision_model")) == ()


def test_the_estimate_counts_a_tower_where_it_trains():
    model = known.build("llava")
    tower = sum(p.numel() for n, p in model.named_parameters() if "vision_tower" in n)
    rests, named = (
        lt.estimate_memory(model, "lisa", lisa=lt.LisaConfig(1, always_active=groups),
                           sequence_length=8).trainable
        for groups in (ALWAYS_ACTIVE_GROUPS, (*ALWAYS_ACTIVE_GROUPS, "tower"))
    )  # fmt: skip
    assert named - rests == tower > 0


def test_full_and_select_train_a_tower_as_before():
    model = known.build("llava")
    chosen = choose(model, lt.SelectConfig(groups=("other",)))
    assert any(n.startswith("model.vision_tower.") for n in chosen.tensors)


def test_a_state_in_which_the_tower_trained_does_not_go_on_without_it():
    model = known.build("llava")
    optimizer = adamw(model)
    with Lisa(model, optimizer, lt.LisaConfig(1, 2)) as engine:
        engine.begin_step(0)
        saved = engine.state_dict()
        engine.load_state_dict(saved)
    del saved["towers"]  # a version in which `other` was everything
    with (
        Lisa(model, optimizer, lt.LisaConfig(1, 2)) as engine,
        pytest.raises(ConfigError, match=r"always_active = .*'tower'\], this run"),
    ):
        engine.load_state_dict(saved)
    named = lt.LisaConfig(1, 2, always_active=(*ALWAYS_ACTIVE_GROUPS, "tower"))
    with Lisa(model, optimizer, named) as engine:
        engine.load_state_dict(saved)


def test_a_state_saved_before_other_was_a_group_goes_on_where_the_model_has_none(make_llama):
    model = make_llama(layers=3)
    optimizer = adamw(model)
    with Lisa(model, optimizer, lt.LisaConfig(1, 2)) as engine:
        engine.begin_step(0)
        saved = engine.state_dict()
    saved["settings"]["always_active"] = ["embed", "head", "norm"]  # what it was until now
    with Lisa(model, optimizer, lt.LisaConfig(1, 2)) as engine:
        engine.load_state_dict(saved)
    other = Regression("fc")
    config = lt.LisaConfig(1, 2, always_active=("embed", "head", "norm"))
    with Lisa(other, adamw(other), config) as engine:
        engine.begin_step(0)
        saved = engine.state_dict()
    with (
        Lisa(other, adamw(other), lt.LisaConfig(1, 2)) as engine,
        pytest.raises(ConfigError, match=r"always_active = \['embed', 'head', 'norm'\], this run"),
    ):
        engine.load_state_dict(saved)


# ---------------------------------------------------------------------- shared layers, LayerDrop


def test_a_model_of_one_shared_layer_says_that_nothing_rotates(caplog):
    model = known.build("albert")
    with Lisa(model, adamw(model), lt.LisaConfig(1)):
        pass
    assert (
        "activated_layers is 1 and the model has 1 layer that the 3 hidden layers of its "
        "configuration share: every layer trains in every period, as in full fine-tuning"
    ) in caplog.text


def test_rotating_layers_say_nothing_of_the_kind(make_llama, caplog):
    model = make_llama(layers=3)
    with Lisa(model, adamw(model), lt.LisaConfig(2)):
        pass
    assert not caplog.records
    with Lisa(model, adamw(model), lt.LisaConfig(3)):
        pass
    assert "activated_layers is 3 and the model has 3 layers: every layer trains" in caplog.text


class Dropping(nn.Module):
    """Skips the blocks that it is told to, as LayerDrop does by chance."""

    def __init__(self, layerdrop=0.3):
        super().__init__()
        torch.manual_seed(0)
        self.layerdrop = layerdrop
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(4)
        )
        self.skip = set()

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            if i not in self.skip:
                x = x + block(x)
        return x.square().mean()


def test_a_drawn_layer_that_is_skipped_is_counted_and_named_per_draw(caplog):
    model = Dropping()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    said, expected = [], []
    config = lt.LisaConfig(2, 3, "cyclic", always_active=())
    rng = np.random.default_rng(0)
    missed: dict[int, int] = {}
    caplog.set_level(logging.INFO, logger="lisa_train")
    with Lisa(model, optimizer, config, on_notice=said.append) as engine:
        for step in range(12):
            engine.begin_step(step)
            if step % 3 == 0:
                missed = {}
                expected.append((step, missed))
            model.skip = {int(rng.integers(4))} if step < 9 else set()
            for layer in model.skip & set(engine.active_layers):
                missed[layer] = missed.get(layer, 0) + 1
            model(torch.ones(2, 4)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert "model.layerdrop is 0.3" in said[0]
    texts = [
        "drawn layers had no gradient and did not move: "
        + ", ".join(f"layer {i} in {n}" for i, n in sorted(missed.items()))
        + f" of the 3 steps after step {step} "
        for step, missed in expected
        if missed
    ]
    assert len(texts) >= 2
    assert [text.split("(the model")[0] for text in said[1:]] == texts
    levels = [r.levelno for r in caplog.records if "no gradient and" in r.getMessage()]
    assert levels == [logging.WARNING] + [logging.INFO] * (len(texts) - 1)  # the screen, once


def test_without_layer_drop_and_with_all_reached_nothing_is_said(caplog):
    model = Dropping(layerdrop=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Lisa(model, optimizer, lt.LisaConfig(1, 1)) as engine:
        for step in range(3):
            engine.begin_step(step)
            model(torch.ones(2, 4)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not caplog.records


@pytest.mark.parametrize("name", ["hubert", "wav2vec2"])
def test_speech_models_say_that_they_skip_layers(name, caplog):
    model = known.build(name)
    assert model.config.layerdrop == 0.1
    with Lisa(model, adamw(model), lt.LisaConfig(1, 1)):
        pass
    assert "config.layerdrop is 0.1: the model skips that share of its layers" in caplog.text
