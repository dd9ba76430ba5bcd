"""What is counted of a training as it goes: tokens, labels, losses, the norm before clipping."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Trainer

from lisa_analysis.contract.schema import HELD_OUT_SCORES
from lisa_train.measure.scalar_lines import count_tokens
from lisa_train.trainer.losses import StepLoss, count_labels, held_out_loss, put_per_label


class Tally:
    """Counts what a line of the scalars says of a step, and the result of the run.

    Parameters
    ----------
    trainer
        The trainer.
    tokens
        Tokens that earlier segments of the run counted.
    held_out
        Held-out losses of earlier segments.

    Attributes
    ----------
    held_out
        Held-out losses, in their order.
    scores
        What the last evaluation was judged by beside its loss.
    began
        When training began (`time.perf_counter`).
    """

    def __init__(self, trainer: Trainer, tokens: int = 0, held_out: tuple[float, ...] = ()) -> None:
        self._trainer = trainer
        self._tokens: Any = tokens
        self.held_out = list(held_out)
        self.scores: dict[str, float] = {}
        self._per_label: dict[str, float | None] = {}
        self._labels: Any = None
        self.began = time.perf_counter()
        self.begin_step()

    def begin_step(self) -> None:
        """Start the clock and the sums of a step."""
        self._step_began = time.monotonic()
        self._loss = StepLoss()
        self._norm: torch.Tensor | None = None
        self._clip_coef: torch.Tensor | None = None

    def batch_taken(self, inputs: Any) -> None:
        """Count a micro-batch before the forward pass, which may change it."""
        count = count_tokens(inputs)
        self._tokens = None if count is None or self._tokens is None else self._tokens + count
        self._labels = count_labels(self._trainer, inputs)

    def micro_batch(self, loss: torch.Tensor, items: Any) -> None:
        """Add the loss of the micro-batch that was taken last."""
        self._loss.add(self._trainer, loss, self._labels, items)

    def clipped(self, max_norm: float, norm: Any) -> None:
        """Take note of the gradients' norm, and of the factor that clipping put on them."""
        if not torch.is_tensor(norm):
            return
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self._norm = norm.detach()
        # The same expression as in torch.nn.utils.clip_grads_with_norm_.
        self._clip_coef = (max_norm / (self._norm + 1e-6)).clamp(max=1.0)

    def line(self) -> dict[str, Any]:
        """Return what is known of the step when the optimizer has stepped."""
        return {
            "clip_coef": self._clip_coef,
            "labels": self._loss.labels,
            "loss": self._loss.value,
            "grad_norm": self._norm,
            "tokens": self._tokens,
            "step_seconds": time.monotonic() - self._step_began,
        }

    @contextmanager
    def evaluating(self, prefix: str) -> Iterator[None]:
        """Sum the held-out loss per label of an evaluation."""
        with held_out_loss(self._trainer) as sums:
            yield
        if sums.known:
            self._per_label = {f"{prefix}_loss": sums.value(self._trainer)}

    def evaluated(self, metrics: Mapping[str, Any] | None) -> dict[str, float]:
        """Return the numbers among the metrics of an evaluation, losses per label."""
        numbers = {k: v for k, v in (metrics or {}).items() if isinstance(v, int | float)}
        for name in self._per_label.keys() & numbers.keys():
            put_per_label(numbers, name, self._per_label[name])
        self._per_label = {}
        if isinstance(loss := numbers.get("eval_loss"), float):
            self.held_out.append(loss)
        self.scores = {n: numbers[f"eval_{n}"] for n in HELD_OUT_SCORES if f"eval_{n}" in numbers}
        return numbers
