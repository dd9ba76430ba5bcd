"""NormRecorder: what to measure when, for any training loop; it knows no Trainer.

Between two flushes nothing waits for the device: sums stay where the tensors are, and one copy
brings them over. Rows of the newest step are held back until the next one begins, because a
census of the same step completes them, and what is flushed is never rewritten.
"""

import dataclasses
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import numpy as np
import torch
from torch import nn

from lisa_analysis.errors import ConfigError, LisaError, RunDirectoryError
from lisa_train import environment
from lisa_train.adapters import LoraPair, find_lora_pairs, product_squares
from lisa_train.buffers import MetricBuffer, to_host
from lisa_train.config import RecordConfig
from lisa_train.layermap import LayerMap, find_layers
from lisa_train.norms import changes, squares, squares_and_magnitudes
from lisa_train.optimizer_state import unwrap_optimizer
from lisa_train.tensor_table import TensorTable
from lisa_train.writer import RunWriter

# Rows that may lie on the device before they are written, however long the flush window is.
MAX_BUFFERED_ROWS = 100_000

P = ParamSpec("P")
T = TypeVar("T")


def _measured(
    method: "Callable[Concatenate[NormRecorder, P], T]",
) -> "Callable[Concatenate[NormRecorder, P], T | None]":
    """Time a public method, and apply `on_record_error` to what goes wrong in it."""

    @functools.wraps(method)
    def wrapped(self: "NormRecorder", *args: P.args, **kwargs: P.kwargs) -> T | None:
        if self.stopped or self._inside:
            return method(self, *args, **kwargs) if self._inside else None
        self._entered = time.perf_counter()
        self._inside = True
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            self._failed(error)
            return None
        finally:
            self._inside = False
            self.seconds += time.perf_counter() - self._entered

    return wrapped


class NormRecorder:
    """Measures a training loop and writes its run directory.

    Call `before_step` after the backward pass of the last micro-batch and before clipping, and
    `after_step` after `optimizer.step()`, both with the number of the step (from 1).

    Parameters
    ----------
    model
        The model; only its tensors are read.
    optimizer
        Its optimizer, for the learning rate and the step counts; wrappers are looked through.
    config
        What to measure; `run_dir` is needed unless a writer is given.
    writer
        Where to; None opens a new run in `config.run_dir`.
    layer_map
        The layers; None finds them.
    step
        Completed optimizer steps at the start, 0 unless training continues.

    Raises
    ------
    RunDirectoryError
        When the run directory cannot be used.
    ConfigError
        When `config.select` matches nothing, or no run directory is given.

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
        writer: RunWriter | None = None,
        layer_map: LayerMap | None = None,
        *,
        table: TensorTable | None = None,
        step: int = 0,
    ) -> None:
        self.config = config
        self.stopped = False
        self.seconds = 0.0
        self._inside = False
        self._model = model
        self._optimizer = unwrap_optimizer(optimizer)
        layer_map = layer_map or find_layers(model)
        self.table = table or TensorTable(model, layer_map, config.select)
        self.writer = writer or _new_writer(model, config, self.table, layer_map)
        self._want = frozenset(config.quantities)
        self._pairs = _pairs(model, self.table) if self._want & _OF_PRODUCTS else []
        self._ids = np.array([i for i, _ in self.table.tensors])
        self._device = self.table.tensors[0][1].device
        self._buffer = MetricBuffer()
        self._lines: list[dict[str, Any]] = []
        self._latest: dict[str, Any] = {}
        self._active: list[tuple[int, nn.Parameter]] = []
        self._snapshots: dict[int, torch.Tensor] = {}
        self._gradients: dict[int, torch.Tensor] = {}
        self._step = step
        self._census_step: int | None = None
        self._said: set[str] = set()
        self._flushed_at = self._stepped_at = time.monotonic()
        self._seconds_before = self._entered = 0.0
        self._gradient_factor = 1.0
        if self.writer.segment:
            self._census_step = step  # the checkpoint that the run continues from has one
        else:
            self.census(step)
            self.flush(everything=True)

    # ------------------------------------------------------------------ every step

    def due(self, step: int) -> bool:
        """Whether the norms of optimizer step `step` are recorded: the first and every n-th."""
        return step == 1 or step % self.config.every == 0

    @_measured
    def before_step(self, step: int, *, gradient_scale: float = 1.0, undo: bool = False) -> None:
        """Measure the gradients of step `step` and keep what its update is measured against.

        Parameters
        ----------
        step
            Number of the optimizer step about to be made, from 1.
        gradient_scale
            Factor on the gradients that the optimizer will not see (fp16 loss scale).
        undo
            `after_step` will be told the clip coefficient, so that gradients in fp32 need not
            be copied for `descent`.
        """
        self._active = []
        self._seconds_before = self.seconds
        self._flush_if_old()
        if not self.due(step):
            return
        self._active = [
            (i, p) for i, p in self.table.tensors if p.grad is not None and p.requires_grad
        ]
        self._measure_gradients(step, gradient_scale)
        if self._want & {"update_norm", "descent"}:
            self._snapshots = _copies(self._snapshots, [(i, p.detach()) for i, p in self._active])
        self._gradients = {}
        if "descent" in self._want:
            gradients = [(i, p.grad.detach()) for i, p in self._active if p.grad is not None]
            copied = [(i, g) for i, g in gradients if not undo or g.dtype != torch.float32]
            self._gradients = {i: g.clone() for i, g in copied}
            self._gradient_factor = 1 / gradient_scale

    def _measure_gradients(self, step: int, gradient_scale: float) -> None:
        if not self._want & {"grad_norm", "grad_norm_l1"} or not self._active:
            return
        ids = np.array([i for i, _ in self._active])
        gradients = [p.grad for _, p in self._active if p.grad is not None]
        if "grad_norm_l1" in self._want:
            square, magnitude = squares_and_magnitudes(gradients)
            self._buffer.add(step, "grad_norm_l1", ids, magnitude / gradient_scale)
        else:
            square = squares(gradients)
        self._buffer.add(step, "grad_norm", ids, square / gradient_scale**2)

    @_measured
    def after_step(
        self, step: int, *, clip_coef: Any = None, skipped: bool = False, **scalars: Any
    ) -> None:
        """Measure what the optimizer did in step `step` and add a line to the scalars.

        Parameters
        ----------
        step
            Number of the optimizer step just made, from 1.
        clip_coef
            Factor that clipping applied to all gradients (number or tensor), if known.
        skipped
            The optimizer did not step (fp16 overflow): there is no update to measure.
        **scalars
            Columns of the scalars table, as `loss`; numbers or tensors of one element. What is
            left out and can be seen from here is filled in.
        """
        self._step = step
        line: dict[str, Any] = {"step": step, "clip_coef": clip_coef, **scalars}
        line = {k: v.detach() if torch.is_tensor(v) else v for k, v in line.items()}
        if self._active:
            if not skipped:
                self._measure_update(step, clip_coef)
            self._measure_weights(step)
        if line.get("grad_norm") is None and self.config.select is None:
            square = self._buffer.values(step, "grad_norm") if self.due(step) else None
            line["grad_norm"] = square.sum().sqrt() if square is not None else None
        now = time.monotonic()
        line.setdefault("step_seconds", now - self._stepped_at)
        self._stepped_at = now
        if line.get("learning_rate") is None:
            line["learning_rate"] = self._optimizer.param_groups[0]["lr"]
        line["peak_memory_bytes"] = environment.peak_memory_bytes(self._device)
        line["skipped"] = bool(skipped)
        self._active = []
        self._gradients = {}
        if self._device.type != "cpu":
            self._snapshots = {}
        spent = self.seconds + time.perf_counter() - self._entered
        line["recorder_seconds"] = spent - self._seconds_before
        self._lines.append(line)

    def amend(self, **scalars: Any) -> None:
        """Add what became known late to the newest line of the scalars."""
        if self._lines:
            self._lines[-1].update(scalars)

    def _measure_update(self, step: int, clip_coef: Any) -> None:
        if not self._want & {"update_norm", "descent"}:
            return
        ids = np.array([i for i, _ in self._active])
        before = [self._snapshots[i] for i, _ in self._active]
        after = [p for _, p in self._active]
        gradients = None
        if "descent" in self._want:
            gradients = [self._gradients.get(i, p.grad) for i, p in self._active]
        update, weight, product = changes(before, after, gradients)  # type: ignore[arg-type]
        self._buffer.add(step, "update_norm", ids, update)
        if "weight_norm" in self._want:
            self._buffer.add(step, "weight_norm", ids, weight)
        if product is not None:
            # What was not copied before clipping was scaled in place since; undo it.
            coefficient = 1.0 if clip_coef is None else torch.as_tensor(clip_coef).to(product)
            undone = product / coefficient
            copied = product * self._gradient_factor
            if not self._gradients:
                descent = undone
            elif len(self._gradients) == len(ids):
                descent = copied
            else:
                kept = [int(i) in self._gradients for i in ids]
                descent = torch.stack(
                    [c if k else u for c, u, k in zip(copied, undone, kept, strict=True)]
                )
            self._buffer.add(step, "descent", ids, -descent)

    def _measure_weights(self, step: int) -> None:
        """Add weight norms that the update did not give, LoRA's products and the step counts."""
        tensors = dict(self._active)
        if "weight_norm" in self._want:
            done = self._buffer.measured(step, "weight_norm")
            rest = [i for i in tensors if i not in done]
            self._buffer.add(
                step, "weight_norm", np.array(rest, int), squares([tensors[i] for i in rest])
            )
        if "opt_steps" in self._want:
            self._add_optimizer_steps(step)
        ids = {self.table.ids[pair.name_b] for pair in self._pairs} & set(tensors)
        self._measure_products(step, [p for p in self._pairs if self.table.ids[p.name_b] in ids])

    def _measure_products(self, step: int, pairs: list[LoraPair]) -> None:
        if not pairs:
            return
        ids = np.array([self.table.ids[pair.name_b] for pair in pairs])
        deltas, indices, merged = product_squares(pairs, "merged_norm" in self._want)
        if "delta_norm" in self._want:
            self._buffer.add(step, "delta_norm", ids, deltas)
        self._buffer.add(step, "merged_norm", ids[indices], merged)

    def _add_optimizer_steps(self, step: int) -> None:
        found: list[tuple[int, Any]] = []
        for i, p in self._active:
            state = self._optimizer.state.get(p)
            count = state.get("step") if isinstance(state, dict) else None
            if count is not None:
                found.append((i, count))
        if not found:
            return
        kind = torch.float64 if self._device.type != "mps" else torch.float32
        home = next((c.device for _, c in found if torch.is_tensor(c)), torch.device("cpu"))
        counts = torch.stack(
            [torch.as_tensor(count, device=home).to(kind).reshape(()) for _, count in found]
        )
        self._buffer.add(step, "opt_steps", np.array([i for i, _ in found]), counts)

    # ------------------------------------------------------------------ now and then

    @_measured
    def census(self, step: int) -> None:
        """Measure the weights of all tensors, frozen ones too, after `step` completed steps."""
        if self._census_step == step:
            return
        self._census_step = step
        done = self._buffer.measured(step, "weight_norm")
        rest = [(i, p) for i, p in self.table.tensors if i not in done]
        self._buffer.add(
            step, "weight_norm", np.array([i for i, _ in rest], int), squares([p for _, p in rest])
        )
        known = self._buffer.measured(step, "delta_norm")
        self._measure_products(
            step, [p for p in self._pairs if self.table.ids[p.name_b] not in known]
        )

    @_measured
    def checkpoint(self, step: int) -> None:
        """Take a census and put everything on the disk; call it before writing a checkpoint."""
        self.census(step)
        self.flush(everything=True)

    @_measured
    def event(self, name: str, step: int, **fields: Any) -> None:
        """Write an event, see `lisa_analysis.schema.EVENT_FIELDS`."""
        self.writer.event(name, step, **fields)

    @_measured
    def flush(self, *, everything: bool = False) -> None:
        """Put on the disk what was measured up to the step before the newest (or all of it)."""
        for rows in self._buffer.take(None if everything else self._step):
            self.writer.write_metrics(rows)
        for line in to_host(self._lines):
            self.writer.scalars(_tidy(line))
            self._latest = line
        self._lines = []
        self._flushed_at = time.monotonic()
        self.writer.flush()

    def _flush_if_old(self) -> None:
        age = time.monotonic() - self._flushed_at
        if age < self.config.flush_seconds and self._buffer.rows < MAX_BUFFERED_ROWS:
            return
        try:
            self.flush()
        except RunDirectoryError as error:
            self._failed(error)  # the disk's trouble is no reason to miss this step

    def latest_scalars(self) -> dict[str, Any]:
        """Return the newest scalars that can be had without waiting for the device."""
        if self._lines and self._device.type == "cpu":
            return to_host(self._lines[-1:])[0]
        return dict(self._latest)

    def close(self, status: str = "finished", error: str | None = None, **result: Any) -> None:
        """Take the last census, write everything and say in run.json how the run ended."""
        if self.writer.closed:
            return
        if not self.stopped:
            self.census(self._step)
            self.flush(everything=True)
        fields: dict[str, Any] = {"result": result} if result else {}
        if error:
            fields["error"] = error
        try:
            self.writer.close(status, **fields)
        except LisaError as problem:
            self._failed(problem)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(*outcome(error))

    def _failed(self, error: Exception) -> None:
        """Stop training or say it once, as the user chose; a full disk may have room later."""
        if self.config.on_record_error == "raise":
            raise error
        if isinstance(error, RunDirectoryError):
            text = f"Recording: {error}"
        else:
            self.stopped = True
            text = f"Recording stopped, training goes on: {one_sentence(error)}"
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, RuntimeWarning, stacklevel=4)


def _copies(
    buffers: dict[int, torch.Tensor], tensors: Iterable[tuple[int, torch.Tensor]]
) -> dict[int, torch.Tensor]:
    """Copy the tensors; buffers of the last time are used again, those out of use dropped.

    Only on the CPU do buffers survive a step: there fresh pages cost more than the copy.
    """
    copies: dict[int, torch.Tensor] = {}
    for i, tensor in tensors:
        kept = buffers.get(i)
        if kept is not None and kept.shape == tensor.shape and kept.dtype == tensor.dtype:
            copies[i] = kept.copy_(tensor.detach())
        else:
            copies[i] = tensor.detach().clone()
    return copies


_OF_PRODUCTS = frozenset({"delta_norm", "merged_norm"})


def _pairs(model: nn.Module, table: TensorTable) -> list[LoraPair]:
    measured = {i for i, _ in table.tensors}
    return [p for p in find_lora_pairs(model) if table.ids.get(p.name_b) in measured]


def _new_writer(
    model: nn.Module, config: RecordConfig, table: TensorTable, layer_map: LayerMap
) -> RunWriter:
    if config.run_dir is None:
        raise ConfigError("record.run_dir is not set: name the folder to write.")
    return RunWriter(
        config.run_dir,
        manifest=manifest(model, config, table, layer_map),
        parameters=table.rows,
    )


def manifest(
    model: nn.Module, config: RecordConfig, table: TensorTable, layer_map: LayerMap
) -> dict[str, Any]:
    """Entries of run.json that the model and the machine tell."""
    recording = {k: v for k, v in dataclasses.asdict(config).items() if k != "run_dir"}
    return {
        "method": environment.method_of(model),
        "model": environment.describe_model(model),
        "versions": environment.versions(),
        "hardware": environment.hardware(table.tensors[0][1].device),
        "layers": environment.layer_entries(layer_map),
        "recording": recording,
    }


def _tidy(line: dict[str, Any]) -> dict[str, Any]:
    """Whole numbers as such, durations to the microsecond."""
    for name in ("tokens", "peak_memory_bytes"):
        value = line.get(name)
        if value is not None and math.isfinite(value):
            line[name] = int(value)
    for name in ("step_seconds", "recorder_seconds"):
        line[name] = round(float(line[name]), 6)
    return line


def outcome(error: BaseException | None) -> tuple[str, str | None]:
    """Return the status and the sentence of a run that ended with `error`, or without one."""
    if error is None:
        return "finished", None
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        return "interrupted", None
    return "failed", one_sentence(error)


def one_sentence(error: BaseException) -> str:
    """Return an exception as one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500] if text else type(error).__name__
