"""Hears of an exception in Trainer's loop, of which Trainer tells its callbacks nothing."""

import inspect
from collections.abc import Callable
from typing import Any

from transformers import Trainer, TrainerCallback

from lisa_train.trainer.wraps import Wraps

# Whatever runs between on_train_begin and on_train_end does so inside one of these.
_LOOP = ("_run_epoch", "_evaluate", "_finalize_training", "training_step")


def calling_trainer(callback: TrainerCallback) -> Trainer | None:
    """Return the trainer that is calling `callback` now.

    Trainer hands its callbacks the model and the optimizer, but not itself, so that only the
    call stack knows; None when something else than a trainer calls.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            return caller
        frame = frame.f_back
    return None


def on_exception(trainer: Trainer, clean_up: Callable[[], None]) -> Wraps:
    """Call `clean_up` when an exception leaves a part of `trainer`'s loop.

    Returns
    -------
    Wraps
        Take them off when training has ended.
    """

    def watched(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except BaseException:
            clean_up()
            raise

    wraps = Wraps()
    for name in _LOOP:
        if hasattr(trainer, name):  # else it has been said, see `private_names`
            wraps.put(trainer, name, watched)
    return wraps
