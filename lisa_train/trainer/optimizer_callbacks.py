"""What is done to the optimizer of a transformers Trainer: when it steps, how much it holds.

`StepCallback` lets it step inside the backward pass, `EightBitCallback` chooses the precision of
its state by group, `AllocationCallback` lets adapters share out their ranks.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lisa_analysis.contract.errors import ConfigError
from lisa_train.model.layer_cache import known_layers
from lisa_train.optim.eight_bit import set_eight_bit_states
from lisa_train.optim.settings import check_step_settings
from lisa_train.optim.step_in_backward import StepInBackward
from lisa_train.trainer.events import Listener, TrainerEvents


class StepCallback(Listener, TrainerCallback):
    """Lets the optimizer of a trainer step inside the backward pass; see `StepInBackward`.

    Trainer's own step finds no gradients then. So that it goes on logging their norm, the norm of
    every gradient is taken before it is freed, and the accelerator's `clip_grad_norm_`, which
    Trainer asks without clipping, answers from these.

    Parameters
    ----------
    trainer
        The trainer.

    Attributes
    ----------
    steps
        What steps; None before training begins.

    Raises
    ------
    ConfigError
        Where the result would not be that of the ordinary step.
    """

    def __init__(self, trainer: Trainer) -> None:
        _check_trainer(trainer)
        self.steps: StepInBackward | None = None
        self._events = TrainerEvents.of(trainer)
        self._norms: dict[torch.Tensor, torch.Tensor] = {}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Put the hooks on the tensors of the optimizer."""
        self.close()
        self.steps = StepInBackward(optimizer)
        self.steps.watchers.append(self)
        self._events.subscribe(self)

    def close(self) -> None:
        """Take everything off; safe to call twice. Not before the recorder has closed."""
        self._events.unsubscribe(self)
        self._norms.clear()
        if self.steps is not None:
            self.steps.close()

    def before_tensor(self, parameter: torch.Tensor) -> None:
        """Take the norm of a gradient, as torch's `clip_grad_norm_` does."""
        assert parameter.grad is not None
        self._norms[parameter] = torch.linalg.vector_norm(parameter.grad.detach())

    def after_tensor(self, parameter: torch.Tensor) -> None:
        """Leave the tensor alone."""

    def clip(
        self,
        clip: Callable[..., Any],
        parameters: Iterable[torch.Tensor],
        max_norm: float,
        norm_type: float = 2,
    ) -> torch.Tensor:
        """Return the norm of the gradients that have been freed."""
        if max_norm != float("inf") or norm_type != 2:
            raise ConfigError(
                f"step_in_backward is on but gradients are to be clipped to {max_norm:g}: all of "
                "them would be needed at once; do not clip, or turn step_in_backward off."
            )
        norms = []
        for parameter in parameters:
            norm = self._norms.pop(parameter, None)
            if norm is None and parameter.grad is not None:  # not one of the optimizer's tensors
                norm = torch.linalg.vector_norm(parameter.grad.detach())
            if norm is not None:
                norms.append(norm)
        if not norms:
            return torch.tensor(0.0)
        return torch.linalg.vector_norm(torch.stack([x.to(norms[0].device) for x in norms]))


class AllocationCallback(TrainerCallback):
    """Lets AdaLoRA and its like share out their ranks behind every step, as PEFT asks for.

    Added before the recorder, which then measures what the step came to.
    """

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Share out; the gradients are still there."""
        for module in self._sharing(model):
            module.update_and_allocate(state.global_step + 1)

    @staticmethod
    def is_needed(model: nn.Module) -> bool:
        """Whether the adapters of `model` share out anything."""
        return bool(AllocationCallback._sharing(model))

    @staticmethod
    def _sharing(model: nn.Module) -> list[Any]:
        # Of the class: PEFT's outer module passes every name on to the inner one.
        return [m for m in model.modules() if hasattr(type(m), "update_and_allocate")]


class EightBitCallback(TrainerCallback):
    """Chooses the precision of the optimizer's state when the optimizer is there.

    Parameters
    ----------
    groups
        See `set_eight_bit_states`.
    path
        Path of the layers, where the model's structure leaves it open.
    """

    def __init__(self, groups: tuple[str, ...], path: str | None) -> None:
        self._groups = groups
        self._path = path

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Set it before the first step."""
        assert model is not None
        layer_map = known_layers(model, self._path)
        set_eight_bit_states(optimizer, model, layer_map, self._groups)


def _check_trainer(trainer: Trainer) -> None:
    """`ConfigError` for settings under which the result would differ from the ordinary step."""
    args = trainer.args
    check_step_settings(
        max_grad_norm=args.max_grad_norm,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        fp16=getattr(trainer.accelerator, "scaler", None) is not None or args.fp16,
        optim=str(getattr(args.optim, "value", args.optim)),
    )
    sharded = any(getattr(trainer, f"is_{x}_enabled", False) for x in ("deepspeed", "fsdp"))
    if args.world_size > 1 or sharded:
        raise ConfigError(
            f"step_in_backward is on with {args.world_size} processes or sharded weights: "
            "gradients are not complete before the processes have exchanged them; train with one "
            "process, or turn step_in_backward off."
        )
    if args.auto_find_batch_size:
        raise ConfigError(
            "step_in_backward and auto_find_batch_size are both on: a pass that runs out of memory "
            "would leave the model between two steps; set the batch size yourself."
        )
    if any(isinstance(cb, StepCallback) for cb in trainer.callback_handler.callbacks):
        raise ConfigError("this trainer already steps inside backward; attach it once.")
