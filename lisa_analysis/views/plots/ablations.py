"""Pictures of an ablation: what layers are worth, what they cost elsewhere, who predicts it."""

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lisa_analysis.views.plots import style
from lisa_analysis.views.plots.scores import layers_below

# What the metrics of an ablation are called beside each other.
NAMES = {
    "ablation_keep": "alone (keep)",
    "ablation_reset": "missed (reset)",
    "forgetting": "forgetting",
    "forgetting_keep": "forgetting, alone",
}

# A number among more points than this names none of them.
_CROWD = 2


def worth(profiles: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """Draw what the layers' changes are worth: one mark per layer and way of asking.

    Parameters
    ----------
    profiles
        Metric of the ablation -> its `ImportanceProfile` (`lisa_analysis.importance`).
    ax
        Where to draw; a new figure when None.

    Returns
    -------
    Axes
        Whiskers are intervals; a mark without one has too few examples; below the line a change
        did harm.
    """
    what = "a mapping from a metric of the ablation to its profile"
    style.drawable(profiles, "items", "worth", what)
    ax = style.axes_or_new(ax)
    frames = {
        name: style.drawable(profile, "to_frame", "worth", what).to_frame()
        for name, profile in profiles.items()
    }
    frames = {name: f for name, f in frames.items() if f["score"].notna().any()}
    if not frames:
        return style.note(ax, "No layer was ablated.")
    n_layers = max(len(frame) for frame in frames.values())
    apart = min(0.3, 0.5 / len(frames))
    for position, (name, frame) in enumerate(frames.items()):
        color, _, marker = style.look(position)
        shift = apart * (position - (len(frames) - 1) / 2)
        at = np.arange(len(frame)) + shift
        score, low, high = (frame[c].to_numpy(dtype=np.float64) for c in ("score", "low", "high"))
        sure = np.isfinite(low) & np.isfinite(high)
        ax.vlines(at[sure], low[sure], high[sure], color=color, linewidth=1.3)
        for layer in np.flatnonzero(np.isfinite(score)):
            look: Any = {"mfc": color if sure[layer] or score[layer] == 0 else "none"}
            (mark,) = ax.plot(at[layer], score[layer], marker, color=color, markersize=4.2, **look)
            mark.set_gid(f"layer-{int(layer)}")
        ax.plot([], [], marker, color=color, markersize=4.2, label=NAMES.get(name, name))
    ax.axhline(0, color=style.MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    layers_below(ax, n_layers, next(iter(frames.values()))["name"])
    ax.set_ylabel("loss per token, nats")
    style.legend(ax)
    return ax


def gain_and_forgetting(gain: Any, cost: Any, *, ax: Axes | None = None) -> Axes:
    """Draw what each layer gains on the task against what it costs on general text.

    Parameters
    ----------
    gain, cost
        Profiles by layer, as ``ablation_reset`` and ``forgetting``.
    ax
        Where to draw; a new figure when None.

    Returns
    -------
    Axes
        To the right: worth more; upwards: forgets more. Upper left pays for little.
    """
    for profile in (gain, cost):
        style.drawable(profile, "scores", "gain_and_forgetting", f"{style.A_PROFILE} on each axis")
    ax = style.axes_or_new(ax, (4.6, 3.6))
    x, y = gain.scores, cost.scores
    known = np.isfinite(x) & np.isfinite(y)
    if not known.any():
        return style.note(ax, "No layer was ablated on both texts.")
    color = style.SERIES[0]
    for frame, axis in ((gain.to_frame(), "x"), (cost.to_frame(), "y")):
        low, high = (frame[c].to_numpy(dtype=np.float64) for c in ("low", "high"))
        sure = known & np.isfinite(low) & np.isfinite(high)
        draw = ax.hlines if axis == "x" else ax.vlines
        draw((y if axis == "x" else x)[sure], low[sure], high[sure], color=color, alpha=0.35, lw=1)
    for layer in np.flatnonzero(known):
        (mark,) = ax.plot(x[layer], y[layer], "o", color=color, markersize=4)
        mark.set_gid(f"layer-{int(layer)}")
    for number in _apart(x, y, known):
        ax.annotate(str(number), (x[number], y[number]), xytext=(4, 3), textcoords="offset points",
                    fontsize="small")  # fmt: skip
    for line in (ax.axhline, ax.axvline):
        line(0, color=style.MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(nbins=5))
    ax.margins(0.08)
    ax.set_xlabel(f"gain on the task, {NAMES.get(gain.metric, gain.metric)}, nats per token")
    ax.set_ylabel("forgetting, nats per token")
    return style.finish(ax)


def _apart(x: np.ndarray, y: np.ndarray, known: np.ndarray, most: int = 14) -> list[int]:
    """Layers worth a number: those that stand apart from all others, the farthest out first."""
    scaled = []
    for values in (x, y):
        spread = np.ptp(values[known]) or 1.0
        scaled.append((values - np.sort(values[known])[known.sum() // 2]) / spread)
    distance = np.where(known, scaled[0] ** 2 + scaled[1] ** 2, -1.0)
    across, up = (np.abs(values[:, None] - values[None, :]) for values in scaled)
    # So many points lie where the number would be hard to read: its own is one of them.
    near = ((across < 0.06) & (up < 0.07) & known[None, :]).sum(1)
    out = [i for i in np.argsort(-distance).tolist() if known[i] and near[i] <= _CROWD]
    chosen: list[int] = []
    for layer in out:
        if all(across[layer, c] >= 0.06 or up[layer, c] >= 0.07 for c in chosen):
            chosen.append(layer)
    return chosen[:most]


def validity(validity: Any, *, level: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw how well every metric ranks the layers as the ablation does.

    Parameters
    ----------
    validity
        A `Validity` (`lisa_analysis.validity`).
    level
        ``layer``, ``module`` or ``within kind``; None takes the finest that there is.
    ax
        Where to draw; a new figure when None.

    Returns
    -------
    Axes
        One row per metric: ρ with its interval for keep and for reset. A filled mark is evidence
        among all metrics, an open one is not; within the grey band chance alone puts a metric in
        95 of 100 orders of the layers; the small bar is the ceiling that noise leaves.
    """
    what = "what lisa_analysis.validity returns"
    frame = style.drawable(validity, "to_frame", "validity", what).to_frame()
    style.drawable(frame, "level", "validity", what)
    level = level if level is not None else frame["level"].iloc[-1]
    frame = frame[frame["level"] == level]
    names = [f"{m} · {s}" if s else m
             for m, s in zip(frame["metric"], frame["source"], strict=True)]  # fmt: skip
    frame = frame.assign(name=names)
    order = _best_first(frame)
    ax = style.axes_or_new(ax, (7.2, 1.1 + 0.26 * max(len(order), 2)))
    if not order:
        return style.note(ax, "No metric was compared at this level.")
    chance = frame["chance"].max()
    if np.isfinite(chance):
        ax.axvspan(-chance, chance, color=style.FROZEN, alpha=0.45, linewidth=0,
                   label="chance, one metric alone")  # fmt: skip
    targets = list(dict.fromkeys(frame["target"]))
    for position, target in enumerate(targets):
        color, _, marker = style.look(position)
        rows = frame[frame["target"] == target].set_index("name").reindex(order)
        at = np.arange(len(order))[::-1] + 0.16 * (len(targets) - 1 - 2 * position)
        _marks(ax, at, rows, color, marker)
        ax.plot([], [], marker, color=color, markersize=4.5, label=NAMES.get(target, target))
    ax.axvline(0, color=style.MUTED, linewidth=0.9)
    ax.set_yticks(range(len(order))[::-1], [style.literal(name, 24) for name in order])
    ax.set_ylim(-0.6, len(order) - 0.4)
    ax.set_xlim(-1.05, 1.05)
    ax.set_xlabel("rank correlation with the ablation (Spearman's ρ)")
    style.finish(ax, grid="x")
    style.legend(ax)
    return ax


def _marks(ax: Axes, at: np.ndarray, rows: pd.DataFrame, color: str, marker: str) -> None:
    value, low, high, top = (
        rows[c].to_numpy(dtype=np.float64) for c in ("spearman", "low", "high", "ceiling")
    )
    evidence = rows["evidence"].to_numpy() == True  # noqa: E712 - a metric without it is NaN
    sure = np.isfinite(low) & np.isfinite(high)
    ax.hlines(at[sure], low[sure], high[sure], color=color, linewidth=1.2)
    ax.plot(top, at, "|", color=color, markersize=7, markeredgewidth=1.4, alpha=0.7)
    ax.plot(value[evidence], at[evidence], marker, color=color, markersize=4.8)
    ax.plot(value[~evidence], at[~evidence], marker, color=color, markersize=4.8, mfc="none")


def _best_first(frame: pd.DataFrame) -> list[str]:
    """Names by the better of their agreements."""
    best: dict[str, float] = {}
    for name, value in zip(frame["name"], frame["spearman"], strict=True):
        best[name] = max(best.get(name, -2.0), float(value))
    return sorted(best, key=lambda name: -best[name])
