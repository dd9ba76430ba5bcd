"""What the plots draw: layer × step grids and thinned series, from a run's frames."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lisa_analysis.metrics.step_table import step_table

MAX_COLUMNS = 400
MAX_POINTS = 400


@dataclass(frozen=True)
class LayerGrid:
    """One column of the metrics table, summed over the tensors of each layer.

    Attributes
    ----------
    column
        Name in `lisa_analysis.contract.schema.METRICS_TABLE`.
    steps
        Recorded optimizer steps, increasing, shape (T,).
    values
        Layer values, shape (L, T). NaN where nothing was measured: the layer was frozen.
    non_finite
        True where a tensor of the layer was measured as NaN or inf, shape (L, T).
    """

    column: str
    steps: np.ndarray
    values: np.ndarray
    non_finite: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    def to_frame(self) -> pd.DataFrame:
        """Return layers as rows (index ``layer``) and steps as columns."""
        return pd.DataFrame(
            self.values,
            index=pd.RangeIndex(len(self.values), name="layer"),
            columns=pd.Index(self.steps, name="step"),
        )

    def thinned(self, most: int = MAX_COLUMNS) -> tuple["LayerGrid", int]:
        """Average neighbouring columns until at most `most` are left.

        Returns
        -------
        tuple[LayerGrid, int]
            The smaller grid, its steps the first of each group, and the largest number of
            recorded steps that share a column (1 = nothing was averaged). One non-finite step
            makes the whole cell non-finite: thinning must not hide a fault.
        """
        if len(self) <= most:
            return self, 1
        starts = np.linspace(0, len(self), most, endpoint=False).astype(int)
        measured = np.isfinite(self.values)
        counts = np.add.reduceat(measured, starts, axis=1)
        sums = np.add.reduceat(np.where(measured, self.values, 0.0), starts, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            means = sums / counts
        bad = np.add.reduceat(self.non_finite, starts, axis=1) > 0
        group = int(np.diff([*starts, len(self)]).max())
        return LayerGrid(self.column, self.steps[starts], means, bad), group


def layer_grids(run: Any, columns: Iterable[str]) -> dict[str, LayerGrid]:
    """Layer × step grids of several metrics columns, summed over the tensors of each layer.

    Only tensors that were trained at a step count (`lisa_analysis.metrics.step_table`), so a layer
    that LISA froze is missing there, and LoRA runs show their adapters.

    Parameters
    ----------
    run
        An opened run directory (`lisa_analysis.load`).
    columns
        Names of metrics columns; one that the run does not hold gives an empty grid.
    """
    table = step_table(run)
    grids = {}
    for column in columns:
        if column not in table:
            empty = np.empty((run.n_layers, 0))
            grids[column] = LayerGrid(column, np.empty(0, np.int64), empty, empty.astype(bool))
            continue
        values = table[column][:, : run.n_layers].T.astype(np.float64)
        bad = np.isinf(values)
        grids[column] = LayerGrid(column, table.steps, np.where(bad, np.nan, values), bad)
    return grids


@dataclass(frozen=True)
class Series:
    """A line thinned for drawing: bin means with the smallest and largest value of each bin."""

    x: np.ndarray
    low: np.ndarray
    middle: np.ndarray
    high: np.ndarray
    group: int

    def __len__(self) -> int:
        return len(self.x)


def thin(x: np.ndarray, y: np.ndarray, most: int = MAX_POINTS) -> Series:
    """Average neighbouring points until at most `most` are left, keeping each group's extremes.

    Missing and non-finite values are left out; `group` is the largest number of points that
    share one place (1 = the line is as recorded).
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    keep = np.isfinite(y)
    x, y = x[keep], y[keep]
    if len(x) <= most:
        return Series(x, y, y, y, 1)
    starts = np.linspace(0, len(x), most, endpoint=False).astype(int)
    counts = np.diff([*starts, len(x)])
    return Series(
        np.add.reduceat(x, starts) / counts,
        np.minimum.reduceat(y, starts),
        np.add.reduceat(y, starts) / counts,
        np.maximum.reduceat(y, starts),
        int(counts.max()),
    )


def step_label(group: int, *, band: bool = True) -> str:
    """Label of the step axis; it says so when a point stands for several recorded steps."""
    if group <= 1:
        return "optimizer step"
    extremes = "; band: smallest to largest" if band else ""
    return f"optimizer step (each point: mean of {group:,} records{extremes})"


def depth_bands(n_layers: int) -> dict[str, slice]:
    """Split the stack into bottom, middle and top thirds; fewer bands when there are too few."""
    if n_layers < 3:
        return {"all layers": slice(0, n_layers)}
    third = max(1, round(n_layers / 3))
    return {
        f"bottom (0–{third - 1})": slice(0, third),
        f"middle ({third}–{n_layers - third - 1})": slice(third, n_layers - third),
        f"top ({n_layers - third}–{n_layers - 1})": slice(n_layers - third, n_layers),
    }
