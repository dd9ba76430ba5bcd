"""A probe: gradients of independent batches at fixed weights, of every layer, without any update.

Repetitions are independent by construction, so that the intervals need no model of time, and what
the data agree on (signal, ‖E g‖²) is told from what a small batch makes up (noise, tr Σ).
"""

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from lisa_analysis.contract.errors import ConfigError, LisaError
from lisa_train.checks import one_of
from lisa_train.measure.config import RecordConfig
from lisa_train.measure.disk.manifest import describe_run
from lisa_train.measure.disk.writer import RunWriter
from lisa_train.measure.probe.batch_gradients import BatchGradients, sums_fit
from lisa_train.measure.probe.result import ProbeResult
from lisa_train.measure.probe.sketch import BUCKETS, RELATIVE_ERROR
from lisa_train.measure.processes import Processes
from lisa_train.measure.scalar_lines import count_tokens
from lisa_train.model.layer_cache import known_layers
from lisa_train.model.run_entries import joined
from lisa_train.model.sharding import is_sharded
from lisa_train.model.tensor_table import number_tensors

SignalSource = Literal["auto", "exact", "sketch"]
# Between two looks at the precision, relative to the number of batches so far.
_GROWTH = 1.25


def probe(
    model: nn.Module,
    batches: Iterable[Any],
    run_dir: str | Path,
    batches_limit: int | None = None,
    config: RecordConfig | None = None,
    *,
    loss: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    until: float | None = None,
    signal: SignalSource = "auto",
    seed: int = 0,
    manifest: Mapping[str, Any] | None = None,
    config_yaml: str | None = None,
    progress: bool | None = None,
) -> Path:
    """Measure the gradients of independent batches at the weights that the model has.

    Every gradient is dropped as soon as its numbers are taken: above the forward pass memory
    holds the gradients of one layer, and with an exact signal one fp32 copy of the weights more.
    Frozen tensors are measured too (the base weights of an adapter among them), nothing of the
    model changes, and the random state is put back.

    Parameters
    ----------
    model
        The model, in the mode that it is in: `model.eval()` leaves dropout out.
    batches
        Independent batches, as the loss takes them; a mapping of tensors is moved to the model's
        device. With several processes every one has its own.
    run_dir
        The run directory to write; one that holds a run is refused.
    batches_limit
        Batches to take of each process at most; None takes all.
    config
        `select` and `layers` say which tensors are measured and where the layers lie.
    loss
        Returns the loss of a model and a batch; None takes ``model(**batch).loss``.
    until
        Stop when every layer's interval is this narrow: half its width over the score, both on
        the scale of gradients (0.1 is ± 10 %). None takes all batches.
    signal
        ``exact`` sums the gradients themselves, ``sketch`` sketches of them
        (`lisa_train.measure.probe.sketch`), ``auto`` is exact where the sums take at most half of
        the free memory.
    seed
        Of the sketches.
    manifest, config_yaml
        Entries of run.json that only the caller knows, and the text of config.yaml.
    progress
        Show a bar, with `until` the time that is probably left; None does on a terminal.

    Returns
    -------
    pathlib.Path
        The run directory: `probes/` has a row per batch and tensor, and one per tensor for all
        batches together; `metrics/` the norms of the weights.

    Raises
    ------
    ConfigError
        For another word as `signal`, sharded weights, or a loss that is missing.
    LisaError
        When no batch came, a batch has no loss, or a tensor's gradient comes in two parts.
    RunDirectoryError
        When the directory holds a run already or cannot be written.
    """
    config = config or RecordConfig()
    one_of("signal", signal, get_args(SignalSource))
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # which would exchange gradients of its own
    layer_map = known_layers(model, config.layers)
    table = number_tensors(model, layer_map, config.select)
    if any(is_sharded(p) for _, p in table.tensors):
        raise ConfigError(
            "the model's weights are sharded (FSDP2): a probe takes whole gradients; probe before "
            "the model is sharded."
        )
    processes = Processes(table)
    exact = signal == "exact" or (signal == "auto" and sums_fit([p for _, p in table.tensors]))
    # All the same way: the sums are added over the processes.
    exact = not processes.any(not exact)
    known = joined(
        {**describe_run(model, config, table, layer_map), **_entries(model, exact, until)},
        manifest or {},
    )
    known["hardware"]["processes"] = processes.count
    writer = None
    if processes.first:
        writer = RunWriter(run_dir, manifest=known, parameters=table.rows, config_yaml=config_yaml)
    gradients = BatchGradients(table.tensors, exact=exact, seed=seed)
    taken = ProbeResult(gradients, table, processes, writer)
    try:
        taken.weights()
        _run(model, batches, taken, processes, batches_limit, loss or _model_loss, until, progress)
        taken.write()
    except BaseException as error:
        taken.fail(error)
        raise
    return Path(run_dir)


def _entries(model: nn.Module, exact: bool, until: float | None) -> dict[str, Any]:
    """Entries of run.json that say how the probe was made."""
    return {
        "method": "probe",
        "probe": {
            "signal": "exact" if exact else "sketch",
            "buckets": BUCKETS,
            "relative_error": 0.0 if exact else RELATIVE_ERROR,
            "mode": "train" if model.training else "eval",
            "until": until,
        },
    }


def _run(
    model: nn.Module,
    batches: Iterable[Any],
    taken: ProbeResult,
    processes: Processes,
    limit: int | None,
    loss: Callable[[nn.Module, Any], torch.Tensor],
    until: float | None,
    progress: bool | None,
) -> None:
    """Pass the batches through the model, one backward pass each."""
    from tqdm import tqdm

    device = next(model.parameters()).device
    shown = sys.stderr.isatty() if progress is None else progress
    bar = tqdm(total=limit, desc="probe", unit="batch", disable=not (shown and processes.first))
    rounds, look = 0, 8
    remaining = iter(batches)
    with bar, taken.gradients.of(model):
        while limit is None or rounds < limit:
            batch = next(remaining, None)
            if not processes.any(batch is not None):
                break
            if batch is not None:
                _one(model, _on(batch, device), taken, loss)
                bar.update()
            rounds += 1
            if until is not None and rounds >= look:
                width = taken.width()
                if width <= until:
                    break
                _expect(bar, rounds, width, until, limit)
                look = int(np.ceil(look * _GROWTH))
    if not rounds:
        raise LisaError("the probe got no batch: give at least one (three for intervals).")


def _expect(bar: Any, done: int, width: float, until: float, limit: int | None) -> None:
    """Show how surely the layers are known, and by it how many batches are left.

    A width shrinks with the root of the number of batches.
    """
    needed = None
    if np.isfinite(width):
        bar.set_postfix_str(f"± {width:.1%} of ± {until:.1%}", refresh=False)
        needed = math.ceil(done * (width / until) ** 2)
    bar.total = min((n for n in (needed, limit) if n is not None), default=None)
    bar.refresh()


def _one(
    model: nn.Module, batch: Any, taken: ProbeResult, loss: Callable[[nn.Module, Any], torch.Tensor]
) -> None:
    """One forward and backward pass; the hooks take the gradients."""
    value = loss(model, batch)
    if not torch.is_tensor(value) or value.numel() != 1 or not value.requires_grad:
        raise LisaError(
            f"the loss of a batch is {type(value).__name__}, expected a tensor of one element "
            "that depends on the model's weights: give `loss`, or batches with labels."
        )
    value.backward()  # type: ignore[no-untyped-call]
    taken.gradients.end_batch()
    taken.losses.append(float(value.detach()))
    taken.tokens += int(count_tokens(batch) or 0)


def _model_loss(model: nn.Module, batch: Any) -> Any:
    output = model(**batch)
    return output["loss"] if isinstance(output, Mapping) and "loss" in output else output.loss


def _on(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a mapping to the model's device; anything else is the loss's business."""
    if not isinstance(batch, Mapping):
        return batch
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
