"""Stepping inside backward is the ordinary step, bit for bit, with one gradient at a time."""

import copy
import re
from pathlib import Path

import bitsandbytes
import pandas as pd
import pytest
import torch
from helpers_recording import mixtral, t5
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.optimization import Adafactor

import lisa_analysis as la
import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_train.methods.lisa.engine import Lisa
from lisa_train.optim.step_in_backward import StepInBackward


def groups(model):
    """Two parameter groups, with and without weight decay, as Trainer makes them."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    return [
        {"params": matrices, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


def eight_bit(model):
    return bitsandbytes.optim.AdamW8bit(groups(model), lr=1e-2, min_8bit_size=16)


OPTIMIZERS = {
    "adamw": lambda m: torch.optim.AdamW(groups(m), lr=1e-2),
    "adamw_foreach": lambda m: torch.optim.AdamW(groups(m), lr=1e-2, foreach=True),
    "adamw_fused": lambda m: torch.optim.AdamW(groups(m), lr=1e-2, fused=True),
    "amsgrad": lambda m: torch.optim.AdamW(groups(m), lr=1e-2, amsgrad=True),
    "sgd_momentum": lambda m: torch.optim.SGD(groups(m), lr=1e-2, momentum=0.9, nesterov=True),
    "adafactor": lambda m: Adafactor(groups(m), lr=1e-2, scale_parameter=False,
                                     relative_step=False, beta1=0.9),
    "torch_adafactor": lambda m: torch.optim.Adafactor(groups(m), lr=1e-2),
    "adamw_8bit": eight_bit,
}  # fmt: skip


def batch(step):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 64, (2, 8), generator=generator)
    return {"input_ids": ids, "labels": ids}


def train(model, optimizer, steps, engine=None, each=lambda: None):
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    losses = []
    for step in range(steps):
        if engine is not None:
            engine.begin_step(step)
        loss = model(**batch(step)).loss
        loss.backward()
        each()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_same(first, second):
    """Equal to the bit: tensors, and whatever holds them."""
    assert type(first) is type(second)
    if torch.is_tensor(first):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_same(a, b)
    else:
        assert first == second


class GradientBytes:
    """Most bytes of gradients that a model held when a gradient was complete."""

    def __init__(self, model):
        self.model, self.peak, self.tensors = model, 0, []

    def before_tensor(self, parameter):
        held = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.peak = max(self.peak, sum(g.numel() * g.element_size() for g in held))
        self.tensors.append(parameter)

    def after_tensor(self, parameter):
        assert parameter.grad is not None


# ---------------------------------------------------------------------- exactness


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_states_and_losses_are_those_of_the_ordinary_step(make_llama, name, tied):
    plain, stepped = (make_llama(layers=3, tie_word_embeddings=tied) for _ in range(2))
    one, other = OPTIMIZERS[name](plain), OPTIMIZERS[name](stepped)
    expected = train(plain, one, 5)

    def gone():
        assert all(p.grad is None for p in stepped.parameters())

    with StepInBackward(other):
        assert train(stepped, other, 5, each=gone) == expected
    assert_same(plain.state_dict(), stepped.state_dict())
    assert_same(one.state_dict(), other.state_dict())


def test_only_one_gradient_is_held_at_a_time(make_llama):
    model = make_llama(layers=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with StepInBackward(optimizer) as steps:
        steps.watchers.append(watch := GradientBytes(model))
        train(model, optimizer, 2)
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    assert watch.peak == max(sizes) < sum(sizes) / 4
    assert len(watch.tensors) == 2 * len(sizes)


def test_a_tied_tensor_steps_once_when_its_whole_gradient_is_there(make_llama):
    model = make_llama(layers=2, tie_word_embeddings=True)
    reference = copy.deepcopy(model)
    reference(**batch(0)).loss.backward()
    whole = reference.model.embed_tokens.weight.grad
    found = []

    class Look:
        def before_tensor(self, parameter):
            if parameter is model.model.embed_tokens.weight:
                found.append(parameter.grad.clone())

        def after_tensor(self, parameter):
            pass

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with StepInBackward(optimizer) as steps:
        steps.watchers.append(Look())
        model(**batch(0)).loss.backward()
    assert len(found) == 1
    assert torch.equal(found[0], whole)


def test_a_layer_that_is_used_three_times_steps_once():
    torch.manual_seed(0)
    first = nn.Linear(4, 4)
    second = copy.deepcopy(first)
    x = torch.randn(3, 4)

    def loss(layer):
        return layer(layer(layer(x).tanh()).tanh()).square().sum()

    for layer, inside in ((first, False), (second, True)):
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
        steps = StepInBackward(optimizer) if inside else None
        for _ in range(3):
            loss(layer).backward()
            optimizer.step()
            optimizer.zero_grad()
        if steps is not None:
            steps.close()
    assert_same(first.state_dict(), second.state_dict())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer_state": "keep"},
        {"optimizer_state": "offload"},
        {"warmup_steps": 2},
        {"always_active": ("head",), "embed_probability": 0.5},
        {"precision": "fp32_active"},
    ],
    ids=str,
)
def test_lisa_is_the_same(make_llama, settings, checkpointing):
    models = [make_llama(layers=4, tie_word_embeddings=False) for _ in range(2)]
    if settings.get("precision"):
        models = [m.bfloat16() for m in models]
    results = []
    for model, inside in zip(models, (False, True), strict=True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
        config = lt.LisaConfig(1, 2, seed=3, **settings)
        steps = StepInBackward(optimizer) if inside else None
        with Lisa(model, optimizer, config) as engine:
            losses = train(model, optimizer, 9, engine)
            results.append((losses, optimizer.state_dict(), engine.tensors(), engine.state_dict()))
        if steps is not None:
            steps.close()
    assert_same(results[0], results[1])
    assert_same(models[0].state_dict(), models[1].state_dict())


def test_closing_goes_back_to_ordinary_steps(make_llama):
    model = make_llama(layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with StepInBackward(optimizer):
        train(model, optimizer, 1)
    before = copy.deepcopy(model.state_dict())
    model(**batch(1)).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert_same(dict(before), dict(model.state_dict()))


def test_frozen_tensors_keep_their_flags_and_can_be_released_later(make_llama):
    model = make_llama(layers=2)
    model.lm_head.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with StepInBackward(optimizer):
        assert not model.lm_head.weight.requires_grad
        before = model.lm_head.weight.detach().clone()
        train(model, optimizer, 1)
        assert torch.equal(model.lm_head.weight, before)
        model.lm_head.requires_grad_(True)
        model(**batch(1)).loss.backward()
        assert not torch.equal(model.lm_head.weight, before)


# ---------------------------------------------------------------------- misuse, in words


def test_a_second_backward_pass_before_the_step_is_refused(make_llama):
    model = make_llama(layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with StepInBackward(optimizer):
        model(**batch(0)).loss.backward()
        with pytest.raises(ConfigError, match=r"second gradient before optimizer\.step"):
            model(**batch(1)).loss.backward()


def test_a_paused_pass_leaves_weights_and_gradients_alone(make_llama):
    model = make_llama(layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with StepInBackward(optimizer) as steps:
        before = copy.deepcopy(model.state_dict())
        with steps.paused():
            model(**batch(0)).loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        assert_same(dict(before), dict(model.state_dict()))


def test_lisa_asks_for_begin_step_out_of_the_backward_pass(make_llama):
    model = make_llama(layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with (
        StepInBackward(optimizer),
        Lisa(model, optimizer, lt.LisaConfig(1, 1)),
        pytest.raises(ConfigError, match="call begin_step"),
    ):
        model(**batch(0)).loss.backward()


class CountsPerGroup(torch.optim.SGD):
    """An optimizer with a step count per group, as Prodigy and others have."""

    def __init__(self, params):
        super().__init__(params, lr=1e-2)
        self.param_groups[0]["k"] = 0

    def step(self, closure=None):
        self.param_groups[0]["k"] += 1
        return super().step(closure)


def schedule_free(params):
    import schedulefree

    return schedulefree.AdamWScheduleFree(params)


@pytest.mark.parametrize("build", [schedule_free, torch.optim.LBFGS])
def test_optimizers_that_step_all_tensors_together_are_refused(build):
    with pytest.raises(ConfigError, match="for all tensors together"):
        StepInBackward(build(nn.Linear(2, 2).parameters()))


def test_an_optimizer_that_counts_by_group_is_refused_at_its_first_step():
    model = nn.Linear(2, 2)
    with (
        StepInBackward(CountsPerGroup(model.parameters())),
        pytest.raises(ConfigError, match="CountsPerGroup changes 'k' of a whole parameter group"),
    ):
        model(torch.ones(1, 2)).sum().backward()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "max_grad_norm is 1: clipping to a norm of all gradients needs all of them at once"),
        ({"max_grad_norm": 0.0, "gradient_accumulation_steps": 4}, "accumulation_steps is 4"),
        ({"max_grad_norm": 0.0, "fp16": True}, "fp16 is true"),
        ({"max_grad_norm": 0.0, "optim": "schedule_free_adamw"}, "all tensors together"),
        ({"max_grad_norm": 0.0, "optim": "galore_adamw_layerwise"}, "by itself"),
    ],
    ids=str,
)
def test_settings_that_would_change_the_result_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        lt.TrainConfig("model", "data", method="full", step_in_backward=True, **settings)


# ---------------------------------------------------------------------- Trainer


def make_trainer(model, folder, **changes):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (48, 8), generator=generator).tolist()
    settings = {
        "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "weight_decay": 0.1, "logging_steps": 1, "save_strategy": "steps", "save_steps": 5,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False,
        "max_grad_norm": 0.0, "warmup_steps": 2, "lr_scheduler_type": "cosine",
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **(settings | changes))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return Trainer(model, arguments, train_dataset=rows)


def logs(trainer):
    keys = ("step", "loss", "grad_norm", "learning_rate")
    return [[e[k] for k in keys] for e in trainer.state.log_history if "loss" in e]


LISA = lt.LisaConfig(1, 3, warmup_steps=1)
OPTIMS = ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adamw_bnb_8bit"]


@pytest.mark.parametrize("lisa", [None, LISA], ids=["full", "lisa"])
@pytest.mark.parametrize("optim", OPTIMS)
def test_a_trainer_ends_with_the_same_weights_checkpoints_and_logs(
    make_llama, tmp_path, monkeypatch, optim, lisa
):
    # wide enough for 8-bit states, which bitsandbytes gives to large tensors only
    models = [make_llama(layers=3, hidden_size=64, intermediate_size=64) for _ in range(2)]
    trainers = []
    for model, name in zip(models, ("plain", "stepped"), strict=True):
        # its settings by position outlive an optimizer and would hide those that are missing
        monkeypatch.setattr(bitsandbytes.optim.GlobalOptimManager, "_instance", None)
        trainers.append(trainer := make_trainer(model, tmp_path / name, optim=optim))
        lt.attach(trainer, lisa, step_in_backward=name == "stepped")
        trainer.train()
    plain, stepped = trainers
    assert_same(models[0].state_dict(), models[1].state_dict())
    assert [row[:2] + row[3:] for row in logs(plain)] == [r[:2] + r[3:] for r in logs(stepped)]
    norms = [[row[2] for row in logs(t)] for t in trainers]
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)
    assert min(norms[0]) > 0
    for file in ("optimizer.pt", "scheduler.pt"):
        saved = [
            torch.load(tmp_path / name / "checkpoint-5" / file, weights_only=True)
            for name in ("plain", "stepped")
        ]
        assert_same(*saved)
    assert "clip_grad_norm_" not in vars(stepped.accelerator)
    assert all(not p._post_accumulate_grad_hooks for p in models[1].parameters())


@pytest.mark.parametrize("lisa", [None, LISA], ids=["full", "lisa"])
def test_a_resumed_run_is_bit_identical(make_llama, tmp_path, lisa):
    whole, again = make_llama(layers=3), make_llama(layers=3)
    first = make_trainer(whole, tmp_path)
    lt.attach(first, lisa, step_in_backward=True)
    first.train()
    second = make_trainer(again, tmp_path)
    lt.attach(second, lisa, step_in_backward=True)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert_same(whole.state_dict(), again.state_dict())
    assert_same(first.optimizer.state_dict(), second.optimizer.state_dict())
    assert logs(first)[5:] == logs(second)[5:]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm is 1"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"optim": "schedule_free_adamw"}, "all tensors together"),
    ],
    ids=str,
)
def test_attach_refuses_what_would_change_the_result(make_llama, tmp_path, changes, words):
    trainer = make_trainer(make_llama(layers=2), tmp_path, **changes)
    with pytest.raises(ConfigError, match=words):
        lt.attach(trainer, step_in_backward=True)


def test_attach_refuses_several_processes(make_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    trainer = make_trainer(make_llama(layers=2), tmp_path)
    with pytest.raises(ConfigError, match="with 2 processes or sharded weights"):
        lt.attach(trainer, step_in_backward=True)


def test_an_exception_takes_everything_off(make_llama, tmp_path):
    model = make_llama(layers=2)
    trainer = make_trainer(model, tmp_path)
    lt.attach(trainer, LISA, step_in_backward=True)
    trainer.compute_loss = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert "clip_grad_norm_" not in vars(trainer.accelerator)
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


# ---------------------------------------------------------------------- the recorder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lisa", [None, LISA], ids=["full", "lisa"])
def test_a_recording_is_the_same_to_the_bit(make_llama, tmp_path, lisa, dtype):
    runs = []
    for name in ("plain", "stepped"):
        model = make_llama(layers=3, tie_word_embeddings=True).to(dtype)
        trainer = make_trainer(model, tmp_path / name / "out", save_strategy="no")
        record = lt.RecordConfig(str(tmp_path / name / "run"), every=2, probe_every=3)
        lt.attach(trainer, lisa, record, step_in_backward=name == "stepped")
        trainer.train()
        runs.append(la.load(tmp_path / name / "run"))
    plain, stepped = runs
    order = ["step", "param_id"]
    frames = [run.metrics().sort_values(order).reset_index(drop=True) for run in runs]
    assert set(frames[0]["step"]) == {0, 1, 2, 3, 4, 6, 8}
    for column in ("grad_norm", "grad_norm_l1", "update_norm", "descent", "opt_steps",
                   "probe_grad_norm"):  # fmt: skip
        assert frames[0][column].notna().any(), column
    pd.testing.assert_frame_equal(frames[0], frames[1], check_exact=True)
    same = ["step", "loss", "learning_rate", "clip_coef", "tokens", "skipped"]
    pd.testing.assert_frame_equal(plain.scalars[same], stepped.scalars[same], check_exact=True)
    pd.testing.assert_series_equal(
        plain.scalars["grad_norm"], stepped.scalars["grad_norm"],
        rtol=1e-6 if dtype == torch.float32 else 1e-2,
    )  # fmt: skip
    assert (stepped.scalars["recorder_seconds"] > 0).all()


def test_a_recorded_plain_loop_is_the_same_to_the_bit(make_llama, tmp_path):
    frames = []
    for name in ("plain", "stepped"):
        model = make_llama(layers=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        steps = StepInBackward(optimizer) if name == "stepped" else None
        config = lt.RecordConfig(str(tmp_path / name), every=1)
        recorder = lt.NormRecorder(model, optimizer, config, step_in_backward=steps)
        with recorder:
            for step in range(1, 5):
                loss = model(**batch(step)).loss
                loss.backward()
                recorder.before_step(step)
                optimizer.step()
                recorder.after_step(step, loss=loss)
                optimizer.zero_grad()
        run = la.load(tmp_path / name)
        frames.append((run.metrics(), run.scalars[["step", "loss", "grad_norm"]]))
    pd.testing.assert_frame_equal(frames[0][0], frames[1][0], check_exact=True)
    # sums of the same numbers in another order
    pd.testing.assert_frame_equal(frames[0][1], frames[1][1], rtol=1e-12)


def test_the_whole_configuration_trains_so(tiny_model_dir, text_file, tmp_path):
    runs = []
    for inside in (False, True):
        config = lt.TrainConfig(
            str(tiny_model_dir), str(text_file), output_dir=str(tmp_path / str(inside)),
            method="lisa", lisa=lt.LisaConfig(1, 2), max_steps=5, max_length=32,
            per_device_train_batch_size=4, learning_rate=1e-2, max_grad_norm=0.0,
            step_in_backward=inside, record=lt.RecordConfig(every=1), save_final_model=False,
        )  # fmt: skip
        runs.append(la.load(lt.train(config)))
    frames = [run.metrics() for run in runs]
    pd.testing.assert_frame_equal(frames[0], frames[1], check_exact=True)
    pd.testing.assert_series_equal(runs[0].scalars["loss"], runs[1].scalars["loss"])


def test_the_loop_of_the_documentation_runs(make_llama):
    text = (Path(__file__).resolve().parents[3] / "docs/memory-options.md").read_text("utf-8")
    [block] = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    model = make_llama(layers=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = copy.deepcopy(model.state_dict())
    names = {"lt": lt, "model": model, "optimizer": optimizer, "config": lt.LisaConfig(1, 2),
             "batches": [batch(step) for step in range(4)]}  # fmt: skip
    exec(compile(block, "memory-options.md", "exec"), names)
    moved = {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    ever = {i for i, n in enumerate(names["engine"].visits) if n}
    assert {int(n.split(".")[2]) for n in moved if ".layers." in n} == ever


@pytest.mark.parametrize("name", ["reentrant", "mixtral", "t5"])
def test_other_ways_to_a_gradient(make_llama, name):
    """Nested backward passes, experts without tokens, a matrix used three times."""
    builders = {"reentrant": lambda: make_llama(layers=3), "mixtral": mixtral, "t5": t5}
    models = [builders[name]() for _ in range(2)]
    states = []
    for model, inside in zip(models, (False, True), strict=True):
        if name == "reentrant":
            model.activation_checkpointing_enable({"use_reentrant": True})
        model.train()
        optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
        steps = StepInBackward(optimizer) if inside else None
        for step in range(3):
            ids = batch(step)["input_ids"] % 48
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if steps is not None:
            steps.close()
        states.append(optimizer.state_dict())
    assert_same(models[0].state_dict(), models[1].state_dict())
    assert_same(*states)
