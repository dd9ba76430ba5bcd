"""What learning needs of a Trainer: a batch for measuring passes, settings that allow it."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer

from lisa_analysis.contract.errors import ConfigError
from lisa_train.methods.lisa.learning.config import LearnConfig
from lisa_train.private_names import check
from lisa_train.trainer.events import Listener, TrainerEvents
from lisa_train.trainer.probe_pass import probe_pass


def check_learning(trainer: Trainer, learn: LearnConfig) -> None:
    """`ConfigError` where a step of this trainer does not show what is to be learned from."""
    args = trainer.args
    if learn.metric != "signal":
        return
    if args.gradient_accumulation_steps < 2:
        raise ConfigError(
            "lisa.learn.metric is 'signal', which compares the micro-batches of a step, but "
            f"gradient_accumulation_steps is {args.gradient_accumulation_steps}: set it to 2 or "
            "more (and the batch size to a part), or choose 'grad_rms'."
        )
    if args.fp16 or getattr(trainer.accelerator, "scaler", None) is not None:
        raise ConfigError(
            "lisa.learn.metric is 'signal' with fp16, whose loss scale is in the gradients as they "
            "arrive and changes; use bf16, or choose 'grad_rms'."
        )


class ProbeSource(Listener):
    """Keeps the last batch of a step that a measuring pass follows, and makes the pass.

    Parameters
    ----------
    trainer
        The trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        check("trainer probe")
        self._trainer = trainer
        self._events = TrainerEvents.of(trainer)
        self._due: Callable[[int], bool] = lambda step: False
        self._inputs: Any = None

    def listen(self, due: Callable[[int], bool]) -> None:
        """Keep batches from now on; `due` tells whether a pass follows so many steps."""
        self._due = due
        self._events.subscribe(self)

    def gradients_ready(self, step: int, inputs: Any, scale: torch.Tensor | float) -> None:
        """Keep the batch, if a pass follows this step."""
        if self._due(step):
            self._inputs = inputs

    def run(self) -> None:
        """Make a forward and a backward pass with the batch that was kept."""
        inputs, self._inputs = self._inputs, None
        if inputs is None:
            raise ConfigError(
                "lisa.learn.metric is 'probe', but no batch of the step before was seen: this "
                "trainer makes its steps in a way of its own; choose 'grad_rms'."
            )
        scale = self._events.loss_scale.now(self._trainer.args.device)
        probe_pass(self._trainer, inputs, scale)

    def close(self) -> None:
        """Keep nothing any more."""
        self._inputs = None
        self._events.unsubscribe(self)
