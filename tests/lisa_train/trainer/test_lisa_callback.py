"""LISA inside transformers' Trainer: plain equality, resume, saved state, every optimizer."""

import json
import pickle

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError, LisaError
from lisa_train.trainer.events import TrainerEvents


def rows(n=48):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (n, 8), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def make_trainer(model, output_dir, *callbacks, eval_dataset=None, kind=Trainer, **changes):
    settings = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(str(output_dir), **(settings | changes))
    return kind(
        model, arguments, train_dataset=rows(), eval_dataset=eval_dataset, callbacks=list(callbacks)
    )


def losses(trainer, after=0):
    return [e["loss"] for e in trainer.state.log_history if "loss" in e and e["step"] > after]


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


class Watch(TrainerCallback):
    """Notes which tensors require gradients at the events of Trainer."""

    def __init__(self, lisa):
        self.lisa = lisa
        self.active, self.within = [], []

    def on_substep_end(self, args, state, control, **kwargs):
        self.within.append((state.global_step, self.lisa.engine.active_layers))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
        assert with_gradient == {n for n, p in model.named_parameters() if p.requires_grad}
        self.active.append(self.lisa.engine.active_layers)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_all_layers_active_and_state_kept_is_full_fine_tuning_bit_for_bit(
    make_llama, tmp_path, optim
):
    full, rotated = make_llama(layers=3), make_llama(layers=3)
    plain = make_trainer(full, tmp_path, optim=optim)
    plain.train()
    config = lt.LisaConfig(3, 2, optimizer_state="keep")
    engaged = make_trainer(rotated, tmp_path, lt.LisaCallback(config), optim=optim)
    engaged.train()
    assert losses(plain) == losses(engaged)
    assert same_weights(full, rotated)


def test_draws_happen_at_optimizer_steps_and_one_schedule_runs_through(make_llama, tmp_path):
    model = make_llama()
    callback = lt.LisaCallback(lt.LisaConfig(2, 3))
    watch, drawn = Watch(callback), []
    callback.on_draw.append(drawn.append)
    trainer = make_trainer(
        model, tmp_path, callback, watch, gradient_accumulation_steps=3, lr_scheduler_type="linear"
    )
    trainer.train()
    assert [draw.step for draw in drawn] == [0, 3, 6]
    assert watch.active == [drawn[step // 3].layers for step in range(8)]
    assert all(layers == drawn[step // 3].layers for step, layers in watch.within)
    assert len(watch.within) == 8 * 2
    rates = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    assert rates == pytest.approx([1e-2 * (8 - step) / 8 for step in range(8)])


@pytest.mark.parametrize(
    ("optim", "policy"),
    [
        ("adamw_torch_fused", "reset"),
        ("adamw_torch", "reset"),
        ("adafactor", "reset"),
        ("schedule_free_adamw", "reset"),
        ("adamw_8bit", "reset"),
        ("adamw_torch_fused", "keep"),
        ("adamw_torch_fused", "offload"),
        ("schedule_free_adamw", "keep"),
    ],
)
def test_a_run_resumed_inside_a_period_is_bit_identical(make_llama, tmp_path, optim, policy):
    config = lt.LisaConfig(1, 3, "balanced", optimizer_state=policy)
    settings = {"save_strategy": "steps", "save_steps": 5, "optim": optim, "max_steps": 10}
    if optim == "schedule_free_adamw":
        settings["lr_scheduler_type"] = "constant"
    model = make_llama(layers=4)
    uninterrupted = lt.LisaCallback(config)
    whole = make_trainer(model, tmp_path, uninterrupted, **settings)
    whole.train()
    again = make_llama(layers=4, seed=1)
    callback = lt.LisaCallback(config)
    resumed = make_trainer(again, tmp_path, callback, **settings)
    watch, drawn = Watch(callback), []
    resumed.add_callback(watch)
    callback.on_draw.append(drawn.append)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert [draw.step for draw in drawn] == [6, 9]
    assert len(watch.active) == 5
    assert losses(resumed, after=5) == losses(whole, after=5)
    assert same_weights(model, again)
    assert drawn[-1].visits == tuple(uninterrupted.engine.visits)
    first, second = (t.optimizer.state_dict()["state"] for t in (whole, resumed))
    assert first.keys() == second.keys()
    for position in first:
        for key, value in first[position].items():
            if torch.is_tensor(value):
                assert torch.equal(value, second[position][key]), key


def test_checkpoints_hold_the_engine_and_only_the_state_of_active_tensors(make_llama, tmp_path):
    model = make_llama(layers=4)
    callback = lt.LisaCallback(lt.LisaConfig(1, 3))
    trainer = make_trainer(model, tmp_path, callback, save_strategy="steps", save_steps=4)
    trainer.train()
    engine = callback.engine
    for step in (4, 8):
        folder = tmp_path / f"checkpoint-{step}"
        state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
        assert len(state) == 9 + 3
        saved = json.loads((folder / "trainer_state.json").read_text())["stateful_callbacks"]
        assert saved["lisa_toolkit"]["index"] == (step - 1) // 3
        assert saved["lisa_toolkit"]["layer_names"] == list(engine.layer_map.names)
    sizes = [(tmp_path / f"checkpoint-{s}" / "optimizer.pt").stat().st_size for s in (4, 8)]
    assert abs(sizes[0] - sizes[1]) < 0.02 * sizes[0]
    loaded = type(model).from_pretrained(tmp_path / "checkpoint-8")
    assert same_weights(loaded, model)


def test_flags_are_restored_at_the_end_and_a_second_training_starts_afresh(make_llama, tmp_path):
    model = make_llama(layers=4)
    callback = lt.LisaCallback(lt.LisaConfig(1, 3))
    trainer = make_trainer(model, tmp_path, callback)
    trainer.train()
    assert all(p.requires_grad for p in model.parameters())
    assert callback.engine.visits.sum() == 3
    trainer.train()
    assert callback.engine.visits.sum() == 3
    assert all(p.requires_grad for p in model.parameters())


def test_a_checkpoint_of_a_run_without_lisa_can_be_continued_with_it(make_llama, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4}
    make_trainer(make_llama(layers=4), tmp_path, **settings).train()
    callback = lt.LisaCallback(lt.LisaConfig(1, 3))
    trainer = make_trainer(make_llama(layers=4), tmp_path, callback, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert callback.engine.visits.sum() == 2
    state = torch.load(tmp_path / "checkpoint-8" / "optimizer.pt", weights_only=True)["state"]
    assert len(state) == 9 + 3  # what the full run left behind is gone


def test_trainers_own_restoring_of_callbacks_does_not_interfere(make_llama, tmp_path):
    config = lt.LisaConfig(1, 3)
    settings = {"save_strategy": "steps", "save_steps": 5, "max_steps": 10}
    model, again = make_llama(layers=4), make_llama(layers=4)
    make_trainer(model, tmp_path, lt.LisaCallback(config), **settings).train()
    resumed = make_trainer(
        again,
        tmp_path,
        lt.LisaCallback(config),
        restore_callback_states_from_checkpoint=True,
        **settings,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert same_weights(model, again)


def test_evaluation_and_the_best_model_at_the_end_work(make_llama, tmp_path):
    model = make_llama(layers=4)
    callback = lt.LisaCallback(lt.LisaConfig(1, 2))
    trainer = make_trainer(
        model,
        tmp_path,
        callback,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        eval_dataset=rows(8),
    )
    trainer.train()
    best = type(model).from_pretrained(trainer.state.best_model_checkpoint)
    assert same_weights(best, model)


def test_the_training_seed_decides_the_schedule(make_llama, tmp_path):
    schedules = []
    for seed in (1, 1, 2):
        callback = lt.LisaCallback(lt.LisaConfig(2, 1))
        drawn = []
        callback.on_draw.append(drawn.append)
        make_trainer(make_llama(), tmp_path, callback, seed=seed).train()
        schedules.append([draw.layers for draw in drawn])
    assert schedules[0] == schedules[1] != schedules[2]


def test_a_smaller_batch_after_running_out_of_memory_starts_again(make_llama, tmp_path):
    model = make_llama(layers=4)
    callback = lt.LisaCallback(lt.LisaConfig(1, 3))

    class Exhaust(TrainerCallback):
        failed = False

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 4 and not self.failed:
                self.failed = True
                raise RuntimeError("CUDA out of memory.")

    trainer = make_trainer(model, tmp_path, callback, Exhaust(), auto_find_batch_size=True)
    trainer.train()
    assert trainer.state.global_step == 8
    assert callback.engine.visits.sum() == 3
    assert all(p.requires_grad for p in model.parameters())


# ---------------------------------------------------------------------- attach


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        assert not all(p.requires_grad for p in model.parameters())
        raise KeyboardInterrupt


def fail(*_, **__):
    raise RuntimeError("planted")


def a_step_fails(trainer):
    trainer.model.register_forward_hook(fail)


def the_data_fail(trainer):
    trainer.data_collator = fail


def the_evaluation_fails(trainer):
    trainer.args.eval_on_start = True
    trainer.evaluate = fail


def a_callback_stops(trainer):
    trainer.add_callback(Stop())


def the_end_fails(trainer):
    trainer._finalize_training = fail


class OwnLoop(Trainer):
    """A trainer that goes its own way to the loop of its class."""

    def train(self, *args, **kwargs):
        return super().train(*args, **kwargs)

    def _inner_training_loop(this, *args, **kwargs):  # noqa: N805
        return super()._inner_training_loop(*args, **kwargs)


@pytest.mark.parametrize("added", ["at once", "later", "to the handler", "pickled"])
@pytest.mark.parametrize("kind", [Trainer, OwnLoop])
def test_a_callback_that_was_told_nothing_finds_its_trainer(make_llama, tmp_path, added, kind):
    callback = lt.LisaCallback(lt.LisaConfig(1, 3))
    if added == "pickled":
        callback = pickle.loads(pickle.dumps(callback))
    first = [callback] if added in ("at once", "pickled") else []
    trainer = make_trainer(make_llama(), tmp_path, *first, kind=kind, max_steps=2)
    if added == "later":
        trainer.add_callback(callback)
    elif added == "to the handler":
        trainer.callback_handler.add_callback(callback)
    trainer.train()
    assert callback._events is TrainerEvents.of(trainer)


def test_one_callback_of_two_trainers_works_in_the_one_that_calls(make_llama, tmp_path):
    callback, found = lt.LisaCallback(lt.LisaConfig(1, 1)), []
    trainers = [make_trainer(make_llama(seed=i), tmp_path, callback, max_steps=2) for i in (0, 1)]
    for trainer in (*trainers, trainers[0]):
        trainer.train()
        found.append(callback._events.trainer)
    assert found == [*trainers, trainers[0]]


def test_a_training_within_a_training_finds_its_own_trainer(make_llama, tmp_path):
    inner, outer = (lt.LisaCallback(lt.LisaConfig(1, 1)) for _ in range(2))
    within = make_trainer(make_llama(seed=1), tmp_path / "inner", inner, max_steps=1)

    class Trains(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            within.train()

    around = make_trainer(make_llama(), tmp_path, Trains(), outer, max_steps=1)
    around.train()
    assert inner._events.trainer is within
    assert outer._events.trainer is around


def test_a_callback_that_no_trainer_has_is_refused_unless_it_is_given_one(make_llama, tmp_path):
    """Without a trainer it would not average gradients, refuse set-ups, or hear of exceptions."""

    class Around(TrainerCallback):
        """Hands on the events of a callback that the trainer does not know."""

        def __init__(self, inside):
            self.inside = inside

        def on_train_begin(self, *args, **kwargs):
            self.inside.on_train_begin(*args, **kwargs)

        def on_step_begin(self, *args, **kwargs):
            self.inside.on_step_begin(*args, **kwargs)

    model = make_llama()
    trainer = make_trainer(model, tmp_path, max_steps=1)
    config = lt.LisaConfig(1, 3)
    around = Around(lt.LisaCallback(config))
    trainer.add_callback(around)
    with pytest.raises(ConfigError, match=r"LisaCallback does not know .*trainer=trainer"):
        trainer.train()
    assert all(p.requires_grad for p in model.parameters())
    around.inside = lt.LisaCallback(config, trainer=trainer)
    trainer.train()
    assert around.inside._events.trainer is trainer
    around.inside.close()


@pytest.mark.parametrize("add", ["attach", "add_callback"])
@pytest.mark.parametrize(
    "plant", [a_step_fails, the_data_fail, the_evaluation_fails, a_callback_stops, the_end_fails]
)
def test_flags_are_restored_after_an_exception(make_llama, tmp_path, plant, add):
    model = make_llama(layers=4)
    trainer = make_trainer(model, tmp_path)
    if add == "attach":
        lt.attach(trainer, lisa=lt.LisaConfig(1, 3))
    else:
        trainer.add_callback(lt.LisaCallback(lt.LisaConfig(1, 3)))
    plant(trainer)
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        trainer.train()
    assert all(p.requires_grad for p in model.parameters())
    assert not {"_run_epoch", "_evaluate", "training_step"} & set(vars(trainer))  # no wrap stays


def test_attach_to_an_optimizer_that_lacks_layers_is_an_error(make_llama, tmp_path):
    model = make_llama(layers=4)
    trainer = make_trainer(model, tmp_path)
    model.model.layers.requires_grad_(False)
    trainer.create_optimizer()
    model.model.layers.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"lacks 36 of the 3\d tensors"):
        lt.attach(trainer, lisa=lt.LisaConfig(1, 3))
    assert trainer.train.__name__ == "train"
    assert not any(isinstance(cb, lt.LisaCallback) for cb in trainer.callback_handler.callbacks)


def test_attach_to_an_optimizer_that_lacks_a_group_is_an_error(make_llama, tmp_path):
    model = make_llama(layers=4)
    trainer = make_trainer(model, tmp_path)
    trainer.optimizer = torch.optim.AdamW(model.model.layers.parameters())
    with pytest.raises(ConfigError, match=r"lacks 3 of the 39 tensors .*embed"):
        lt.attach(trainer, lisa=lt.LisaConfig(1, 3))
    lt.attach(trainer, lisa=lt.LisaConfig(1, 3, always_active=()))


@pytest.mark.parametrize(
    ("settings", "frozen", "words"),
    [
        ({"activated_layers": 9}, False, "activated_layers is 9, but the model has 4 layers"),
        ({"probabilities": "missing.json"}, False, "missing.json"),
        ({"probabilities": (1.0, 1.0)}, False, "2 inclusion probabilities"),
        ({}, True, "no parameter that requires gradients"),
    ],
)
def test_attach_refuses_what_training_would(make_llama, tmp_path, settings, frozen, words):
    model = make_llama(layers=4).requires_grad_(not frozen)
    trainer = make_trainer(model, tmp_path)
    before = list(trainer.callback_handler.callbacks)
    with pytest.raises(LisaError, match=words):
        lt.attach(trainer, lisa=lt.LisaConfig(**settings), step_in_backward=True)
    assert trainer.callback_handler.callbacks == before  # nothing is left half attached
    assert trainer.train.__name__ == "train"


def test_attach_twice_is_an_error(make_llama, tmp_path):
    trainer = make_trainer(make_llama(layers=4), tmp_path)
    lt.attach(trainer, lisa=lt.LisaConfig(1, 3))
    with pytest.raises(ConfigError, match="already"):
        lt.attach(trainer, lisa=lt.LisaConfig(1, 3))


def test_attach_to_a_trainer_that_builds_its_model_when_training_begins(make_llama, tmp_path):
    arguments = make_trainer(make_llama(layers=4), tmp_path).args
    trainer = Trainer(args=arguments, model_init=lambda: make_llama(layers=4), train_dataset=rows())
    attached = lt.attach(trainer, lisa=lt.LisaConfig(1, 3))
    trainer.train()
    assert attached.active_layers() == attached.engine_callback.engine.active_layers
    assert len(attached.active_layers()) == 1
    assert all(p.requires_grad for p in trainer.model.parameters())
