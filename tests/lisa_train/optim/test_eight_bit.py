"""8-bit optimizer states by group: each tensor as under the optimizer that its group names."""

import gc
import weakref

import bitsandbytes
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_train.optim.eight_bit import set_eight_bit_states

# tensors large enough for 8 bits: 64 · 64 = 4,096 elements
WIDE = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "layers": 2}


@pytest.fixture(autouse=True)
def _fresh_manager(monkeypatch):
    # bitsandbytes shares one between all optimizers of the process
    monkeypatch.setattr(bitsandbytes.optim.GlobalOptimManager, "_instance", None)


def train_on_noise(model, optimizer, steps=4):
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return dict(model.named_parameters())


def bits(optimizer, parameter):
    return {torch.uint8: 8, torch.float32: 32}[optimizer.state[parameter]["state1"].dtype]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("groups", [("embed", "head"), ("head",), ("layers",), ()], ids=str)
def test_every_tensor_moves_as_under_the_optimizer_of_its_group(make_llama, groups, tied):
    def build():
        return make_llama(**WIDE, tie_word_embeddings=tied)

    mixed, small, large = build(), build(), build()
    optimizer = bitsandbytes.optim.AdamW8bit(mixed.parameters(), lr=1e-2)
    set_eight_bit_states(optimizer, mixed, lt.find_layers(mixed), groups)
    moved = train_on_noise(mixed, optimizer)
    in_8 = train_on_noise(small, bitsandbytes.optim.AdamW8bit(small.parameters(), lr=1e-2))
    in_32 = train_on_noise(large, bitsandbytes.optim.AdamW(large.parameters(), lr=1e-2))
    for name, parameter in moved.items():
        group = lt.find_layers(mixed).group_of(name).replace("layer", "layers")
        chosen = group in groups or (tied and group == "embed" and "head" in groups)
        if parameter.numel() >= 4096:
            assert not torch.equal(in_8[name], in_32[name])
        expected = in_8 if chosen else in_32
        assert torch.equal(parameter, expected[name]), name
        large_enough = parameter.numel() >= 4096
        assert bits(optimizer, parameter) == (8 if chosen and large_enough else 32), name


def test_settings_do_not_reach_the_next_optimizer(make_llama):
    first, second = make_llama(**WIDE), make_llama(**WIDE)
    optimizer = bitsandbytes.optim.AdamW8bit(first.parameters(), lr=1e-2)
    set_eight_bit_states(optimizer, first, lt.find_layers(first), ())
    train_on_noise(first, optimizer, 1)
    following = bitsandbytes.optim.AdamW8bit(second.parameters(), lr=1e-2)
    train_on_noise(second, following, 1)
    assert bits(following, second.model.embed_tokens.weight) == 8


def test_nothing_keeps_the_model_alive(make_llama):
    first, second = make_llama(**WIDE), make_llama(**WIDE)
    shared = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for model in (first, second):  # as Trainer does
        shared.register_module_override(model.model.embed_tokens, "weight", {"optim_bits": 32})
    optimizer = bitsandbytes.optim.AdamW8bit(first.parameters(), lr=1e-2)
    set_eight_bit_states(optimizer, first, lt.find_layers(first), ("embed",))
    train_on_noise(first, optimizer, 1)
    assert bits(optimizer, first.model.embed_tokens.weight) == 8
    alive = weakref.ref(first.model.embed_tokens.weight)
    del first, optimizer, model
    gc.collect()
    assert alive() is None
    kept = [module for module, _, _ in shared.module_weight_config_triple]
    assert kept == [second.model.embed_tokens]


class StateBytes(TrainerCallback):
    """Bytes of state per element at the end of a step, by tensor."""

    def __init__(self):
        self.found = {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        for name, parameter in model.named_parameters():
            values = optimizer.state.get(parameter, {}).values()
            held = {v.data_ptr(): v for v in values if torch.is_tensor(v) and v.numel() != 256}
            size = sum(v.numel() * v.element_size() for v in held.values())
            if size:
                self.found[name] = size / parameter.numel()


def trained(model, folder, *, groups, optim="adamw_bnb_8bit", steps=4, resume=False, **attach):
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2,
        save_strategy="steps", save_steps=3, report_to=[], use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, optim=optim, max_grad_norm=0.0,
    )  # fmt: skip
    rows = [{"input_ids": [3 + i] * 8, "labels": [3 + i] * 8} for i in range(16)]
    trainer = Trainer(model, arguments, train_dataset=rows)
    lt.attach(trainer, eight_bit_states=groups, **attach)
    trainer.add_callback(watch := StateBytes())
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    return watch.found


def test_embeddings_hold_a_quarter_of_what_trainer_gives_them(make_llama, tmp_path):
    # two codes of a byte, and two fp32 scales for every 256 elements
    eight = 2 + 2 * 4 / 256
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    default = trained(make_llama(**WIDE), tmp_path / "a", groups=None)
    assert (default[embed], default[head]) == (8.0, eight)
    chosen = trained(make_llama(**WIDE), tmp_path / "b", groups=["embed", "head"])
    assert (chosen[embed], chosen[head]) == (eight, eight)
    layer = "model.layers.0.mlp.up_proj.weight"
    assert (default[layer], chosen[layer]) == (eight, 8.0)


@pytest.mark.parametrize("inside", [False, True])
def test_a_resumed_lisa_run_is_bit_identical(make_llama, tmp_path, inside):
    settings = {
        "groups": ("embed", "head"), "lisa": lt.LisaConfig(1, 2), "step_in_backward": inside,
        "steps": 6,
    }  # fmt: skip
    whole, again = make_llama(**WIDE), make_llama(**WIDE)
    trained(whole, tmp_path, **settings)
    trained(again, tmp_path, resume=True, **settings)
    for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_other_optimizers_and_unknown_groups_are_refused(make_llama, tmp_path):
    model = make_llama(layers=1)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ConfigError, match="the optimizer is AdamW: only those of bitsandbytes"):
        set_eight_bit_states(optimizer, model, lt.find_layers(model), ["embed"])
    with pytest.raises(ConfigError, match=r"eight_bit_states is .* but optim is 'adamw_torch'"):
        trained(model, tmp_path, groups=["embed"], optim="adamw_torch")
    with pytest.raises(ConfigError, match="optim is 'adamw_torch_8bit'"):
        lt.TrainConfig("m", "d", optim="adamw_torch_8bit", eight_bit_states=("embed",))
    with pytest.raises(ConfigError, match=r"eight_bit_states is 'embeds'.*[Dd]id you mean"):
        lt.TrainConfig("m", "d", optim="adamw_bnb_8bit", eight_bit_states=("embeds",))


def test_the_whole_configuration_trains_so(tiny_model_dir, text_file, tmp_path):
    config = lt.TrainConfig(
        str(tiny_model_dir), str(text_file), output_dir=str(tmp_path / "run"), max_steps=2,
        max_length=32, optim="adamw_bnb_8bit", eight_bit_states=["embed"], max_grad_norm=0.0,
        step_in_backward=True, save_steps=2, save_final_model=False, lisa=lt.LisaConfig(1, 2),
    )  # fmt: skip
    saved = lt.train(config) / "checkpoints" / "checkpoint-2" / "optimizer.pt"
    states = torch.load(saved, weights_only=True)["state"].values()
    # bitsandbytes files what is quantized under a key of its own
    kinds = [v.dtype for s in states for v in s["__bnb_optimizer_quant_state__"].values()]
    assert kinds.count(torch.uint8) == 2  # both moments of the tied embedding
