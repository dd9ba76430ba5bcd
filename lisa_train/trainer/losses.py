"""Losses per label that counts: of one training step, and of the examples that are held out.

A label counts when it is compared with a prediction: not ignored (-100), and not the first token
of a sequence, which nothing predicts. Where no label counts there is no loss, and no zero either.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Trainer
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from lisa_train.model.module_tree import unwrap
from lisa_train.trainer.events import patch

IGNORED = -100


def count_labels(trainer: Trainer, inputs: Any) -> torch.Tensor | None:
    """Count the labels of a batch that its loss is a mean over, without waiting for the device.

    None where that cannot be told: no labels, or labels that are no classes or tokens.
    """
    if not isinstance(inputs, Mapping):
        return None
    labels, shifted = inputs.get("labels"), inputs.get("shift_labels")
    if torch.is_tensor(shifted):
        labels = shifted
    elif torch.is_tensor(labels) and labels.ndim > 1 and _shifts_labels(trainer.model):
        labels = labels[..., 1:]
    if not torch.is_tensor(labels) or labels.is_floating_point() or labels.dtype == torch.bool:
        return None
    return labels.ne(IGNORED).sum()


def _shifts_labels(model: Any) -> bool:
    """Whether the model's loss compares every position with the label of the next one."""
    bare: Any = unwrap(model)
    base = bare.get_base_model() if hasattr(bare, "get_base_model") else bare
    encoder_decoder = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    kind = getattr(base, "loss_type", None)
    return LOSS_MAPPING.get(kind) is ForCausalLMLoss and not encoder_decoder


class StepLoss:
    """The loss of one optimizer step, from those of its micro-batches."""

    def __init__(self) -> None:
        self._total: torch.Tensor | None = None
        self._weighted = False
        self.labels: Any = None

    def add(self, trainer: Trainer, loss: torch.Tensor, labels: Any, num_items: Any) -> None:
        """Add a micro-batch.

        Parameters
        ----------
        trainer
            The trainer, which divides a mean by the number of micro-batches of the step.
        loss
            What `training_step` returned.
        labels
            What `count_labels` counted in the micro-batch.
        num_items
            What the trainer counted as labels of the whole step, over all processes.
        """
        loss = loss.detach()
        labels = None if labels is None else labels.to(loss.device)
        if _adds_up(trainer, num_items):
            self.labels = num_items if num_items is not None else _sum(self.labels, labels)
        elif labels is not None:
            # A mean over the micro-batch: an empty one weighs nothing, were its own mean NaN.
            whole = loss * trainer.current_gradient_accumulation_steps * labels
            loss = torch.where(labels > 0, whole, torch.zeros_like(whole))
            self._weighted = True
            self.labels = _sum(self.labels, labels)
        self._total = loss if self._total is None else self._total + loss

    @property
    def value(self) -> torch.Tensor | None:
        """The loss; without meaning where `labels` is 0."""
        if self._total is None or not self._weighted:
            return self._total
        return self._total / self.labels.clamp(min=1)


def _adds_up(trainer: Trainer, num_items: Any) -> bool:
    """Whether the losses of a step's micro-batches are shares of the step's loss.

    Otherwise each is a mean, which Trainer has divided by their number. Trainer's own rule
    (`Trainer.loss_is_scaled_for_ga`, which transformers before 5.19 did not have).
    """
    said = getattr(trainer, "loss_is_scaled_for_ga", None)
    if said is not None:
        return bool(said)
    by_model = trainer.model_accepts_loss_kwargs and num_items is not None
    return bool(by_model or trainer.compute_loss_func is not None)


def _sum(one: Any, other: Any) -> Any:
    return other if one is None else one if other is None else one + other


class HeldOutLoss:
    """Sums over an evaluation: Trainer's own `eval_loss` is a mean of the batches' means."""

    def __init__(self) -> None:
        self._sum: Any = 0.0
        self._labels: Any = 0
        self.known = True

    def add(self, loss: Any, labels: Any) -> None:
        """Add a batch, with its mean loss over so many labels."""
        if labels is None or loss is None:
            self.known = False
            return
        loss = loss.detach().double().mean()
        labels = labels.to(loss.device)
        self._sum = self._sum + torch.where(labels > 0, loss * labels, torch.zeros_like(loss))
        self._labels = self._labels + labels

    def value(self, trainer: Trainer) -> float | None:
        """Loss per label over all processes; None where no label counts."""
        device = trainer.args.device
        both = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device)
                            for x in (self._sum, self._labels)])  # fmt: skip
        if trainer.args.world_size > 1:
            both = trainer.accelerator.reduce(both, reduction="sum")
        total, labels = both.tolist()
        return total / labels if labels else None


@contextmanager
def held_out_loss(trainer: Trainer) -> Iterator[HeldOutLoss]:
    """Watch the batches that `trainer` evaluates meanwhile."""
    sums = HeldOutLoss()

    def prediction_step(
        original: Callable[..., Any], model: Any, inputs: Any, *a: Any, **k: Any
    ) -> Any:
        labels = count_labels(trainer, inputs)
        result = original(model, inputs, *a, **k)
        sums.add(result[0], labels)
        return result

    take_off = patch(trainer, "prediction_step", prediction_step)
    try:
        yield sums
    finally:
        take_off()


def put_per_label(metrics: dict[str, float], name: str, loss: float | None) -> None:
    """Replace a loss among the metrics of an evaluation; without a label it is not measured."""
    if loss is None:
        metrics.pop(name, None)
    else:
        metrics[name] = loss


def evaluate_per_label(trainer: Trainer) -> None:
    """Let `trainer` report held-out losses per label, to its trackers and callbacks too."""

    def evaluation_loop(
        original: Callable[..., Any], *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        with held_out_loss(trainer) as sums:
            output = original(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if sums.known:
            put_per_label(output.metrics, f"{metric_key_prefix}_loss", sums.value(trainer))
        return output

    patch(trainer, "evaluation_loop", evaluation_loop)
