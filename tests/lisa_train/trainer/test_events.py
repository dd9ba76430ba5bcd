"""Events of a Trainer: what is told when, once, and a trainer that is left as it was."""

import copy

import pytest
import torch
from helpers_recording import arguments, examples, llama
from transformers import Trainer, TrainerCallback

import lisa_train as lt
from lisa_analysis.rundir.opening import load
from lisa_train.trainer.events import Listener, TrainerEvents, patch


def make(folder, *callbacks, **changes):
    return Trainer(
        llama(), arguments(folder / "out", **changes), train_dataset=examples(),
        eval_dataset=examples(4), callbacks=list(callbacks),
    )  # fmt: skip


def own_names(owner):
    """Methods that an object has of its own, in the place of its class's."""
    return {name for name in vars(owner) if callable(getattr(type(owner), name, None))}


class Adding(Listener):
    """Puts a word in front of what clipping answers, and notes what it hears."""

    def __init__(self, word):
        self.word, self.heard = word, []

    def clip(self, clip, parameters, max_norm, *args, **kwargs):
        return [self.word, *clip(parameters, max_norm, *args, **kwargs)]

    def clipped(self, max_norm, norm):
        self.heard.append((max_norm, norm))


def test_listeners_may_leave_in_any_order(tmp_path):
    trainer = make(tmp_path)
    accelerator = trainer.accelerator
    accelerator.clip_grad_norm_ = own = lambda parameters, max_norm: [parameters]
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)):
        listeners = [Adding(number) for number in range(3)]
        events = TrainerEvents.of(trainer)
        before = own_names(trainer)
        for listener in listeners:
            events.subscribe(listener)
            events.subscribe(listener)  # twice is once
        assert accelerator.clip_grad_norm_("x", 4.0) == [2, 1, 0, "x"]
        left = [0, 1, 2]
        for number in order:
            events.unsubscribe(listeners[number])
            events.unsubscribe(listeners[number])
            left.remove(number)
            answer = accelerator.clip_grad_norm_("x", 5.0)
            assert answer == [*reversed(left), "x"]
            assert all(listeners[i].heard[-1] == (5.0, answer) for i in left)
            assert listeners[number].heard[-1] != (5.0, answer)
        assert accelerator.clip_grad_norm_ is own
        assert own_names(trainer) == before  # nothing is patched that nobody listens to


def test_a_patch_leaves_what_others_put_over_it():
    class Owner:
        def method(self, x):
            return [x]

    owner = Owner()
    take_off = patch(owner, "method", lambda original, x: ["ours", *original(x)])
    theirs = owner.method
    assert theirs.__name__ == "method"
    owner.method = lambda x: ["theirs", *theirs(x)]
    assert owner.method("x") == ["theirs", "ours", "x"]
    take_off()
    assert owner.method("x") == ["theirs", "x"]
    owner = Owner()
    first = patch(owner, "method", lambda original, x: [1, *original(x)])
    second = patch(owner, "method", lambda original, x: [2, *original(x)])
    assert owner.method("x") == [2, 1, "x"]
    second()
    first()
    assert vars(owner) == {}


class Diary(Listener, TrainerCallback):
    """Notes everything that a listener can hear."""

    def __init__(self, words=None):
        self.words = [] if words is None else words
        self.events = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.words.append("begin")
        self.events.subscribe(self)

    def on_train_end(self, args, state, control, **kwargs):
        self.words.append("end")
        self.events.unsubscribe(self)

    def batch_taken(self, inputs):
        self.rows = copy.deepcopy(inputs)
        self.words.append("taken")

    def micro_batch(self, step, loss, items, *, last):
        assert torch.is_tensor(loss)
        self.words.append(f"micro {step} {'last' if last else 'more'}")

    def gradients_ready(self, step, inputs, scale):
        assert scale == 1.0
        assert torch.equal(torch.as_tensor(inputs["input_ids"]), self.rows["input_ids"])
        self.words.append(f"ready {step}")

    def clipped(self, max_norm, norm):
        self.words.append(f"clipped {max_norm:g}")

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.words.append(f"step {state.global_step + 1}")

    def saving(self, step):
        self.words.append(f"saving {step}")

    def logging(self):
        return {"of_mine": 7.0}

    def evaluating(self, prefix):
        self.words.append(f"evaluating {prefix}")
        return super().evaluating(prefix)

    def ended(self, error):
        self.words.append(f"ended {error}")
        self.events.unsubscribe(self)


def listening(folder, diary, **changes):
    trainer = make(folder, diary, **changes)
    diary.events = TrainerEvents.of(trainer)
    return trainer


def test_the_events_of_a_training_in_their_order(tmp_path):
    diary = Diary()
    trainer = listening(
        tmp_path, diary, max_steps=2, gradient_accumulation_steps=2, max_grad_norm=0.5,
        save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    before = own_names(trainer), own_names(trainer.accelerator)
    trainer.train()
    step = ["taken", "micro {} more", "taken", "micro {} last", "ready {}", "clipped 0.5",
            "step {}"]  # fmt: skip
    expected = ["begin", *(word.format(n) for n in (1, 2) for word in step)]
    assert diary.words == [*expected, "evaluating eval", "saving 2", "end"]
    assert (own_names(trainer), own_names(trainer.accelerator)) == before
    logs = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["of_mine"] for line in logs] == [7.0, 7.0]
    trainer.evaluate()
    trainer.save_model(str(tmp_path / "model"))
    assert diary.words[-1] == "end"  # after training nothing is heard


def test_an_exception_is_told_once_and_to_all_in_their_order(tmp_path):
    words = []
    first, second = Diary(words), Diary(words)
    trainer = listening(tmp_path, first, max_steps=4)
    trainer.add_callback(second)
    second.events = first.events
    original = trainer.compute_loss

    def compute_loss(*args, **kwargs):
        if trainer.state.global_step == 1:
            raise RuntimeError("out of luck")
        return original(*args, **kwargs)

    trainer.compute_loss = compute_loss
    with pytest.raises(RuntimeError):
        trainer.train()
    assert [w for w in words if w.startswith("ended")] == ["ended out of luck"] * 2
    assert own_names(trainer) == {"compute_loss"}
    assert own_names(trainer.accelerator) == set()


def test_a_name_that_is_gone_is_no_silence(tmp_path, monkeypatch):
    """Private ones are announced (see `private_names`), and a public one is an error."""
    trainer = make(tmp_path)
    monkeypatch.delattr(Trainer, "_finalize_training")
    diary = Diary()
    TrainerEvents.of(trainer).subscribe(diary)
    assert "_run_epoch" in own_names(trainer)
    TrainerEvents.of(trainer).unsubscribe(diary)
    monkeypatch.delattr(type(trainer.accelerator), "clip_grad_norm_")
    with pytest.raises(AttributeError, match="clip_grad_norm_"):
        TrainerEvents.of(trainer).subscribe(diary)


@pytest.mark.parametrize("order", ["lisa first", "record first"])
def test_what_lisa_says_at_the_start_is_in_the_run_that_begins(tmp_path, order):
    """Not in the one before it, whose recorder the callback still has."""
    trainer = make(tmp_path, max_steps=2)
    lisa = lt.LisaCallback(lt.LisaConfig(1, 2))  # one draw of three layers: two are never drawn
    record = lt.RecordCallback(trainer, lt.RecordConfig(str(tmp_path / "run")))
    for callback in (lisa, record) if order == "lisa first" else (record, lisa):
        trainer.add_callback(callback)
    for attempt in range(2):
        trainer.train()
        said = load(tmp_path / "run").events.query("event == 'warning'")["message"].tolist()
        assert len(said) == 1, attempt
        assert "never" in said[0]
        (tmp_path / "run").rename(tmp_path / f"run {attempt}")
        assert not (tmp_path / "run").exists()
