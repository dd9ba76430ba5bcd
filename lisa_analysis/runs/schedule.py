"""LISA's schedule as a table and as a picture's grid: which layers were drawn, and how often."""

import numpy as np
import pandas as pd

from lisa_analysis.metrics.layer_grid import LayerGrid
from lisa_analysis.rundir.events import chosen, draw_events, draws
from lisa_analysis.rundir.run import Run


def schedule_grid(run: Run) -> LayerGrid:
    """Layers × draws, 1 where a draw holds a layer; the steps are those of the draws."""
    active = chosen(run).T.astype(np.float64)
    steps = np.array([step for step, _ in draws(run)], dtype=np.int64)
    return LayerGrid("active", steps, active, np.zeros_like(active, dtype=bool))


def probability_grid(run: Run) -> LayerGrid:
    """Layers × draws, π of each draw over that of uniform sampling; no steps unless π moves."""
    found = [(step, pi) for step, _, pi in draw_events(run) if pi is not None]
    values = np.array([pi for _, pi in found]).reshape(len(found), run.n_layers).T
    if not len(found) or not np.ptp(values, axis=1).max() > 1e-9:
        found, values = [], values[:, :0]
    uniform = values.sum(axis=0, keepdims=True) / run.n_layers
    steps = np.array([step for step, _ in found], dtype=np.int64)
    shown = values / uniform if len(found) else values
    return LayerGrid("inclusion_probability", steps, shown, np.zeros(shown.shape, dtype=bool))


def visit_counts(run: Run) -> pd.DataFrame:
    """Return layer, draws that chose it, and the draws that its probabilities add up to.

    ``expected`` is NaN when a draw did not log its inclusion probabilities.
    """
    expected = np.zeros(run.n_layers)
    for _, _, pi in draw_events(run):
        expected += np.nan if pi is None else pi
    observed = chosen(run).sum(axis=0, dtype=np.int64)
    return pd.DataFrame(
        {"layer": np.arange(run.n_layers), "observed": observed, "expected": expected}
    )
