"""The report's figures: a plot as SVG, a sentence on how to read it, and its data."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from lisa_analysis import plots
from lisa_analysis.metrics.layer_grid import (
    LayerGrid,
    band_series,
    depth_bands,
)
from lisa_analysis.metrics.thinning import thin
from lisa_analysis.profiles.relative import relative_frame
from lisa_analysis.runs.curves import QUANTITIES, curve_frame, held_out_frame
from lisa_analysis.runs.schedule import probability_grid, schedule_grid, visit_counts
from lisa_analysis.views.plots.grids import COLUMN_TITLES
from lisa_analysis.views.report import readout, svg
from lisa_analysis.views.report.figure import (
    HALF,
    NARROW,
    WIDE,
    Budget,
    ReportFigure,
    canvas,
    extremes,
    short_label,
    thinned,
)
from lisa_analysis.views.report.format import count, number
from lisa_analysis.views.report.tables import Table, frame_table, grid_table, series_table

if TYPE_CHECKING:
    from lisa_analysis import Run


def profile_figure(slug: str, profile: Any, layer_names: Sequence[str]) -> ReportFigure:
    """Importance per layer with intervals."""
    # A proxy that the run's own ablation does not bear out is not called importance.
    what = "Score" if profile.agrees_with_ablation is False else "Importance"
    title = f"{what} of each layer: {profile.metric}"
    frame = profile.to_frame()
    scores = pd.to_numeric(frame["score"]) if "score" in frame else pd.Series(dtype=float)
    if not np.isfinite(scores.to_numpy(dtype=float)).any():
        return ReportFigure(slug, title, "No layer has a score: nothing was recorded.", None, None)
    caption = f"{profile.definition} {whiskers(profile.confidence)}"
    if "initial" in frame and pd.to_numeric(frame["initial"], errors="coerce").gt(0).any():
        caption += " Line across a bar: the score at step 0."
    figure = ReportFigure(slug, title, caption, None, profile_table(profile))
    return panels(figure, {"": profile}, extremes("Bar chart.", scores), layer_names)


def change_figure(slug: str, found: Any, layer_names: Sequence[str]) -> ReportFigure:
    """Two probes of one run on shared axes, with what rose and what fell."""
    caption = (
        f"{found.statement} {found.before.definition} Bars are over the mean of the layers at that "
        "step, the sentence and the table in the metric itself: a layer rose or fell where its "
        "bands for all layers at once do not overlap."
    )
    table = frame_table(
        "Two probes of the run", found.layers,
        [(name, name) for name in ("layer", "name", "before", "after", "ratio", "change")],
        layer="layer",
    )  # fmt: skip
    figure = ReportFigure(slug, "What training changed", caption, None, table)
    return panels(figure, found.profiles, "Two bar charts on shared axes.", layer_names)


def whiskers(confidence: float) -> str:
    """How to read the marks of `lisa_analysis.plots.side_by_side`."""
    return (
        f"Whiskers: {100 * confidence:g} % interval of a layer by itself (thick) and of all layers "
        "at once (thin), by which they stand above (▲, numbered) or below (▼). Open circle: too "
        "little data for an interval."
    )


def panels(
    figure: ReportFigure, profiles: Mapping[str, Any], text: str, layer_names: Sequence[str]
) -> ReportFigure:
    """Draw profiles side by side into `figure`, once for a wide screen and once for a narrow."""
    columns = 1 if len(profiles) < 3 else 2 if len(profiles) < 7 else 3
    rows = -(-len(profiles) // columns)
    wide, high = (WIDE, max(3.0, 0.55 + rows * (1.35 if rows < 3 else 1.02)))
    image, readout = _panels(figure.slug, figure.title, text, profiles, layer_names,
                             columns=columns, size=(wide, high), top=0.34)  # fmt: skip
    slug = f"{figure.slug}-narrow"
    size = (NARROW, 0.9 + (2.3 if len(profiles) == 1 else 1.3 * len(profiles)))
    narrow, narrow_readout = _panels(slug, figure.title, text, profiles, layer_names,
                                     columns=1, size=size, top=0.72)  # fmt: skip
    return replace(figure, image=image, readout=readout, narrow=narrow,
                   narrow_readout=narrow_readout)  # fmt: skip


def _panels(
    slug: str, title: str, text: str, profiles: Mapping[str, Any], layer_names: Sequence[str],
    *, columns: int, size: tuple[float, float], top: float,
) -> tuple[Markup, Markup]:  # fmt: skip
    at: list[tuple[float, float]] = []
    said: list[str] = []
    with svg.ink(slug):
        ax = canvas(*size, left=0.62, right=0.08, top=top)
        plots.side_by_side(profiles, columns=columns, ax=ax)
        image = svg.to_svg(ax, slug, title, text, layer_names)
        shown = [(name, relative_frame(p)) for name, p in profiles.items()
                 if np.isfinite(p.scores).any()]  # fmt: skip
        for panel, (name, frame) in zip(ax.child_axes, shown, strict=True):
            middle = sum(panel.get_ylim()) / 2
            at += readout.places(panel, np.arange(len(frame)), np.full(len(frame), middle))
            said += [_layer_words(name, row, frame.attrs["relative"])
                     for row in frame.to_dict("records")]  # fmt: skip
    return image, readout.points(at, said)


def _layer_words(name: str, row: dict[Any, Any], relative: bool) -> str:
    """One layer of one profile, as it is read out."""
    lead = f"{name}: " if name else ""
    layer = f"{lead}layer {row['layer']}, {row['name']}: "
    if not np.isfinite(row["score"]):
        return f"{layer}never measured"
    unit = "×" if relative else ""
    text = f"{layer}{unit}{number(row['score'])}{' the mean' if relative else ''}"
    if not np.isfinite(row["low"]):
        return f"{text}, no interval"
    text += f" ({number(row['low'])} to {number(row['high'])})"
    stands = {"above": ", above the others", "below": ", below the others"}
    return text + stands.get(str(row.get("standing")), "")


def profile_table(profile: Any) -> Table:
    """Profile as numbers; embedding, head and final norm follow the layers of the stack."""
    frame = profile.to_frame()
    outside = profile.outside
    if outside is not None and len(outside):
        frame = pd.concat([frame, outside.dropna(axis=1, how="all")], ignore_index=True)
        # Groups outside the stack have no place in it.
        frame.loc[frame.index >= profile.n_layers, "layer"] = np.nan
    return frame_table(
        f"{profile.metric} of every layer, then of what lies outside the stack",
        frame,
        [
            ("layer", "layer"),
            ("name", "name"),
            ("score", "score"),
            ("low", "low"),
            ("high", "high"),
            ("joint_low", "low, all at once"),
            ("joint_high", "high, all at once"),
            ("standing", "stands"),
            ("n_eff", "effective samples"),
            ("visits", "visits"),
            ("initial", "at step 0"),
        ],
        layer="layer",
    )


def kind_figure(slug: str, profile: Any) -> ReportFigure:
    """Module kind × layer, from a profile by module."""
    title = f"Where in the layer: {profile.metric} by kind of module"
    frame = profile.to_frame()
    if "kind" not in frame:
        frame = frame.assign(kind=frame["name"].astype(str).str.rsplit(" ", n=1).str[-1])
    if not frame["score"].notna().any():
        return ReportFigure(slug, title, "No module has a score.", None, None)
    # Layers without a score stay, grey; a kind that was never measured in any layer goes.
    frame = frame[frame.groupby("kind")["score"].transform("count") > 0]
    kinds = frame["kind"].nunique()
    with svg.ink(slug):
        ax = canvas(WIDE, 0.9 + 0.26 * max(kinds, 2), right=0.85, top=0.1)
        plots.kind_grid(frame, label=profile.metric, ax=ax)
        image = svg.to_svg(ax, slug, title, extremes("Colour map.", frame["score"]))
        spoken = _kind_readout(ax, frame)
    wide = frame.pivot(index="layer", columns="kind", values="score").reset_index()
    table = frame_table(title, wide, [(c, str(c)) for c in wide], layer="layer")
    caption = (
        f"{profile.definition} Colour is logarithmic where all scores have one sign; grey: no such "
        "module, or never measured."
    )
    return ReportFigure(slug, title, caption, image, table, readout=spoken)


def _kind_readout(ax: Any, frame: pd.DataFrame) -> Markup:
    kinds = [label.get_text() for label in ax.get_yticklabels()]
    layers = range(int(frame["layer"].max()) + 1)
    wide = frame.pivot(index="kind", columns="layer", values="score").reindex(
        index=kinds, columns=layers
    )
    return readout.cells(ax, kinds, [f"layer {i}" for i in layers], wide.to_numpy())


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
    title = "Which layers LISA trained, and when"
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
        "Blue: active during the interval that begins at that step. Right: draws of each layer "
        "(bar) and the number that its inclusion probabilities add up to (mark)."
    )
    table = frame_table(
        "Visits of each layer",
        visits,
        [("layer", "layer"), ("observed", "observed"), ("expected", "expected")],
        layer="layer",
    )
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
    if control != "none":
        caption += (
            f" A control: the learned probabilities are {control}, so that they are those of other "
            "layers."
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


def probabilities_figure(slug: str, probabilities: Any, layer_names: Sequence[str]) -> ReportFigure:
    """Inclusion probabilities beside uniform sampling."""
    title = "How often to sample each layer next time"
    pi = np.asarray(probabilities.inclusion_probabilities, dtype=float)
    with svg.ink(slug):
        ax = canvas(WIDE, 3.0)
        plots.probabilities(probabilities, ax=ax)
        image = svg.to_svg(ax, slug, title, extremes("Bar chart.", pi), layer_names)
    frame = probabilities.to_frame()
    if "layer" not in frame:
        frame = frame.reset_index(names="layer")
    table = frame_table(
        "From score to probability", frame, [(c, str(c).replace("_", " ")) for c in frame],
        layer="layer",
    )  # fmt: skip
    spoken = readout.of_layers(ax, table)
    return ReportFigure(slug, title, probabilities.statement, image, table, readout=spoken)


def strengths_figure(
    slug: str, strengths: pd.DataFrame, chosen: Any, layer_names: Sequence[str]
) -> ReportFigure:
    """What each strength would give: π by layer, and what a draw collects."""
    title = "What each strength would give"
    with svg.ink(slug):
        ax = canvas(WIDE, 3.0)
        plots.strengths(strengths, ax=ax)
        most = [pi.max() for pi in strengths["pi"] if pi is not None]
        image = svg.to_svg(ax, slug, title, extremes("Line chart.", most), layer_names)
    columns: list[Any] = [
        ("strength", "strength"), ("least", "least π", number), ("most", "largest π", number),
        ("never_drawn", "layers never drawn", _whole), ("gain", "score of a draw", _times),
        ("why_not", "why not"),
    ]  # fmt: skip
    if not strengths["why_not"].any():
        columns.pop()
    caption = (
        f"This file: strength {chosen.strength:g}" if not isinstance(chosen.strength, str)
        else f"This file: {chosen.strength}"
    )  # fmt: skip
    caption += (
        ". 1 is the default, and mild; above it a few layers train most of the time, and a smaller "
        "learning rate may be in place. Score of a draw: the mean score of a drawn layer over "
        "that of a uniformly drawn one. No strength is known to lower the loss."
    )
    known = [(row["strength"], row["pi"]) for row in strengths.to_dict("records")
             if row["pi"] is not None]  # fmt: skip
    texts = [f"layer {i}: π at " + ", ".join(f"strength {s} {number(pi[i])}" for s, pi in known)
             for i in range(len(layer_names))]  # fmt: skip
    table, spoken = frame_table(title, strengths, columns), readout.along(
        ax, range(len(texts)), texts
    )  # fmt: skip
    return ReportFigure(slug, title, caption, image, table, readout=spoken)


def _whole(value: float) -> str:
    return "" if value != value else f"{value:.0f}"


def _times(value: float) -> str:
    return "" if value != value else f"×{value:.2f}"


def _grid_height(n_layers: int) -> float:
    return float(np.clip(1.3 + 0.085 * n_layers, 2.7, 5.6))
