"""What is counted of a training as it goes: tokens, labels, losses, the norm before clipping."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from lisa_analysis.contract.schema import HELD_OUT_SCORES
from lisa_train.measure.scalar_lines import count_tokens
from lisa_train.trainer.losses import (
    StepLoss,
    count_labels,
    count_target,
    held_out_loss,
    put_per_label,
)

# The step of an evaluation, and its numbers by name.
Evaluation = tuple[int, Mapping[str, float]]


class Tally:
    """Counts what a line of the scalars says of a step, and the result of the run.

    Parameters
    ----------
    trainer
        The trainer.
    tokens
        Tokens that earlier segments of the run counted.
    held_out
        Evaluations of earlier segments: step and numbers.

    Attributes
    ----------
    held_out
        Evaluations in their order, each its step and its numbers by name.
    began
        When training began (`time.perf_counter`).
    """

    def __init__(
        self, trainer: Trainer, tokens: int = 0, held_out: Sequence[Evaluation] = ()
    ) -> None:
        self._trainer = trainer
        self._tokens: Any = tokens
        self.held_out = list(held_out)
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
        self._labels = count_labels(self._trainer, inputs)
        count = count_tokens(inputs)
        if count is None or self._tokens is None:
            self._tokens = None
        else:
            self._tokens = self._tokens + count + count_target(self._trainer, inputs, self._labels)

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

    def evaluated(
        self, step: int, metrics: Mapping[str, Any] | None, *, counts: bool = True
    ) -> dict[str, float]:
        """Return the numbers among the metrics of an evaluation, losses per label.

        It `counts` for the figures of the run unless it is made after the training.
        """
        numbers = {k: v for k, v in (metrics or {}).items() if isinstance(v, int | float)}
        for name in self._per_label.keys() & numbers.keys():
            put_per_label(numbers, name, self._per_label[name])
        self._per_label = {}
        if counts:
            self.held_out.append((step, numbers))
        return numbers

    def result(self, *, ended: bool) -> dict[str, Any]:
        """Return the held-out figures of the run; `ended`: training went to its end.

        Those of the last step are of another model than the one that is kept where Trainer has put
        the best weights in the place of the last ones.
        """
        losses = [loss for _, m in self.held_out if (loss := _loss(m)) is not None]
        found: dict[str, Any] = {
            "first_held_out_loss": losses[0] if losses else None,
            "last_held_out_loss": losses[-1] if losses else None,
            "last_held_out_scores": _scores(self.held_out[-1][1]) if self.held_out else None,
        }
        best = _best_step(self._trainer) if ended else None
        if best is not None:
            metrics = next((m for step, m in reversed(self.held_out) if step == best), {})
            found |= {
                "best_step": best,
                "best_held_out_loss": _loss(metrics),
                "best_held_out_scores": _scores(metrics),
            }
        return found


def _best_step(trainer: Trainer) -> int | None:
    """Step whose weights Trainer has loaded at the end; None where they are the last ones."""
    folder = trainer.state.best_model_checkpoint
    if not trainer.args.load_best_model_at_end or folder is None:
        return None
    step = Path(folder).name.rpartition("-")[2]
    return int(step) if step.isdecimal() and int(step) != trainer.state.global_step else None


def _loss(metrics: Mapping[str, float]) -> float | None:
    loss = metrics.get("eval_loss")
    return loss if isinstance(loss, float) else None


def _scores(metrics: Mapping[str, float]) -> dict[str, float] | None:
    return {n: metrics[f"eval_{n}"] for n in HELD_OUT_SCORES if f"eval_{n}" in metrics} or None
