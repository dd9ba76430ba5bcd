"""What happens in a Trainer, also what it tells no callback: the one place that patches it.

A `Listener` overrides what it wants to hear, subscribes to the `TrainerEvents` of its trainer when
training begins, and leaves when it ends. Every method is patched once, on the trainer itself and
not on its class, however many listen; what was put on last comes off first, with the last listener
that leaves. What callbacks hear anyway (`on_optimizer_step`, `on_step_end`, …) is not told again.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from lisa_analysis.contract.errors import ConfigError
from lisa_train.trainer.loss_scale import LossScale

# Methods of the trainer, or of its accelerator, and what listeners hear by them. Whatever runs
# between on_train_begin and on_train_end does so inside one of those that tell `ended`.
_TELLS = {
    "training_step": ("batch_taken", "micro_batch", "gradients_ready", "ended"),
    "clip_grad_norm_": ("clip", "clipped"),
    "evaluation_loop": ("evaluating",),
    "log": ("logging",),
    "save_model": ("saving",),
    "_run_epoch": ("ended",),
    "_evaluate": ("ended",),
    "_finalize_training": ("finishing", "ended"),
}
_OF_ACCELERATOR = frozenset({"clip_grad_norm_"})
# Where the events of a trainer are found.
_KEY = "lisa_toolkit_events"


class Listener:
    """What can be heard, in the order of a training; nothing is done unless overridden."""

    def batch_taken(self, inputs: Any) -> None:
        """Before the forward pass of a micro-batch, whose `inputs` nobody has touched yet."""

    def micro_batch(self, step: int, loss: torch.Tensor, items: Any, *, last: bool) -> None:
        """After the backward pass of a micro-batch of optimizer step `step` (from 1).

        Parameters
        ----------
        step
            Number of the step.
        loss
            What `training_step` returned.
        items
            Labels of the whole step, if `loss` is divided by them already.
        last
            Whether it is the last one of the step.
        """

    def gradients_ready(self, step: int, inputs: Any, scale: torch.Tensor | float) -> None:
        """After the last micro-batch (`inputs`) of a step, before clipping.

        The gradients carry the loss scale of fp16, `scale`, until then.
        """

    def clip(
        self, clip: Callable[..., Any], parameters: Any, max_norm: float, *args: Any, **kwargs: Any
    ) -> Any:
        """Answer in the place of the accelerator's `clip_grad_norm_`, which is `clip`."""
        return clip(parameters, max_norm, *args, **kwargs)

    def clipped(self, max_norm: float, norm: Any) -> None:
        """After clipping to `max_norm`, which found the gradients' `norm`."""

    def saving(self, step: int) -> None:
        """Before the weights of a checkpoint are written, after `step` optimizer steps."""

    def logging(self) -> Mapping[str, float]:
        """Return more numbers for the trackers, beside a training loss."""
        return {}

    def evaluating(self, prefix: str) -> AbstractContextManager[object]:
        """Return what an evaluation runs inside, whose metrics begin with `prefix`."""
        return nullcontext()

    def finishing(self) -> None:
        """After the last step, its evaluation and its checkpoint; the last weights are in place.

        Trainer puts the best ones there next (`load_best_model_at_end`), before `on_train_end`.
        """

    def ended(self, error: BaseException) -> None:
        """An exception leaves the loop; of a quiet end `on_train_end` tells."""


class TrainerEvents:
    """Tells listeners what happens in one trainer; `TrainerEvents.of` finds them.

    Listeners hear everything in the order in which they subscribed.

    Parameters
    ----------
    trainer
        The trainer; none of its methods is touched before somebody subscribes.

    Attributes
    ----------
    trainer
        The same.
    loss_scale
        The loss scale of fp16.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.loss_scale = LossScale(trainer)
        self._listeners: list[Listener] = []
        self._patches: dict[str, Callable[[], None]] = {}

    @classmethod
    def of(cls, trainer: Trainer) -> "TrainerEvents":
        """Return the events of a trainer, which has one of them."""
        if not isinstance(found := vars(trainer).get(_KEY), cls):
            setattr(trainer, _KEY, found := cls(trainer))
        return found

    def subscribe(self, listener: Listener) -> None:
        """Tell `listener` from now on."""
        if listener not in self._listeners:
            self._listeners.append(listener)
            self._patch(listener)

    def unsubscribe(self, listener: Listener) -> None:
        """Tell `listener` nothing any more; safe to call twice."""
        if listener in self._listeners:
            self._listeners.remove(listener)
        while self._patches and not self._listeners:
            self._patches.popitem()[1]()

    def around_train(self, context: Callable[[Any], AbstractContextManager[object]]) -> None:
        """Run every `trainer.train` from now on inside `context(resume_from_checkpoint)`.

        Only there it shows that training resumes, before anything is loaded, and every exception.
        """

        def train(
            original: Callable[..., Any],
            resume_from_checkpoint: Any = None,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            if (args[0] if args else kwargs.get("trial")) is not None:
                raise ConfigError(
                    "hyperparameter_search trains one trainer again and again with models that it "
                    "makes meanwhile, which attach does not follow: make a trainer for every "
                    "trial, and attach to each of them."
                )
            with context(resume_from_checkpoint):
                return original(resume_from_checkpoint, *args, **kwargs)

        patch(self.trainer, "train", train)

    def _hearing(self, event: str) -> tuple[Listener, ...]:
        """Listeners that hear an event; a copy, as they may leave meanwhile."""
        return tuple(each for each in self._listeners if _overrides(each, event))

    # ------------------------------------------------------------------ the patches

    def _patch(self, listener: Listener) -> None:
        """Patch what tells something that `listener` overrides."""
        by_name = {
            "training_step": self._training_step,
            "clip_grad_norm_": self._clip,
            "evaluation_loop": self._evaluation_loop,
            "log": self._log,
            "save_model": self._save_model,
            "_finalize_training": self._finalize,
        }
        for name, told in _TELLS.items():
            owner: Any = self.trainer.accelerator if name in _OF_ACCELERATOR else self.trainer
            wanted = any(_overrides(listener, event) for event in told)
            # A private name that is gone has been said, see `private_names`.
            gone = name.startswith("_") and not hasattr(owner, name)
            if wanted and not gone and name not in self._patches:
                self._patches[name] = patch(owner, name, by_name.get(name, self._watched))

    def _watched(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._watch():
            return original(*args, **kwargs)

    def _finalize(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._watch():
            for listener in self._hearing("finishing"):
                listener.finishing()
            return original(*args, **kwargs)

    @contextmanager
    def _watch(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            for listener in self._hearing("ended"):
                listener.ended(error)
            raise

    def _training_step(
        self, original: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        with self._watch():
            for listener in self._hearing("batch_taken"):
                listener.batch_taken(inputs)
            loss = original(model, inputs, *args, **kwargs)
            items = args[0] if args else kwargs.get("num_items_in_batch")
            step = self.trainer.state.global_step + 1
            last = bool(self.trainer.accelerator.sync_gradients)
            for listener in self._hearing("micro_batch"):
                listener.micro_batch(step, loss, items, last=last)
            if last and (hearing := self._hearing("gradients_ready")):
                scale = self.loss_scale.before_step(loss.device)
                for listener in hearing:
                    listener.gradients_ready(step, inputs, scale)
            return loss

    def _clip(
        self,
        original: Callable[..., Any],
        parameters: Any,
        max_norm: float,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        call = original
        for listener in self._hearing("clip"):
            call = functools.partial(listener.clip, call)
        norm = call(parameters, max_norm, *args, **kwargs)
        for listener in self._hearing("clipped"):
            listener.clipped(max_norm, norm)
        return norm

    def _save_model(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.trainer.is_in_train:
            for listener in self._hearing("saving"):
                listener.saving(self.trainer.state.global_step)
        return original(*args, **kwargs)

    def _log(
        self, original: Callable[..., Any], logs: dict[str, float], *args: Any, **kwargs: Any
    ) -> Any:
        if "loss" in logs:
            for listener in self._hearing("logging"):
                logs = {**logs, **listener.logging()}
        return original(logs, *args, **kwargs)

    def _evaluation_loop(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as around:
            prefix = kwargs.get("metric_key_prefix", "eval")
            for listener in self._hearing("evaluating"):
                around.enter_context(listener.evaluating(prefix))
            return original(*args, **kwargs)


def _overrides(listener: Listener, event: str) -> bool:
    return getattr(type(listener), event) is not getattr(Listener, event)


class _Patched:
    """A method of one object with something around it, which must not be that of a copy of it."""

    def __init__(self, call: Callable[..., Any], original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: object) -> Any:
        raise ConfigError(
            "a trainer that lisa_train.attach works on cannot be copied: the copy would train the "
            "original. Copy it first, and attach to each."
        )


def patch(owner: Any, name: str, wrapper: Callable[..., Any]) -> Callable[[], None]:
    """Let `wrapper(original, *args, **kwargs)` stand for `owner.name`.

    Returns
    -------
    callable
        Takes it off. Where somebody else has put something over it meanwhile, that stays, and
        calls the original.
    """
    original, own = getattr(owner, name), name in vars(owner)
    on = True

    def patched(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs) if on else original(*args, **kwargs)

    held = _Patched(patched, original)

    def take_off() -> None:
        nonlocal on
        on = False
        if vars(owner).get(name) is not held:
            return
        if own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)

    setattr(owner, name, held)
    return take_off


def calling_trainer(callback: TrainerCallback) -> Trainer:
    """Return the trainer that is calling `callback` now.

    For callbacks that a user added without a word to them, and for these alone: what `attach` makes
    is told its trainer. Trainer hands its callbacks the model, the optimizer and its state, but
    neither itself nor anything that leads to it, so that it is looked for among those who call. To
    have every trainer announce itself, `Trainer.__init__` and `add_callback` would have to be
    patched on the class, for the trainings of everybody in the process, and trainers that keep
    their callbacks in their own way would still not be found, without a word. Looking changes
    nothing, is done once a training, and refuses where it finds none.

    Raises
    ------
    ConfigError
        When no trainer that has the callback is calling.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            return caller
        frame = frame.f_back
    name = type(callback).__name__
    raise ConfigError(
        f"{name} does not know the trainer that it works in: no Trainer that has it is calling. "
        f"Give it one, {name}(…, trainer=trainer), or use lisa_train.attach; in a training loop of "
        "your own use lisa_train.Lisa."
    )
