"""The recorder in a transformers Trainer: a callback, and a listener where no callback hears."""

import functools
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lisa_analysis.contract.errors import ConfigError
from lisa_train.measure import faults
from lisa_train.measure.config import RecordConfig
from lisa_train.measure.disk.manifest import peak_memory_bytes
from lisa_train.measure.disk.run_file import status_of
from lisa_train.measure.processes import Processes
from lisa_train.measure.recorder import NormRecorder
from lisa_train.measure.session import RunSession
from lisa_train.methods.lisa.engine import Draw
from lisa_train.model.layer_cache import known_layers
from lisa_train.model.tensor_table import number_tensors
from lisa_train.private_names import check
from lisa_train.trainer.continuation import Continuation, warn_of_losses
from lisa_train.trainer.events import Listener, TrainerEvents
from lisa_train.trainer.lisa_callback import LisaCallback, draw_fields
from lisa_train.trainer.optimizer_callbacks import StepCallback
from lisa_train.trainer.parallel_checks import check_parallel
from lisa_train.trainer.probe_pass import TrainerProbes
from lisa_train.trainer.tally import Tally
from lisa_train.trainer.trackers import alert
from lisa_train.trainer.trainer_run import NO_BATCH, TrainerRun, need_batches

P = ParamSpec("P")
T = TypeVar("T")


def _recording(
    method: "Callable[Concatenate[RecordCallback, P], T]",
) -> "Callable[Concatenate[RecordCallback, P], T | None]":
    """Let a fault of this callback's own end the recording, not the training; see `faults`."""

    @functools.wraps(method)
    def wrapped(self: "RecordCallback", *args: P.args, **kwargs: P.kwargs) -> T | None:
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            if self.recorder is None or not faults.is_fault(error):
                raise
            self.recorder.failed(error)
            return None

    return wrapped


class RecordCallback(Listener, TrainerCallback):
    """Writes the run directory of any `transformers.Trainer` or subclass; see `attach`.

    Gradients are read after the last micro-batch of a step and before clipping, and everything is
    on the disk before a checkpoint is written. It listens while training lasts, and no longer.

    Parameters
    ----------
    trainer
        The trainer.
    config
        What to record, and where.
    lisa
        The LISA callback of the same trainer, whose draws become events.
    stepping
        The callback that steps inside backward, if the trainer has one, added before this.
    manifest
        Entries for run.json that the trainer does not know.
    config_yaml
        Content of config.yaml.
    resume
        Continue the run in the directory; also done when training resumes from a checkpoint.
    continuation
        What knows how a resumed training differs from the one that was interrupted.

    Raises
    ------
    ConfigError
        Under DeepSpeed, FSDP1 and DataParallel, whose gradients are out of reach, or without a run
        directory.
    """

    def __init__(
        self,
        trainer: Trainer,
        config: RecordConfig,
        *,
        lisa: LisaCallback | None = None,
        stepping: StepCallback | None = None,
        manifest: Mapping[str, Any] | None = None,
        config_yaml: str | None = None,
        resume: bool = False,
        continuation: Continuation | None = None,
    ) -> None:
        check_parallel(trainer, "the recorder")
        self._run = TrainerRun(
            trainer, config, manifest=manifest, config_yaml=config_yaml, resume=resume,
            continuation=continuation,
        )  # fmt: skip
        check("exceptions", *(["trainer probe"] if config.probe_every else []))
        self.config = config
        self.recorder: NormRecorder | None = None
        self._trainer = trainer
        self._events = TrainerEvents.of(trainer)
        self._stepping = stepping
        self._tally = Tally(trainer)
        self._probes = TrainerProbes(trainer, config, self._events.loss_scale)
        # Sharded and replicated tensors side by side are clipped in a way that shows no norm.
        self._sharded = bool(getattr(trainer, "is_fsdp_enabled", False))
        self._shown = -1.0  # the step whose norms trackers were shown last
        self._lisa: LisaCallback | None = None
        self._hear(lisa)

    def _hear(self, *callbacks: TrainerCallback | None) -> None:
        """Listen to the first LISA callback among some, unless one is known already."""
        for callback in callbacks:
            if self._lisa is None and isinstance(callback, LisaCallback):
                self._lisa = callback
                callback.on_draw.append(self._on_draw)
                callback.on_notice.append(self._on_notice)

    # ------------------------------------------------------------------ begin and end

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the run directory and take the first census."""
        began = time.perf_counter()
        need_batches(kwargs.get("train_dataloader"))
        self._events.unsubscribe(self)
        self._hear(*self._trainer.callback_handler.callbacks)  # added without a word to this one
        lisa = self._lisa.config if self._lisa else None
        if lisa is None:
            warn_of_losses(self._trainer, state, None)
        path = (lisa and lisa.layers) or self.config.layers
        layer_map = known_layers(self._trainer.model, path)
        table = number_tensors(self._trainer.model, layer_map, self.config.select)
        processes = Processes(table)
        self._sharded = self._sharded or processes.sharded
        self._probes.check(kwargs.get("train_dataloader"), sharded=self._sharded)
        # Not of a training that has ended, but of an attempt with a larger batch.
        earlier = self.recorder if self.recorder and not self.recorder.writer.closed else None
        self.recorder = None
        session = RunSession(self.config, processes)
        if not self._run.begin(session, earlier, state.global_step, layer_map, table, lisa):
            return
        if earlier is None:
            self._tally = Tally(self._trainer, self._run.tokens, self._run.held_out)
        self._tally.began = began
        self.recorder = NormRecorder(
            self._trainer.model,
            self._trainer.optimizer,
            self.config,
            layer_map=layer_map,
            table=table,
            step=state.global_step,
            step_in_backward=self._stepping.steps if self._stepping else None,
            began=began,
            session=session,
        )
        self.recorder.on_finding.append(functools.partial(alert, self._trainer))
        self._shown = -1.0
        self._events.subscribe(self)
        self._probes.begin(self.recorder, state.global_step)
        told = self._lisa.notices if self._lisa and earlier is None else []
        for text in (*self._run.notes(), *told):
            self.recorder.event("warning", state.global_step, message=text)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the last census and close the run."""
        if state.global_step == 0 and self.recorder is not None:
            raise ConfigError(f"no step was made: {NO_BATCH}")
        self.close()

    def close(self, error: BaseException | None = None) -> None:
        """End the recording; with `error` the run's status says how. Safe to call twice."""
        self._events.unsubscribe(self)
        if self.recorder is None:
            return
        status, sentence = status_of(error)
        if not self.recorder.writer.closed:
            self.recorder.close(status, sentence, **(self._result(ended=error is None) or {}))
        elif error is not None:
            self.recorder.session.restate(status, sentence)

    def ended(self, error: BaseException) -> None:
        """End the recording, unless training may go on in a retry."""
        if self._trainer.args.auto_find_batch_size:
            self._events.unsubscribe(self)
        else:
            self.close(error)

    @_recording
    def _result(self, *, ended: bool) -> dict[str, Any]:
        assert self.recorder is not None
        line = self.recorder.latest_scalars(wait=True)
        devices = {p.device for p in self._trainer.model.parameters()}
        result = {
            "steps": self._trainer.state.global_step,
            "tokens": line.get("tokens"),
            "seconds": round(time.perf_counter() - self._tally.began, 3),
            "recorder_seconds": round(self.recorder.seconds, 3),
            "loss": line.get("loss"),
            **self._tally.result(ended=ended),
            "peak_memory_bytes": peak_memory_bytes(*devices),
        }
        if self._lisa is not None and self._lisa.engine is not None:
            result |= self._lisa.engine.coverage
        return {name: value for name, value in result.items() if value is not None}

    def latest_scalars(self) -> dict[str, Any]:
        """Newest scalars that can be had without waiting for the device."""
        return {} if self.recorder is None else self.recorder.latest_scalars()

    # ------------------------------------------------------------------ every step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock and the sums of the step."""
        self._tally.begin_step()

    @_recording
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the update; the gradients are still there, the schedule has not moved on."""
        if self.recorder is None:
            return
        self.recorder.after_step(
            state.global_step + 1,
            skipped=self._events.loss_scale.skipped(),
            **self._tally.line(),
        )

    @_recording
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add what Trainer knows only now."""
        if self.recorder is None:
            return
        self.recorder.amend(epoch=state.epoch)
        self._probes.step_end(self.recorder, state.global_step)

    @_recording
    def finishing(self) -> None:
        """Measure the last weights before Trainer may put the best ones in their place.

        Whatever ended the training: its last step, or a callback after an evaluation.
        """
        if self.recorder is None:
            return
        step = self._trainer.state.global_step
        self._probes.finish(self.recorder, step)
        self.recorder.census(step)

    @_recording
    def batch_taken(self, inputs: Any) -> None:
        """Count what the batch holds, which a trainer may change."""
        self._tally.batch_taken(inputs)

    @_recording
    def micro_batch(self, step: int, loss: torch.Tensor, items: Any, *, last: bool) -> None:
        """Add up the loss of the step."""
        self._tally.micro_batch(loss, items)
        if not last and self.recorder is not None:
            self.recorder.micro_batch(step)

    @_recording
    def gradients_ready(self, step: int, inputs: Any, scale: torch.Tensor | float) -> None:
        """Measure the gradients."""
        assert self.recorder is not None
        self.recorder.before_step(step, gradient_scale=scale, undo=not self._sharded)
        self._probes.gradients_ready(step, inputs)

    @_recording
    def clipped(self, max_norm: float, norm: Any) -> None:
        """Take note of the gradients' norm, and of the factor that clipping put on them."""
        self._tally.clipped(max_norm, norm)

    # ------------------------------------------------------------------ events

    @_recording
    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write held-out metrics as an event."""
        if self.recorder is None:
            return
        late = self.recorder.writer.closed  # of other data, or of the best weights
        numbers = self._tally.evaluated(state.global_step, metrics, counts=not late)
        marked = {"after_training": True} if late else {}
        self.recorder.event("evaluate", state.global_step, metrics=numbers, **marked)

    @_recording
    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Announce the checkpoint; what it stands on is on the disk already."""
        if self.recorder is None:
            return
        path = self._run.checkpoint_path(state.global_step)
        self.recorder.event("checkpoint", state.global_step, path=path)
        self.recorder.flush()

    def saving(self, step: int) -> None:
        """Put everything on the disk before the checkpoint is."""
        if self.recorder is not None:
            self.recorder.checkpoint(step)

    def logging(self) -> Mapping[str, float]:
        """Give the trackers a few numbers of the newest step that is written."""
        asked = self._trainer.args.report_to or self.config.report_layers
        if self.recorder is None or not asked:
            return {}
        found = self.recorder.aggregates
        newest = found.get("recorded_step", 0.0)
        if self.config.report_layers and newest == self._shown:
            return {}  # these are in the log already
        self._shown = newest
        return found

    def evaluating(self, prefix: str) -> AbstractContextManager[object]:
        """Sum the held-out loss per label."""
        return self._tally.evaluating(prefix)

    @_recording
    def _on_draw(self, draw: Draw) -> None:
        if self.recorder is not None:
            self.recorder.event("lisa_draw", draw.step, **draw_fields(draw))

    def _on_notice(self, notice: str) -> None:
        if self.recorder is None or self._lisa is None:
            return
        if self.recorder.writer.closed and notice in self._lisa.notices:
            return  # of the training that begins, whose run is not open yet
        self.recorder.event("warning", self._trainer.state.global_step, message=notice)
