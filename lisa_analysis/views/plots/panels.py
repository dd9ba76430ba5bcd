"""Profiles side by side with their intervals, a panel each on shared axes, layers named."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lisa_analysis.profiles.relative import relative_frame
from lisa_analysis.views.plots import style
from lisa_analysis.views.plots.scores import labelled

# How a layer stands: colour, mark, words of the legend. Never colour alone.
_LOOKS: Mapping[str, tuple[str, str, str]] = {
    "above": (style.SERIES[0], "^", "above the others"),
    "below": (style.SERIES[3], "v", "below"),
    "within": (style.MUTED, "o", "within the others"),
    "unknown": (style.MUTED, "o", "no interval"),
}
_START = style.SERIES[4]


def side_by_side(
    profiles: Mapping[str, Any] | Sequence[Any], *, columns: int | None = None,
    ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Draw every profile in a panel of its own, with intervals, on axes that all share.

    Parameters
    ----------
    profiles
        Label -> `ImportanceProfile` by layer; or a list of them, called by what differs.
    columns
        Panels beside each other; None takes one for up to two profiles, else two or three.
    ax
        What the panels divide among themselves; a new figure when None.

    Returns
    -------
    Axes
        `ax`; its ``child_axes`` are the panels, in order. Scores are over the mean of their
        layers (dashed), so that metrics and runs of any scale share an axis. Thick whiskers hold
        a layer by itself, thin ones all layers at once: by these a layer stands above (▲, with
        its number) or below (▼); an open circle has no interval, a layer without a mark was
        never measured.
    """
    if not isinstance(profiles, Mapping):
        profiles = labelled(profiles, "side_by_side")
    frames = {
        name: relative_frame(style.drawable(p, "to_frame", "side_by_side", style.A_PROFILE))
        for name, p in profiles.items()
    }
    frames = {name: f for name, f in frames.items() if np.isfinite(f["score"]).any()}
    count = len(frames)
    if count > 1:  # what was there before is of one run; several have marks enough
        frames = {name: f.drop(columns="initial", errors="ignore") for name, f in frames.items()}
    columns = columns or (1 if count < 3 else 2 if count < 7 else 3)
    rows = max(1, math.ceil(count / columns))
    ax = style.axes_or_new(ax, (9.4 if columns > 1 else 7.2, 0.6 + 1.5 * max(rows, 2)))
    if not frames:
        return style.note(ax, "No profile has a score: nothing was recorded.")
    ax.set_axis_off()
    panels = _panels(ax, count, rows, columns)
    # Panels of different depth cannot share their layers.
    depth = max(len(frame) for frame in frames.values())
    for panel, (name, frame) in zip(panels, frames.items(), strict=True):
        draw_panel(panel, frame)
        panel.set_xlim(-0.7, (depth if _even(frames) else len(frame)) - 0.3)
        if count > 1:
            wide = style.inches(panel)[0]
            title = style.literal(name, max(12, int(15 * wide)))
            panel.set_title(title, loc="left", fontsize="small", pad=3)
    _share(ax, panels, frames, columns)
    _explain(ax, frames)
    return ax


def _even(frames: Mapping[str, pd.DataFrame]) -> bool:
    return len({len(frame) for frame in frames.values()}) == 1


def _panels(ax: Axes, count: int, rows: int, columns: int) -> list[Axes]:
    """Inset axes over the whole of `ax`, with room for titles and gaps in inches."""
    box = ax.get_position()
    width, height = style.whole(ax).get_size_inches() * (box.width, box.height)
    gap, title = 0.3 / width, (0.3 if count > 1 else 0.0) / height
    wide = (1 - gap * (columns - 1)) / columns
    tall = (1 - title * rows) / rows
    return [
        ax.inset_axes((
            (i % columns) * (wide + gap), 1 - (i // columns + 1) * (tall + title), wide, tall
        ))
        for i in range(count)
    ]  # fmt: skip


def draw_panel(ax: Axes, frame: pd.DataFrame) -> None:
    """One profile: bars from zero, whiskers, a mark and, of what stands apart, its number."""
    score, low, high, joint_low, joint_high = (
        frame[name].to_numpy(dtype=np.float64)
        for name in ("score", "low", "high", "joint_low", "joint_high")
    )
    words = standings(frame)
    for layer in np.flatnonzero(np.isfinite(score)).tolist():
        color, marker, _ = _LOOKS[words[layer]]
        sure = bool(np.isfinite(low[layer]) and np.isfinite(high[layer]))
        (bar,) = ax.bar(layer, score[layer], 0.78, color=color, alpha=0.3, linewidth=0)
        bar.set_gid(f"layer-{layer}")
        if sure:
            ax.vlines(layer, low[layer], high[layer], color=color, linewidth=1.8)
        if np.isfinite(joint_low[layer]) and np.isfinite(joint_high[layer]):
            ax.vlines(layer, joint_low[layer], joint_high[layer], color=color, linewidth=0.7)
        ax.plot(layer, score[layer], marker, color=color, markersize=3.4,
                mfc=color if sure else "none")  # fmt: skip
    if "initial" in frame:
        start = pd.to_numeric(frame["initial"], errors="coerce").to_numpy(dtype=np.float64)
        for layer in np.flatnonzero(np.isfinite(start) & (start > 0) & np.isfinite(score)).tolist():
            ax.hlines(start[layer], layer - 0.39, layer + 0.39, color=_START, linewidth=1.3)


def standings(frame: pd.DataFrame) -> list[str]:
    """How every row stands: what is neither above nor below is within, or has no interval."""
    words = frame["standing"] if "standing" in frame else ["within"] * len(frame)
    return [word if word in _LOOKS else "unknown" for word in words]


def _name_layers(ax: Axes, frame: pd.DataFrame) -> None:
    """Write the numbers of the layers that stand apart over their whiskers, none on another."""
    words = standings(frame)
    tops = frame[["score", "high", "joint_high"]].to_numpy(dtype=np.float64)
    reach = np.nanmax(tops, axis=1, initial=-np.inf)
    bottom, top = ax.get_ylim()
    inches = style.inches(ax)[0]
    room = 72 * inches / max(len(words), 1)  # points that a layer is wide
    size, before, lift = (8.0 if room > 12 else 6.5), -9, 0
    for layer, word in enumerate(words):
        if word not in ("above", "below") or not np.isfinite(reach[layer]):
            continue
        wide = 0.65 * size * len(str(layer))
        close = before >= 0 and (layer - before) * room < wide
        lift = (lift + 1) % 2 if close else 0
        before = layer
        height = 72 * style.inches(ax)[1]
        most = top - (top - bottom) * (1.1 * size * (1 + lift)) / height  # below the title
        ax.annotate(
            str(layer), (layer, min(reach[layer], most)), xytext=(0, 2 + 0.9 * size * lift),
            textcoords="offset points", ha="center", va="bottom",
            fontsize=size if word == "above" else size - 0.5,
            fontweight="bold" if word == "above" else "normal", color=_LOOKS[word][0],
        )  # fmt: skip


def _share(
    ax: Axes, panels: Sequence[Axes], frames: Mapping[str, pd.DataFrame], columns: int
) -> None:
    """One scale for all panels; labels stand at the left and at the bottom alone."""
    relative = [frame.attrs["relative"] for frame in frames.values()]
    top, bottom = _limits(list(frames.values()))
    even = _even(frames)
    for i, (panel, frame) in enumerate(zip(panels, frames.values(), strict=True)):
        panel.set_ylim(bottom, top)
        level = 1.0 if relative[i] else 0.0
        panel.axhline(level, color=style.MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        wide = style.inches(panel)[0]
        panel.set_xticks(style.layer_ticks(len(frame), most=max(6, int(3.4 * wide))))
        panel.yaxis.set_major_locator(mpl.ticker.MaxNLocator(nbins=4))
        style.finish(panel)
        last = i + columns >= len(panels)
        panel.tick_params(
            labelleft=i % columns == 0, labelbottom=last or not even, labelsize="small"
        )
        if last:
            panel.set_xlabel("layer", labelpad=1)
        if "name" in frame:
            style.stacks_apart(panel, frame["name"], label=last)
        _name_layers(panel, frame)
    width = style.inches(ax)[0]
    ax.text(
        -0.4 / width, 0.5, "score over the layers' mean" if all(relative) else "score",
        rotation=90, ha="center", va="center", transform=ax.transAxes,
    )  # fmt: skip


def _limits(frames: Sequence[pd.DataFrame]) -> tuple[float, float]:
    """Top and bottom of the scale: all scores and pointwise bounds; one wide band may leave it."""
    scores = np.concatenate([f["score"].to_numpy(dtype=np.float64) for f in frames])
    bounds = [np.concatenate([f[c].to_numpy(dtype=np.float64) for f in frames])
              for c in ("high", "joint_high", "low")]  # fmt: skip
    largest = float(np.nanmax(scores))
    far = [float(np.nanmax(b)) for b in bounds[:2] if np.isfinite(b).any()]
    top = min(max([largest, *far]), 1.8 * max(largest, 0.0) or 1.0)
    bottom = min(0.0, float(np.nanmin(scores)))
    if np.isfinite(bounds[2]).any() and bottom < 0:
        bottom = min(bottom, float(np.nanmin(bounds[2])))
    room = 0.14 * (top - bottom) or 1.0  # nothing changed: every score is 0
    return top + room, bottom


def _explain(ax: Axes, frames: Mapping[str, pd.DataFrame]) -> None:
    """Legend above the panels, of what occurs in them."""
    found = {word for frame in frames.values()
             for word, score in zip(standings(frame), frame["score"], strict=True)
             if np.isfinite(score)}  # fmt: skip
    for word, (color, marker, text) in _LOOKS.items():
        if word in found:
            look: Any = {"mfc": "none"} if word == "unknown" else {}
            ax.plot([], [], marker, color=color, markersize=4.5, label=text, **look)
    if any("initial" in f and pd.to_numeric(f["initial"], errors="coerce").gt(0).any()
           for f in frames.values()):  # fmt: skip
        ax.plot([], [], color=_START, linewidth=1.3, label="at step 0")
    ax.plot([], [], color=style.MUTED, linewidth=0.9, linestyle=(0, (4, 3)), label="mean")
    wide = style.inches(ax)[0]
    style.legend(ax, columns=5 if wide > 5 else 2)
