"""LISA in a transformers Trainer: the engine as one callback."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lisa_train.config import LisaConfig
from lisa_train.lisa import Draw, Lisa

# Where the engine's state lies in a checkpoint's trainer_state.json. Not an `ExportableState`:
# Trainer restores those only on request, by building a new callback without listeners.
STATE_KEY = "lisa_toolkit"


class LisaCallback(TrainerCallback):
    """Trains a few layers at a time in any `transformers.Trainer` or subclass.

    The state of the engine travels in `trainer_state.json` of every checkpoint, and a resumed
    run goes on from it. Trainer tells its callbacks nothing of an exception: `attach` restores
    the `requires_grad` flags then, and so does calling `close`.

    Parameters
    ----------
    config
        The settings; None takes the defaults.

    Attributes
    ----------
    engine
        The running `Lisa`, None before training begins.
    on_draw
        Listeners, called with every `lisa_train.lisa.Draw`.
    """

    def __init__(self, config: LisaConfig | None = None) -> None:
        self.config = config or LisaConfig()
        self.engine: Lisa | None = None
        self.on_draw: list[Callable[[Draw], None]] = []

    def close(self) -> None:
        """End LISA: every `requires_grad` flag is as it was before training."""
        if self.engine is not None:
            self.engine.close()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Start the engine, or continue the one that the checkpoint holds."""
        assert model is not None
        self.close()  # a run that was stopped by an exception, or a retry with a smaller batch
        self.engine = Lisa(
            model,
            optimizer,
            self.config,
            seed=args.seed,
            total_steps=state.max_steps,
            on_draw=self._tell,
        )
        if (saved := state.stateful_callbacks.get(STATE_KEY)) is not None:
            self.engine.load_state_dict(saved)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw, when an interval begins; never between micro-batches."""
        assert self.engine is not None
        self.engine.begin_step(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the engine's state where a checkpoint of this step picks it up."""
        assert self.engine is not None
        state.stateful_callbacks[STATE_KEY] = self.engine.state_dict()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the engine; flags are restored."""
        self.close()

    def _tell(self, draw: Draw) -> None:
        for listener in self.on_draw:
            listener(draw)
