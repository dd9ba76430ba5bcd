"""Layer × step and layer × kind pictures: heat map, LISA schedule, module kinds."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm, Normalize, SymLogNorm, to_rgba

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.metrics.layer_grid import MAX_COLUMNS, LayerGrid
from lisa_analysis.runs.schedule import probability_grid, schedule_grid, visit_counts
from lisa_analysis.views.opening import a_run
from lisa_analysis.views.plots import style

if TYPE_CHECKING:
    from lisa_analysis import Run

COLUMN_TITLES = {
    "weight_norm": "weight norm",
    "grad_norm": "gradient norm",
    "grad_norm_l1": "gradient norm, L1",
    "update_norm": "update norm",
    "delta_norm": "distance from the start",
    "merged_norm": "norm of the adapted weight",
    "probe_grad_norm": "probe gradient norm",
    "update_norm / learning rate": "update norm / learning rate",
}


def heatmap(
    run: "Run | LayerGrid",
    column: str = "grad_norm",
    *,
    ax: Axes | None = None,
    most: int = MAX_COLUMNS,
) -> Axes:
    """Draw one metrics column as colour over layer × step.

    Parameters
    ----------
    run
        An opened run directory, or a `LayerGrid` that was read from one.
    column
        Name of a metrics column; ignored for a `LayerGrid`.
    ax
        Where to draw; a new figure when None (show it with ``ax.figure``).
    most
        Largest number of columns; more recorded steps are averaged, and the axis says so.

    Returns
    -------
    Axes
        Colour is logarithmic when the values are positive. Grey cells were frozen or not
        measured, red cells hold a NaN or an infinity.
    """
    grid = style.grid_of(run, column, "heatmap")
    ax = style.axes_or_new(ax, (7.2, _height(len(grid.values))))
    title = COLUMN_TITLES.get(grid.column, grid.column)
    if not len(grid) or not len(grid.values):
        return style.note(ax, f"No {title} was recorded.")
    shown, group = grid.thinned(most)
    ax.set_facecolor(style.FROZEN)
    image = ax.imshow(
        np.ma.masked_invalid(np.where(shown.non_finite, np.nan, shown.values)),
        norm=_norm(shown.values),
        cmap=_colormap(),
        **_raster(shown.values.shape),
    )
    if shown.non_finite.any():
        _mark_non_finite(ax, shown.non_finite)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.015, fraction=0.04, aspect=18)
    bar.outline.set_visible(False)
    bar.set_label(title)
    _label_colors(bar, image.norm)
    _label_layers(ax, len(shown.values), grid.names)
    _label_steps(ax, shown.steps, group)
    return ax


def visits(
    run: "Run | LayerGrid",
    column: str = "grad_norm",
    *,
    ax: Axes | None = None,
    most: int = MAX_COLUMNS,
) -> Axes:
    """Draw one metrics column of a run that trains a few layers at a time: a dot per visit.

    Where most layers rest at most steps, a picture over layer × step shows the schedule and little
    else. Arguments are those of `heatmap`.

    Returns
    -------
    Axes
        A column of dots for every layer, dark at the start of the run and light at its end; where
        more steps were recorded than `most`, a dot is the mean of neighbouring ones. Non-finite
        values are crosses at the top.
    """
    grid = style.grid_of(run, column, "visits")
    ax = style.axes_or_new(ax)
    title = COLUMN_TITLES.get(grid.column, grid.column)
    if not len(grid) or not np.isfinite(grid.values).any():
        return style.note(ax, f"No {title} was recorded.")
    shown, _ = grid.thinned(most)
    layer, at = np.nonzero(np.isfinite(shown.values))
    value = shown.values[layer, at]
    dots = ax.scatter(
        layer + 0.5 * (at / max(len(shown) - 1, 1) - 0.5), value, c=shown.steps[at], s=9,
        cmap=style.COLORMAP, linewidths=0, rasterized=len(value) > 1500,
    )  # fmt: skip
    wrong = np.flatnonzero(shown.non_finite.any(axis=1))
    ax.plot(wrong, np.ones(len(wrong)), "x", color=style.NON_FINITE, clip_on=False,
            transform=ax.get_xaxis_transform())  # fmt: skip
    if value.min() > 0 and value.max() > 3 * value.min():
        ax.set_yscale("log")
        style.log_ticks(ax.yaxis, float(value.min()), float(value.max()))
    bar = ax.figure.colorbar(dots, ax=ax, pad=0.015, fraction=0.04, aspect=18)
    bar.outline.set_visible(False)
    bar.set_label("optimizer step")
    ax.set_xticks(style.layer_ticks(len(shown.values), most=25))
    ax.set_xlim(-0.7, len(shown.values) - 0.3)
    ax.set_xlabel("layer")
    style.stacks_apart(ax, grid.names)
    ax.set_ylabel(title)
    return style.finish(ax)


def _mark_non_finite(ax: Axes, cells: np.ndarray) -> None:
    """Paint cells red, with a mark above their column: a cell can be thinner than a pixel."""
    alarm = np.zeros((*cells.shape, 4))
    alarm[cells] = to_rgba(style.NON_FINITE)
    ax.imshow(alarm, **_raster(cells.shape))
    columns = np.flatnonzero(cells.any(axis=0))
    above: Any = {"transform": ax.get_xaxis_transform(), "clip_on": False, "markersize": 4}
    ax.plot(columns, np.full(len(columns), 1.02), "v", color=style.NON_FINITE, **above)


def schedule(run: "Run", *, ax: Axes | None = None, most: int = MAX_COLUMNS) -> Axes:
    """Draw which layers LISA made active, with expected against observed visits at the right.

    The bars at the right are the draws in which a layer was active; the mark is what its
    inclusion probabilities add up to. Runs without LISA draws get a note instead.
    """
    run = a_run(run, "schedule", "events")
    drawn = schedule_grid(run)
    ax = style.axes_or_new(ax, (7.2, _height(run.n_layers)))
    if not len(drawn):
        return style.note(ax, "This run drew no layers: LISA was not used.")
    grid, group = drawn.thinned(most)
    ax.set_facecolor(style.FROZEN)
    colors = mpl.colors.ListedColormap([to_rgba(style.SERIES[0], a) for a in np.linspace(0, 1, 64)])
    ax.imshow(grid.values, norm=Normalize(0, 1), cmap=colors, **_raster(grid.values.shape))
    _label_layers(ax, run.n_layers, run.layer_names)
    _label_steps(ax, grid.steps, group, what="draw at step", unit="draws")
    visits = visit_counts(run)
    side = ax.inset_axes((1.02, 0, 0.22, 1), sharey=ax)
    side.barh(visits["layer"], visits["observed"], height=0.72, color=style.SERIES[0], alpha=0.55)
    side.plot(
        visits["expected"],
        visits["layer"],
        "|",
        color=style.SERIES[3],
        markersize=6,
        markeredgewidth=1.6,
    )
    side.tick_params(labelleft=False, length=0)
    side.set_xlabel("visits")
    side.set_xlim(0, float(np.nanmax(visits[["observed", "expected"]])) * 1.08)
    style.finish(side, grid="x")
    side.spines["left"].set_visible(False)
    return ax


def learned_probabilities(run: "Run", *, ax: Axes | None = None, most: int = MAX_COLUMNS) -> Axes:
    """Draw the inclusion probabilities of every draw, as multiples of those of uniform sampling.

    Colour is logarithmic and white at 1: red layers are drawn more often than uniform sampling
    would, blue ones less. Runs whose probabilities do not move get a note instead.
    """
    run = a_run(run, "learned_probabilities", "events")
    grid = probability_grid(run)
    ax = style.axes_or_new(ax, (7.2, _height(run.n_layers)))
    if not len(grid):
        return style.note(ax, "The probabilities of this run do not move.")
    shown, group = grid.thinned(most)
    positive = shown.values[shown.values > 0]
    far = max(1.25, float(np.exp(np.abs(np.log(positive)).max())))
    ax.set_facecolor(style.FROZEN)
    image = ax.imshow(
        np.ma.masked_less_equal(shown.values, 0),
        norm=LogNorm(1 / far, far, clip=True),
        cmap=mpl.colormaps[style.DIVERGING].with_extremes(bad=(0, 0, 0, 0)),
        **_raster(shown.values.shape),
    )
    bar = ax.figure.colorbar(image, ax=ax, pad=0.015, fraction=0.04, aspect=18)
    bar.outline.set_visible(False)
    whole = grid.column == "inclusion_probability"
    bar.set_label("probability over k/L" if whole else "share that trains, over uniform")
    _label_colors(bar, image.norm)
    _label_layers(ax, run.n_layers, run.layer_names)
    _label_steps(ax, shown.steps, group, what="draw at step", unit="draws")
    return ax


def kind_grid(scores: Any, *, label: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw a score as colour over module kind × layer.

    Parameters
    ----------
    scores
        An `ImportanceProfile` by module, or a frame with the columns ``layer``, ``kind`` and
        ``score``; missing combinations stay grey.
    label
        What the score is, for the colour bar; None takes the profile's metric.
    ax
        Where to draw; a new figure when None.

    Raises
    ------
    LisaError
        For a profile by anything else, or what is neither.
    """
    if not isinstance(scores, pd.DataFrame):
        by = style.drawable(scores, "by", "kind_grid", f"{style.A_PROFILE} or a frame").by
        if by != "module":
            raise LisaError(
                f"plots.kind_grid draws a profile by module, got one by {by}: make it with "
                "importance(run, by='module')."
            )
        label = label or scores.metric
        frame = scores.to_frame()
        scores = frame.assign(kind=frame["name"].astype(str).str.rsplit(" ", n=1).str[-1])
    scores = scores.dropna(subset=["layer", "kind"])
    kinds = sorted(scores["kind"].unique(), key=_kind_order)
    ax = style.axes_or_new(ax, (7.2, 0.9 + 0.26 * max(len(kinds), 2)))
    if scores.empty:
        return style.note(ax, "No module was measured.")
    n_layers = int(scores["layer"].max()) + 1
    values = np.full((len(kinds), n_layers), np.nan)
    for kind, layer, score in zip(scores["kind"], scores["layer"], scores["score"], strict=True):
        values[kinds.index(kind), int(layer)] = score
    ax.set_facecolor(style.FROZEN)
    options = _raster(values.shape) | {"origin": "upper"}
    options["extent"] = (-0.5, n_layers - 0.5, len(kinds) - 0.5, -0.5)
    norm, colors = _signed(values)
    image = ax.imshow(np.ma.masked_invalid(values), norm=norm, cmap=colors, **options)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.015, fraction=0.04, aspect=12)
    bar.outline.set_visible(False)
    bar.set_label(style.literal(label or "score"))
    _label_colors(bar, image.norm)
    ax.set_yticks(range(len(kinds)), [style.literal(kind) for kind in kinds])
    ax.set_xticks(style.layer_ticks(n_layers))
    ax.set_xlabel("layer")
    return style.finish(ax, grid=None)


_KINDS = ("attn.q", "attn.k", "attn.v", "attn.qkv", "attn.o", "mlp.gate", "mlp.up", "mlp.gate_up",
          "mlp.down", "moe.router", "norm", "other")  # fmt: skip


def _kind_order(kind: str) -> tuple[int, str]:
    return (_KINDS.index(kind) if kind in _KINDS else len(_KINDS), kind)


def _height(n_layers: int) -> float:
    """Figure height in inches: rows stay thick enough to see, tall stacks do not fill pages."""
    return float(np.clip(1.0 + 0.1 * n_layers, 2.2, 5.2))


def _colormap() -> mpl.colors.Colormap:
    return mpl.colormaps[style.COLORMAP].with_extremes(bad=(0, 0, 0, 0))


def _norm(values: np.ndarray) -> Normalize:
    """Logarithmic colour over the positive values; linear when some are zero or negative."""
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    if not len(positive):
        return Normalize(0, 1)
    low, high = float(positive.min()), float(positive.max())
    if len(positive) < len(finite) and finite.min() < 0:
        return Normalize(float(finite.min()), high)
    if high <= low * (1 + 1e-9):
        low, high = low * 0.9, high * 1.1
    return LogNorm(low, high, clip=True)


def _signed(values: np.ndarray) -> tuple[Normalize, mpl.colors.Colormap]:
    """Colours of scores that may lie below zero.

    A few below zero, small beside the largest, are noise around zero: they share the colour of the
    smallest, on a logarithmic scale. Scores of both signs get white at zero.
    """
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    if not len(finite) or finite.min() >= 0 or not len(positive):
        return _norm(values), _colormap()
    if -finite.min() < 0.1 * finite.max():
        low = max(float(positive.min()), float(positive.max()) / 1e3)
        return LogNorm(low, float(positive.max()), clip=True), _colormap()
    most = float(np.abs(finite).max())
    faint = mpl.colormaps[style.DIVERGING].with_extremes(bad=(0, 0, 0, 0))
    return SymLogNorm(most / 30, vmin=-most, vmax=most, clip=True), faint


def _label_colors(bar: Colorbar, norm: Any) -> None:
    if isinstance(norm, LogNorm) and norm.vmin and norm.vmax:
        style.log_ticks(bar.ax.yaxis, norm.vmin, norm.vmax)


def _raster(shape: tuple[int, ...]) -> dict[str, Any]:
    """`imshow` options for a layer × column raster with layer 0 at the bottom."""
    return {
        "origin": "lower",
        "aspect": "auto",
        "interpolation": "none",
        "extent": (-0.5, shape[1] - 0.5, -0.5, shape[0] - 0.5),
    }


def _label_layers(ax: Axes, n_layers: int, names: Sequence[str]) -> None:
    ax.set_yticks(style.layer_ticks(n_layers))
    ax.set_ylabel("layer")
    style.stacks_apart(ax, names, upwards=True)


def _label_steps(
    ax: Axes, steps: np.ndarray, group: int, what: str = "optimizer step", unit: str = "records"
) -> None:
    ax.set_xticks(*style.step_ticks(steps))
    ax.set_xlabel(what if group <= 1 else f"{what} (each column: mean of {group:,} {unit})")
    style.finish(ax, grid=None)
