"""The recorder in a transformers Trainer: one callback, and wraps where no callback reaches."""

import functools
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lisa_analysis.contract.errors import ConfigError
from lisa_analysis.contract.schema import MANIFEST
from lisa_analysis.rundir.run import load
from lisa_train.measure import faults
from lisa_train.measure.config import RecordConfig
from lisa_train.measure.disk.manifest import manifest as describe
from lisa_train.measure.disk.manifest import peak_memory_bytes
from lisa_train.measure.disk.outcome import one_sentence, outcome
from lisa_train.measure.disk.silent_writer import SilentWriter
from lisa_train.measure.disk.storage import HeldError
from lisa_train.measure.disk.writer import RunWriter
from lisa_train.measure.processes import Processes
from lisa_train.measure.recorder import NormRecorder, warn_unrecorded
from lisa_train.measure.tokens import count_tokens
from lisa_train.methods.lisa.engine import Draw
from lisa_train.model.layer_map import find_layers
from lisa_train.model.run_entries import joined, lisa_entries
from lisa_train.model.tensor_table import TensorTable
from lisa_train.private_names import check
from lisa_train.trainer.continuation import Continuation, warn_of_losses
from lisa_train.trainer.lisa_callback import LisaCallback
from lisa_train.trainer.loss_scale import LossScale
from lisa_train.trainer.losses import StepLoss, count_labels, held_out_loss, put_per_label
from lisa_train.trainer.parallel_checks import check_parallel
from lisa_train.trainer.step_callback import StepCallback
from lisa_train.trainer.unwinding import on_exception
from lisa_train.trainer.wraps import Wraps, plain_state_kept

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


_NO_BATCH = (
    "the training data give no batch; give at least as many examples as a batch has, or set "
    "dataloader_drop_last to false."
)

_ROUNDED = (
    "delta_norm of step {} is that of the checkpoint, whose active layers are in fp32; after it "
    "they were rounded to bfloat16, and the final model differs by that rounding."
)


class RecordCallback(TrainerCallback):
    """Writes the run directory of any `transformers.Trainer` or subclass; see `attach`.

    Gradients are read after the last micro-batch of a step and before clipping, by wrapping
    `training_step` of this trainer; the clip norm by wrapping its accelerator's
    `clip_grad_norm_`; and everything is on the disk before `save_model` writes a checkpoint.
    The wraps go when training ends, by an exception too.

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
        check_parallel(trainer, "the recorder", sharded=True)
        if config.run_dir is None:
            raise ConfigError("record.run_dir is not set: name the folder to write.")
        check("exceptions", *(["trainer probe"] if config.probe_every else []))
        self.config = config
        self.recorder: NormRecorder | None = None
        self._trainer = trainer
        self._run_dir = Path(config.run_dir)
        self._lisa = lisa
        self._stepping = stepping
        self._manifest = dict(manifest or {})
        self._config_yaml = config_yaml
        self._resume = resume
        self._continuation = continuation
        self._wraps = Wraps()
        self._watch = Wraps()
        self._ended: tuple[str, str | None] | None = None
        self._early_draws: list[Draw] = []
        self._early_notices: list[str] = []
        self._held_out: list[float] = []
        self._tokens: Any = 0
        self._loss = StepLoss()
        self._per_label: dict[str, float | None] = {}
        self._norm: torch.Tensor | None = None
        self._scale = LossScale(trainer)
        self._probe_inputs: Any = None
        # Sharded and replicated tensors side by side are clipped in a way that shows no norm.
        self._sharded = bool(getattr(trainer, "is_fsdp_enabled", False))
        self._clip_coef: torch.Tensor | None = None
        self._step_began = self._began = time.monotonic()
        if lisa is not None:
            lisa.on_draw.append(self._on_draw)
            lisa.on_notice.append(self._on_notice)

    def _find_lisa(self) -> None:
        """Take up a LISA callback that was added to the trainer without a word to this one."""
        for callback in self._trainer.callback_handler.callbacks:
            if self._lisa is None and isinstance(callback, LisaCallback):
                self._lisa = callback
                callback.on_draw.append(self._on_draw)

    # ------------------------------------------------------------------ begin and end

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the run directory and take the first census."""
        opening = time.perf_counter()
        _need_batches(kwargs.get("train_dataloader"))
        self._unwrap()
        self._find_lisa()
        self._began = time.monotonic()
        if self._lisa is None:
            warn_of_losses(self._trainer, state, None)
        model = self._trainer.model
        chosen = self._lisa.config.layers if self._lisa else None
        layer_map = find_layers(model, chosen or self.config.layers)
        table = TensorTable(model, layer_map, self.config.select)
        processes = Processes(table)
        self._sharded = self._sharded or processes.sharded
        problem: Exception | None = None
        writer: RunWriter | SilentWriter | None = None
        try:
            writer = self._open(state, args, layer_map, table, first=processes.first)
        except Exception as error:
            problem = error
        if not processes.agree(problem is None):
            earlier, self.recorder = self.recorder, None
            if earlier is not None:  # of an attempt with a larger batch
                earlier.close("failed", one_sentence(problem) if problem else None)
            self._unrecorded(problem)
            return
        self.recorder = NormRecorder(
            model,
            self._trainer.optimizer,
            self.config,
            writer,
            layer_map,
            table=table,
            step=state.global_step,
            step_in_backward=self._stepping.steps if self._stepping else None,
            began=opening,
        )
        self._wrap()
        for note in self._continuation.notes if self._continuation else ():
            self.recorder.event("warning", state.global_step, message=note)
        for draw in self._early_draws:
            self._on_draw(draw)
        for notice in self._early_notices:
            self._on_notice(notice)
        self._early_draws, self._early_notices = [], []

    def _unrecorded(self, problem: Exception | None) -> None:
        """Refuse to train, or train without a recording where the disk is to blame."""
        if problem is None:
            return  # the first process says it
        # A directory that holds a run is refused whatever `on_record_error` says: nothing has
        # begun yet, and the run that the user wants may be the one to continue.
        # Nor may checkpoints go into the directory that another process fills with its own.
        output = Path(self._trainer.args.output_dir or ".").resolve()
        shared = isinstance(problem, HeldError) and output.is_relative_to(self._run_dir.resolve())
        stops = faults.stops_training(problem, self.config.on_record_error)
        if stops or faults.is_refusal(problem) or shared:
            raise problem
        warn_unrecorded(problem)

    def _open(
        self,
        state: TrainerState,
        args: TrainingArguments,
        layer_map: Any,
        table: Any,
        *,
        first: bool,
    ) -> RunWriter | SilentWriter:
        step = state.global_step
        if self.recorder is not None and not self.recorder.writer.closed:
            # The trainer begins again with a smaller batch.
            self.recorder.writer.begin_segment(step, parts=self._parts(args))
            return self.recorder.writer
        resume = self._resume or (step > 0 and (self._run_dir / MANIFEST).exists())
        if not first:
            return SilentWriter(int(resume))
        writer = RunWriter(
            self._run_dir,
            manifest=self._entries(table, layer_map, args),
            parameters=table.rows,
            config_yaml=self._config_yaml,
            resume=resume,
            step=step,
            checkpoint=self._checkpoint_path(args, step) if step else None,
            parts=self._parts(args),
            resumed=self._resumed(args),
        )
        if resume:
            self._continue(step)
        return writer

    def _parts(self, args: TrainingArguments) -> dict[str, Any]:
        return self._continuation.parts(args) if self._continuation else {}

    def _resumed(self, args: TrainingArguments) -> dict[str, Any]:
        """Fields of the event `resume`: what goes on, and what is not as it was."""
        found: dict[str, Any] = {"processes": args.world_size}
        if self._continuation is not None:
            found["changes"] = self._continuation.changes or None
            found["missing"] = self._continuation.missing or None
        return found

    def _entries(self, table: Any, layer_map: Any, args: Any) -> dict[str, Any]:
        """Entries of run.json, the same for every way that a trainer is built."""
        entries = describe(self._trainer.model, self.config, table, layer_map)
        data_seed = args.seed if args.data_seed is None else args.data_seed
        known: dict[str, Any] = {
            "hardware": {"processes": args.world_size},
            "seeds": {"seed": args.seed, "data_seed": data_seed},
        }
        if self._lisa is not None:  # whose engine may start after this
            known = joined(known, lisa_entries(self._lisa.config, args.seed))
        return joined(joined(entries, known), self._manifest)

    def _continue(self, step: int) -> None:
        """Take up the running totals where the earlier segments left them."""
        run = load(self._run_dir)
        tokens = run.scalars.loc[run.scalars["step"] <= step, "tokens"].dropna()
        self._tokens = int(tokens.iloc[-1]) if len(tokens) else 0
        events = run.events
        if "metrics" in events:
            metrics = events.loc[events["event"] == "evaluate", "metrics"]
            found = [m.get("eval_loss") for m in metrics if isinstance(m, dict)]
            self._held_out = [x for x in found if isinstance(x, float)]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the last census and close the run."""
        if state.global_step == 0 and self.recorder is not None:
            raise ConfigError(f"no step was made: {_NO_BATCH}")
        step, rounded = state.global_step, self._rounded_at_the_end(args)
        done = self.recorder is not None and self.recorder.census_step == step
        if self.recorder is not None and done and rounded and self.config.base_delta:
            # The rows are on the disk, with the checkpoint, and are never rewritten.
            self.recorder.event("warning", step, message=_ROUNDED.format(step))
        self.close()

    def close(self, error: BaseException | None = None) -> None:
        """End the recording; with `error` the run's status says how. Safe to call twice."""
        self._unwrap()
        if self.recorder is None:
            return
        status, sentence = outcome(error)
        if self.recorder.writer.closed:
            if error is not None and (status, sentence) != self._ended:
                self._restate(status, sentence)
            return
        self._ended = (status, sentence)
        self.recorder.close(status, sentence, **(self._result() or {}))

    def _restate(self, status: str, sentence: str | None) -> None:
        """Correct a closed run's end; the error that is on its way matters more than the disk's."""
        assert self.recorder is not None
        try:
            self.recorder.writer.update_manifest(status=status, error=sentence)
        except Exception as failure:
            faults.come_through(failure)
            text = faults.warning_text(f"Recording: {faults.reason(failure)}", failure)
            warnings.warn(text, RuntimeWarning, stacklevel=4)

    @_recording
    def _result(self) -> dict[str, Any]:
        assert self.recorder is not None
        line = self.recorder.latest_scalars(wait=True)
        devices = {p.device for p in self._trainer.model.parameters()}
        result = {
            "steps": self._trainer.state.global_step,
            "tokens": line.get("tokens"),
            "seconds": round(time.monotonic() - self._began, 3),
            "recorder_seconds": round(self.recorder.seconds, 3),
            "loss": line.get("loss"),
            "first_held_out_loss": self._held_out[0] if self._held_out else None,
            "last_held_out_loss": self._held_out[-1] if self._held_out else None,
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
        self._step_began = time.monotonic()
        self._loss, self._norm, self._clip_coef = StepLoss(), None, None

    @_recording
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the update; the gradients are still there, the schedule has not moved on."""
        if self.recorder is None:
            return
        self.recorder.after_step(
            state.global_step + 1,
            clip_coef=self._clip_coef,
            skipped=self._scale.skipped(),
            labels=self._loss.labels,
            loss=self._loss.value,
            grad_norm=self._norm,
            tokens=self._tokens,
            step_seconds=time.monotonic() - self._step_began,
        )

    @_recording
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add what Trainer knows only now."""
        if self.recorder is None:
            return
        self.recorder.amend(epoch=state.epoch)
        if self._probe_inputs is not None:
            inputs, self._probe_inputs = self._probe_inputs, None
            scale = self._scale.now(args.device)
            self.recorder.probe(
                state.global_step,
                lambda: self._probe_pass(inputs, scale),
                gradient_scale=1.0 if scale is None else scale,
            )
        if control.should_training_stop and not self._rounded_at_the_end(args):
            # Trainer may put the best weights in the place of the last ones before it ends.
            self.recorder.census(state.global_step)

    def _rounded_at_the_end(self, args: TrainingArguments) -> bool:
        """Whether the engine changes the last weights when training ends, before this callback.

        The last census is that of the weights that stay, unless a checkpoint took one before.
        """
        return (
            self._lisa is not None
            and self._lisa.config.precision == "fp32_active"
            and not args.load_best_model_at_end
        )

    def _probe_pass(self, inputs: Any, scale: torch.Tensor | None) -> None:
        """One forward and backward pass of the bare model, of the loss that the trainer trains.

        The batch counts as a whole step's, so that the gradient is a mean over its own items,
        however many micro-batches a step has. Nothing that the trainer counts moves.
        """
        trainer = self._trainer
        with plain_state_kept(trainer):
            trainer.current_gradient_accumulation_steps = 1
            items = trainer._get_num_items_in_batch([inputs], trainer.args.device)
            batch = trainer._prepare_inputs(inputs)
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)
            loss = loss.mean()
            (loss if scale is None else loss * scale.to(loss.device)).backward()

    @_recording
    def _after_training_step(self, inputs: Any, loss: torch.Tensor) -> None:
        assert self.recorder is not None
        accelerator, step = self._trainer.accelerator, self._trainer.state.global_step + 1
        if not accelerator.sync_gradients:
            self.recorder.micro_batch(step)
            return
        # Until clipping the gradients carry the loss scale.
        scale = self._scale.before_step(loss.device)
        self.recorder.before_step(step, gradient_scale=scale, undo=not self._sharded)
        if self.config.probe_every and step % self.config.probe_every == 0:
            self._probe_inputs = inputs

    @_recording
    def _after_clipping(self, max_norm: float, norm: Any) -> None:
        if not torch.is_tensor(norm):
            return
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self._norm = norm.detach()
        # The same expression as in torch.nn.utils.clip_grads_with_norm_.
        self._clip_coef = (max_norm / (self._norm + 1e-6)).clamp(max=1.0)

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
        numbers = {k: v for k, v in (metrics or {}).items() if isinstance(v, int | float)}
        for name in self._per_label.keys() & numbers.keys():
            put_per_label(numbers, name, self._per_label[name])
        self._per_label = {}
        if isinstance(loss := numbers.get("eval_loss"), float):
            self._held_out.append(loss)
        self.recorder.event("evaluate", state.global_step, metrics=numbers)

    @_recording
    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Announce the checkpoint; what it stands on is on the disk already."""
        if self.recorder is None:
            return
        path = self._checkpoint_path(args, state.global_step)
        self.recorder.event("checkpoint", state.global_step, path=path)
        self.recorder.flush()

    def _checkpoint_path(self, args: TrainingArguments, step: int) -> str:
        path = os.path.join(args.output_dir or ".", f"checkpoint-{step}")
        return Path(os.path.relpath(path, self._run_dir)).as_posix()

    @_recording
    def _on_draw(self, draw: Draw) -> None:
        if self.recorder is None:
            self._early_draws.append(draw)
            return
        self.recorder.event(
            "lisa_draw",
            draw.step,
            layers=draw.layers,
            groups=draw.groups,
            inclusion_probabilities=draw.inclusion_probabilities,
            visits=draw.visits,
            trainable_share=draw.trainable_share,
            state_bytes=draw.state_bytes,
        )

    def _on_notice(self, notice: str) -> None:
        if self.recorder is None:
            self._early_notices.append(notice)
            return
        self.recorder.event("warning", self._trainer.state.global_step, message=notice)

    # ------------------------------------------------------------------ wraps

    def _wrap(self) -> None:
        trainer, accelerator = self._trainer, self._trainer.accelerator

        def training_step(
            original: Callable[..., Any], model: Any, inputs: Any, *a: Any, **k: Any
        ) -> Any:
            count = count_tokens(inputs)
            self._tokens = None if count is None or self._tokens is None else self._tokens + count
            labels = count_labels(trainer, inputs)
            loss = original(model, inputs, *a, **k)
            items = a[0] if a else k.get("num_items_in_batch")
            self._loss.add(trainer, loss, labels, items)
            self._after_training_step(inputs, loss)
            return loss

        def clip(
            original: Callable[..., Any], parameters: Any, max_norm: float, *a: Any, **k: Any
        ) -> Any:
            norm = original(parameters, max_norm, *a, **k)
            self._after_clipping(max_norm, norm)
            return norm

        def save_model(original: Callable[..., Any], *a: Any, **k: Any) -> Any:
            if self.recorder is not None and trainer.is_in_train:
                self.recorder.checkpoint(trainer.state.global_step)
            return original(*a, **k)

        def log(original: Callable[..., Any], logs: dict[str, float], *a: Any, **k: Any) -> Any:
            if "loss" in logs and self.recorder is not None:
                logs = {**logs, **self.recorder.aggregates}
            return original(logs, *a, **k)

        def evaluation_loop(original: Callable[..., Any], *a: Any, **k: Any) -> Any:
            with held_out_loss(trainer) as sums:
                output = original(*a, **k)
            if sums.known:
                name = f"{k.get('metric_key_prefix', 'eval')}_loss"
                self._per_label = {name: sums.value(trainer)}
            return output

        self._wraps.put(trainer, "training_step", training_step)
        self._wraps.put(trainer, "evaluation_loop", evaluation_loop)
        if trainer.args.report_to:
            self._wraps.put(trainer, "log", log)
        self._wraps.put(accelerator, "clip_grad_norm_", clip)
        self._wraps.put(trainer, "save_model", save_model)
        self._watch = on_exception(trainer, self._on_exception)

    def _unwrap(self) -> None:
        self._wraps.take_off()
        self._watch.take_off()

    def _on_exception(self) -> None:
        """End the recording, of which Trainer tells nothing, unless it may go on in a retry."""
        if self._trainer.args.auto_find_batch_size:
            self._unwrap()
        else:
            self.close(sys.exception())


def _need_batches(dataloader: Any) -> None:
    """`ConfigError` for data that can be seen to give no batch: nothing would be trained."""
    try:
        length = None if dataloader is None else len(dataloader)
    except TypeError:  # a stream: only its end will tell
        return
    if length == 0:
        raise ConfigError(f"{type(dataloader.dataset).__name__}: {_NO_BATCH}")
