"""Losses per label that counts: of one training step, and of the examples that are held out.

A label counts when it is compared with a prediction: not ignored (-100), and not the first token
of a sequence, which nothing predicts. Where no label counts there is no loss, and no zero either.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from transformers import Trainer
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from lisa_train.model.module_tree import unwrap
from lisa_train.trainer.events import patch

IGNORED = -100
_LOSS = re.compile("loss|cross_entropy", re.IGNORECASE)  # functions that compute one, by name


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
    kind = getattr(_base(model), "loss_type", None)
    return LOSS_MAPPING.get(kind) is ForCausalLMLoss and not _writes_from_another_text(model)


def count_target(trainer: Trainer, inputs: Any, labels: torch.Tensor | None) -> Any:
    """Return the tokens of a batch that a decoder writes, beside those that its encoder reads."""
    text = (
        labels is not None and torch.is_tensor(inputs.get("labels")) and inputs["labels"].ndim > 1
    )
    return labels if text and _writes_from_another_text(trainer.model) else 0


def _writes_from_another_text(model: Any) -> bool:
    return bool(getattr(getattr(_base(model), "config", None), "is_encoder_decoder", False))


def _base(model: Any) -> Any:
    """The model below wrappers and adapters."""
    bare: Any = unwrap(model)
    return bare.get_base_model() if hasattr(bare, "get_base_model") else bare


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
        parts = trainer.current_gradient_accumulation_steps
        if not _adds_up(trainer, num_items):
            mean = loss * parts
        elif is_plain_mean(trainer):
            mean = loss / _processes_over(trainer, num_items)
        else:
            self.labels = num_items if num_items is not None else _sum(self.labels, labels)
            self._add(loss)
            return
        if labels is None:
            self._add(mean / parts)
            return
        # A mean over the micro-batch: an empty one weighs nothing, were its own mean NaN.
        whole = mean * labels
        self._add(torch.where(labels > 0, whole, torch.zeros_like(whole)))
        self._weighted = True
        self.labels = _sum(self.labels, labels)

    def _add(self, loss: torch.Tensor) -> None:
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


def is_plain_mean(trainer: Trainer) -> bool:
    """Whether the model's loss is the mean of a micro-batch, though Trainer takes it for a share.

    Trainer tells every model whose `forward` takes keywords how many labels the whole step has, and
    believes that its loss is divided by them. Many classes of transformers take keywords and
    compute a mean all the same: nearly all classifiers of texts, T5, BART, Whisper; and so do the
    losses of numbers and of several labels at once. Then Trainer adds the means up: losses and
    gradients are as many times too large as a step has micro-batches and processes.
    """
    own = type(trainer).compute_loss.__module__.split(".")[0] not in ("transformers", "trl")
    if own or trainer.compute_loss_func is not None or getattr(trainer, "label_smoother", None):
        return False
    base = _base(trainer.model)
    several = ("regression", "multi_label_classification")
    if getattr(getattr(base, "config", None), "problem_type", None) in several:
        return True
    return _computes_mean(type(base).forward)


@cache
def _computes_mean(forward: Callable[..., Any]) -> bool:
    """Whether a `forward` computes a loss that is not told the number of labels."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    except (OSError, TypeError, SyntaxError):
        return False  # Trainer's word stands
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and _LOSS.search(_called(n))]
    told = [k.arg for call in calls for k in call.keywords]  # None is **kwargs
    return bool(calls) and None not in told and "num_items_in_batch" not in told


def _called(call: ast.Call) -> str:
    """The last part of the name of what is called."""
    return str(getattr(call.func, "attr", None) or getattr(call.func, "id", ""))


def take_means(trainer: Trainer) -> None:
    """Let `trainer` divide by micro-batches where its model divides by nothing, see above."""
    if is_plain_mean(trainer):
        trainer.model_accepts_loss_kwargs = False


def added_means(trainer: Trainer) -> str | None:
    """Say that Trainer adds up means of micro-batches, where it does; None where all is well."""
    if trainer.model_accepts_loss_kwargs is False or not is_plain_mean(trainer):
        return None
    if getattr(trainer, "loss_is_scaled_for_ga", None) is False:
        return None
    times = trainer.args.gradient_accumulation_steps * trainer.accelerator.num_processes
    if times == 1:
        return None
    return (
        f"the loss of {type(unwrap(trainer.model)).__name__} is the mean of a micro-batch, which "
        f"Trainer takes for a share of the step's and adds up: its gradients, their norms and the "
        f"loss that Trainer shows are up to {times} times too large; recorded losses are means. "
        "trainer.model_accepts_loss_kwargs = False before training mends it."
    )


def _processes_over(trainer: Trainer, num_items: Any) -> int:
    """The factor that `Trainer.compute_loss` puts on a loss that it takes for a share."""
    averages = trainer.args.average_tokens_across_devices and num_items is not None
    return trainer.accelerator.num_processes if averages else 1


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
        inputs = _once(trainer, inputs)
        labels = count_labels(trainer, inputs)
        with _own_labels(trainer):
            loss, *rest = original(model, inputs, *a, **k)
        sums.add(loss, labels)
        return (_share(trainer, loss, labels), *rest)

    take_off = patch(trainer, "prediction_step", prediction_step)
    try:
        yield sums
    finally:
        take_off()


def _once(trainer: Trainer, inputs: Any) -> Any:
    """Return a batch without the labels of rows that fill up the last round of several processes.

    Accelerate begins anew with the first rows where the number of rows does not go into the round;
    Trainer drops what was predicted for them, but has their losses in its mean.
    """
    state = trainer.accelerator.gradient_state
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    several = trainer.accelerator.num_processes > 1 and torch.is_tensor(labels)
    if not several or not state.end_of_dataloader or state.remainder <= 0:
        return inputs
    labels = cast(torch.Tensor, labels)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        return inputs
    kept = max(0, state.remainder - trainer.accelerator.process_index * len(labels))
    once = labels.clone()
    once[kept:] = IGNORED
    return {**inputs, "labels": once}


@contextmanager
def _own_labels(trainer: Trainer) -> Iterator[None]:
    """Let a batch's loss be the mean over its own labels, not a share of all processes'."""
    given = trainer.args.average_tokens_across_devices
    trainer.args.average_tokens_across_devices = False
    try:
        yield
    finally:
        trainer.args.average_tokens_across_devices = given


def _share(trainer: Trainer, loss: Any, labels: Any) -> Any:
    """Return a loss as Trainer wants it: its mean over processes is that over all labels."""
    processes = trainer.accelerator.num_processes
    wanted = trainer.args.average_tokens_across_devices and trainer.model_accepts_loss_kwargs
    if processes == 1 or loss is None or labels is None or not wanted:
        return loss
    labels = labels.to(loss.device)
    share = loss * labels * processes / trainer.accelerator.reduce(labels, "sum").clamp(min=1)
    return torch.where(labels > 0, share, torch.zeros_like(share))


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
