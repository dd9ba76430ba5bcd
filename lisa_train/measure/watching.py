"""Findings while training: the rules of `la.diagnose`, on what has just been written."""

import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lisa_train.measure import faults
from lisa_train.measure.disk.writer import RunWriter, SilentWriter
from lisa_train.model.tensor_table import TensorTable

if TYPE_CHECKING:
    from lisa_analysis.runs.diagnostics.finding import Finding
    from lisa_analysis.runs.diagnostics.rule import Rule

logger = logging.getLogger(__name__)
# Recorded steps that are looked at together: enough to tell a habit from an accident.
KEPT = 64


class Watching:
    """Hands what is written to the rules, and what they find to the log, the run and listeners.

    Only the process that writes the run looks at it; the others do nothing.

    Parameters
    ----------
    wanted
        Whether anything is looked at (`RecordConfig.watch`).
    writer
        Of the run.
    table
        Its tensors.

    Attributes
    ----------
    listeners : list of callables
        Each is called with the number of the step and a `lisa_analysis` Finding.
    """

    def __init__(self, wanted: bool, writer: RunWriter | SilentWriter, table: TensorTable) -> None:
        self.listeners: list[Callable[[int, Finding], object]] = []
        self._writer = writer
        self._table = table
        self._on = wanted and isinstance(writer, RunWriter)
        self._rules: list[Rule] | None = None
        self._rows: deque[Mapping[str, Any]] = deque(maxlen=KEPT)
        self._lines: list[Mapping[str, Any]] = []
        self._draws: list[tuple[int, Mapping[str, Any]]] = []

    def rows(self, rows: Mapping[str, Any]) -> None:
        """Take the rows of one step."""
        if self._on:
            self._rows.append(rows)

    def line(self, line: Mapping[str, Any]) -> None:
        """Take a line of the scalars."""
        if self._on:
            self._lines.append(line)

    def event(self, name: str, step: int, fields: Mapping[str, Any]) -> None:
        """Take an event."""
        if self._on and name == "lisa_draw":
            self._draws.append((step, fields))

    def look(self, step: int) -> None:
        """Say what is wrong and has not been said, each rule once; `step` steps are done."""
        if not self._on or not self._rows:
            return
        first = int(self._rows[0]["step"][0])
        self._lines = [line for line in self._lines if line["step"] >= first]
        try:
            self._judge(step)
        except Exception as error:
            faults.come_through(error)
            self._on = False
            logger.warning("Nothing is watched any more: %s", faults.reason(error))

    def _judge(self, step: int) -> None:
        # Not before something has been written: these imports are not free.
        from lisa_analysis.runs.diagnostics.live import NewestSteps, judge, live_rules

        if self._rules is None:
            self._rules = live_rules()
        assert isinstance(self._writer, RunWriter)
        run = NewestSteps(
            self._writer.manifest, self._table.rows, self._rows, self._lines, self._draws
        )
        for rule, finding in judge(run, list(self._rules)):
            self._rules.remove(rule)
            self._say(step, finding)

    def _say(self, step: int, finding: "Finding") -> None:
        text = f"{finding.title}: {finding.evidence} Try: {finding.advice}"
        logger.warning("step %d: %s", step, text)
        self._writer.event("warning", step, message=text, rule=finding.id)
        for listener in self.listeners:
            listener(step, finding)
