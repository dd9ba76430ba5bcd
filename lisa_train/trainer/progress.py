"""Progress of a training run: loss, active layers, time left; bar, notebook cell, or lines."""

import math
import sys
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lisa_train.trainer.progress_html import progress_page


class _Progress(TrainerCallback):
    """What both forms share: where the numbers come from, and a line per evaluation.

    Parameters
    ----------
    latest
        Returns the newest scalars of the run (loss, learning_rate, …); may be empty.
    active_layers
        Returns the layers that train at the moment, or None when there is no such choice.
    """

    def __init__(
        self,
        latest: Callable[[], dict[str, Any]],
        active_layers: Callable[[], tuple[int, ...] | None],
    ) -> None:
        self._latest = latest
        self._active_layers = active_layers

    def shown(self) -> dict[str, str]:
        """Loss and active layers as text, as far as they are known."""
        found: dict[str, str] = {}
        if (loss := self._latest().get("loss")) is not None:
            found["loss"] = f"{loss:.3f}"
        if (layers := self._active_layers()) is not None:
            found["layers"] = layers_in_words(layers)
        return found

    def write(self, line: str) -> None:
        """Write a line of its own."""
        print(line, file=sys.stderr, flush=True)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        loss = (metrics or {}).get("eval_loss")
        if state.is_world_process_zero and loss is not None:
            self.write(f"step {state.global_step}: held-out loss {loss:.4f}")


class ProgressBar(_Progress):
    """Shows a tqdm bar in a terminal."""

    _bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        from tqdm import tqdm

        if state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                dynamic_ncols=True,
                smoothing=0.1,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.set_postfix(self.shown(), refresh=False)
            self._bar.update(state.global_step - self._bar.n)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def write(self, line: str) -> None:
        """Write a line above the bar."""
        if self._bar is None:
            super().write(line)
        else:
            self._bar.write(line, file=sys.stderr)


class ProgressCell(_Progress):
    """Shows a bar and the loss curve in a notebook, as HTML that stays in the saved notebook.

    No widget: those need a package and a running kernel to be seen.
    """

    SECONDS = 0.5  # between two drawings
    MOST = 600  # points of the curve
    _handle: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        from IPython.display import HTML, display

        self._training: list[tuple[int, float]] = []
        self._held_out: list[tuple[int, float]] = []
        self._began, self._first, self._drawn = time.monotonic(), state.global_step, 0.0
        if state.is_world_process_zero:
            self._handle = display(HTML("<progress></progress>"), display_id=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        loss = self._latest().get("loss")
        if loss is not None and math.isfinite(loss):
            self._training.append((state.global_step, float(loss)))
        if len(self._training) > self.MOST:
            del self._training[1::2]
        if time.monotonic() - self._drawn > self.SECONDS:
            self._draw(state, done=False)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        loss = (metrics or {}).get("eval_loss")
        if loss is not None and math.isfinite(loss):
            self._held_out.append((state.global_step, float(loss)))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._draw(state, done=True)

    def _draw(self, state: TrainerState, *, done: bool) -> None:
        if self._handle is None:
            return
        from IPython.display import HTML

        taken = time.monotonic() - self._began
        pace = taken / max(1, state.global_step - self._first)
        left = pace * (state.max_steps - state.global_step)
        words = f"{taken:.0f} s" if done else f"{left:.0f} s left"
        page = progress_page(
            state.global_step, state.max_steps, self.shown(), self._training, self._held_out, words
        )
        self._handle.update(HTML(page))
        self._drawn = time.monotonic()


class ProgressLines(_Progress):
    """Prints about ten lines over a run, where the output is no terminal (a cluster's log file)."""

    LINES = 10
    _start = (0.0, 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = (time.monotonic(), state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        every = max(1, state.max_steps // self.LINES)
        if not state.is_world_process_zero or state.global_step % every:
            return
        began, first = self._start
        pace = (time.monotonic() - began) / max(1, state.global_step - first)
        parts = [f"step {state.global_step}/{state.max_steps}"]
        parts += [f"{name} {text}" for name, text in self.shown().items()]
        parts.append(f"{pace * (state.max_steps - state.global_step):.0f} s left")
        self.write(", ".join(parts))


class EvaluateAtEnd(TrainerCallback):
    """Asks for an evaluation after the last step, once, whatever `eval_steps` says."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
        return control


class FirstStep(TrainerCallback):
    """Knows whether training has come as far as its first step."""

    begun = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begun = True


def layers_in_words(layers: tuple[int, ...]) -> str:
    """Return ``3,17`` for a few layers, ``12 of them`` for many."""
    return ",".join(map(str, layers)) if len(layers) <= 6 else f"{len(layers)} of them"
