"""What a probe has measured so far: how surely, and how it reaches the disk."""

import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.statistics.signal import MIN_BATCHES, signal_and_noise
from lisa_train.measure.disk.run_file import outcome
from lisa_train.measure.disk.writer import RunWriter
from lisa_train.measure.probe.batch_gradients import BatchGradients, agreement
from lisa_train.model.norms import squares
from lisa_train.model.tensor_table import TensorTable


class Together:
    """The processes that probe one model, each with batches of its own."""

    def __init__(self) -> None:
        running = dist.is_available() and dist.is_initialized()
        self.count = dist.get_world_size() if running else 1
        self.first = not running or dist.get_rank() == 0

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set anywhere."""
        if self.count == 1:
            return flag
        value = torch.tensor(float(flag), device=device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def joined(self, part: np.ndarray) -> np.ndarray:
        """Arrays of all processes, one after the other along the first axis."""
        if self.count == 1:
            return part
        parts: list[Any] = [None] * self.count
        dist.all_gather_object(parts, part)
        return np.concatenate(parts)

    def added(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor


class ProbeResult:
    """What has been measured, and how it reaches the disk."""

    def __init__(
        self, gradients: BatchGradients, table: TensorTable, writer: RunWriter | None
    ) -> None:
        self.gradients = gradients
        self.losses: list[float] = []
        self.tokens = 0
        self.table = table
        self._writer = writer
        self._began = time.monotonic()
        layers = {row["param_id"]: row["layer"] for row in table.rows}
        self._layer_of = np.array([-1 if layers[i] is None else layers[i] for i in gradients.ids])

    def weights(self) -> None:
        """Write the norms of the weights that the gradients were taken at."""
        if self._writer is not None:
            ids = self.gradients.ids
            norms = squares([p for _, p in self.table.tensors]).sqrt().cpu().double().numpy()
            self._writer.write_metrics(
                {"step": np.zeros(len(ids), int), "param_id": ids, "weight_norm": norms}
            )

    def measured(self, processes: Together) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Numbers of the tensors that any batch reached, and their columns by batch."""
        ids = np.unique(processes.joined(self.gradients.reached()))
        columns = {k: processes.joined(v) for k, v in self.gradients.numbers(ids).items()}
        sketches = [processes.joined(self.gradients.sketches(int(i))) for i in ids]
        sums = None
        if self.gradients.exact:
            sums = self.gradients.sum_squares(ids, processes.added)
        columns["signal"] = agreement(columns["square"], sketches, sums)
        return ids, columns

    def width(self, processes: Together) -> float:
        """Half-width over score of the layer that is known worst; inf where nothing is known."""
        ids, columns = self.measured(processes)
        layer = self._layer_of[np.searchsorted(self.gradients.ids, ids)]
        inside = np.unique(layer[layer >= 0])
        if len(columns["signal"]) < MIN_BATCHES or not len(inside):
            return float("inf")
        square, agreed = (
            np.stack([columns[name][:, layer == n].sum(axis=1) for n in inside], axis=1)
            for name in ("square", "signal")
        )
        found = signal_and_noise(square, agreed)
        if not (found.signal > 0).all():
            return float("inf")
        root = np.sqrt(np.maximum(np.stack([found.low, found.signal, found.high]), 0.0))
        return float(((root[2] - root[0]) / (2 * root[1])).max())

    def write(self, processes: Together) -> None:
        """Write everything and close the run."""
        ids, columns = self.measured(processes)
        losses = processes.joined(np.array(self.losses))
        tokens = int(processes.joined(np.array([self.tokens])).sum())
        if self._writer is None:
            return
        batches, n = columns["square"].shape
        if not n:
            raise LisaError("the backward passes brought no gradient to any measured tensor.")
        together = signal_and_noise(columns["square"], columns["signal"])
        each = {
            "batch": np.ma.array(np.repeat(np.arange(batches), n)),
            "param_id": np.tile(ids, batches),
            "grad_norm": np.sqrt(columns["square"]).ravel(),
            "grad_norm_l1": columns["magnitude"].ravel(),
            "taylor": columns["taylor"].ravel(),
            "signal": columns["signal"].ravel(),
            "noise": _missing(batches * n),
        }
        missing = _missing(n)
        all_of_them = {
            "batch": _missing(n), "param_id": ids, "grad_norm": missing,
            "grad_norm_l1": missing, "taylor": missing, "signal": together.signal,
            "noise": together.noise,
        }  # fmt: skip
        if batches < 2:  # one batch has no other to agree with
            each["signal"] = _missing(batches * n)
            all_of_them |= {"signal": missing, "noise": missing}
        rows = {k: np.ma.concatenate([each[k], all_of_them[k]]) for k in each}
        self._writer.write_probe(0, rows)
        self._writer.event("probe", 0, batches=batches)
        result = {
            "batches": batches,
            "tokens": tokens or None,
            "loss": float(losses.mean()),
            "seconds": round(time.monotonic() - self._began, 3),
        }
        self._writer.close(result={k: v for k, v in result.items() if v is not None})

    def fail(self, error: BaseException, processes: Together) -> None:
        """Say how the run ended; keep the batches that were complete."""
        if self._writer is None or self._writer.closed:
            return
        status, sentence = outcome(error)
        try:
            if self.gradients.batches and processes.count == 1:
                self.write(processes)
                self._writer.update_manifest(status=status, error=sentence)
        finally:
            self._writer.close(status, error=sentence)


def _missing(n: int) -> Any:
    return np.ma.masked_array(np.zeros(n), mask=True)
