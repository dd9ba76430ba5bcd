"""Several runs in one picture: one line per group of runs, seeds as a band."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from lisa_analysis.metrics.thinning import MAX_POINTS
from lisa_analysis.runs.arms import by_arm
from lisa_analysis.runs.curves import QUANTITIES, group_series
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
        Opened run directories, which are grouped by arm (runs that differ in nothing but the
        seed), or a mapping from a label to the runs of a group.
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
    style.drawable(runs, "__iter__", "comparison", f"several runs, each {style.A_RUN}")
    for run in () if isinstance(runs, Mapping) else runs:
        style.drawable(run, "scalars", "comparison", f"several runs, each {style.A_RUN}")
    groups = runs if isinstance(runs, Mapping) else by_arm(runs)
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
