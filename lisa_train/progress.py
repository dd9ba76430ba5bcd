"""Progress of a training run: loss, active layers, time left; a bar, or lines in a log file."""

import sys
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressBar(TrainerCallback):
    """Shows a tqdm bar (a widget in a notebook) and says each held-out loss on a line of its own.

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
        self._bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        from tqdm.auto import tqdm

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
        if self._bar is None:
            return
        shown: dict[str, str] = {}
        if (loss := self._latest().get("loss")) is not None:
            shown["loss"] = f"{loss:.3f}"
        if (layers := self._active_layers()) is not None:
            shown["layers"] = layers_in_words(layers)
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(state.global_step - self._bar.n)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        loss = (metrics or {}).get("eval_loss")
        if self._bar is not None and loss is not None:
            self._bar.write(f"step {state.global_step}: held-out loss {loss:.4f}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it stands; safe to call twice."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def layers_in_words(layers: tuple[int, ...]) -> str:
    """``3,17`` for a few layers, ``12 of them`` for many."""
    return ",".join(map(str, layers)) if len(layers) <= 6 else f"{len(layers)} of them"


class ProgressLines(TrainerCallback):
    """Prints about ten lines over a run, for a terminal that is none (a cluster's log file).

    Parameters are those of `ProgressBar`.
    """

    LINES = 10

    def __init__(
        self,
        latest: Callable[[], dict[str, Any]],
        active_layers: Callable[[], tuple[int, ...] | None],
    ) -> None:
        self._latest = latest
        self._active_layers = active_layers
        self._start = (0.0, 0)

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
        if (loss := self._latest().get("loss")) is not None:
            parts.append(f"loss {loss:.3f}")
        if (layers := self._active_layers()) is not None:
            parts.append(f"layers {layers_in_words(layers)}")
        parts.append(f"{pace * (state.max_steps - state.global_step):.0f} s left")
        print(", ".join(parts), file=sys.stderr, flush=True)

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
            line = f"step {state.global_step}: held-out loss {loss:.4f}"
            print(line, file=sys.stderr, flush=True)


class EvaluateAtEnd(TrainerCallback):
    """Asks for an evaluation after the last step, once, whatever `eval_steps` says."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
        return control
