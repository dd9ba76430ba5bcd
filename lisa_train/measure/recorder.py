"""NormRecorder: what to measure when, for any training loop; it knows no Trainer.

Between two flushes nothing waits for the device: sums stay where the tensors are, and one copy
brings them over. Rows of the newest step are held back until the next one begins, because a
census of the same step completes them, and what is flushed is never rewritten.
"""

import functools
import time
import warnings
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import torch
from torch import nn

from lisa_analysis.contract.errors import ConfigError, RunDirectoryError
from lisa_train.measure import faults
from lisa_train.measure.adapters import start as adapter_start
from lisa_train.measure.buffers import MetricBuffer
from lisa_train.measure.cadence import Cadence, FlushTimer
from lisa_train.measure.config import RecordConfig
from lisa_train.measure.disk import manifest as environment
from lisa_train.measure.disk.run_file import outcome
from lisa_train.measure.disk.writer import RunWriter, SilentWriter
from lisa_train.measure.probe.measuring_pass import GuardedPasses
from lisa_train.measure.processes import Processes
from lisa_train.measure.recording_time import RecordingTime
from lisa_train.measure.scalar_lines import ScalarLines, check_names
from lisa_train.measure.session import RunSession
from lisa_train.measure.step.step_measure import StepMeasure
from lisa_train.measure.tracker_numbers import aggregates, tensor_groups
from lisa_train.measure.unmeasured import unmeasured_products, unmeasured_when_sharded
from lisa_train.model.layer_map import LayerMap, find_layers
from lisa_train.model.parallel import refuse_wrappers
from lisa_train.model.run_entries import joined
from lisa_train.model.tensor_table import TensorTable, tensor_table
from lisa_train.optim.frozen_state import as_one, optimizers_of
from lisa_train.optim.step_in_backward import StepInBackward
from lisa_train.private_names import check

# Rows that may lie on the device before they are written, however long the flush window is.
MAX_BUFFERED_ROWS = 100_000

P = ParamSpec("P")
T = TypeVar("T")


def _measured(
    method: "Callable[Concatenate[NormRecorder, P], T]",
) -> "Callable[Concatenate[NormRecorder, P], T | None]":
    """Time a public method; what goes wrong in it is judged by `lisa_train.measure.faults`."""

    @functools.wraps(method)
    def wrapped(self: "NormRecorder", *args: P.args, **kwargs: P.kwargs) -> T | None:
        if self.stopped or self._inside:
            return method(self, *args, **kwargs) if self._inside else None
        self._inside = True
        with self._time.running():
            try:
                return method(self, *args, **kwargs)
            except Exception as error:
                self._failed(error)
                return None
            finally:
                self._inside = False

    return wrapped


class NormRecorder:
    """Measures a training loop and writes its run directory.

    Call `before_step` after the backward pass of the last micro-batch and before clipping, and
    `after_step` after `optimizer.step()`, both with the number of the step (from 1).

    With several processes (`torch.distributed`) each of them makes a recorder and makes the same
    calls, with its own loss and tokens; the first alone opens and writes the run directory.

    Parameters
    ----------
    model
        The model; only its tensors are read.
    optimizer
        Its optimizer, for the learning rate (of its first group) and the step counts, or a list
        of several; wrappers are looked through.
    config
        What to measure; `run_dir` is needed unless a writer is given.
    writer
        Where to; None opens a new run in `config.run_dir`. Of several processes only the first
        one's is asked for.
    layer_map
        The layers; None finds them.
    step
        Completed optimizer steps at the start, 0 unless training continues.
    step_in_backward
        What steps the optimizer inside the backward pass, if anything does: then every tensor is
        measured around its own step. The calls that the loop makes stay the same.
    manifest
        Entries of the run's `run.json` that only the loop knows, as ``{"method": "lisa"}``; not
        for a given writer, which has its own.
    began
        When the opening of the run began (`time.perf_counter`), if before this call.
    session
        A run that is open already, in the place of `writer`.

    Raises
    ------
    RunDirectoryError
        When the run directory holds a run already; with ``on_record_error="raise"`` also when it
        cannot be written or another process writes it (else a warning: nothing is recorded).
    ConfigError
        When `config.select` matches nothing, no run directory is given, or the model is wrapped
        by FSDP1 or `nn.DataParallel`.

    Examples
    --------
    >>> recorder = NormRecorder(model, optimizer, RecordConfig("runs/a"))  # doctest: +SKIP
    >>> with recorder:
    ...     for step, batch in enumerate(batches, 1):
    ...         loss = model(**batch).loss
    ...         loss.backward()
    ...         recorder.before_step(step)
    ...         torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    ...         optimizer.step()
    ...         recorder.after_step(step, loss=loss)
    ...         optimizer.zero_grad()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        config: RecordConfig,
        writer: RunWriter | SilentWriter | None = None,
        layer_map: LayerMap | None = None,
        *,
        table: TensorTable | None = None,
        step: int = 0,
        step_in_backward: StepInBackward | None = None,
        manifest: Mapping[str, Any] | None = None,
        began: float | None = None,
        session: RunSession | None = None,
    ) -> None:
        began = time.perf_counter() if began is None else began
        refuse_wrappers(model, "the recorder")
        self.config = config
        self._written = -1  # the last step whose rows are complete on the disk
        self._time = RecordingTime(began)
        self._inside = False
        self._optimizer = as_one(optimizers_of(optimizer))
        layer_map = layer_map or find_layers(model, config.layers)
        self.table = table or tensor_table(model, layer_map, config.select)
        devices = list({p.device: None for _, p in self.table.tensors})
        self._processes = Processes(self.table)
        check("model", "recorder", *_needed(model, config, self._processes))
        self.stopped = False
        self._method_of: nn.Module | None = None
        self.session = session or self._opened(writer, model, layer_map, manifest)
        self.writer = self.session.writer
        self._buffer = MetricBuffer()
        self._cadence = Cadence(config.every, step)
        self._measure = StepMeasure(
            model,
            self._optimizer,
            config,
            self.table,
            self._buffer,
            self._processes,
            self._cadence,
            self._time,
        )
        self._lines = ScalarLines(self._optimizer, devices)
        self.aggregates: dict[str, float] = {}
        self._groups = tensor_groups(self.table, len(layer_map))
        self._census_step: int | None = None
        self._said: set[str] = set()
        self._flush_timer = FlushTimer(config.flush_seconds)
        self._stepping = step_in_backward
        self._passes = GuardedPasses(
            self._measure.probe,
            step_in_backward,
            config.on_record_error,
            sharded=self._processes.sharded,
        )
        if step_in_backward is not None:
            step_in_backward.watchers.append(self)
        for text in unmeasured_when_sharded(config, self.table, self._processes):
            self._say(text)
        resumed = bool(self.writer.segment and step)
        self._find_start_of_adapters(model, resumed)
        if resumed:
            self._census_step = step  # the checkpoint that the run continues from has one
        else:
            self.census(step)
            self.flush(everything=True)
        self._time.opened()

    def _find_start_of_adapters(self, model: nn.Module, resumed: bool) -> None:
        """Let changes be measured from where the run began, and say where they cannot be."""
        find = adapter_start.take_up if resumed else adapter_start.begin
        for text in find(self._measure.pairs, self._processes, self.writer):
            self._say(text)
        for text in unmeasured_products(model, self.table, self._measure.pairs, self.config):
            self._say(text)

    def _opened(
        self,
        given: RunWriter | SilentWriter | None,
        model: nn.Module,
        layer_map: LayerMap,
        manifest: Mapping[str, Any] | None,
    ) -> RunSession:
        """Return the session of a run that is open, or of one that is opened now."""
        session = RunSession(self.config, self._processes, given)
        # The user knows better, where the method is given.
        self._method_of = None if given is not None or "method" in (manifest or {}) else model
        if given is None and self.config.run_dir is None:
            raise ConfigError("record.run_dir is not set: name the folder to write.")

        def new_writer() -> RunWriter:
            assert self.config.run_dir is not None
            known = environment.manifest(model, self.config, self.table, layer_map)
            known["hardware"]["processes"] = self._processes.count
            return RunWriter(
                self.config.run_dir,
                manifest=joined(known, manifest or {}),
                parameters=self.table.rows,
            )

        self.stopped = not session.open(new_writer if given is None else lambda: given)
        return session

    def _say_the_method(self) -> None:
        """Look once more, at the first step, how the model is trained."""
        if self._method_of is not None:
            model, self._method_of = self._method_of, None
            self.session.state_method(model)

    @property
    def seconds(self) -> float:
        """Time spent recording so far."""
        return self._time.total

    @property
    def _step(self) -> int:
        """Completed optimizer steps."""
        return self._cadence.completed

    @property
    def census_step(self) -> int | None:
        """Step of the newest census."""
        return self._census_step

    # ------------------------------------------------------------------ every step

    def due(self, step: int) -> bool:
        """Whether the norms of optimizer step `step` are recorded: the first and every n-th."""
        return self._cadence.due(step)

    @_measured
    def micro_batch(self, step: int) -> None:
        """Take note of a micro-batch, for `grad_noise`.

        Call it after the backward pass of every micro-batch of step `step` but the last.
        """
        self._time.begin_step()
        if self.due(step):
            self._measure.micro_batch()

    @_measured
    def before_step(
        self, step: int, *, gradient_scale: float | torch.Tensor = 1.0, undo: bool = False
    ) -> None:
        """Measure the gradients of step `step` and keep what its update is measured against.

        Parameters
        ----------
        step
            Number of the optimizer step about to be made, from 1.
        gradient_scale
            Factor on the gradients that the optimizer will not see (fp16 loss scale), a number
            or a tensor of one element.
        undo
            `after_step` will be told the clip coefficient, so that gradients in fp32 need not
            be copied for `descent`.
        """
        self._time.begin_step()
        self._flush_if_old()
        self._say_the_method()
        if self.due(step):
            self._measure.gradients(step, gradient_scale, undo)
            if self._measure.second_gradients:
                self._say(
                    "grad_noise: a micro-batch made more than one backward pass; of the tensors "
                    "that the second one reached it is not measured."
                )

    @_measured
    def before_tensor(self, parameter: torch.Tensor) -> None:
        """Measure a gradient inside backward (`TensorWatcher`)."""
        self._time.begin_step()
        if self._cadence.due_now:
            self._measure.before_tensor(self._step + 1, parameter)

    @_measured
    def after_tensor(self, parameter: torch.Tensor) -> None:
        """Measure the step of one tensor inside backward (`TensorWatcher`)."""
        if self._cadence.due_now:
            self._measure.after_tensor(self._step + 1)

    def after_step(
        self,
        step: int,
        *,
        clip_coef: Any = None,
        skipped: bool | torch.Tensor = False,
        labels: Any = None,
        **scalars: Any,
    ) -> None:
        """Measure what the optimizer did in step `step` and add a line to the scalars.

        Parameters
        ----------
        step
            Number of the optimizer step just made, from 1.
        clip_coef
            Factor that clipping applied to all gradients (number or tensor), if known.
        skipped
            The optimizer did not step (fp16 overflow): there is no update to measure. A tensor of
            one element is not waited for. A loss scaler skips a step exactly when its scale falls,
            also where a fused optimizer makes the decision on the device.
        labels
            Number of labels that `loss` is a mean over (number or tensor), if known: with none
            there is no loss, and several processes are weighted by theirs.
        **scalars
            Columns of the scalars table, as `loss`; numbers or tensors of one element. What is
            left out and can be seen from here is filled in. To `step_seconds`, as the loop
            measured it up to this call, comes the recording that it does not hold yet.

        Raises
        ------
        ConfigError
            When a scalar has a name that the table does not know, whatever `on_record_error` is.
        """
        called = time.perf_counter()
        check_names(scalars)
        scalars = {"clip_coef": clip_coef, "labels": labels, **scalars}
        self._after_step(step, skipped, scalars, called)

    @_measured
    def _after_step(
        self, step: int, skipped: bool | torch.Tensor, scalars: dict[str, Any], called: float
    ) -> None:
        self._cadence.completed = step
        due = self.due(step)
        line = self._lines.begin(step, scalars, skipped)
        if due:
            if torch.is_tensor(skipped):
                self._buffer.leave_out_update(step, skipped)
            if torch.is_tensor(skipped) or not skipped:
                self._measure.update(step, line["clip_coef"])
            self._measure.state(step)
            self._measure.forget()
        self._lines.add(line)
        if due or self._processes.count == 1:
            self._merge()
        whole = due and self.config.select is None
        self._lines.complete(line, self._buffer.values(step, "grad_norm") if whole else None)
        self._time.finish_step(line, called)

    def amend(self, **scalars: Any) -> None:
        """Add what became known late to the newest line of the scalars."""
        self._lines.amend(scalars)

    def _merge(self) -> None:
        """Put the processes' parts together; one collective, at the same steps on all."""
        self._processes.merge(self._buffer.unmerged(), self._lines.unmerged)
        self._lines.merged()

    # ------------------------------------------------------------------ now and then

    @_measured
    def census(self, step: int) -> None:
        """Measure the weights of all tensors, frozen ones too, after `step` completed steps."""
        if self._census_step != step:
            self._census_step = step
            self._measure.census(step)
            self._merge()

    @_measured
    def probe(
        self,
        step: int,
        backward: Callable[[], object],
        *,
        gradient_scale: float | torch.Tensor = 1.0,
    ) -> None:
        """Measure the gradients of all layers, frozen ones too, after `step` completed steps.

        Parameters
        ----------
        step
            Completed optimizer steps; the row that the norms stand in.
        backward
            Runs one forward and backward pass; called once, with everything requiring gradients.
            No gradient is left of it, and the random state is as before. If it fails (no loss,
            no memory), nothing is probed any more; ``on_record_error="raise"`` stops training.
        gradient_scale
            Factor on the loss of the pass (fp16 loss scale), without which its gradients would
            underflow; a number or a tensor of one element.

        Notes
        -----
        With several processes each of them calls it with its own batch, and the norms are those
        of the mean of their gradients; it takes collectives of its own. A failure on one of them
        ends the probing on all. With sharded weights (FSDP2) it stops training: what FSDP began
        cannot be taken back, and the others wait for the one that failed, as in training.
        """
        if self._passes.failed:
            return
        if step <= self._written:
            self._say(
                f"probe: the rows of step {step} are on the disk already and are never rewritten; "
                "call probe before checkpoint. Such passes are left out."
            )
            return
        said = self._passes.run(step, backward, gradient_scale)
        if said is not None:
            self._say(*said)
        self._merge()

    @_measured
    def checkpoint(self, step: int) -> None:
        """Take a census and put everything on the disk; call it before writing a checkpoint."""
        self.census(step)
        self.flush(everything=True)

    @_measured
    def event(self, name: str, step: int, **fields: Any) -> None:
        """Write an event, see `lisa_analysis.contract.schema.EVENT_FIELDS`."""
        self.writer.event(name, step, **fields)

    @_measured
    def flush(self, *, everything: bool = False) -> None:
        """Put on the disk what was measured up to the step before the newest (or all of it)."""
        self._write(everything)

    def _write(self, everything: bool) -> None:
        for rows in self._buffer.take(None if everything else self._step):
            self.aggregates = aggregates(rows, self._groups) or self.aggregates
            self.writer.write_metrics(rows)
        if everything:
            self._written = self._step
        self._time.settle()
        if not self._lines.unmerged:
            self._time.written()
        for line in self._lines.take():
            self.writer.scalars(line)
        self._flush_timer.flushed()
        self.writer.flush()

    def _flush_if_old(self) -> None:
        if not self._flush_timer.due and self._buffer.rows < MAX_BUFFERED_ROWS:
            return
        try:
            self.flush()
        except RunDirectoryError as error:
            self._failed(error)  # the disk's trouble is no reason to miss this step

    def latest_scalars(self, *, wait: bool = False) -> dict[str, Any]:
        """Return the newest scalars: those that the host has, or with `wait` the last step's."""
        return self._lines.newest(wait=wait)

    def close(self, status: str = "finished", error: str | None = None, **result: Any) -> None:
        """Take the last census, write everything and say in run.json how the run ended.

        A recording that an error of its own cut short is ``failed``, however training ended.
        """
        if self._stepping is not None and self in self._stepping.watchers:
            self._stepping.watchers.remove(self)
        self._measure.close()
        if self.writer.closed:
            return

        def last_write() -> None:
            with self._time.running():
                self._write(everything=True)

        problem = self.session.write_last(self._step, lambda: self._last_census(status), last_write)
        if "recorder_seconds" in result:  # the last census is in it
            result["recorder_seconds"] = round(self.seconds, 3)
        at_the_end = self.session.close(status, error, result)
        problem = problem or at_the_end
        if problem is None:
            return
        if error is None:
            self._failed(problem)
        elif faults.is_fault(problem):  # the training's own error matters more: it is on its way
            self._say(f"Recording: {faults.reason(problem)}", faults.full_traceback(problem))

    def _last_census(self, status: str) -> None:
        if status == "finished" or self._processes.count == 1:
            self.census(self._step)
            return
        self._lines.merged(known=False)  # the others may be gone

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(*outcome(error))

    def failed(self, error: Exception) -> None:
        """Take an error of the code around the recorder for one of its own."""
        self._failed(error)

    def _failed(self, error: Exception) -> None:
        """Stop training or say it once, as the user chose; a full disk may have room later."""
        disk = isinstance(error, RunDirectoryError)
        stops = faults.stops_training(error, self.config.on_record_error)
        if stops or (self._processes.count > 1 and not disk):
            raise error
        if disk:
            self._say(f"Recording: {error}")
        else:
            self.stopped = True
            self._measure.close()  # copies of weights would stay for the rest of the training
            why = faults.reason(error)
            self.session.problem = f"recording stopped after step {self._step}: {why}"
            self._say(f"Recording stopped, training goes on: {why}", faults.full_traceback(error))

    def _say(self, text: str, trace: str | None = None) -> None:
        """Warn once, on the terminal and in the run's events."""
        if text not in self._said:
            self._said.add(text)
            self._event(text, trace)
            text = text if trace is None else f"{text}\n{trace}"
            warnings.warn(text, RuntimeWarning, stacklevel=5)

    def _event(self, text: str, trace: str | None) -> None:
        if not self.writer.closed:
            self.writer.event("warning", self._step, message=text, traceback=trace)


def _needed(model: nn.Module, config: RecordConfig, processes: Processes) -> list[str]:
    """Areas of `private_names` that a recording with these settings needs."""
    areas = {
        "sharded": processes.sharded,
        "sharded probe": processes.sharded and bool(config.probe_every),
        "base_delta": config.base_delta,
        "adapters": hasattr(model, "peft_config")
        and bool({"delta_norm", "merged_norm"} & set(config.quantities)),
    }
    return [area for area, needed in areas.items() if needed]
