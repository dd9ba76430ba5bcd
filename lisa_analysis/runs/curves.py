"""Quantities of training over the steps: of one run, and of runs that differ in their seed."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lisa_analysis.contract.errors import LisaError, suggest
from lisa_analysis.metrics.thinning import MAX_POINTS, Series, thin
from lisa_analysis.rundir.events import held_out_losses
from lisa_analysis.rundir.run import Run

QUANTITIES = {
    "loss": "loss",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "memory": "peak memory (GiB)",
    "recorder": "time spent recording (%)",
}


def curve_frame(run: Run, quantity: str) -> pd.DataFrame:
    """Return ``step`` and ``value`` of a quantity that `curves` draws, and ``clip_coef``."""
    if quantity not in QUANTITIES:
        raise LisaError(
            f"quantity {quantity!r} is not one of {', '.join(QUANTITIES)}."
            f"{suggest(quantity, QUANTITIES)}"
        )
    scalars = run.scalars
    nothing = pd.Series(np.nan, index=scalars.index, dtype=float)

    def column(name: str) -> pd.Series:
        return scalars[name].astype(float) if name in scalars else nothing

    if quantity == "memory":
        value = column("peak_memory_bytes") / 2**30
    elif quantity == "recorder":
        # Steps that record nothing cost nothing: their zeros would hide what recording costs.
        # Older runs have the work of another step in some: no share of the step that it stands at.
        spent, step = column("recorder_seconds"), column("step_seconds")
        value = 100 * spent.where((spent > 0) & (spent <= step)) / step
    else:
        value = column(quantity)
    return pd.DataFrame({"step": column("step"), "value": value, "clip_coef": column("clip_coef")})


def held_out_frame(run: Run) -> pd.DataFrame:
    """Return ``step`` and ``value`` of the run's held-out losses."""
    return held_out_losses(run)


def group_series(
    runs: Sequence[Run], quantity: str, *, held_out: bool = False, most: int = MAX_POINTS
) -> Series:
    """Mean and range over runs at the steps that all of them logged, thinned."""
    columns = []
    for run in runs:
        frame = held_out_frame(run) if held_out else curve_frame(run, quantity)
        frame = frame.dropna(subset=["step", "value"]).drop_duplicates("step", keep="last")
        columns.append(frame.set_index("step")["value"])
    table = pd.concat(columns, axis=1, join="inner").sort_index()
    # Where one run diverged there is no mean; its own curve marks the place.
    table = table[np.isfinite(table.to_numpy(dtype=np.float64)).all(axis=1)]
    values = table.to_numpy(dtype=np.float64)
    if not len(values):
        empty = np.empty(0)
        return Series(empty, empty, empty, empty, 1)
    steps = table.index.to_numpy(dtype=np.float64)
    middle = thin(steps, values.mean(axis=1), most)
    low, high = thin(steps, values.min(axis=1), most), thin(steps, values.max(axis=1), most)
    return Series(middle.x, low.low, middle.middle, high.high, middle.group)
