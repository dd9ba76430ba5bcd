"""What the memory options promise, in bytes: gradients, state, activations, logits."""

import copy

import pytest
import torch
from datasets import Dataset
from helpers_allocations import (
    Allocations,
    bytes_of,
    forward_bytes,
    gradient_bytes,
    state_bytes,
    tensors_of,
)
from torch.utils._python_dispatch import TorchDispatchMode

import lisa_train as lt
from lisa_train.methods.lisa.engine import Lisa

IDS = torch.randint(3, 64, (2, 32), generator=torch.Generator().manual_seed(0))


def loss_of(model, ids=IDS):
    return model(input_ids=ids, labels=ids).loss


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def bytes_of_group(model, *groups):
    units = lt.find_layers(model).units(model)
    parameters = {p for group in groups for p in units[group]}
    return sum(p.numel() * p.element_size() for p in parameters)


def bytes_of_layer(model):
    return bytes_of(model.model.layers[0].parameters())


# ---------------------------------------------------------------------- gradients and state


@pytest.mark.parametrize(
    "groups", [("embed", "head", "norm"), ("head", "norm"), ("norm",), ("embed",), ()], ids=str
)
def test_gradients_and_state_are_those_of_what_trains(make_llama, groups):
    model = make_llama()
    optimizer = adamw(model)
    expected = bytes_of_group(model, *groups) + 2 * bytes_of_layer(model)
    with Lisa(model, optimizer, lt.LisaConfig(2, 1, always_active=groups)) as engine:
        for step in range(6):
            engine.begin_step(step)
            loss_of(model).backward()
            assert gradient_bytes(model) == expected
            optimizer.step()
            assert state_bytes(optimizer) == 2 * expected + 4 * len(optimizer.state)
            optimizer.zero_grad()


def test_sampled_embeddings_hold_nothing_in_the_intervals_without_them(make_llama):
    model = make_llama()
    optimizer = adamw(model)
    config = lt.LisaConfig(1, 1, always_active=("norm",), embed_probability=0.5)
    rest = bytes_of_group(model, "norm") + bytes_of_layer(model)
    found = set()
    with Lisa(model, optimizer, config) as engine:
        for step in range(12):
            engine.begin_step(step)
            loss_of(model).backward()
            drawn = "embed" in engine.active_groups
            assert gradient_bytes(model) == rest + drawn * bytes_of_group(model, "embed")
            optimizer.step()
            optimizer.zero_grad()
            found.add(drawn)
    assert found == {False, True}


@pytest.mark.parametrize("policy", ["reset", "keep", "offload"])
def test_the_optimizer_holds_state_of_the_active_only_whatever_is_kept(make_llama, policy):
    model = make_llama(layers=4)
    optimizer = adamw(model)
    config = lt.LisaConfig(1, 1, "cyclic", always_active=(), optimizer_state=policy)
    layer = bytes_of_layer(model)
    with Lisa(model, optimizer, config) as engine:
        for step in range(4):
            engine.begin_step(step)
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
            tensors = len(optimizer.state)
            assert state_bytes(optimizer) == 2 * layer + 4 * tensors
            saved = optimizer.state_dict()["state"].values()
            size = sum(v.numel() * v.element_size() for s in saved for v in s.values())
            times = 1 if policy == "reset" else step + 1
            assert size == times * (2 * layer + 4 * tensors)


# ---------------------------------------------------------------------- activations


def test_nothing_is_saved_below_the_lowest_active_layer(make_llama):
    kept = []
    for layers in (3, 9):
        model = make_llama(layers=layers)
        model.requires_grad_(False)
        model.model.layers[-2].requires_grad_(True)
        size, loss = forward_bytes(model, lambda model=model: loss_of(model))
        loss.backward()
        kept.append(size)
    assert kept[0] == kept[1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_frozen_layer_saves_nothing_for_weight_gradients(make_llama, attention):
    kept = {}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "attn_implementation": attention}
    for frozen in (False, True):
        model = make_llama(layers=3, **sizes)
        model.model.layers[1].requires_grad_(not frozen)
        kept[frozen], _ = forward_bytes(model, lambda model=model: loss_of(model))
    tokens = IDS.numel() * 4
    # what only a weight gradient needs: each norm's scaled input and output (the input of q, k, v
    # and of gate, up), and the input of the down projection; that of the output projection is
    # kept by the attention itself (sdpa)
    needless = tokens * (4 * 16 + 24) + (tokens * 16 if attention == "eager" else 0)
    assert kept[False] - kept[True] == needless


PLACEMENTS = {
    "none": lambda layer, active: False,
    "all": lambda layer, active: True,
    "active": lambda layer, active: layer in active,
    "frozen": lambda layer, active: layer not in active,
    "below the top": lambda layer, active: layer < 5,
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_checkpointing_every_layer_is_never_worse_than_a_choice_of_them(
    make_llama, attention, embeddings
):
    peaks, gradients, recomputed = {}, {}, {}
    for name, chosen in PLACEMENTS.items():
        model = make_llama(layers=6, hidden_size=32, attn_implementation=attention)
        model.activation_checkpointing_enable({"use_reentrant": False})
        optimizer = adamw(model)
        always = ("embed", "head", "norm") if embeddings else ("head", "norm")
        config = lt.LisaConfig(2, 1, always_active=always, seed=3)
        count = []
        with Lisa(model, optimizer, config) as engine:
            engine.begin_step(0)
            assert engine.active_layers == (2, 4)
            for i, layer in enumerate(model.model.layers):
                layer.gradient_checkpointing = chosen(i, engine.active_layers)
                layer.mlp.register_forward_pre_hook(lambda *_, i=i, c=count: c.append(i))
            with Allocations(tensors_of(model)) as seen:
                loss_of(model).backward()
            peaks[name], recomputed[name] = seen.peak, sorted(count[6:])
            gradients[name] = [p.grad for p in model.parameters() if p.grad is not None]
    for name in PLACEMENTS:
        assert peaks["all"] <= peaks[name]
        assert all(map(torch.equal, gradients[name], gradients["none"]))
    assert peaks["none"] > peaks["active"] > peaks["all"] < peaks["frozen"] < peaks["none"]
    # with the embeddings at rest, what lies below the lowest active layer is not run again
    assert recomputed["all"] == list(range(6) if embeddings else range(2, 6))


# ---------------------------------------------------------------------- logits

VOCABULARY = 70_001  # more than two of the tiles that TRL's fused head computes
TILE = 32_768


def sft_trainer(model, folder, tokenizer, **changes):
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        str(folder), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False, save_strategy="no", max_length=24,
        bf16=False, **changes,
    )  # fmt: skip
    rows = [{"input_ids": IDS[i % 2, :24].tolist()} for i in range(8)]
    return SFTTrainer(
        model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_logits_never_stand_whole(make_llama, tiny_model_dir, tmp_path, smoothing):
    """As `lisa-train` and TRL's SFTTrainer train; label smoothing alone needs all logits."""
    from transformers import AutoTokenizer

    model = make_llama(layers=1, vocab_size=VOCABULARY)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    trainer = sft_trainer(model, tmp_path, tokenizer, label_smoothing_factor=smoothing)
    lt.attach(trainer, lt.LisaConfig(1, 1))
    step, widest = trainer.training_step, []

    def training_step(*args, **kwargs):
        with Allocations(width=TILE) as seen:
            loss = step(*args, **kwargs)
        widest.append(seen.widest)
        return loss

    trainer.training_step = training_step
    trainer.train()
    tokens = 2 * 23  # every token but the first of a sequence is predicted
    if smoothing:
        assert max(widest) >= tokens * VOCABULARY * 4
    else:
        assert widest == [tokens * TILE * 4] * 2


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("attached", [False, True])
def test_the_heads_gradient_never_stands_whole_in_fp32(
    make_llama, tiny_model_dir, tmp_path, attached
):
    """Under `attach`, and for as long as it trains; TRL by itself sums it whole."""
    from transformers import AutoTokenizer
    from trl.trainer import utils

    model = make_llama(layers=1, vocab_size=VOCABULARY).to(torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    trainer = sft_trainer(model, tmp_path, tokenizer)
    theirs = utils._ChunkedLogProbFunction
    if attached:
        lt.attach(trainer, lt.LisaConfig(1, 1))
    step, whole = trainer.training_step, []

    def training_step(*args, **kwargs):
        with Fp32Like(model.lm_head.weight) as seen:
            loss = step(*args, **kwargs)
        whole.append(seen.found)
        return loss

    trainer.training_step = training_step
    trainer.train()
    assert whole == [not attached] * 2
    assert utils._ChunkedLogProbFunction is theirs


class Fp32Like(TorchDispatchMode):
    """Whether any fp32 tensor of this shape came up."""

    def __init__(self, tensor):
        super().__init__()
        self.shape, self.found = tensor.shape, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.found |= result.shape == self.shape
        return result


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_the_loss_in_tiles_is_the_loss(make_llama, tiny_model_dir, tmp_path):
    from transformers import AutoTokenizer

    model = make_llama(layers=1, vocab_size=VOCABULARY)
    plain = copy.deepcopy(model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    trainer = sft_trainer(model, tmp_path, tokenizer)
    ids = IDS[:, :24]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    loss, expected = trainer.compute_loss(model, dict(batch)), loss_of(plain, ids)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name, rtol=1e-4, atol=1e-8)
