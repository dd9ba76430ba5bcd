"""Several runs in one picture: one line per group of runs, seeds as a band."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lisa_analysis.metrics.thinning import MAX_POINTS
from lisa_analysis.runs.arms import by_arm
from lisa_analysis.runs.curves import QUANTITIES, group_series
from lisa_analysis.views.opening import some_runs
from lisa_analysis.views.plots import style
from lisa_analysis.views.plots.lines import draw_series


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
        Run directories, opened or as paths, which are grouped by arm (runs that differ in nothing
        but the seed), or a mapping from a label to the runs of a group.
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
    if isinstance(runs, Mapping):
        groups = {name: some_runs(members, "comparison") for name, members in runs.items()}
    else:
        groups = by_arm(some_runs(runs, "comparison"))
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
    ax.set_xlabel(style.step_label(group))
    ax.margins(x=0.01)
    style.thousands(ax)
    return style.finish(ax)


def differences(differences: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw differences between arms: one row per pair, with its interval.

    Parameters
    ----------
    differences
        ``Comparison.differences``: columns a, b, mean, low, high and pairs; rows without a mean
        are left out.
    ax
        Where to draw; a new figure when None.

    Returns
    -------
    Axes
        Left of the line a has the lower loss. A filled mark has an interval without zero; an open
        one may be the seeds' doing, and without a whisker there are too few of them.
    """
    style.drawable(differences, "columns", "differences", "Comparison.differences")
    rows = differences.dropna(subset=["mean"]).reset_index(drop=True)
    ax = style.axes_or_new(ax, (7.2, 0.8 + 0.3 * max(len(rows), 2)))
    if rows.empty:
        return style.note(ax, "No two arms have a held-out loss at equal steps.")
    for place, row in zip(range(len(rows))[::-1], rows.to_dict("records"), strict=True):
        known = np.isfinite(row["low"]) and np.isfinite(row["high"])
        told = known and (row["low"] > 0 or row["high"] < 0)
        color = style.SERIES[0] if told else style.MUTED
        if known:
            ax.hlines(place, row["low"], row["high"], color=color, linewidth=1.6)
        ax.plot(row["mean"], place, "o", color=color, markersize=5, mfc=color if told else "none")
    ax.axvline(0, color=style.MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    names = [f"{style.literal(r['a'], 34)} − {style.literal(r['b'], 34)}"
             for r in rows.to_dict("records")]  # fmt: skip
    ax.set_yticks(range(len(rows))[::-1], names)
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.margins(x=0.08)
    ax.set_xlabel("difference in held-out loss at equal steps")
    return style.finish(ax, grid="x")
