"""What probed batches have in common: over all processes, how surely, and as rows."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lisa_analysis.contract.errors import ConfigError, LisaError
from lisa_analysis.statistics.signal import MIN_BATCHES, signal_and_noise
from lisa_train.measure.disk.run_file import one_sentence, status_of
from lisa_train.measure.disk.writer import RunWriter
from lisa_train.measure.probe.batch_gradients import BatchGradients, agreement, sums_fit
from lisa_train.measure.probe.measuring_pass import Passes
from lisa_train.measure.processes import Processes
from lisa_train.model.norms import squares
from lisa_train.model.tensor_table import TensorTable


@dataclass(frozen=True)
class Probed:
    """The batches of all processes.

    Attributes
    ----------
    ids
        Numbers of the tensors that any batch reached, ascending.
    square, magnitude, taylor, agreement
        Shape (batches, tensors), float64: ‖g_b‖², ‖g_b‖₁, ⟨g_b, θ⟩ and ⟨g_b, mean of the others⟩.
    exact
        Whether `agreement` is, in its mean over the batches; else it is that of sketches.
    """

    ids: NDArray[np.int64]
    square: NDArray[np.float64]
    magnitude: NDArray[np.float64]
    taylor: NDArray[np.float64]
    agreement: NDArray[np.float64]
    exact: bool

    @classmethod
    def together(cls, gradients: BatchGradients, processes: Processes) -> "Probed":
        """Return what the processes have measured; all of them call it together."""
        ids = np.unique(processes.joined(gradients.reached()))
        columns = {k: processes.joined(v) for k, v in gradients.numbers(ids).items()}
        sketches = [processes.joined(gradients.sketches(int(i))) for i in ids]
        sums = gradients.sum_squares(ids, processes.added) if gradients.exact else None
        agreed = agreement(columns["square"], sketches, sums)
        return cls(ids, **columns, agreement=agreed, exact=gradients.exact)

    @property
    def batches(self) -> int:
        """Number of batches."""
        return len(self.square)

    def width(self, groups: NDArray[np.int64]) -> float:
        """Half-width over score of the group that is known worst; inf where nothing is known.

        Parameters
        ----------
        groups
            Group of every tensor of `ids`, below zero for one that is in none.
        """
        inside = np.unique(groups[groups >= 0])
        if self.batches < MIN_BATCHES or not len(inside):
            return float("inf")
        square, agreed = (
            np.stack([column[:, groups == n].sum(axis=1) for n in inside], axis=1)
            for column in (self.square, self.agreement)
        )
        found = signal_and_noise(square, agreed)
        if not (found.signal > 0).all():
            return float("inf")
        root = np.sqrt(np.maximum(np.stack([found.low, found.signal, found.high]), 0.0))
        return float(((root[2] - root[0]) / (2 * root[1])).max())

    def event(self) -> dict[str, Any]:
        """Return the fields of the event that announces the rows."""
        return {"batches": self.batches, "signal": "exact" if self.exact else "sketch"}

    def rows(self) -> dict[str, Any]:
        """Return the columns of `lisa_analysis.contract.schema.PROBES_TABLE` but the step."""
        batches, n = self.square.shape
        together = signal_and_noise(self.square, self.agreement)
        each = {
            "batch": np.ma.array(np.repeat(np.arange(batches), n)),
            "param_id": np.tile(self.ids, batches),
            "grad_norm": np.sqrt(self.square).ravel(),
            "grad_norm_l1": self.magnitude.ravel(),
            "taylor": self.taylor.ravel(),
            "signal": self.agreement.ravel(),
            "noise": _missing(batches * n),
        }
        missing = _missing(n)
        all_of_them = {
            "batch": missing, "param_id": self.ids, "grad_norm": missing,
            "grad_norm_l1": missing, "taylor": missing, "signal": together.signal,
            "noise": together.noise,
        }  # fmt: skip
        if batches < 2:  # one batch has no other to agree with
            each["signal"] = _missing(batches * n)
            all_of_them |= {"signal": missing, "noise": missing}
        return {k: np.ma.concatenate([each[k], all_of_them[k]]) for k in each}


def probed_batches(
    model: nn.Module, table: TensorTable, processes: Processes, passes: Passes, scale: Any = 1.0
) -> Probed:
    """Make backward passes with all tensors of a model that trains, and keep their numbers alone.

    All processes call it together, each with as many passes on batches of its own; a failure of
    one is raised in all of them.

    Parameters
    ----------
    model, table, processes
        The model, its tensors and the processes that train it.
    passes
        Each runs one forward and backward pass, without any collective.
    scale
        Factor on the losses (fp16 loss scale).

    Raises
    ------
    ConfigError
        When weights are sharded.
    """
    if processes.sharded:
        raise ConfigError(
            "several batches cannot be probed at once with sharded weights (FSDP2): a probe takes "
            "whole gradients; set record.probe_batches to 1."
        )
    exact = not processes.any(not sums_fit([p for _, p in table.tensors]))
    gradients = BatchGradients(table.tensors, exact=exact)
    problem: Exception | None = None
    try:
        with gradients.of(model, scale):
            for backward in passes:
                backward()
                gradients.end_batch()
    except Exception as error:
        problem = error
    if processes.any(problem is not None):
        raise problem or RuntimeError("the pass failed on another process")
    probed = Probed.together(gradients, processes)
    if not len(probed.ids):
        raise RuntimeError("the passes brought no gradient to any of the measured tensors")
    return probed


class ProbeResult:
    """A run that is a probe and nothing else: what has been measured, and how it ends.

    Parameters
    ----------
    gradients
        Takes the batches of this process.
    table
        The tensors.
    processes
        The processes that probe together, each with batches of its own.
    writer
        Of the first process; None in the others.
    """

    def __init__(
        self,
        gradients: BatchGradients,
        table: TensorTable,
        processes: Processes,
        writer: RunWriter | None,
    ) -> None:
        self.gradients = gradients
        self.losses: list[float] = []
        self.tokens = 0
        self._table = table
        self._processes = processes
        self._writer = writer
        self._began = time.monotonic()
        layers = {row["param_id"]: row["layer"] for row in table.rows}
        self._layer_of = np.array([-1 if layers[i] is None else layers[i] for i in gradients.ids])

    def weights(self) -> None:
        """Write the norms of the weights that the gradients were taken at."""
        if self._writer is not None:
            ids = self.gradients.ids
            norms = squares([p for _, p in self._table.tensors]).sqrt().cpu().double().numpy()
            self._writer.write_metrics(
                {"step": np.zeros(len(ids), int), "param_id": ids, "weight_norm": norms}
            )

    def width(self) -> float:
        """Half-width over score of the layer that is known worst; inf where nothing is known."""
        probed = Probed.together(self.gradients, self._processes)
        return probed.width(self._layer_of[np.searchsorted(self.gradients.ids, probed.ids)])

    def write(self) -> None:
        """Write everything and close the run."""
        probed = Probed.together(self.gradients, self._processes)
        losses = self._processes.joined(np.array(self.losses))
        tokens = int(self._processes.joined(np.array([self.tokens])).sum())
        if self._writer is None:
            return
        if not len(probed.ids):
            raise LisaError("the backward passes brought no gradient to any measured tensor.")
        self._writer.write_probe(0, probed.rows())
        self._writer.event("probe", 0, **probed.event())
        result = {
            "batches": probed.batches,
            "tokens": tokens or None,
            "loss": float(losses.mean()),
            "seconds": round(time.monotonic() - self._began, 3),
        }
        self._writer.close(result={k: v for k, v in result.items() if v is not None})

    def fail(self, error: BaseException) -> None:
        """Say how the run ended; keep the batches that were complete.

        What goes wrong meanwhile becomes a note on `error`, which is on its way.
        """
        if self._writer is None or self._writer.closed:
            return
        status, sentence = status_of(error)
        try:
            if self.gradients.batches and self._processes.count == 1:
                self.write()
        except Exception as another:
            error.add_note(f"The batches before it could not be kept: {one_sentence(another)}")
        try:
            if self._writer.closed:
                self._writer.update_manifest(status=status, error=sentence)
            else:
                self._writer.close(status, error=sentence)
        except Exception as another:
            error.add_note(f"run.json could not be brought up to date: {one_sentence(another)}")


def _missing(n: int) -> Any:
    return np.ma.masked_array(np.zeros(n), mask=True)
