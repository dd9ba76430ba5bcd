"""Figures of the page: every choice of layers against random ones, every arm against uniform."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from lisa_analysis.views.plots import style

Row = Mapping[str, object]  # of a table of the page, with `apart` and `told`
KINDS = {"lora": "adapters", "weights": "weights"}


def draw_selection(rows: Sequence[Row], file: Path) -> None:
    """Question A: losses less those of random sets, adapters and weights; a panel a task."""
    marks = {KINDS[kind]: [r for r in rows if r["trained"] == kind] for kind in KINDS}
    _draw(marks, "layers", "loss less random layers', nats", file)


def draw_sampling(rows: Sequence[Row], file: Path) -> None:
    """Question B: losses less those of uniform draws, and less those of an arm's placebo."""
    ends = " less its placebo"
    beside = [{**r, "arm": str(r["arm"]).removesuffix(ends)} for r in rows if ends in str(r["arm"])]
    alone = [{**r, "arm": r["name"]} for r in rows if ends not in str(r["arm"])]
    marks = {"less uniform draws": alone, "less its placebo": beside}
    _draw(marks, "arm", "difference in loss, nats", file)


def _draw(marks: Mapping[str, Sequence[Row]], label: str, unit: str, file: Path) -> None:
    """One row a name, one panel an environment, one mark a kind; bars are intervals over seeds.

    Filled is told from 0: p below .05, after Holm's correction where the contrast is secondary.
    Nothing is drawn before there is a difference.
    """
    marks = {kind: [r for r in rows if r["apart"] is not None] for kind, rows in marks.items()}
    every = [row for rows in marks.values() for row in rows]
    environments = list(dict.fromkeys(str(row["environment"]) for row in every))
    names = list(dict.fromkeys(str(row[label]) for row in every))[::-1]
    if not every:
        return
    size = (1.9 + 1.8 * len(environments), 1.5 + 0.27 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(environments), sharey=True, squeeze=False)[0]
    for ax, environment in zip(axes, environments, strict=True):
        for position, (kind, rows) in enumerate(marks.items()):
            color, _, marker = style.look(position)
            offset = 0.18 * (1 - 2 * position)
            for row in (row for row in rows if row["environment"] == environment):
                apart, at = row["apart"], names.index(str(row[label])) + offset
                ax.plot([apart.low, apart.high], [at, at], color=color, linewidth=1.3)
                face = color if row["told"] else "white"
                ax.plot(apart.mean, at, marker, color=color, mfc=face, ms=5)
            ax.plot([], [], marker, color=color, ms=5, label=kind)
        ax.axvline(0, color=style.MUTED, linewidth=0.9, zorder=0)
        ax.set_title(environment, fontsize=10)
        ax.locator_params(axis="x", nbins=3)
        style.finish(ax, grid="x")
    axes[0].set_yticks(range(len(names)), names)
    figure.legend(
        *axes[0].get_legend_handles_labels(), frameon=False, fontsize=9, ncols=len(marks),
        loc="outside lower center",
        title=f"{unit}; left is better; filled: told from 0, after Holm's correction",
        title_fontsize=8,
    )  # fmt: skip
    figure.savefig(file, dpi=130, metadata={"Software": None})
