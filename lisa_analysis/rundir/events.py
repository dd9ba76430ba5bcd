"""What the streams say: LISA's draws, held-out losses, learning rates; which events are usable."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.contract.schema import HELD_OUT_SCORES
from lisa_analysis.rundir.jsonl import NON_FINITE, short

if TYPE_CHECKING:
    import pandas as pd

    from lisa_analysis.rundir.run import Run

Ids = NDArray[np.int64]


def draws(run: "Run") -> list[tuple[int, tuple[int, ...]]]:
    """LISA's draws in order, (step, layers); the later of two draws at one step counts."""
    return [(step, layers) for step, layers, _ in draw_events(run)]


def draw_events(run: "Run") -> list[tuple[int, tuple[int, ...], NDArray[np.float64] | None]]:
    """LISA's draws with the inclusion probabilities π that were in force, None if not logged."""
    events = run.events
    if not len(events) or "event" not in events or "layers" not in events:
        return []
    found: dict[int, tuple[tuple[int, ...], NDArray[np.float64] | None]] = {}
    logged = events[events["event"] == "lisa_draw"]
    pis = logged.get("inclusion_probabilities", None)
    for index, (step, layers) in enumerate(zip(logged["step"], logged["layers"], strict=True)):
        pi = None if pis is None else pis.iloc[index]
        usable = pi is not None and np.ndim(pi) == 1
        found[int(step)] = (
            tuple(int(layer) for layer in layers),
            np.asarray(pi, dtype=np.float64) if usable else None,
        )
    return [(step, *found[step]) for step in sorted(found)]


def chosen(run: "Run") -> NDArray[np.bool_]:
    """Whether a draw holds a layer, shape (draws, layers)."""
    drawn = draws(run)
    found = np.zeros((len(drawn), run.n_layers), dtype=bool)
    for index, (_, layers) in enumerate(drawn):
        found[index, list(layers)] = True
    return found


def ruling_draws(run: "Run", steps: Ids) -> Ids:
    """Index of the draw that ruled every step (a draw at step d rules d+1 …), −1 before any."""
    starts = np.array([step for step, _ in draws(run)], dtype=np.int64)
    return np.asarray(np.searchsorted(starts, steps, side="left") - 1, dtype=np.int64)


def evaluations(run: "Run") -> list[tuple[int, dict[str, Any]]]:
    """Step and metrics of the evaluations of a training, in order, without those after its end."""
    events = run.events
    if not len(events) or "metrics" not in events:
        return []
    counts = events["event"] == "evaluate"
    if "after_training" in events:
        counts &= events["after_training"].ne(True)
    found = events.loc[counts, ["step", "metrics"]].values
    return [(int(step), metrics) for step, metrics in found if isinstance(metrics, dict)]


def held_out_losses(run: "Run") -> "pd.DataFrame":
    """Return ``step`` and ``value`` of the evaluations that gave a held-out loss, in order.

    Of two evaluations at one step the later counts; one without a loss is left out, and so is one
    after the end of training.
    """
    import pandas as pd

    rows = [
        (step, float(metrics["eval_loss"]))
        for step, metrics in evaluations(run)
        if metrics.get("eval_loss") is not None
    ]
    frame = pd.DataFrame(rows, columns=["step", "value"]).astype({"step": int, "value": float})
    return frame.drop_duplicates("step", keep="last").sort_values("step", ignore_index=True)


def held_out_scores(run: "Run") -> dict[str, float]:
    """Return what the last evaluation was judged by beside its loss, see `HELD_OUT_SCORES`.

    A score that only this run's task knows stands in its `result`, once the run has ended.
    """
    result = run.manifest.get("result")
    own = result.get("last_held_out_scores") if isinstance(result, dict) else None
    names = dict.fromkeys([*HELD_OUT_SCORES, *(own if isinstance(own, dict) else ())])
    found: dict[str, float] = {}
    for _, metrics in evaluations(run):
        found = {
            name: float(metrics[f"eval_{name}"])
            for name in names
            if isinstance(metrics.get(f"eval_{name}"), int | float)
        } or found
    return found


def learning_rates(run: "Run", steps: Ids) -> NDArray[np.float64] | None:
    """Return the learning rate of `steps`, None when none was logged.

    A step that was not logged has that of the nearest one that was.
    """
    scalars = run.scalars
    if not len(scalars) or "learning_rate" not in scalars:
        return None
    logged = scalars.dropna(subset=["learning_rate"]).drop_duplicates("step", keep="last")
    if not len(logged):
        return None
    known = logged.set_index("step")["learning_rate"].sort_index()
    rates = known.reindex(steps, method="nearest").to_numpy(dtype=np.float64)
    return np.asarray(rates)


def usable_events(
    lines: list[dict[str, Any]], n_layers: int, path: Path
) -> tuple[list[dict[str, Any]], list[str]]:
    """Leave out events whose own fields are not what they should be, with a warning each."""
    kept, warnings = [], []
    for line in lines:
        for field in ("inclusion_probabilities", "visits") if line["event"] == "lisa_draw" else ():
            if reason := _broken_list(line, field, n_layers):
                line = {**line, field: None}
                warnings.append(
                    f"{path.name}: the lisa_draw of step {line['step']} {reason}; these are left "
                    "out, the draw counts."
                )
        if reason := _broken_event(line, n_layers):
            warnings.append(
                f"{path.name}: the {line['event']} of step {line['step']} {reason}; left out."
            )
        else:
            kept.append(line)
    return kept, warnings


def _broken_event(line: Mapping[str, Any], n_layers: int) -> str | None:
    if line["event"] == "lisa_draw":
        layers = line.get("layers")
        if not _all_are(layers, int) or not all(0 <= layer < n_layers for layer in layers or ()):
            return f"has layers = {short(layers)}, expected indices of the {n_layers} layers"
    if line["event"] == "evaluate":
        metrics = line.get("metrics")
        loss = metrics.get("eval_loss") if isinstance(metrics, Mapping) else None
        known = loss is None or loss in NON_FINITE if isinstance(loss, str | None) else False
        if not isinstance(metrics, Mapping | None) or not (known or _all_are([loss], int | float)):
            return f"has metrics = {short(metrics)}, expected an object with numbers"
    return None


def _broken_list(line: Mapping[str, Any], field: str, n_layers: int) -> str | None:
    """What is wrong with a list of one number per layer, which a draw may have or lack."""
    values, most = line.get(field), 1 + 1e-6 if field != "visits" else math.inf
    if values is None:
        return None
    whole = isinstance(values, list) and len(values) == n_layers and _all_are(values, int | float)
    if whole and all(0 <= value <= most for value in values):
        return None
    kind = "numbers" if field == "visits" else "probabilities"
    return f"has {field} = {short(values)}, expected {n_layers} {kind}"


def _all_are(values: object, kind: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, kind)
        and not isinstance(value, bool)
        and (isinstance(value, float) or abs(value) < 2**63)  # arrays hold no longer ones
        for value in values
    )
