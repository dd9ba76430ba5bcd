"""Figures of profiles and of what they steer: scores, kinds, probabilities, strengths."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from lisa_analysis import plots
from lisa_analysis.profiles.relative import relative_frame
from lisa_analysis.views.html_report import readout, svg
from lisa_analysis.views.html_report.figure import (
    NARROW,
    WIDE,
    ReportFigure,
    canvas,
    extremes,
)
from lisa_analysis.views.html_report.format import number
from lisa_analysis.views.html_report.tables import Table, frame_table

if TYPE_CHECKING:
    from lisa_analysis.profiles.profile import ImportanceProfile


def profile_figure(
    slug: str, profile: "ImportanceProfile", layer_names: Sequence[str]
) -> ReportFigure:
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
        "step, the sentence and the table in the metric itself: a layer rose or fell where the "
        "band of its difference, for all layers at once, leaves zero out."
    )
    table = frame_table(
        "Two probes of the run", found.layers,
        [(name, name) for name in ("layer", "name", "before", "after", "ratio", "difference",
                                   "joint_low", "joint_high", "change")],
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


def profile_table(profile: "ImportanceProfile") -> Table:
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


def kind_figure(slug: str, profile: "ImportanceProfile") -> ReportFigure:
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
    table = frame_table(title, wide, [(str(c), str(c)) for c in wide], layer="layer")
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
