"""What goes wrong while a run is recorded: said once, or raised, as the user chose."""

import warnings
from collections.abc import Callable

from lisa_analysis.contract.errors import RunDirectoryError
from lisa_train.measure import faults
from lisa_train.measure.cadence import Cadence
from lisa_train.measure.config import RecordConfig
from lisa_train.measure.processes import Processes
from lisa_train.measure.session import RunSession


class Troubles:
    """Tells the user and the run's events; ends the recording where it cannot go on.

    Parameters
    ----------
    config
        What the user chose (`on_record_error`).
    session
        The run; its `problem` becomes why the recording ended early.
    processes
        The processes: one that goes on alone would let the others wait for ever.
    cadence
        Knows at which step something happened.
    stop
        Lets go of everything that the recording holds.

    Attributes
    ----------
    stopped : bool
        Whether nothing is recorded any more (or never was).
    """

    def __init__(
        self,
        config: RecordConfig,
        session: RunSession,
        processes: Processes,
        cadence: Cadence,
        stop: Callable[[], None],
    ) -> None:
        self.stopped = not session.recording
        self._config = config
        self._session = session
        self._processes = processes
        self._cadence = cadence
        self._stop = stop
        self._said: set[str] = set()

    def failed(self, error: Exception) -> None:
        """Stop training or say it once, as the user chose; a full disk may have room later."""
        disk = isinstance(error, RunDirectoryError)
        stops = faults.stops_training(error, self._config.on_record_error)
        if stops or (self._processes.count > 1 and not disk):
            raise error
        if disk:
            self.say(f"Recording: {error}")
            return
        self.stopped = True
        self._stop()  # copies of weights would stay for the rest of the training
        why = faults.reason(error)
        self._session.problem = f"recording stopped after step {self._cadence.completed}: {why}"
        self.say(f"Recording stopped, training goes on: {why}", faults.full_traceback(error))

    def say(self, text: str, trace: str | None = None) -> None:
        """Warn once, on the terminal and in the run's events."""
        if text not in self._said:
            self._said.add(text)
            self._session.warning(self._cadence.completed, text, trace)
            text = text if trace is None else f"{text}\n{trace}"
            warnings.warn(text, RuntimeWarning, stacklevel=5)
