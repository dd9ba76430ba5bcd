"""Several runs in one picture: one line per group of runs, seeds as a band."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lisa_analysis.views.plots import style
from lisa_analysis.views.plots.data import MAX_POINTS, Series, step_label, thin
from lisa_analysis.views.plots.lines import QUANTITIES, curve_frame, draw_series, held_out_frame


def comparison(
    runs: Sequence[Any] | Mapping[str, Sequence[Any]],
    quantity: str = "loss",
    *,
    held_out: bool = False,
    ax: Axes | None = None,
    most: int = MAX_POINTS,
) -> Axes:
    """Draw one quantity of several runs: colour, dashes and marks differ by group.

    Parameters
    ----------
    runs
        Opened run directories (grouped by method), or a mapping from a label to the runs that
        differ in nothing but the seed.
    quantity
        As for `curves`.
    held_out
        Draw held-out losses instead of training losses.
    ax
        Where to draw; a new figure when None.

    Returns
    -------
    Axes
        The line is the mean over a group's seeds, the band reaches from the smallest to the
        largest; a group of one has no band.
    """
    groups = runs if isinstance(runs, Mapping) else by_method(runs)
    ax = style.axes_or_new(ax)
    drawn, group = False, 1
    for position, (name, members) in enumerate(groups.items()):
        series = group_series(members, quantity, held_out=held_out, most=most)
        if not len(series):
            continue
        seeds = f" ({len(members)} runs)" if len(members) > 1 else ""
        draw_series(ax, series, f"{style.literal(name, 24)}{seeds}", position)
        drawn, group = True, max(group, series.group)
    what = "held-out loss" if held_out else QUANTITIES.get(quantity, quantity)
    if not drawn:
        return style.note(ax, f"No run has a {what} to compare.")
    style.legend(ax)
    ax.set_ylabel(what)
    ax.set_xlabel(step_label(group))
    ax.margins(x=0.01)
    style.thousands(ax)
    return style.finish(ax)


def by_method(runs: Sequence[Any]) -> dict[str, list[Any]]:
    """Group runs by their method, in the order in which the methods first appear."""
    groups: dict[str, list[Any]] = {}
    for run in runs:
        groups.setdefault(str(run.method), []).append(run)
    return groups


def group_series(
    runs: Sequence[Any], quantity: str, *, held_out: bool = False, most: int = MAX_POINTS
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
