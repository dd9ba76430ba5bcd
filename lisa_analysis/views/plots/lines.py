"""Pictures over optimizer steps: trajectories, depth bands, update ratio, training curves."""

from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lisa_analysis.metrics.layer_grid import (
    LayerGrid,
    band_series,
    depth_bands,
    layer_grids,
    update_ratio_grid,
)
from lisa_analysis.metrics.thinning import MAX_POINTS, Series, thin
from lisa_analysis.runs.curves import QUANTITIES, curve_frame, held_out_frame
from lisa_analysis.views.opening import a_run
from lisa_analysis.views.plots import style
from lisa_analysis.views.plots.grids import COLUMN_TITLES

if TYPE_CHECKING:
    from lisa_analysis import Run


def trajectories(
    run: "Run | LayerGrid", column: str = "weight_norm", *, ax: Axes | None = None
) -> Axes:
    """Draw one line per layer over the steps, coloured from the bottom to the top of the stack.

    `run` is an opened run directory or a `LayerGrid`. Values are drawn on a logarithmic axis when
    all are positive; a line has gaps where its layer was frozen.
    """
    grid = style.grid_of(run, column, "trajectories")
    ax = style.axes_or_new(ax)
    if not np.isfinite(grid.values).any():
        return style.note(ax, f"No {COLUMN_TITLES.get(grid.column, grid.column)} was recorded.")
    shown, group = grid.thinned()
    colors = mpl.colormaps[style.COLORMAP].resampled(max(len(shown.values), 2))
    for layer, values in enumerate(shown.values):
        (line,) = ax.plot(
            shown.steps,
            values,
            color=colors(layer),
            linewidth=0.9,
            marker="." if _has_lone_points(values) else None,
            markersize=4,
        )
        line.set_gid(f"layer-{layer}")
    _log_if_positive(ax, grid.values)
    scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, max(len(grid.values) - 1, 1)), colors)
    bar = ax.figure.colorbar(scale, ax=ax, pad=0.015, fraction=0.04, aspect=18, label="layer")
    bar.outline.set_visible(False)
    return _finish(ax, COLUMN_TITLES.get(grid.column, grid.column), group, band=False)


def _has_lone_points(values: np.ndarray) -> bool:
    """Whether some value stands between gaps, where a line alone would not show it."""
    known = np.concatenate([[False], np.isfinite(values), [False]])
    return bool((known[1:-1] & ~known[:-2] & ~known[2:]).any())


def bands(
    run: "Run | LayerGrid",
    column: str = "update_norm",
    *,
    ax: Axes | None = None,
    most: int = MAX_POINTS,
) -> Axes:
    """Draw the bottom, middle and top third of the stack: mean line and range of the layers."""
    grid = style.grid_of(run, column, "bands")
    ax = style.axes_or_new(ax)
    if not np.isfinite(grid.values).any():
        return style.note(ax, f"No {COLUMN_TITLES.get(grid.column, grid.column)} was recorded.")
    group = 1
    for position, (name, part) in enumerate(depth_bands(len(grid.values)).items()):
        series = band_series(grid, part, most)
        group = max(group, series.group)
        draw_series(ax, series, name, position)
    _log_if_positive(ax, grid.values)
    style.legend(ax)
    return _finish(ax, COLUMN_TITLES.get(grid.column, grid.column), group)


def update_ratio(run: "Run | LayerGrid", *, ax: Axes | None = None, most: int = MAX_POINTS) -> Axes:
    """Draw ‖update‖ / ‖weight‖ of the bottom, middle and top third of the stack.

    `run` is an opened run directory or the `LayerGrid` from `update_ratio_grid`. The dotted line
    at 10⁻³ is a rule of thumb for Adam, not a limit.
    """
    if isinstance(run, LayerGrid):
        grid = run
    else:
        run = a_run(run, "update_ratio")
        grid = update_ratio_grid(layer_grids(run, ["update_norm", "weight_norm"]))
    ax = bands(grid, ax=ax, most=most)
    if ax.axison:
        ax.axhline(1e-3, color=style.MUTED, linewidth=0.9, linestyle=(0, (1, 2)))
    ax.set_ylabel("‖update‖ / ‖weight‖")
    return ax


def curves(
    run: "Run", quantity: str = "loss", *, ax: Axes | None = None, most: int = MAX_POINTS
) -> Axes:
    """Draw one quantity of training over the steps.

    Parameters
    ----------
    run
        An opened run directory.
    quantity
        ``loss`` (training, with held-out losses as marks), ``learning_rate``, ``grad_norm``
        (before clipping, with the share of clipped steps written above), ``memory`` or
        ``recorder`` (share of the step's time).
    ax
        Where to draw; a new figure when None.

    Raises
    ------
    LisaError
        For any other quantity.
    """
    run = a_run(run, "curves", "scalars")
    frame = curve_frame(run, quantity)
    ax = style.axes_or_new(ax)
    label = QUANTITIES[quantity]
    held_out = held_out_frame(run) if quantity == "loss" else pd.DataFrame({"step": []})
    if not np.isfinite(frame["value"]).any() and held_out.empty:
        return style.note(ax, f"No {label} was logged.")
    series = thin(frame["step"].to_numpy(), frame["value"].to_numpy(), most)
    draw_series(ax, series, "training" if quantity == "loss" else label, 0)
    if not held_out.empty:
        ax.plot(
            held_out["step"],
            held_out["value"],
            "D-",
            color=style.SERIES[3],
            markersize=4,
            linewidth=1,
            label="held-out",
        )
    if quantity == "grad_norm":
        _mark_clipped(ax, frame)
    if quantity in ("loss", "grad_norm"):
        style.legend(ax)
    if quantity in ("memory", "recorder", "learning_rate"):
        ax.set_ylim(bottom=0)
    return _finish(ax, label, series.group)


def _mark_clipped(ax: Axes, frame: pd.DataFrame) -> None:
    clipped = frame[frame["clip_coef"] < 1]
    known = int(frame["clip_coef"].notna().sum())
    if not known:
        return
    shown = clipped.iloc[:: max(1, len(clipped) // 200)]
    ax.plot(
        shown["step"],
        np.zeros(len(shown)),
        "|",
        color=style.SERIES[3],
        markersize=6,
        transform=ax.get_xaxis_transform(),
        clip_on=False,
        label=f"clipped ({len(clipped):,} of {known:,} steps)",
    )


def draw_series(ax: Axes, series: Series, name: str, position: int) -> None:
    """Draw a thinned series as a line, with a band where it stands for more than itself."""
    color, dashes, marker = style.look(position)
    if (series.high > series.low).any():
        ax.fill_between(series.x, series.low, series.high, color=color, alpha=0.18, linewidth=0)
    ax.plot(
        series.x,
        series.middle,
        color=color,
        linestyle=dashes,
        linewidth=1.3,
        marker=marker if len(series) < 30 else None,
        markersize=3.5,
        label=name,
    )


def _log_if_positive(ax: Axes, values: np.ndarray) -> None:
    finite = values[np.isfinite(values)]
    if len(finite) and finite.min() > 0 and finite.max() > 3 * finite.min():
        ax.set_yscale("log")
        style.log_ticks(ax.yaxis, float(finite.min()), float(finite.max()))


def _finish(ax: Axes, label: str, group: int, *, band: bool = True) -> Axes:
    ax.set_ylabel(label)
    ax.set_xlabel(style.step_label(group, band=band))
    ax.margins(x=0.01)
    style.thousands(ax)
    return style.finish(ax)
