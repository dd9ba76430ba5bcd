"""Colours, axes and ticks that every plot shares."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.layers import short_stacks, stacks_of
from lisa_analysis.metrics.layer_grid import LayerGrid, layer_grids
from lisa_analysis.views.opening import a_run

# Seaborn's colour-blind palette; its yellow and pale pink are left out, they vanish on white.
_PALETTE = sns.color_palette("colorblind").as_hex()
SERIES: tuple[str, ...] = tuple(_PALETTE[i] for i in (0, 1, 2, 3, 4, 9, 5))
DASHES: tuple[str | tuple[int, tuple[int, ...]], ...] = (
    "solid",
    (0, (5, 2)),
    (0, (1, 1)),
    (0, (5, 1, 1, 1)),
    (0, (3, 1)),
    (0, (7, 2, 2, 2)),
    (0, (2, 2)),
)
MARKERS = "osD^vPX"

LEGEND_COLUMNS = 4

# Greys and the alarm colour have one meaning each; the report gives them a second value for
# its dark theme by looking for exactly these codes.
MUTED = "#949494"
GRID = "#e3e3e3"
FROZEN = "#d4d4d4"
NON_FINITE = "#e5004d"
# Viridis has no grey of its own, so a grey cell can only mean "frozen".
COLORMAP = "viridis"
# White in the middle, where nothing differs.
DIVERGING = "RdBu_r"


def look(position: int) -> tuple[str, str | tuple[int, tuple[int, ...]], str]:
    """Colour, dashes and marker of the position-th line; 49 lines all differ.

    >>> len({look(position) for position in range(49)})
    49
    """
    turn = position // len(SERIES)
    return (
        SERIES[position % len(SERIES)],
        DASHES[(position + turn) % len(DASHES)],
        MARKERS[(position + turn) % len(MARKERS)],
    )


def drawable(value: Any, attribute: str, plot: str, expected: str) -> Any:
    """Return `value` where it has what `plot` draws.

    Raises
    ------
    LisaError
        Where it has not.
    """
    if hasattr(value, attribute):
        return value
    raise LisaError(f"plots.{plot} draws {expected}, got a {type(value).__name__}.")


def grid_of(run: Any, column: str, plot: str) -> LayerGrid:
    """Return the grid that `plot` draws, of a run (opened, or as a path) where it is none yet.

    Raises
    ------
    LisaError
        For what is neither.
    """
    return run if isinstance(run, LayerGrid) else layer_grids(a_run(run, plot), [column])[column]


A_PROFILE = "an importance profile"


def axes_or_new(ax: Axes | None, size: tuple[float, float] = (7.2, 3.0)) -> Axes:
    """Return `ax`, or the axes of a new figure.

    In a notebook pyplot makes the figure, so that it appears below the cell; elsewhere pyplot
    does not know about it, so that it goes when the caller lets it go.
    """
    if ax is not None:
        if not isinstance(ax, Axes):
            raise LisaError(
                f"plots draw on matplotlib Axes, got ax of type {type(ax).__name__}: give "
                "pyplot.subplots()[1], or nothing for a new figure."
            )
        return ax
    if "ipykernel" in sys.modules:
        from matplotlib import pyplot

        return pyplot.subplots(figsize=size, layout="constrained")[1]
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def inches(ax: Axes) -> tuple[float, float]:
    """Width and height of `ax` on paper."""
    box = ax.get_window_extent()
    dpi = whole(ax).dpi
    return box.width / dpi, box.height / dpi


def whole(ax: Axes) -> Figure:
    """The figure that `ax` is in, below whatever subfigures."""
    figure = ax.get_figure(root=True)
    assert figure is not None  # of axes that were not removed
    return figure


def finish(ax: Axes, *, grid: Literal["x", "y"] | None = "y") -> Axes:
    """Remove the box around `ax` and put a faint grid behind the data."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_linewidth(0.6)
    ax.tick_params(length=3, width=0.6)
    if grid:
        ax.grid(axis=grid, color=GRID, linewidth=0.6)
        ax.set_axisbelow(True)
    return ax


def legend(ax: Axes, *, columns: int = LEGEND_COLUMNS) -> None:
    """Put the legend above the axes, where no data can be under it."""
    handles, labels = ax.get_legend_handles_labels()
    if not handles:
        return
    ax.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=min(columns, len(handles)),
        frameon=False,
        fontsize="small",
        borderaxespad=0.3,
        columnspacing=1.4,
        handlelength=2.2,
    )


def note(ax: Axes, sentence: str) -> Axes:
    """Write `sentence` in the middle of empty axes: a plot without data says why."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, sentence, ha="center", va="center", transform=ax.transAxes, color=MUTED)
    return ax


def literal(name: object, most: int = 40) -> str:
    """Return a name from a run as text that matplotlib draws as it stands.

    Dollar signs would start a formula, a leading underscore would hide the label from the
    legend, control characters and lone surrogates cannot be drawn.
    """
    text = "".join(c if c.isprintable() else "\ufffd" for c in str(name))
    text = text if len(text) <= most else text[: most - 1] + "…"
    text = text.replace("$", r"\$")
    return "\u200b" + text if text.startswith("_") else text


def layer_ticks(n_layers: int, most: int = 17) -> list[int]:
    """Layer indices worth a label: an even stride from 0 and always the last layer.

    >>> layer_ticks(12)
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    >>> layer_ticks(80)[:3], layer_ticks(80)[-2:]
    ([0, 5, 10], [75, 79])
    """
    if n_layers <= most:
        return list(range(n_layers))
    stride = next(s for s in (2, 4, 5, 8, 10, 16, 20, 25, 50, 100, n_layers) if n_layers / s < most)
    ticks = list(range(0, n_layers, stride))
    if n_layers - 1 - ticks[-1] <= stride / 2:
        ticks.pop()
    return [*ticks, n_layers - 1]


def stacks_apart(
    ax: Axes, names: Iterable[object], *, upwards: bool = False, label: bool = True
) -> None:
    """Part an axis of layers where one stack ends and the next begins, and say which they are.

    `names` are those of the layers in order, `upwards` says that they lie along the y axis. Of one
    stack nothing is drawn.
    """
    stacks = stacks_of(str(name) for name in names)
    short = short_stacks(stacks)
    if len(short) < 2:
        return
    first = {stack: stacks.index(stack) for stack in short}
    for start in [*first.values()][1:]:
        line = ax.axhline if upwards else ax.axvline
        line(start - 0.5, color=MUTED, linewidth=0.9)
    if label:
        said = [literal(name, 20) for name in short.values()]
        if not upwards:
            said = [f"{name} {first[stack]}–{first[stack] + stacks.count(stack) - 1}"
                    for name, stack in zip(said, short, strict=True)]  # fmt: skip
        (ax.set_ylabel if upwards else ax.set_xlabel)(f"layer: {', '.join(said)}")


def step_ticks(steps: Sequence[int] | np.ndarray, most: int = 7) -> tuple[list[float], list[str]]:
    """Positions in `steps` and labels for round step numbers, for axes that count columns."""
    steps = np.asarray(steps)
    if len(steps) <= most:
        return list(range(len(steps))), [f"{step:,}" for step in steps]
    locator = mpl.ticker.MaxNLocator(nbins=most, integer=True)
    wanted = [v for v in locator.tick_values(steps[0], steps[-1]) if steps[0] <= v <= steps[-1]]
    positions = np.interp(wanted, steps, np.arange(len(steps)))
    return positions.tolist(), [f"{value:,.0f}" for value in wanted]


def step_label(group: int, *, band: bool = True) -> str:
    """Label of the step axis; it says so when a point stands for several recorded steps."""
    if group <= 1:
        return "optimizer step"
    extremes = "; band: smallest to largest" if band else ""
    return f"optimizer step (each point: mean of {group:,} records{extremes})"


def log_ticks(axis: mpl.axis.Axis, low: float, high: float) -> None:
    """Label a logarithmic axis with few, plain numbers, whatever its range."""
    decades = np.log10(high / low)
    subs: tuple[float, ...] = (1,) if decades > 2.5 else (1, 2, 5)
    if decades < 0.6:
        subs = (1, 1.5, 2, 3, 4, 5, 7)
    axis.set_major_locator(mpl.ticker.LogLocator(subs=subs, numticks=9))
    axis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: plain_power(value)))
    axis.set_minor_locator(mpl.ticker.NullLocator())


def plain_power(value: float) -> str:
    """Write a number as people do.

    >>> plain_power(0.002), plain_power(5e-06)
    ('0.002', '5×10⁻⁶')
    """
    mantissa, _, power = f"{value:g}".partition("e")
    if not power:
        return mantissa
    superscript = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{superscript}" if mantissa == "1" else f"{mantissa}×10{superscript}"


def thousands(ax: Axes) -> None:
    """Label the step axis with whole numbers and separators."""
    ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    ax.xaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:,.0f}"))
