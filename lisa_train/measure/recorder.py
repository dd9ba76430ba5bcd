"""NormRecorder: a run from its opening to its end, for any training loop; it knows no Trainer."""

import time
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import nn

from lisa_train.measure import faults
from lisa_train.measure.adapters import start as adapter_start
from lisa_train.measure.config import RecordConfig
from lisa_train.measure.disk.run_file import status_of
from lisa_train.measure.disk.writer import RunWriter, SilentWriter
from lisa_train.measure.output import tensor_groups
from lisa_train.measure.probe.measuring_pass import GuardedPasses, Passes
from lisa_train.measure.processes import Processes
from lisa_train.measure.recording_time import RecordingTime
from lisa_train.measure.session import RunSession
from lisa_train.measure.step.base_weights import base_of_run, loaded_from
from lisa_train.measure.step.step_recorder import StepRecorder, measured
from lisa_train.measure.unmeasured import unmeasured_products, unmeasured_when_sharded
from lisa_train.model.layer_cache import known_layers
from lisa_train.model.layer_map import LayerMap
from lisa_train.model.parallel import refuse_wrappers
from lisa_train.model.tensor_table import TensorTable, number_tensors
from lisa_train.optim.frozen_state import as_one, optimizers_of
from lisa_train.optim.step_in_backward import StepInBackward
from lisa_train.private_names import check


class NormRecorder(StepRecorder):
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
        stepping = as_one(optimizers_of(optimizer))  # refuses some, before anything is written
        layer_map = layer_map or known_layers(model, config.layers)
        table = table or number_tensors(model, layer_map, config.select)
        processes = Processes(table)
        check("model", "recorder", *_needed(model, config, processes))
        if session is None:
            session = RunSession(config, processes, writer)
            session.open_for_loop(writer, model, table, layer_map, manifest)
        super().__init__(
            model,
            stepping,
            config,
            table,
            processes,
            session,
            RecordingTime(began),
            step,
            tensor_groups(table, len(layer_map), layers=config.report_layers),
        )
        self._census_step: int | None = None
        self._stepping = step_in_backward
        self._passes = GuardedPasses(
            self._measure.probe,
            step_in_backward,
            config.on_record_error,
            sharded=processes.sharded,
            say=self._troubles.say,
        )
        if step_in_backward is not None:
            step_in_backward.watchers.append(self)
        self._begin(model, step)
        self._time.opened()

    def _begin(self, model: nn.Module, step: int) -> None:
        """Say what cannot be measured, find what the adapters started with, take a census."""
        resumed = bool(self.writer.segment and step)
        find = adapter_start.take_up if resumed else adapter_start.begin
        pairs = self._measure.pairs
        for text in (
            *unmeasured_when_sharded(self.config, self.table, self._processes),
            *find(pairs, self._processes, self.writer),
            *(self._take_up_base(model) if resumed and self.config.base_delta else ()),
            *unmeasured_products(model, self.table, pairs, self.config),
        ):
            self._troubles.say(text)
        if resumed:
            self._census_step = step  # the checkpoint that the run continues from has one
        else:
            self.census(step)
            self.flush(everything=True)

    def _take_up_base(self, model: nn.Module) -> list[str]:
        """Measure ‖W − W₀‖ from the W₀ that the run began with; say where that is not known."""
        described = getattr(self.writer, "manifest", {}).get("model") or {}
        recorded = self._processes.from_first(described.get("name"))
        base = base_of_run(recorded, model)
        if base != loaded_from(model):
            self._measure.take_up_base(base)
        if base is not None:
            return []
        return [
            f"record.base_delta: the model was loaded from a checkpoint, {loaded_from(model)}, and "
            f"{recorded}, which the run began with, is not found; ‖W − W₀‖ is not measured from "
            "here on."
        ]

    @property
    def census_step(self) -> int | None:
        """Step of the newest census."""
        return self._census_step

    @measured
    def census(self, step: int) -> None:
        """Measure the weights of all tensors, frozen ones too, after `step` completed steps."""
        if self._census_step != step:
            self._census_step = step
            self._measure.census(step)
            self._merge()

    @measured
    def probe(
        self,
        step: int,
        backward: Callable[[], object] | Passes,
        *,
        gradient_scale: float | torch.Tensor = 1.0,
        draw: int | None = None,
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
            Several of them, each of an independent batch, give signal and noise in `probes/` too.
        gradient_scale
            Factor on the loss of a pass (fp16 loss scale), without which its gradients would
            underflow; a number or a tensor of one element.
        draw
            A number of the batches: probes of one number are of the same batches in the same
            order, so that what changes is told batch by batch (`la.probe_change`). None says
            nothing of them.

        Notes
        -----
        With several processes each of them calls it with its own batch, and the norms are those
        of the mean of their gradients; it takes collectives of its own. Of several passes, as
        many in every process, each is a batch of its own: they must run no collective. A failure
        on one process ends the probing on all. With sharded weights (FSDP2) it stops training:
        what FSDP began cannot be taken back, and the others wait for the one that failed, as in
        training; several passes are refused there.
        """
        if self._passes.failed:
            return
        passes = [backward] if callable(backward) else list(backward)
        on_disk = step <= self._output.written
        if on_disk and len(passes) == 1:
            self._troubles.say(
                f"probe: the rows of step {step} are on the disk already and are never rewritten; "
                "call probe before checkpoint. Such passes are left out."
            )
            return
        probed = self._passes.run(step, passes, gradient_scale)
        if probed is not None:
            if not on_disk:  # the mean square over batches, as of one pass
                square = torch.from_numpy(probed.square.mean(axis=0))
                self._buffer.add(step, "probe_grad_norm", probed.ids, square)
            self.writer.write_probe(step, probed.rows())
            drawn = {} if draw is None else {"draw": int(draw)}
            self.writer.event("probe", step, **probed.event(), **drawn)
        self._merge()

    @measured
    def checkpoint(self, step: int) -> None:
        """Take a census and put everything on the disk; call it before writing a checkpoint."""
        self.census(step)
        self.flush(everything=True)

    @measured
    def event(self, name: str, step: int, **fields: Any) -> None:
        """Write an event, see `lisa_analysis.contract.schema.EVENT_FIELDS`."""
        self.writer.event(name, step, **fields)
        self._watching.event(name, step, fields)

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
                self._output.write(self._step, everything=True)

        problem = self.session.write_last(self._step, lambda: self._last_census(status), last_write)
        if "recorder_seconds" in result:  # the last census is in it
            result["recorder_seconds"] = round(self.seconds, 3)
        at_the_end = self.session.close(status, error, result)
        problem = problem or at_the_end
        if problem is None:
            return
        if error is None:
            self._troubles.failed(problem)
        elif faults.is_fault(problem):  # the training's own error matters more: it is on its way
            self._troubles.say(
                f"Recording: {faults.reason(problem)}", faults.full_traceback(problem)
            )

    def _last_census(self, status: str) -> None:
        if status != "finished" and (self._inside or self._before is not None):
            pass  # stopped within a step: some tensors are of the next one already
        elif status == "finished" or self._processes.count == 1:
            self.census(self._step)
            return
        self._lines.merged(known=self._processes.count == 1)  # the others may be gone

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.close(*status_of(error))


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
