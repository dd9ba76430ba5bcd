"""LISA in a transformers Trainer: the engine as one callback."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lisa_analysis.contract.errors import ConfigError
from lisa_train.methods.lisa.config import LisaConfig
from lisa_train.methods.lisa.engine import Lisa, Plan
from lisa_train.methods.lisa.learning.online import Passes
from lisa_train.methods.lisa.schedule import Draw
from lisa_train.model.layer_cache import known_layers
from lisa_train.model.parallel import refuse_unproved
from lisa_train.private_names import check
from lisa_train.trainer.events import Listener, TrainerEvents, calling_trainer
from lisa_train.trainer.learning import ProbeSource, check_learning, needs_passes
from lisa_train.trainer.parallel_checks import check_lisa_processes

# Where the engine's state lies in a checkpoint's trainer_state.json. Not an `ExportableState`:
# Trainer restores those only on request, by building a new callback without listeners.
STATE_KEY = "lisa_toolkit"
# Beside it with precision="fp32_active": what a bf16 model cannot hold.
TENSORS_FILE = "lisa.pt"

logger = logging.getLogger(__name__)


class LisaCallback(Listener, TrainerCallback):
    """Trains a few layers at a time in any `transformers.Trainer` or subclass.

    The state of the engine travels in `trainer_state.json` of every checkpoint, and a resumed
    run goes on from it. When training ends, by an exception too, every `requires_grad` flag is
    as it was before.

    Parameters
    ----------
    config
        The settings; None takes the defaults.
    trainer
        The trainer that it is added to; None looks for it when training begins, among those who
        call, as Trainer hands its callbacks all but itself (`attach` hands it over).
    plan
        What was settled about the trainer's model before.

    Attributes
    ----------
    engine
        The running `Lisa`, None before training begins.
    on_draw
        Listeners, called with every `lisa_train.methods.lisa.schedule.Draw`.
    on_notice
        Listeners, called with every sentence that the engine says.
    notices
        What the engine said when this training began, for whoever listens only later.
    checkpoint
        Folder that training resumes from, where that is not `output_dir/checkpoint-<step>`.
    """

    def __init__(
        self,
        config: LisaConfig | None = None,
        *,
        trainer: Trainer | None = None,
        plan: Plan | None = None,
    ) -> None:
        check("exceptions")
        self.config = config or LisaConfig()
        self.engine: Lisa | None = None
        self.on_draw: list[Callable[[Draw], None]] = []
        self.on_notice: list[Callable[[str], None]] = []
        self.notices: list[str] = []
        self.checkpoint: Path | None = None
        self._trainer = trainer
        # Not the plan itself, which would hold the tensors of a model that is replaced.
        self._planned = None if plan is None else (plan.layer_map, plan.loaded_config())
        self._starts = False
        self._events: TrainerEvents | None = None
        self._probe: ProbeSource | None = None

    def close(self) -> None:
        """End LISA: every `requires_grad` flag is as it was before training."""
        if self.engine is not None:
            self.engine.close()
        self.notices.clear()
        if self._events is not None:
            self._events.unsubscribe(self)
        if self._probe is not None:
            self._probe.close()

    def ended(self, error: BaseException) -> None:
        """End LISA when an exception leaves the training."""
        self.close()

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
        trainer = self._trainer or calling_trainer(self)
        check_lisa_processes(trainer, self.config)
        probe = self._probe_source(trainer)
        self._starts = True
        planned, loaded = self._planned or (None, self.config)
        # Where nothing is planned the engine looks for them, once it knows that the model will do.
        layer_map = None if planned is None else known_layers(model, self.config.layers)
        self.engine = Lisa(
            model,
            optimizer,
            loaded if layer_map is planned else self.config,
            layer_map=layer_map,
            seed=args.seed,
            total_steps=state.max_steps,
            on_draw=self._tell,
            on_notice=self._pass_on,
            averages=not _has_ddp(trainer.model_wrapped),
            probe=None if probe is None else self._passes(probe),
        )
        self._starts = False
        from lisa_train.trainer.continuation import warn_of_losses  # it knows this module

        self._check_wrapped(trainer.model_wrapped)
        warn_of_losses(trainer, state, self.config)
        self._events = TrainerEvents.of(trainer)
        self._events.subscribe(self)
        if probe is not None:
            probe.listen(self.engine.probes_at)
        if (saved := state.stateful_callbacks.get(STATE_KEY)) is not None:
            self.engine.load_state_dict(saved)
            if self.config.precision == "fp32_active":
                self._load_tensors(self.checkpoint or _folder(args, state))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw, when a period begins; never between micro-batches."""
        assert self.engine is not None
        self.engine.begin_step(state.global_step)

    def micro_batch(self, step: int, loss: torch.Tensor, items: Any, *, last: bool) -> None:
        """Average the gradients of all processes, before anybody looks at them or clips."""
        if last and self.engine is not None:
            self.engine.average_gradients()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the engine's state where a checkpoint of this step picks it up."""
        assert self.engine is not None
        self.engine.finish_step(state.global_step)
        # What is learned from may still be on an accelerator, which `saving` alone waits for.
        if self.config.learn is None or self._events is None:
            state.stateful_callbacks[STATE_KEY] = self.engine.state_dict()

    def saving(self, step: int) -> None:
        """Leave the engine's state for the checkpoint that is about to be written."""
        if self.engine is not None and self._events is not None:
            state = self._events.trainer.state
            state.stateful_callbacks[STATE_KEY] = self.engine.state_dict()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the fp32 tensors beside the checkpoint of a bf16 model."""
        assert self.engine is not None
        if self.config.precision != "fp32_active":
            return
        tensors = self.engine.tensors()  # split ones are put together by all processes
        if state.is_world_process_zero:
            torch.save(tensors, _folder(args, state) / TENSORS_FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the engine; flags are restored."""
        self.close()

    def _probe_source(self, trainer: Trainer) -> ProbeSource | None:
        """Return what measuring passes of all layers are made with, if they are to be made."""
        learn = self.config.learn
        if learn is None:
            return None
        check_learning(trainer, learn)
        self._probe = ProbeSource(trainer) if needs_passes(trainer, learn) else None
        return self._probe

    def _passes(self, source: ProbeSource) -> Passes:
        """Return the measuring passes of the metric."""
        learn = self.config.learn
        halves = learn is not None and learn.metric == "signal"
        return (source.first_half, source.second_half) if halves else source.run

    def _tell(self, draw: Draw) -> None:
        for listener in self.on_draw:
            listener(draw)

    def _check_wrapped(self, model: nn.Module) -> None:
        """Refuse what only the wrapped model shows, of which Trainer hands on the inside."""
        assert self.engine is not None
        try:
            refuse_unproved(model, rotates=self.engine.rotates)
        except ConfigError:
            self.close()
            raise

    def _pass_on(self, notice: str) -> None:
        if self._starts:
            self.notices.append(notice)
        for listener in self.on_notice:
            listener(notice)

    def _load_tensors(self, checkpoint: Path) -> None:
        assert self.engine is not None
        file = checkpoint / TENSORS_FILE
        if file.is_file():
            self.engine.load_tensors(torch.load(file, map_location="cpu", weights_only=True))
        else:
            logger.warning(
                "%s is missing: the active layers go on from weights rounded to bf16", file
            )


def _has_ddp(model: nn.Module) -> bool:
    return any(isinstance(module, DistributedDataParallel) for module in model.modules())


def draw_fields(draw: Draw) -> dict[str, Any]:
    """Fields of a run's event about a draw."""
    common = {
        "layers": draw.layers,
        "groups": draw.groups,
        "update_factors": draw.update_factors,
        "trainable_share": draw.trainable_share,
        "state_bytes": draw.state_bytes,
    }
    if draw.units is not None:  # these are of parts then
        return common | {
            "units": draw.units,
            "unit_probabilities": draw.inclusion_probabilities,
            "unit_scores": draw.scores,
            "unit_visits": draw.visits,
        }
    return common | {
        "inclusion_probabilities": draw.inclusion_probabilities,
        "scores": draw.scores,
        "visits": draw.visits,
    }


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Checkpoint folder of the present step."""
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
