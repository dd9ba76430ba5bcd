"""LISA's schedule as a table and as a picture's grid: which layers were drawn, and how often."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lisa_analysis.metrics.layer_grid import LayerGrid
from lisa_analysis.rundir.events import chosen, draw_events, draws
from lisa_analysis.rundir.parts import Parts, part_draws, parts_of
from lisa_analysis.rundir.run import Run
from lisa_analysis.statistics.shares import even_shares


def what_is_drawn(run: Run) -> str:
    """``layer``, or the parts of layers that take turns, as ``module``."""
    parts = parts_of(run)
    return "layer" if parts is None else parts.by


def schedule_grid(run: Run) -> LayerGrid:
    """Layers × draws, 1 where a draw holds a layer; the steps are those of the draws."""
    active = chosen(run).T.astype(np.float64)
    steps = np.array([step for step, _ in draws(run)], dtype=np.int64)
    return LayerGrid("active", steps, active, np.zeros_like(active, dtype=bool))


def probability_grid(run: Run) -> LayerGrid:
    """Layers × draws, π of each draw over that of uniform sampling; no steps unless π moves."""
    found = [(step, pi) for step, _, pi in draw_events(run) if pi is not None]
    if (parts := parts_of(run)) is not None:
        drawn = [(step, pi) for step, _, pi in part_draws(run, parts) if pi is not None]
        return _grid_of_parts(drawn, parts, run.n_layers)
    values = np.array([pi for _, pi in found]).reshape(len(found), run.n_layers).T
    if not len(found) or not np.ptp(values, axis=1).max() > 1e-9:
        found, values = [], values[:, :0]
    stacks = [str(layer.get("stack", "")) for layer in run.manifest["layers"]]
    if not (run.manifest.get("lisa") or {}).get("activated_of_stack"):  # drawn as one stack
        stacks = [""] * run.n_layers
    uniform = np.array([even_shares(pi, stacks) for pi in values.T]).reshape(values.T.shape).T
    steps = np.array([step for step, _ in found], dtype=np.int64)
    shown = values / uniform if len(found) else values
    return LayerGrid("inclusion_probability", steps, shown, np.zeros(shown.shape, dtype=bool))


def _grid_of_parts(
    found: list[tuple[int, NDArray[np.float64]]], parts: Parts, layers: int
) -> LayerGrid:
    """Parameters that train of every layer on average, over what a uniform draw would train."""
    pi = np.array([values for _, values in found]).reshape(len(found), len(parts.names))
    if not len(found) or not np.ptp(pi, axis=0).max() > 1e-9:
        found, pi = [], pi[:0]
    members = np.zeros((layers, len(parts.names)))
    members[parts.layers, np.arange(len(parts.names))] = parts.sizes
    total = members.sum(axis=1, keepdims=True)
    share = members @ pi.T / np.where(total > 0, total, np.nan)
    uniform = (pi @ parts.sizes) / parts.sizes.sum()
    steps = np.array([step for step, _ in found], dtype=np.int64)
    shown = share / uniform[None, :]
    return LayerGrid("trained_share", steps, shown, np.zeros(shown.shape, dtype=bool))


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
