"""Layer × step grids: one column over the stack and the steps, thinned, by thirds of the depth."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lisa_analysis.metrics.step_tables import step_table
from lisa_analysis.metrics.thinning import MAX_POINTS, Series, thin

if TYPE_CHECKING:
    from lisa_analysis.rundir.run import Run

MAX_COLUMNS = 400


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
    names
        Names of the layers; empty where they are not known.
    """

    column: str
    steps: np.ndarray
    values: np.ndarray
    non_finite: np.ndarray
    names: tuple[str, ...] = ()

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
        return LayerGrid(self.column, self.steps[starts], means, bad, self.names), group


def layer_grids(run: "Run", columns: Iterable[str]) -> dict[str, LayerGrid]:
    """Layer × step grids of several metrics columns, summed over the tensors of each layer.

    Only tensors that were trained at a step count (`lisa_analysis.metrics.step_tables`), so a layer
    that LISA froze is missing there, and LoRA runs show their adapters.

    Parameters
    ----------
    run
        An opened run directory (`lisa_analysis.load`).
    columns
        Names of metrics columns; one that the run does not hold gives an empty grid.
    """
    table = step_table(run)
    grids, names = {}, tuple(run.layer_names)
    for column in columns:
        if column not in table:
            empty = np.empty((run.n_layers, 0))
            grids[column] = LayerGrid(
                column, np.empty(0, np.int64), empty, empty.astype(bool), names
            )
            continue
        values = table[column][:, : run.n_layers].T.astype(np.float64)
        bad = np.isinf(values)
        grids[column] = LayerGrid(column, table.steps, np.where(bad, np.nan, values), bad, names)
    return grids


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


def update_ratio_grid(grids: Mapping[str, LayerGrid]) -> LayerGrid:
    """Divide update norms by weight norms of the same layer and step."""
    update, weight = grids["update_norm"], grids["weight_norm"]
    steps, left, right = np.intersect1d(update.steps, weight.steps, return_indices=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = update.values[:, left] / weight.values[:, right]
    bad = update.non_finite[:, left] | weight.non_finite[:, right]
    values = np.where(np.isfinite(values), values, np.nan)
    return LayerGrid("update / weight", steps, values, bad, update.names)


def over_learning_rate(grid: LayerGrid, run: "Run") -> LayerGrid:
    """Divide a grid of updates by the learning rate of their step.

    What is left does not follow the schedule of the rate. The grid itself where the run logged no
    rate above zero; of a step without one nothing is known.
    """
    scalars = run.scalars
    if "learning_rate" not in scalars or not len(grid):
        return grid
    logged = scalars[["step", "learning_rate"]].apply(pd.to_numeric, errors="coerce").dropna()
    rate = logged.drop_duplicates("step", keep="last").set_index("step")["learning_rate"]
    by_step = rate.reindex(grid.steps).to_numpy(dtype=np.float64)
    if not (np.isfinite(by_step) & (by_step > 0)).any():
        return grid
    values = grid.values / np.where(by_step > 0, by_step, np.nan)
    return LayerGrid(
        f"{grid.column} / learning rate", grid.steps, values, grid.non_finite, grid.names
    )


def band_series(grid: LayerGrid, part: slice, most: int = MAX_POINTS) -> Series:
    """Mean, smallest and largest value of a band's layers over the steps, thinned."""
    values = np.ma.masked_invalid(grid.values[part])
    middle = thin(grid.steps, values.mean(axis=0).filled(np.nan), most)
    low = thin(grid.steps, values.min(axis=0).filled(np.nan), most)
    high = thin(grid.steps, values.max(axis=0).filled(np.nan), most)
    return Series(middle.x, low.low, middle.middle, high.high, middle.group)
