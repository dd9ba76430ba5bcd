"""What learning needs of a Trainer: a batch for measuring passes, settings that allow it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import Trainer

from lisa_analysis.contract.errors import ConfigError
from lisa_train.methods.lisa.learning.config import LearnConfig
from lisa_train.model.parallel import in_all
from lisa_train.private_names import check
from lisa_train.trainer.events import Listener, TrainerEvents
from lisa_train.trainer.probe_pass import run_probe_pass


def check_learning(trainer: Trainer, learn: LearnConfig) -> None:
    """`ConfigError` where a step of this trainer does not show what is to be learned from."""
    args = trainer.args
    if learn.metric != "signal":
        return
    if args.gradient_accumulation_steps < 2 and args.per_device_train_batch_size < 2:
        raise ConfigError(
            "lisa.learn.metric is 'signal', which compares the micro-batches of a step, or the "
            "halves of its batch, but gradient_accumulation_steps is "
            f"{args.gradient_accumulation_steps} and the batch size 1: set either to 2 or more, "
            "or choose 'grad_rms'."
        )
    pairs = {"DPOTrainer", "RewardTrainer"} & {kind.__name__ for kind in type(trainer).__mro__}
    if args.gradient_accumulation_steps < 2 and pairs:
        raise ConfigError(
            "lisa.learn.metric is 'signal', which compares the micro-batches of a step, or the "
            f"halves of its batch, but the halves of a batch of {pairs.pop()} are all chosen and "
            "all rejected texts: set gradient_accumulation_steps to 2 or more, or choose "
            "'grad_rms'."
        )
    if args.fp16 or getattr(trainer.accelerator, "scaler", None) is not None:
        raise ConfigError(
            "lisa.learn.metric is 'signal' with fp16, whose loss scale is in the gradients as they "
            "arrive and changes; use bf16, or choose 'grad_rms'."
        )


def needs_passes(trainer: Trainer, learn: LearnConfig) -> bool:
    """Whether measuring passes are made: of all layers, or of the halves of a lone batch."""
    halves = learn.metric == "signal" and trainer.args.gradient_accumulation_steps < 2
    return learn.metric == "probe" or halves


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
        self._parts: tuple[Any, Any] | None = None

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
        inputs = self._taken()
        scale = self._events.loss_scale.now(self._trainer.args.device)
        run_probe_pass(self._trainer, inputs, scale)

    def _taken(self) -> Any:
        inputs, self._inputs = self._inputs, None
        if inputs is None:
            raise ConfigError(
                "lisa.learn.metric measures in passes of its own, but no batch of the step before "
                "was seen: this trainer makes its steps in a way of its own; choose 'grad_rms'."
            )
        return inputs

    def first_half(self) -> None:
        """Make a pass with the first half of the batch that was kept."""
        parts = halves_of(self._taken())
        # A pass waits for those of all processes: all make both, or none.
        self._parts = parts if in_all(parts is not None) else None
        self._half(0)

    def second_half(self) -> None:
        """Make a pass with the other half."""
        self._half(1)
        self._parts = None

    def _half(self, which: int) -> None:
        # Of a batch of one row, or without a label in a half, nothing is measured, nor where
        # another process has such a batch.
        if self._parts is not None:
            scale = self._events.loss_scale.now(self._trainer.args.device)
            run_probe_pass(self._trainer, self._parts[which], scale)

    def close(self) -> None:
        """Keep nothing any more."""
        self._inputs = None
        self._events.unsubscribe(self)


def halves_of(inputs: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Split a batch by rows; None where it has one, or a half has no label to learn from.

    Raises
    ------
    ConfigError
        For a batch that is no mapping, or has something in it that does not go by rows.
    """
    if not isinstance(inputs, Mapping):
        raise ConfigError(
            f"lisa.learn.metric is 'signal', but a batch is a {type(inputs).__name__}, whose "
            "halves are not known: set gradient_accumulation_steps to 2 or more, or choose "
            "'grad_rms'."
        )
    sized = {name: value for name, value in inputs.items() if _rows(value) is not None}
    rows = {name: _rows(value) for name, value in sized.items()}
    if len(set(rows.values())) > 1:
        a, b = min(rows, key=lambda n: rows[n] or 0), max(rows, key=lambda n: rows[n] or 0)
        raise ConfigError(
            f"lisa.learn.metric is 'signal', but {a} and {b} of a batch have {rows[a]} and "
            f"{rows[b]} rows, so that it has no halves: set gradient_accumulation_steps to 2 or "
            "more, or choose 'grad_rms'."
        )
    count = next(iter(rows.values()), None)
    if count is None or count < 2:
        return None
    middle = count // 2
    first, second = (
        {n: v[part] if n in sized else v for n, v in inputs.items()}
        for part in (slice(None, middle), slice(middle, None))
    )
    for half in (first, second):
        labels = half.get("labels")
        if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
            continue
        if bool(torch.eq(labels, -100).all()):
            return None
    return first, second


def _rows(value: Any) -> int | None:
    if torch.is_tensor(value):
        return int(value.shape[0]) if value.dim() else None
    return len(value) if isinstance(value, list | tuple) else None
