"""A run from its opening to its end: the one way for a Trainer's callback and for a plain loop.

Of several processes the first alone opens and writes the run directory, and all settle together
what became of that: one that stops, or goes on unrecorded, alone would let the others wait for
ever.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lisa_analysis.contract.errors import ConfigError, RunDirectoryError
from lisa_train.measure import faults
from lisa_train.measure.config import RecordConfig
from lisa_train.measure.disk.manifest import describe_run
from lisa_train.measure.disk.storage import UnwritableError
from lisa_train.measure.disk.writer import RunWriter, SilentWriter
from lisa_train.measure.processes import Processes
from lisa_train.model.layer_map import LayerMap
from lisa_train.model.run_entries import joined, method_entries
from lisa_train.model.tensor_table import TensorTable


class RunSession:
    """Opens one run, says what went wrong with it, and closes it.

    Parameters
    ----------
    config
        What to do when the directory cannot be had (`on_record_error`), and its name.
    processes
        The processes that train together.
    writer
        Of a run that is open already.

    Attributes
    ----------
    writer
        Where to; of every process but the first, and without a recording, one that writes nothing.
    problem
        Why the recording is not whole, in a sentence; None while nothing is known.
    recording
        Whether anything is recorded.
    """

    def __init__(
        self,
        config: RecordConfig,
        processes: Processes,
        writer: RunWriter | SilentWriter | None = None,
    ) -> None:
        self.writer: RunWriter | SilentWriter = writer or SilentWriter()
        self.problem: str | None = None
        self.recording = writer is not None
        self._config = config
        self._processes = processes
        self._ended: tuple[str, str | None] | None = None
        self._method_of: nn.Module | None = None

    def open(
        self,
        make: Callable[[], RunWriter | SilentWriter],
        *,
        also_refused: Callable[[Exception], bool] = lambda error: False,
        unless: Callable[[Exception | None], None] = lambda error: None,
    ) -> bool:
        """Open the run directory, or continue one that is open.

        Parameters
        ----------
        make
            Returns the writer; called in the first process.
        also_refused
            Whether training must not begin after an error, whatever `on_record_error` says, beside
            those that `faults.is_refusal` knows.
        unless
            Called first where the run could not be opened, with the error if it is this process's.

        Returns
        -------
        bool
            Whether anything is recorded. If not, it has been said.

        Raises
        ------
        Exception
            What `make` raised, where that stops training.
        RunDirectoryError
            In the other processes then.
        """
        writer, problem = None, None
        if self._processes.first:
            try:
                writer = make()
            except Exception as error:
                problem = error
        stops = problem is not None and (
            faults.stops_training(problem, self._config.on_record_error)
            or faults.is_refusal(problem)
            or also_refused(problem)
        )
        failed, stopped, segment = self._processes.highest(
            problem is not None, stops, writer.segment if writer else 0
        )
        self.writer = SilentWriter(segment) if failed or writer is None else writer
        self.recording = not failed
        if not failed:
            return True
        unless(problem)
        if problem is not None and stopped:
            raise problem
        if stopped:
            raise RunDirectoryError(
                f"{self._config.run_dir} is not recorded to: the first process could not open it "
                "and says why."
            )
        if problem is not None:
            _warn_unrecorded(problem)
        return False

    def open_for_loop(
        self,
        given: RunWriter | SilentWriter | None,
        model: nn.Module,
        table: TensorTable,
        layer_map: LayerMap,
        entries: Mapping[str, Any] | None,
    ) -> None:
        """Open the run of a plain loop, which may have brought a writer of its own.

        Parameters
        ----------
        given
            The loop's own writer.
        model, table, layer_map
            What run.json describes.
        entries
            What only the loop knows of the run.

        Raises
        ------
        ConfigError
            When neither a writer nor a directory is given.
        Exception
            See `open`.
        """
        # The user knows better, where the method is given.
        known = given is not None or "method" in (entries or {})
        self._method_of = None if known else model
        if given is None and self._config.run_dir is None:
            raise ConfigError("record.run_dir is not set: name the folder to write.")

        def new_writer() -> RunWriter:
            assert self._config.run_dir is not None
            found = describe_run(model, self._config, table, layer_map)
            found["hardware"]["processes"] = self._processes.count
            return RunWriter(
                self._config.run_dir,
                manifest=joined(found, entries or {}),
                parameters=table.rows,
            )

        self.open(new_writer if given is None else lambda: given)

    def state_method(self) -> None:
        """Look once more, at a loop's first step, how its model is trained.

        An engine that was opened after the recorder is in run.json then.
        """
        if self._method_of is None:
            return
        entries, self._method_of = method_entries(self._method_of), None
        known = getattr(self.writer, "manifest", {})
        if known.get("method") == "full" != entries["method"]:
            self.writer.update_manifest(**joined(known, entries))

    def write_last(self, step: int, *parts: Callable[[], object]) -> Exception | None:
        """Do what is left to do, all of it; return the first error, which run.json will name."""
        problem: Exception | None = None
        for part in parts:
            try:
                part()
            except Exception as failure:
                problem = problem or failure
        if problem is not None and not isinstance(problem, UnwritableError):
            # What the disk refused is tried once more when the writer closes.
            text = f"recording ended early: {faults.reason(problem)}"
            self.problem = self.problem or text
            self.warning(step, text, faults.full_traceback(problem))
        return problem

    def close(self, status: str, error: str | None, result: Mapping[str, Any]) -> Exception | None:
        """Say in run.json how the run ended; return what the disk had against it.

        A recording that an error of its own cut short is ``failed``, however training ended.
        """
        self._ended = (status, error)
        if self.writer.lost_rows and self.problem is None:
            self.problem = f"{self.writer.lost_rows} rows were lost while the disk refused them"
        if status == "finished" and self.problem:
            status = "failed"
        fields: dict[str, Any] = {"result": dict(result)} if result else {}
        if error or self.problem:
            fields["error"] = error or self.problem
        try:
            self.writer.close(status, **fields)
        except Exception as failure:
            return failure
        return None

    def restate(self, status: str, error: str | None) -> None:
        """Correct the end of a closed run: something failed after it.

        The error that is on its way matters more than the disk's.
        """
        if (status, error) == self._ended:
            return
        try:
            self.writer.update_manifest(status=status, error=error)
        except Exception as failure:
            faults.come_through(failure)
            text = faults.warning_text(f"Recording: {faults.reason(failure)}", failure)
            warnings.warn(text, RuntimeWarning, stacklevel=5)

    def warning(self, step: int, text: str, trace: str | None = None) -> None:
        """Write a warning among the events of a run that is open."""
        if not self.writer.closed:
            self.writer.event("warning", step, message=text, traceback=trace)


def _warn_unrecorded(error: Exception) -> None:
    text = f"Training goes on unrecorded: {faults.reason(error)}"
    warnings.warn(faults.warning_text(text, error), RuntimeWarning, stacklevel=5)
