"""What a run achieved and what it cost: one summary per run, losses read off at equal cost."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lisa_analysis.rundir.events import held_out_losses, held_out_scores
from lisa_analysis.rundir.run import Run

COSTS = ("step", "tokens", "seconds")
_EQUAL = {"step": "loss_at_equal_steps", "tokens": "loss_at_equal_tokens",
          "seconds": "loss_at_equal_seconds"}  # fmt: skip


@dataclass(frozen=True, eq=False)
class RunSummary:
    """Summary of one run.

    Attributes
    ----------
    row
        The columns of the comparison that need no other run.
    curve
        Every evaluation: run, step, tokens, seconds, held_out_loss.
    """

    row: dict[str, Any]
    curve: pd.DataFrame

    @classmethod
    def of(cls, run: Run, label: str) -> "RunSummary":
        """Read the streams of `run`."""
        scalars, result = run.scalars, run.manifest.get("result") or {}
        curve = evaluations(run, label)
        losses = curve["held_out_loss"]
        row = {
            "run": label,
            "method": run.method,
            "status": run.status,
            "seed": (run.manifest.get("seeds") or {}).get("seed"),
            "steps": _whole(_last(scalars, "step"), result.get("steps")),
            "tokens": _whole(_last(scalars, "tokens"), result.get("tokens")),
            "seconds": _number(_total(scalars, "step_seconds"), result.get("seconds")),
            "peak_memory_bytes": _whole(
                _largest(scalars, "peak_memory_bytes"), result.get("peak_memory_bytes")
            ),
            "held_out_loss": float(losses.iloc[-1]) if len(losses) else float("nan"),
            **held_out_scores(run),
        }
        return cls(row, curve)


def table(summaries: list[RunSummary]) -> pd.DataFrame:
    """One row per run, with the held-out loss at the largest cost that all runs reached.

    A loss that is not finite is one: a run that diverged reached its steps, without a number.
    """
    frame = pd.DataFrame([summary.row for summary in summaries])
    for cost, column in _EQUAL.items():
        reached = [summary.curve.dropna(subset=[cost]) for summary in summaries]
        evaluated = [curve for curve in reached if len(curve)]
        limit = min((float(curve[cost].max()) for curve in evaluated), default=float("nan"))
        frame[column] = [loss_at(curve, cost, limit) for curve in reached]
    return frame


def reached(curves: pd.DataFrame) -> tuple[int | None, list[str]]:
    """Return the last step that all evaluated runs reached, and which ended there before others.

    None without any evaluation.
    """
    ends = curves.groupby("run", sort=False)["step"].max()
    if not len(ends):
        return None, []
    least = int(ends.min())
    return least, [str(run) for run in ends.index[ends == least]] if ends.max() > least else []


def score_columns(frame: pd.DataFrame) -> list[str]:
    """Columns of `table` with what the held-out part was judged by beside its loss."""
    columns = list(map(str, frame))
    return columns[columns.index("held_out_loss") + 1 : columns.index("loss_at_equal_steps")]


def loss_at(curve: pd.DataFrame, cost: str, value: float) -> float:
    """Held-out loss at a cost, linear between evaluations; NaN outside of what was evaluated."""
    if not len(curve) or not np.isfinite(value):
        return float("nan")
    x = curve[cost].to_numpy(dtype=np.float64)
    if not x.min() <= value <= x.max():
        return float("nan")
    return float(np.interp(value, x, curve["held_out_loss"].to_numpy(dtype=np.float64)))


def evaluations(run: Run, label: str) -> pd.DataFrame:
    """Held-out losses with the steps, tokens and training seconds that they cost."""
    scalars = run.scalars
    frame = held_out_losses(run).rename(columns={"value": "held_out_loss"})
    frame.insert(0, "run", label)
    frame.insert(2, "tokens", _at_steps(scalars, "tokens", frame["step"], running=True))
    frame.insert(3, "seconds", _at_steps(scalars, "step_seconds", frame["step"], running=False))
    return frame


def _at_steps(scalars: pd.DataFrame, column: str, steps: pd.Series, *, running: bool) -> Any:
    """Value of a running total at given steps, 0 before training; cumulates it when it is not."""
    if not len(steps):
        return np.zeros(0)
    if column not in scalars or not scalars[column].notna().any():
        return np.full(len(steps), np.nan)
    logged = scalars[["step", column]].dropna().drop_duplicates("step", keep="last")
    logged = logged.sort_values("step")
    total = logged[column] if running else logged[column].cumsum()
    x = np.concatenate([[0.0], logged["step"].to_numpy(dtype=np.float64)])
    y = np.concatenate([[0.0], total.to_numpy(dtype=np.float64)])
    return np.interp(steps.to_numpy(dtype=np.float64), x, y)


def _logged(frame: pd.DataFrame, column: str) -> Any:
    return frame[column].dropna() if column in frame else pd.Series(dtype=np.float64)


def _last(frame: pd.DataFrame, column: str) -> Any:
    values = _logged(frame, column)
    return values.iloc[-1] if len(values) else None


def _total(frame: pd.DataFrame, column: str) -> Any:
    values = _logged(frame, column)
    return values.sum() if len(values) else None


def _largest(frame: pd.DataFrame, column: str) -> Any:
    values = _logged(frame, column)
    return values.max() if len(values) else None


def _number(*candidates: Any) -> float:
    """First candidate that is a number, NaN without any."""
    for value in candidates:
        if value is not None and not isinstance(value, str) and np.isfinite(value):
            return float(value)
    return float("nan")


def _whole(*candidates: Any) -> Any:
    value = _number(*candidates)
    return int(value) if np.isfinite(value) else None
