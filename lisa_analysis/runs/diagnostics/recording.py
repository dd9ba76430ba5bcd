"""Rules on the record itself: complete, and cheap enough."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lisa_analysis.runs.diagnostics.rule import CouldNotRunError, Evidence, Outcome, Rule


@dataclass(frozen=True)
class LogGaps(Rule):
    """Steps that should be there and are not."""

    id: ClassVar[str] = "log_gaps"
    title: ClassVar[str] = "Gaps in the log"
    meaning: ClassVar[str] = (
        "Figures over time are averages of what was recorded; gaps bias them towards the rest, "
        "and an unfinished run may not have reached its end state."
    )
    advice: ClassVar[str] = (
        "Resume the run from its last checkpoint, or read its figures as those of a part."
    )

    @property
    def threshold(self) -> str:
        """When the rule fires."""
        return "a missing recorded step, an unfinished run, or a warning of the reader"

    def check(self, evidence: Evidence) -> Outcome:
        """Compare the recorded steps with the cadence."""
        run, steps = evidence.run, evidence.table.steps
        problems = []
        if run.status != "finished":
            problems.append(f"the run is {run.status}")
        if not len(steps):
            if run.status == "running":
                raise CouldNotRunError("no step has been recorded yet")
            problems.append("no step was recorded")
            return Outcome("warn", f"{_sentence(problems)}.")
        every = (run.manifest.get("recording") or {}).get("every")
        if not isinstance(every, int) or every < 1:
            gaps = np.diff(steps)
            every = int(np.median(gaps)) if len(gaps) else 1
        last = int(steps[-1])
        expected = np.arange(every, last + 1, every)
        missing = np.setdiff1d(expected, steps, assume_unique=True)
        first = None
        if len(missing):
            first = int(missing[0])
            problems.append(
                f"{len(missing)} of {len(expected)} steps due every {every} are missing, first "
                f"{first}"
            )
        done = (run.manifest.get("result") or {}).get("steps")
        if run.status == "finished" and isinstance(done, int) and done - last >= every:
            problems.append(f"the run finished at step {done}, its record ends at {last}")
        problems += [warning.rstrip(".") for warning in run.warnings]
        if not problems:
            return Outcome(
                "ok", f"All {len(steps)} steps due every {every} up to {last} are there."
            )
        running = run.status == "running" and len(problems) == 1
        return Outcome("info" if running else "warn", f"{_sentence(problems)}.", step=first)


@dataclass(frozen=True)
class RecorderCost(Rule):
    """Time spent recording."""

    share: float = 0.05
    id: ClassVar[str] = "recorder_cost"
    title: ClassVar[str] = "Cost of recording"
    meaning: ClassVar[str] = "The record takes a noticeable part of the training time."
    advice: ClassVar[str] = "Record less often (record.every)."

    @property
    def threshold(self) -> str:
        """When the rule fires."""
        return f"more than {self.share:.0%} of the time"

    def check(self, evidence: Evidence) -> Outcome:
        """Add up the times."""
        frame = evidence.scalar("recorder_seconds", "step_seconds")
        total = float(frame["step_seconds"].sum())
        if total <= 0:
            raise CouldNotRunError("step_seconds was not measured")
        share = float(frame["recorder_seconds"].sum()) / total
        return Outcome(
            "info" if share > self.share else "ok",
            f"Recording took {share:.1%} of {total:,.0f} s.",
        )


def _sentence(parts: list[str]) -> str:
    text = "; ".join(parts)
    return text[0].upper() + text[1:]
