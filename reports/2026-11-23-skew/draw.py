"""The study's figure: profiles of three methods, seeds as bands, a thin line for step 0."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import lisa_analysis as la
from lisa_analysis.views.plots import style


def relative(scores: np.ndarray) -> np.ndarray:
    """Scores over their geometric mean, shape (layers,); NaN for a layer never seen."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(scores)
    return np.asarray(np.exp(logs - np.nanmean(logs)))


def profiles(
    metrics: Mapping[str, Mapping[str, list[la.ImportanceProfile]]],
    methods: Mapping[str, str],
    file: Path,
) -> None:
    """One panel per metric; scores over their geometric mean, so that methods compare."""
    mpl.use("Agg")
    figure = Figure(figsize=(8.2, 2.6 * len(metrics)), layout="constrained")
    for ax, (title, groups) in zip(figure.subplots(len(metrics), 1), metrics.items(), strict=True):
        for position, (method, name) in enumerate(methods.items()):
            color, dashes, marker = style.look(position)
            logs = np.log(np.stack([relative(p.scores) for p in groups[method]]))
            x = np.arange(logs.shape[1])
            seen = np.isfinite(logs).any(axis=0)
            mean = np.exp(np.nanmean(logs[:, seen], axis=0))
            ax.plot(x[seen], mean, color=color, linestyle=dashes, marker=marker, markersize=3.2,
                    linewidth=1.3, label=name)  # fmt: skip
            ax.fill_between(
                x[seen], np.exp(np.nanmin(logs[:, seen], axis=0)),
                np.exp(np.nanmax(logs[:, seen], axis=0)), color=color, alpha=0.18, linewidth=0,
            )  # fmt: skip
            start = np.stack([p.to_frame()["initial"].to_numpy(float) for p in groups[method]])
            if np.isfinite(start).all():
                initial = np.exp(np.log(np.stack([relative(s) for s in start])).mean(axis=0))
                ax.plot(x, initial, color=color, linewidth=0.8, alpha=0.6)
        ax.axhline(1, color=style.MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        ax.set_title(title, fontsize=10, loc="left")
        ax.set_ylabel("over the layers' mean", fontsize=8)
        ax.set_xticks(style.layer_ticks(logs.shape[1]))
        style.finish(ax)
    ax.set_xlabel("layer")
    handles, labels = ax.get_legend_handles_labels()
    handles.append(Line2D([], [], color=style.MUTED, linewidth=0.8))
    figure.legend(handles, [*labels, "at step 0"], ncols=4, frameon=False, fontsize=9,
                  loc="outside upper center")  # fmt: skip
    figure.savefig(file, dpi=130, metadata={"Software": None})
