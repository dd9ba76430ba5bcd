"""Figures of a run over its steps: grids of layers, visits, schedule, learned π, curves."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lisa_analysis import plots
from lisa_analysis.metrics.layer_grid import (
    LayerGrid,
    band_series,
    depth_bands,
)
from lisa_analysis.metrics.thinning import thin
from lisa_analysis.runs.curves import QUANTITIES, curve_frame, held_out_frame
from lisa_analysis.runs.schedule import (
    probability_grid,
    schedule_grid,
    visit_counts,
    what_is_drawn,
)
from lisa_analysis.views.html_report import readout, svg
from lisa_analysis.views.html_report.figure import (
    HALF,
    WIDE,
    Budget,
    ReportFigure,
    canvas,
    extremes,
    short_label,
    thinned,
)
from lisa_analysis.views.html_report.format import count, number
from lisa_analysis.views.html_report.tables import frame_table, grid_table, series_table
from lisa_analysis.views.plots.grids import COLUMN_TITLES

if TYPE_CHECKING:
    from lisa_analysis import Run


_GRID_NOTES = {
    "grad_norm": "Gradient of the optimizer step before clipping",
    "update_norm": "Change of the stored weights in one step",
    "update_norm / learning rate": "Change of the stored weights in one step over the learning "
    "rate of that step, so that the rate's schedule is not in the picture",
    "weight_norm": "Size of the trained weights after the step",
    "delta_norm": "Distance from the weights that training started with",
}


def heatmap_figure(
    slug: str, grid: LayerGrid, layer_names: Sequence[str], budget: Budget
) -> ReportFigure:
    """One metrics column over layer × step."""
    name = COLUMN_TITLES.get(grid.column, grid.column)
    title = name[:1].upper() + name[1:]
    if not len(grid) or not (np.isfinite(grid.values).any() or grid.non_finite.any()):
        return ReportFigure(slug, title, f"The run recorded no {name}.", None, None)
    shown, group = grid.thinned(budget.columns)
    with svg.ink(slug):
        ax = canvas(WIDE, _grid_height(len(grid.values)), right=0.85, top=0.15)
        plots.heatmap(grid, ax=ax, most=budget.columns)
        svg.mark_layers(ax, len(grid.values))
        text = extremes("Colour map, layers upwards, steps to the right.", shown.values)
        image = svg.to_svg(ax, slug, title, text, layer_names)
        spoken = readout.of_grid(ax, shown)
    caption = f"{_GRID_NOTES.get(grid.column, name)}, per layer and recorded step"
    caption += ", on a logarithmic colour scale. Grey: frozen or not measured."
    if grid.non_finite.any():
        found = int(grid.non_finite.sum())
        caption += f" Red: NaN or infinite, {count(found)} {'time' if found == 1 else 'times'}."
    caption += thinned(group, "column")
    table = grid_table(title, shown)
    return ReportFigure(slug, title, caption, image, table, readout=spoken)


def visits_figure(
    slug: str, grid: LayerGrid, layer_names: Sequence[str], budget: Budget
) -> ReportFigure:
    """One metrics column of a run that trains a few layers at a time."""
    name = COLUMN_TITLES.get(grid.column, grid.column)
    title = f"{name[:1].upper()}{name[1:]} at every visit"
    if not len(grid) or not (np.isfinite(grid.values).any() or grid.non_finite.any()):
        return ReportFigure(slug, title, f"The run recorded no {name}.", None, None)
    shown, group = grid.thinned(budget.columns)
    with svg.ink(slug):
        ax = canvas(WIDE, 2.9, right=0.85, top=0.15)
        plots.visits(grid, ax=ax, most=budget.columns)
        svg.mark_layers(ax, len(grid.values), upright=True)
        text = extremes("A column of dots for every layer.", shown.values)
        image = svg.to_svg(ax, slug, title, text, layer_names)
        spoken = readout.along(
            ax, range(len(shown.values)), [_visit_words(i, v) for i, v in enumerate(shown.values)]
        )
    caption = (
        f"{_GRID_NOTES.get(grid.column, name)}. A dot per record of a layer that trained: dark at "
        "the start of the run, light at its end."
    )
    if grid.non_finite.any():
        found = int(grid.non_finite.sum())
        caption += f" Red: NaN or infinite, {count(found)} {'time' if found == 1 else 'times'}."
    caption += thinned(group, "dot")
    return ReportFigure(slug, title, caption, image, grid_table(title, shown), readout=spoken)


def _visit_words(layer: int, values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    if not len(known):
        return f"layer {layer}: never trained while recording"
    return (
        f"layer {layer}: first {number(known[0])}, last {number(known[-1])}, "
        f"{number(known.min())} to {number(known.max())} over {len(known)} dots"
    )


def schedule_figure(
    slug: str, run: "Run", layer_names: Sequence[str], budget: Budget
) -> ReportFigure:
    """LISA's draws."""
    title, drawn = "Which layers LISA trained, and when", what_is_drawn(run)
    if drawn != "layer":
        title = f"Layers with a {drawn} that LISA trained, and when"
    visits = visit_counts(run)
    if not visits["observed"].any():
        return ReportFigure(slug, title, "The run drew no layers.", None, None)
    with svg.ink(slug):
        # The visits stand to the right of the raster.
        ax = canvas(WIDE, _grid_height(run.n_layers), right=1.85, top=0.1)
        plots.schedule(run, ax=ax, most=budget.columns)
        svg.mark_layers(ax, run.n_layers)
        text = extremes("Raster of active layers with visit counts.", visits["observed"])
        image = svg.to_svg(ax, slug, title, text, layer_names)
        shown, _ = schedule_grid(run).thinned(budget.columns)
        spoken = readout.of_grid(ax, shown, what="active after step")
    caption = (
        "Blue: active during the period that begins at that step. Right: draws of each layer "
        "(bar) and the number that its inclusion probabilities add up to (mark)."
    )
    named, columns = "Visits of each layer", [("layer", "layer"), ("observed", "observed")]
    if drawn == "layer":
        columns.append(("expected", "expected"))
    else:
        named = f"Draws that took a {drawn} of each layer"
        caption = (
            f"What takes turns is a {drawn}, not a layer. Blue: at least one {drawn} of the "
            "layer was active during the period that begins at that step. Right: in how many draws."
        )
    table = frame_table(named, visits, columns, layer="layer")
    return ReportFigure(slug, title, caption, image, table, readout=spoken)


def learned_figure(
    slug: str, run: "Run", layer_names: Sequence[str], budget: Budget
) -> ReportFigure | None:
    """Probabilities over time; None where they do not move."""
    grid = probability_grid(run)
    if not len(grid):
        return None
    lisa = run.manifest.get("lisa")
    control = lisa.get("control", "none") if isinstance(lisa, dict) else "none"
    title = "What was learned: probabilities over time"
    with svg.ink(slug):
        ax = canvas(WIDE, _grid_height(run.n_layers), right=0.85, top=0.1)
        plots.learned_probabilities(run, ax=ax, most=budget.columns)
        svg.mark_layers(ax, run.n_layers)
        last = pd.Series(grid.values[:, -1])
        text = extremes("Colour map, layers upwards, draws to the right; last column:", last)
        image = svg.to_svg(ax, slug, title, text, layer_names)
        shown, group = grid.thinned(budget.columns)
        spoken = readout.of_grid(ax, shown, what="draw at step")
    caption = (
        "Probability of each layer in every draw, over that of uniform sampling: red is drawn more "
        "often, blue less. It moves at most twofold from draw to draw."
    )
    whose = "layers"
    if (drawn := what_is_drawn(run)) != "layer":
        whose = f"{drawn}s"
        caption = (
            f"What is drawn is a {drawn}. Shown is the share of each layer's weights that the "
            f"probabilities of its {whose} train in a draw on average, over that of uniform "
            "sampling: red is more, blue less. It moves at most twofold from draw to draw."
        )
    if control != "none":
        caption += (
            f" A control: the learned probabilities are {control}, so that they are those of other "
            f"{whose}."
        )
    caption += thinned(group, "column")
    return ReportFigure(slug, title, caption, image, grid_table(title, shown), readout=spoken)


_CURVE_NOTES = {
    "loss": "Training loss of each step, and the held-out loss where it was evaluated.",
    "learning_rate": "The rate that each step used.",
    "grad_norm": "Norm over all tensors, before clipping; marks at the bottom are clipped steps.",
    "memory": "Peak so far: on a GPU of allocated memory, on a CPU of the process.",
    "recorder": "What measuring costs the steps that are recorded, as a share of their time.",
}


def curve_figure(slug: str, run: "Run", quantity: str, budget: Budget) -> ReportFigure | None:
    """One quantity of training; None when the run did not log it."""
    frame = curve_frame(run, quantity)
    held_out = held_out_frame(run) if quantity == "loss" else frame.iloc[:0]
    if not np.isfinite(frame["value"]).any() and held_out.empty:
        return None
    name = QUANTITIES[quantity]
    title = name[:1].upper() + name[1:]
    series = thin(frame["step"].to_numpy(), frame["value"].to_numpy(), budget.points)
    wide = quantity == "loss"
    with svg.ink(slug):
        ax = canvas(WIDE if wide else HALF, 3.2 if wide else 2.7)
        plots.curves(run, quantity, ax=ax, most=budget.points)
        short_label(ax)
        image = svg.to_svg(ax, slug, title, extremes("Line chart.", frame["value"]))
    named = [("training" if quantity == "loss" else name, series)]
    if not held_out.empty:
        named.append(
            (
                "held-out",
                thin(held_out["step"].to_numpy(), held_out["value"].to_numpy(), budget.points),
            )
        )
    caption = _CURVE_NOTES[quantity] + thinned(series.group, "point")
    table, spoken = series_table(title, named), readout.of_series(ax, named)
    return ReportFigure(slug, title, caption, image, table, wide, spoken)


def ratio_figure(slug: str, grid: LayerGrid, budget: Budget) -> ReportFigure | None:
    """Update-to-weight ratio by depth; None when either norm was not recorded."""
    if not np.isfinite(grid.values).any():
        return None
    title = "Update-to-weight ratio"
    named = [
        (name, band_series(grid, part, budget.points))
        for name, part in depth_bands(len(grid.values)).items()
    ]
    with svg.ink(slug):
        ax = canvas(HALF, 2.7)
        plots.update_ratio(grid, ax=ax, most=budget.points)
        short_label(ax)
        image = svg.to_svg(ax, slug, title, extremes("Line chart.", grid.values))
    caption = (
        "Thirds of the stack: mean and range of their layers. The dotted line at 10⁻³ is a rule "
        "of thumb for Adam, not a limit."
    )
    caption += thinned(max(series.group for _, series in named), "point")
    table, spoken = series_table(title, named), readout.of_series(ax, named)
    return ReportFigure(slug, title, caption, image, table, False, spoken)


def _grid_height(n_layers: int) -> float:
    return float(np.clip(1.3 + 0.085 * n_layers, 2.7, 5.6))
