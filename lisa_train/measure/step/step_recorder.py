"""What a recorder does at every step: read, merge over processes, hand over to the disk.

Between two flushes nothing waits for the device: sums stay where the tensors are, and one copy
brings them over. Rows of the newest step are held back until the next one begins, because a
census of the same step completes them, and what is flushed is never rewritten.
"""

import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from torch import nn

from lisa_analysis.contract.errors import ConfigError, RunDirectoryError
from lisa_train.measure.buffers import MetricBuffer
from lisa_train.measure.cadence import Cadence
from lisa_train.measure.config import RecordConfig
from lisa_train.measure.output import Output
from lisa_train.measure.processes import Processes
from lisa_train.measure.recording_time import RecordingTime
from lisa_train.measure.scalar_lines import ScalarLines, check_names
from lisa_train.measure.session import RunSession
from lisa_train.measure.step.step_measure import StepMeasure
from lisa_train.measure.troubles import Troubles
from lisa_train.measure.watching import Watching
from lisa_train.model.tensor_table import TensorTable

if TYPE_CHECKING:
    from lisa_analysis.runs.diagnostics.finding import Finding

S = TypeVar("S", bound="StepRecorder")
P = ParamSpec("P")
T = TypeVar("T")


def measured(
    method: Callable[Concatenate[S, P], T],
) -> Callable[Concatenate[S, P], T | None]:
    """Time a public method; what goes wrong in it is judged by `lisa_train.measure.faults`."""

    @functools.wraps(method)
    def wrapped(self: S, *args: P.args, **kwargs: P.kwargs) -> T | None:
        if self.stopped or self._inside:
            return method(self, *args, **kwargs) if self._inside else None
        self._inside = True
        with self._time.running():
            try:
                return method(self, *args, **kwargs)
            except Exception as error:
                self._troubles.failed(error)
                return None
            finally:
                self._inside = False

    return wrapped


class StepRecorder:
    """Records optimizer steps of a run that is open.

    Parameters
    ----------
    model, optimizer
        See `lisa_train.NormRecorder`; the optimizer is one.
    config
        What to measure.
    table
        The tensors.
    processes
        The processes that train together.
    session
        The run.
    time
        Runs already: it counts what came before.
    step
        Completed optimizer steps.
    groups
        Numbers of the tensors of each group that trackers are shown.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        config: RecordConfig,
        table: TensorTable,
        processes: Processes,
        session: RunSession,
        time: RecordingTime,
        step: int,
        groups: dict[str, np.ndarray],
    ) -> None:
        self.config = config
        self.table = table
        self.session = session
        self.writer = session.writer
        self._inside = False
        self._began = step
        self._before: int | None = None  # the step that `before_step` was called for
        self._inside = False  # whether tensors have stepped, in backward, of a step not yet made
        self._time = time
        self._processes = processes
        self._cadence = Cadence(config.every, step)
        self._buffer = MetricBuffer()
        self._measure = StepMeasure(
            model, optimizer, config, table, self._buffer, processes, self._cadence, time
        )
        self._troubles = Troubles(config, session, processes, self._cadence, self._measure.close)
        devices = list({p.device: None for _, p in table.tensors})
        self._lines = ScalarLines(optimizer, devices)
        self._watching = Watching(config.watch, self.writer, table)
        self._output = Output(
            self._buffer, self._lines, self.writer, time, config.flush_seconds, groups,
            self._watching,
        )  # fmt: skip

    @property
    def seconds(self) -> float:
        """Time spent recording so far."""
        return self._time.total

    @property
    def stopped(self) -> bool:
        """Whether nothing is recorded any more (or never was)."""
        return self._troubles.stopped

    @property
    def aggregates(self) -> dict[str, float]:
        """Norms of a few groups of tensors at the newest step that is written, for trackers.

        With `RecordConfig.report_layers` of every layer (``grad_norm/layer_07``), with
        ``recorded_step``, the step that they are of.
        """
        found = self._output.aggregates
        if found and self.config.report_layers:
            found = {**found, "recorded_step": float(self._output.aggregated)}
        return found

    @property
    def on_finding(self) -> "list[Callable[[int, Finding], object]]":
        """Functions that get the step and each finding of `RecordConfig.watch`; add yours."""
        return self._watching.listeners

    @property
    def _step(self) -> int:
        """Completed optimizer steps."""
        return self._cadence.completed

    def due(self, step: int) -> bool:
        """Whether the norms of optimizer step `step` are recorded: the first and every n-th."""
        return self._cadence.due(step)

    @measured
    def micro_batch(self, step: int) -> None:
        """Take note of a micro-batch, for `grad_noise`.

        Call it after the backward pass of every micro-batch of step `step` but the last.
        """
        self._time.begin_step()
        if self.due(step):
            self._measure.micro_batch()

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

        Raises
        ------
        ConfigError
            When the first step is not a later one than that of the start, whatever
            `on_record_error` is. (A later one that does not go up ends the recording.)
        """
        if self._goes_up("before_step", step):
            self._before_step(step, gradient_scale, undo)

    def _goes_up(self, call: str, step: int) -> bool:
        """Whether a step's number is that of a new step; what else was recorded would be lost."""
        begun = self._before if call == "after_step" else None  # a step begun may be given up
        if self.stopped or (step > self._step and step == (begun or step)):
            return True
        after = f"before_step({begun})" if begun else f"step {self._step}"
        error = ConfigError(
            f"{call}({step}) after {after}: a step has one number, which counts the optimizer "
            "steps of the whole run, from 1; pass the completed steps + 1 to both calls, and no "
            "number that begins anew with an epoch."
        )
        if self._step == self._began:  # of the first step: nothing is lost yet
            raise error
        self._troubles.failed(error)
        return False

    @measured
    def _before_step(self, step: int, gradient_scale: float | torch.Tensor, undo: bool) -> None:
        self._before = step
        self._time.begin_step()
        self._flush_if_old()
        self.session.state_method()
        if self.due(step):
            self._measure.gradients(step, gradient_scale, undo)
            if self._measure.second_gradients:
                self._troubles.say(
                    "grad_noise: a micro-batch made more than one backward pass; of the tensors "
                    "that the second one reached it is not measured."
                )

    @measured
    def before_tensor(self, parameter: torch.Tensor) -> None:
        """Measure a gradient inside backward (`TensorWatcher`)."""
        self._time.begin_step()
        self._inside = True
        if self._cadence.due_now:
            self._measure.before_tensor(self._step + 1, parameter)

    @measured
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
            When a scalar has a name that the table does not know, whatever `on_record_error` is;
            for the step's number see `before_step`.
        """
        called = time.perf_counter()
        check_names(scalars)
        if not self._goes_up("after_step", step):
            return
        scalars = {"clip_coef": clip_coef, "labels": labels, **scalars}
        self._after_step(step, skipped, scalars, called)

    @measured
    def _after_step(
        self, step: int, skipped: bool | torch.Tensor, scalars: dict[str, Any], called: float
    ) -> None:
        self._cadence.completed, self._before, self._inside = step, None, False
        due = self.due(step)
        line = self._lines.begin(step, scalars, skipped)
        if due:
            if torch.is_tensor(skipped):
                self._buffer.leave_out_update(step, skipped)
            if torch.is_tensor(skipped) or not skipped:
                self._measure.update(step, line["clip_coef"])
            self._measure.state(step)
            if self._measure.micro_batches is not None:
                line["micro_batches"] = self._measure.micro_batches
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

    @measured
    def flush(self, *, everything: bool = False) -> None:
        """Put on the disk what was measured up to the step before the newest (or all of it)."""
        self._output.write(self._step, everything=everything)

    def _flush_if_old(self) -> None:
        if not self._output.due:
            return
        try:
            self.flush()
        except RunDirectoryError as error:
            self._troubles.failed(error)  # a full disk loses no number of this step
        self._watching.look(self._step)

    def latest_scalars(self, *, wait: bool = False) -> dict[str, Any]:
        """Return the newest scalars: those that the host has, or with `wait` the last step's."""
        return self._lines.newest(wait=wait)

    def failed(self, error: Exception) -> None:
        """Take an error of the code around the recorder for one of its own."""
        self._troubles.failed(error)
