"""Pictures with one mark per layer: profile, probabilities, rank agreement."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.profiles.agreement import agreement_square
from lisa_analysis.profiles.relative import relative_scores
from lisa_analysis.views.plots import style


def profile(profile: Any, *, ax: Axes | None = None) -> Axes:
    """Draw an importance profile: one bar per layer, its interval, and what step 0 held.

    Parameters
    ----------
    profile
        An `ImportanceProfile` (`lisa_analysis.importance`).
    ax
        Where to draw; a new figure when None (show it with ``ax.figure``).

    Returns
    -------
    Axes
        Bars are scores, whiskers their intervals, thin where they hold for all layers at once (by
        which layers are compared), the grey part was there before training.
        A layer without an interval (too little data) has an open mark instead of a whisker;
        a layer without a score has a cross on the axis.
    """
    frame = style.drawable(profile, "to_frame", "profile", style.A_PROFILE).to_frame()
    ax = style.axes_or_new(ax)
    if frame.empty or not np.isfinite(_floats(frame["score"])).any():
        return style.note(ax, "No layer has a score: nothing was recorded for this metric.")
    # Modules and tensors share layers: their rows stand side by side instead.
    place = _floats(frame["layer"]) if profile.by == "layer" else np.arange(len(frame))
    score = _floats(frame["score"])
    for position, height in zip(place, score, strict=True):
        if np.isfinite(height):
            (bar,) = ax.bar(position, height, 0.78, color=style.SERIES[0], alpha=0.45, linewidth=0)
            if profile.by == "layer":
                bar.set_gid(f"layer-{int(position)}")
    _initial_part(ax, frame, place, score)
    _score_marks(ax, place, score, _floats(frame["low"]), _floats(frame["high"]))
    _joint_band(ax, place, _floats(frame["joint_low"]), _floats(frame["joint_high"]))
    mean, dashes = float(np.nanmean(score)), (0, (4, 3))
    ax.axhline(mean, color=style.MUTED, linewidth=0.9, linestyle=dashes, label="mean")
    if profile.by == "layer":
        layers_below(ax, len(frame), frame["name"])
    else:
        _names_below(ax, frame["name"].tolist(), profile.by)
    ax.set_ylabel(style.literal(profile.metric))
    style.legend(ax)
    return ax


def _joint_band(ax: Axes, place: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    """Thin whiskers that hold for all layers at once."""
    known = np.isfinite(low) & np.isfinite(high)
    if known.any():
        look: Any = {"color": style.SERIES[0], "linewidth": 0.6, "label": "all layers at once"}
        ax.vlines(place[known], low[known], high[known], **look)


def _score_marks(
    ax: Axes, place: np.ndarray, score: np.ndarray, low: np.ndarray, high: np.ndarray
) -> None:
    """Whisker and dot where there is an interval, an open circle without, a cross unmeasured."""
    color = style.SERIES[0]
    scored = np.isfinite(score)
    sure = scored & np.isfinite(low) & np.isfinite(high)
    unsure = scored & ~sure
    if sure.any():
        ax.vlines(place[sure], low[sure], high[sure], color=color, linewidth=1.4, label="interval")
        ax.plot(place[sure], score[sure], "o", color=color, markersize=3)
    if unsure.any():
        label = "too little data for an interval"
        ax.plot(place[unsure], score[unsure], "o", color=color, mfc="none", ms=4, label=label)
    if not scored.all():
        nothing = np.zeros((~scored).sum())
        look: Any = {"color": style.NON_FINITE, "markersize": 5, "clip_on": False}
        ax.plot(place[~scored], nothing, "x", label="never measured", **look)


def profiles(profiles: Mapping[str, Any] | Sequence[Any], *, ax: Axes | None = None) -> Axes:
    """Draw several profiles over their own means, so that runs of any scale compare.

    Parameters
    ----------
    profiles
        Label -> `ImportanceProfile`, or the profiles of runs that differ in nothing but the seed:
        these share a line, their mean, and a band from the smallest to the largest. Or a list of
        profiles, which are called by what differs: their runs, or their metrics.
    ax
        Where to draw; a new figure when None.

    Returns
    -------
    Axes
        The dashed line is a layer like the mean; models of different depth are laid over each
        other from the bottom (0) to the top (1).
    """
    if not isinstance(profiles, Mapping):
        profiles = labelled(profiles)
    ax = style.axes_or_new(ax)
    frames = {name: relative_scores(item) for name, item in profiles.items()}
    frames = {name: frame for name, frame in frames.items() if frame["relative"].notna().any()}
    if not frames:
        return style.note(ax, "No run has a profile to compare.")
    depths = {len(frame) for frame in frames.values()}
    for position, (name, frame) in enumerate(frames.items()):
        color, dashes, marker = style.look(position)
        x = frame["layer"] if len(depths) == 1 else np.linspace(0, 1, len(frame))
        ax.plot(
            x,
            frame["relative"],
            color=color,
            label=style.literal(name, 24),
            linestyle=dashes,
            marker=marker,
            markersize=3.2,
            linewidth=1.2,
        )
        if isinstance(profiles[name], Sequence):
            ax.fill_between(x, frame["low"], frame["high"], color=color, alpha=0.18, linewidth=0)
    ax.axhline(1, color=style.MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    if len(depths) == 1:
        layers_below(ax, depths.pop())
    else:
        ax.set_xlabel("depth in the stack (0 = bottom, 1 = top)")
        style.finish(ax)
    ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    ax.set_ylabel("score over the layers' mean")
    style.legend(ax)
    return ax


def labelled(profiles: Any, plot: str = "profiles") -> dict[str, Any]:
    """Profiles of a list by what tells them apart, numbered where nothing does."""
    expected = f"a mapping or a list of {style.A_PROFILE.removeprefix('an ')}s"
    if hasattr(profiles, "to_frame"):  # one profile is not its rows
        raise LisaError(f"plots.{plot} draws {expected}, got one profile: put it into a list.")
    several = list(style.drawable(profiles, "__iter__", plot, expected))
    for item in several:
        style.drawable(item, "metric", plot, expected)
    runs, metrics = ([str(getattr(p, name)) for p in several] for name in ("run_id", "metric"))
    both = [f"{metric} of {run}" for run, metric in zip(runs, metrics, strict=True)]
    for names in (runs, metrics, both):
        if len(set(names)) == len(names) and all(names):
            return dict(zip(names, several, strict=True))
    return {f"{n}: {name}": p for n, (name, p) in enumerate(zip(both, several, strict=True), 1)}


def probabilities(probabilities: Any, *, ax: Axes | None = None) -> Axes:
    """Draw inclusion probabilities per layer beside LISA's even choice.

    `probabilities` is a `SamplingProbabilities`: the bars are its inclusion probabilities, the
    dashed line is what uniform sampling of the same number of layers gives, the small marks are
    the scores scaled to the same sum, before mixing, floor and cap.
    """
    ax = style.axes_or_new(ax)
    style.drawable(
        probabilities, "inclusion_probabilities", "probabilities", "sampling probabilities"
    )
    pi = np.asarray(probabilities.inclusion_probabilities, dtype=np.float64)
    k = float(probabilities.activated_layers)
    layer = np.arange(len(pi))
    for position, value in zip(layer, pi, strict=True):
        bar = ax.bar(position, value, width=0.78, color=style.SERIES[2], alpha=0.55, linewidth=0)
        bar[0].set_gid(f"layer-{position}")
    scores = np.asarray(probabilities.scores, dtype=np.float64)
    if scores.shape == pi.shape and np.nansum(scores) > 0:
        scaled = k * scores / np.nansum(scores)
        ax.plot(
            layer,
            scaled,
            "_",
            color=style.SERIES[3],
            markersize=7,
            markeredgewidth=1.6,
            label="score alone",
        )
    even = np.asarray(probabilities.uniform, dtype=np.float64)
    line: dict[str, Any] = {"color": style.MUTED, "linewidth": 1, "linestyle": (0, (4, 3)),
            "label": f"uniform, {k:g} of {len(pi)}"}  # fmt: skip
    if np.ptp(even) < 1e-9:
        ax.axhline(k / len(pi), **line)
    else:  # stacks of different depths
        ax.step(np.append(layer, len(pi)) - 0.5, np.append(even, even[-1]), where="post", **line)
    layers_below(ax, len(pi), probabilities.layer_names)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("inclusion probability")
    style.legend(ax)
    return ax


def strengths(strengths: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the inclusion probabilities that each strength gives, one line each.

    `strengths` is what `lisa_analysis.plans.sampling.strengths` returns; a strength that gives no
    probabilities is left out, and a layer that is never drawn has no mark.
    """
    style.drawable(strengths, "to_dict", "strengths", "a frame of strengths")
    ax = style.axes_or_new(ax)
    layers = 0
    for position, row in enumerate(strengths.to_dict("records")):
        if row["pi"] is None:
            continue
        pi = np.asarray(row["pi"], dtype=np.float64)
        layers = len(pi)
        color, dashes, marker = style.look(position)
        ax.plot(
            np.arange(layers), np.where(pi > 0, pi, np.nan), color=color, linestyle=dashes,
            marker=marker, markersize=3.2, linewidth=1.2,
            label=f"{row['strength']} (×{row['gain']:.2f})",
        )  # fmt: skip
    if not layers:
        return style.note(ax, "No strength gives probabilities.")
    layers_below(ax, layers)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("inclusion probability")
    style.legend(ax)
    return ax


def rank_stability(
    agreement: pd.DataFrame, *, label: str = "Kendall's τ", ax: Axes | None = None
) -> Axes:
    """Draw how well profiles agree on the order of the layers.

    Parameters
    ----------
    agreement
        ``Comparison.rank_agreement`` (one row per pair, with ``run_a``, ``run_b``, ``kendall``),
        or a square table of values from −1 to 1 with the same labels on rows and columns.
    label
        What the values are.
    ax
        Where to draw; a new figure when None.

    Returns
    -------
    Axes
        The number is written into each cell as long as it fits.
    """
    what = "Comparison.rank_agreement, or a square frame"
    if "run_a" in style.drawable(agreement, "columns", "rank_stability", what):
        agreement = agreement_square(agreement)
    size = len(agreement)
    ax = style.axes_or_new(ax, (1.9 + 0.42 * max(size, 3), 1.2 + 0.36 * max(size, 3)))
    if not size:
        return style.note(ax, "Fewer than two profiles: no agreement to show.")
    values = agreement.to_numpy(dtype=np.float64)
    ax.set_facecolor(style.FROZEN)
    image = ax.imshow(
        np.ma.masked_invalid(values),
        vmin=-1,
        vmax=1,
        cmap="PuOr_r",
        aspect="auto",
        interpolation="none",
    )
    ax.figure.colorbar(image, ax=ax, pad=0.02, label=label).outline.set_visible(False)
    if size <= 10:
        _write_values(ax, values)
    names = [style.literal(name, 18) for name in agreement.index]
    ax.set_yticks(range(size), names)
    ax.set_xticks(range(size), names, rotation=35, ha="right")
    return style.finish(ax, grid=None)


def _write_values(ax: Axes, values: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            text = f"{value:.2f}".replace("-", "−")
            color = "white" if abs(value) > 0.6 else "black"
            ax.text(column, row, text, ha="center", va="center", fontsize="small", color=color)


def _initial_part(ax: Axes, frame: pd.DataFrame, layer: np.ndarray, score: np.ndarray) -> None:
    """Shade the part of each bar that step 0 already held, with a line at its level."""
    if "initial" not in frame:
        return
    initial = _floats(frame["initial"])
    known = np.isfinite(initial) & np.isfinite(score) & (initial > 0)
    if not known.any():
        return
    part = np.minimum(initial, score)[known]
    ax.bar(
        layer[known], part, width=0.78, color=style.MUTED, alpha=0.4, linewidth=0, label="at step 0"
    )
    ax.hlines(
        initial[known], layer[known] - 0.39, layer[known] + 0.39, color=style.MUTED, linewidth=1.2
    )


def layers_below(ax: Axes, n_layers: int, names: Iterable[object] = ()) -> None:
    """Label the axis by layers, and part it where one stack ends if `names` show several."""
    ax.set_xticks(style.layer_ticks(n_layers, most=25))
    ax.set_xlim(-0.7, n_layers - 0.3)
    ax.set_xlabel("layer")
    style.stacks_apart(ax, names)
    style.finish(ax)


def _names_below(ax: Axes, names: Sequence[object], what: str) -> None:
    """Label rows that are no layers: by name while the names fit."""
    if len(names) <= 16:
        ax.set_xticks(range(len(names)), [style.literal(name, 18) for name in names], rotation=30)
    ax.set_xlim(-0.7, len(names) - 0.3)
    ax.set_xlabel(what)
    style.finish(ax)


def _floats(values: Sequence[float] | pd.Series) -> np.ndarray:
    return pd.to_numeric(pd.Series(values), errors="coerce").to_numpy(
        dtype=np.float64, na_value=np.nan
    )
