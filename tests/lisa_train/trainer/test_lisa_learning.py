"""Learning inside transformers' Trainer: as in a plain loop, resumed to the bit, in the events."""

import json

import numpy as np
import pytest
import torch
from helpers_recording import arguments, examples, llama
from transformers import Trainer

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_analysis.rundir.opening import load
from lisa_train.methods.lisa.engine import Lisa
from lisa_train.trainer import learning
from lisa_train.trainer.learning import halves_of

LAYERS, STEPS, INTERVAL = 4, 24, 2


def lisa(metric="grad_rms", **changes):
    passes = {"probe_every": 2} if metric == "probe" else {}
    learn = lt.LearnConfig(metric=metric, start_after=0, **passes)
    settings = {"activated_layers": 2, "interval_steps": INTERVAL, "sampling": "balanced"}
    return lt.LisaConfig(learn=learn, **(settings | changes))


def make(tmp_path, config, *, record=None, **changes):
    settings = {"max_steps": STEPS, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
                "lr_scheduler_type": "constant", "max_grad_norm": 0.05}  # fmt: skip
    trainer = Trainer(
        llama(layers=LAYERS),
        arguments(tmp_path, **(settings | changes)),
        train_dataset=examples(64),
    )
    attached = lt.attach(trainer, lisa=config, record=record)
    drawn = []
    attached.engine_callback.on_draw.append(drawn.append)
    return trainer, attached, drawn


def facts(draws):
    return [(d.step, d.layers, d.inclusion_probabilities, d.scores) for d in draws]


def test_a_trainer_learns_what_a_plain_loop_learns(tmp_path):
    trainer, _, drawn = make(tmp_path, lisa(), optim="sgd", learning_rate=0.1)
    batches = []
    taken = trainer.training_step

    def step(model, inputs, *args, **kwargs):
        batches.append({k: v.clone() for k, v in inputs.items()})
        return taken(model, inputs, *args, **kwargs)

    trainer.training_step = step
    trainer.train()
    model = llama(layers=LAYERS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loop = []
    with Lisa(model, optimizer, lisa(), seed=trainer.args.seed, on_draw=loop.append) as engine:
        for n in range(STEPS):
            engine.begin_step(n)
            pair = batches[2 * n : 2 * n + 2]
            labels = sum(int((b["labels"][..., 1:] != -100).sum()) for b in pair)
            for batch in pair:
                model(**batch, num_items_in_batch=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()
    assert [d.step for d in drawn] == [d.step for d in loop]
    assert [d.layers for d in drawn] == [d.layers for d in loop]
    for mine, theirs in zip(drawn, loop, strict=True):
        np.testing.assert_allclose(
            mine.inclusion_probabilities, theirs.inclusion_probabilities, rtol=1e-4
        )
    assert np.ptp(drawn[-1].inclusion_probabilities) > 0.01


AT_A_DRAW, INSIDE = 14, 15


@pytest.mark.parametrize(
    ("metric", "stop"),
    [
        ("grad_rms", INSIDE),
        ("signal", INSIDE),
        ("probe", INSIDE),
        ("probe", AT_A_DRAW),  # made there; the others read the steps in between
        pytest.param("grad_rms", AT_A_DRAW, marks=pytest.mark.slow),
        pytest.param("signal", AT_A_DRAW, marks=pytest.mark.slow),
    ],
)
def test_resumed_it_goes_on_to_the_bit(tmp_path, metric, stop):
    saving = {"save_strategy": "steps", "save_steps": stop}
    whole, _, draws = make(tmp_path / "a", lisa(metric), **saving)
    whole.train()
    again, _, rest = make(tmp_path / "b", lisa(metric), **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stop}"))
    assert facts(rest) == [f for f in facts(draws) if f[0] >= stop]
    ours, theirs = (t.model.parameters() for t in (whole, again))
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    if metric != "signal":
        assert len({d.inclusion_probabilities for d in draws}) > 3
    other, _, _ = make(tmp_path / "c", lisa(metric, control="reversed"), **saving)
    with pytest.raises(Exception, match=r"lisa.control = none \(now reversed\)"):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stop}"))


@pytest.mark.parametrize(
    "changes",
    [
        {"bf16": True},
        {"optim": "adamw_8bit"},
        {"optim": "adafactor"},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("metric", ["grad_rms", "probe"])
def test_it_learns_under(tmp_path, metric, changes):
    trainer, _, drawn = make(tmp_path, lisa(metric), **changes)
    trainer.train()
    assert all(None not in d.scores for d in drawn[-2:])
    assert np.ptp(drawn[-1].inclusion_probabilities) > 0.002


def test_it_learns_inside_backward(tmp_path):
    settings = {"max_steps": STEPS, "max_grad_norm": 0.0, "gradient_accumulation_steps": 1,
                "learning_rate": 1e-2}  # fmt: skip
    found = []
    for inside in (False, True):
        trainer = Trainer(
            llama(layers=LAYERS), arguments(tmp_path / str(inside), **settings),
            train_dataset=examples(64),
        )  # fmt: skip
        attached = lt.attach(trainer, lisa=lisa("descent"), step_in_backward=inside)
        attached.engine_callback.on_draw.append(found.append)
        trainer.train()
    half = len(found) // 2
    plain, within = facts(found[:half]), facts(found[half:])
    assert [f[:2] for f in plain] == [f[:2] for f in within]
    for (*_, mine, _), (*_, theirs, _) in zip(plain, within, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9)


def test_draws_in_the_events_and_the_control_in_the_manifest(tmp_path):
    record = lt.RecordConfig(str(tmp_path / "run"), every=1)
    config = lisa(control="permuted", control_seed=5)
    trainer, _, drawn = make(tmp_path / "out", config, record=record)
    trainer.train()
    run = load(tmp_path / "run")
    events = run.events[run.events["event"] == "lisa_draw"]
    for (_, event), draw in zip(events.iterrows(), drawn, strict=True):
        assert tuple(event["inclusion_probabilities"]) == draw.inclusion_probabilities
        assert event["scores"] is None or tuple(event["scores"]) == draw.scores
    assert run.manifest["lisa"]["control"] == "permuted"
    order = run.manifest["lisa"]["control_permutation"]
    expected = np.random.default_rng(5).permutation(np.arange(float(LAYERS)))
    assert order == expected.astype(int).tolist()
    assert run.manifest["lisa"]["learn"]["metric"] == "grad_rms"
    plain, _, same = make(tmp_path / "plain", config)
    plain.train()
    assert facts(same) == facts(drawn)  # recording changes nothing


def test_a_lone_batch_is_compared_by_halves(tmp_path):
    """What each half of the last batch of an interval gives, by hand."""
    changes = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 4,
               "max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.1}  # fmt: skip
    trainer, attached, drawn = make(tmp_path / "a", lisa("signal"), **changes)
    batches, weights, shown = [], [], []
    taken = trainer.training_step

    def step(model, inputs, *args, **kwargs):
        batches.append({k: v.clone() for k, v in inputs.items()})
        schedule = attached.engine_callback.engine._schedule
        if len(batches) == 1:
            learn = schedule.learn
            schedule.learn = lambda step, values: (shown.append(values), learn(step, values))[1]
        if len(batches) == INTERVAL + 1:
            weights.append({k: v.clone() for k, v in model.state_dict().items()})
        return taken(model, inputs, *args, **kwargs)

    trainer.training_step = step
    trainer.train()
    model = llama(layers=LAYERS)
    model.load_state_dict(weights[0])
    layers = lt.find_layers(model)
    found = {}
    for rows in (slice(0, 2), slice(2, 4)):
        model.zero_grad()
        model(**{k: v[rows] for k, v in batches[INTERVAL - 1].items()}).loss.backward()
        for i in drawn[0].layers:
            gradient = torch.cat([p.grad.flatten() for _, p in layers.parameters(model, i)])
            found.setdefault(i, []).append(gradient.double())
    expected = np.full(LAYERS, np.nan)
    for i, (a, b) in found.items():
        product = float(a @ b)
        expected[i] = (max(product, 0.01 * abs(product)) / a.numel()) ** 0.5
    np.testing.assert_allclose(shown[0], expected, rtol=1e-4)
    assert len(shown) == STEPS // INTERVAL
    assert len({d.inclusion_probabilities for d in drawn}) > 1


def test_halves_of_a_batch():
    ids = torch.arange(6).view(3, 2)
    first, second = halves_of({"input_ids": ids, "labels": ids, "flag": True})
    assert first["input_ids"].tolist() == [[0, 1]]
    assert second["labels"].tolist() == [[2, 3], [4, 5]]
    assert first["flag"] is second["flag"] is True
    assert halves_of({"input_ids": ids[:1]}) is None
    assert halves_of({"labels": torch.tensor([[-100, -100], [1, 2]])}) is None
    with pytest.raises(ConfigError, match="input_ids and pixel_values of a batch have 3 and 7"):
        halves_of({"input_ids": ids, "pixel_values": torch.zeros(7, 2)})
    with pytest.raises(ConfigError, match="a batch is a list"):
        halves_of([ids])


@pytest.mark.parametrize("others", [True, False])
def test_all_processes_make_both_halves_or_none(tmp_path, monkeypatch, others):
    """Where another one's batch has no halves, its passes would be waited for."""
    trainer = Trainer(llama(), arguments(tmp_path))
    made = []
    monkeypatch.setattr(learning, "in_all", lambda flag: flag and others)
    monkeypatch.setattr(learning, "run_probe_pass", lambda trainer, inputs, scale: made.append(1))
    source = learning.ProbeSource(trainer)
    ids = torch.arange(6).view(3, 2)
    for rows, passes in ((ids, 2 * others), (ids[:1], 0)):
        made.clear()
        source.listen(lambda step: True)
        source.gradients_ready(1, {"input_ids": rows}, 1.0)
        source.first_half()
        source.second_half()
        assert len(made) == passes


def test_checkpoints_hold_plain_numbers(tmp_path):
    trainer, _, _ = make(tmp_path, lisa(), save_strategy="steps", save_steps=7)
    trainer.train()
    text = (tmp_path / "checkpoint-7" / "trainer_state.json").read_text()
    state = json.loads(text)["stateful_callbacks"]["lisa_toolkit"]
    assert len(state["learning"]["visits"]["steps"]) == 1  # step 7 began the period of 6
    assert state["sampler"]["next"] == 4


def test_what_a_step_does_not_show_is_refused(tmp_path):
    alone = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 1}
    with pytest.raises(ConfigError, match="gradient_accumulation_steps is 1 and the batch size 1"):
        make(tmp_path, lisa("signal"), **alone)
    callback = lt.LisaCallback(lisa("signal"))
    trainer = Trainer(
        llama(layers=LAYERS), arguments(tmp_path, max_steps=2, **alone),
        train_dataset=examples(8), callbacks=[callback],
    )  # fmt: skip
    with pytest.raises(ConfigError, match="gradient_accumulation_steps is 1"):
        trainer.train()
