"""Figures and tables of the report that put several runs side by side."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lisa_analysis import plots
from lisa_analysis.profiles.agreement import agreement_square
from lisa_analysis.profiles.profile import ImportanceProfile
from lisa_analysis.runs.comparison import Comparison
from lisa_analysis.runs.curves import QUANTITIES, group_series
from lisa_analysis.views.analysis import Analysis
from lisa_analysis.views.html_report import readout, svg
from lisa_analysis.views.html_report.content import METHODS, RunContent
from lisa_analysis.views.html_report.figure import (
    WIDE,
    Budget,
    ReportFigure,
    canvas,
    extremes,
    short_label,
    thinned,
)
from lisa_analysis.views.html_report.figures import panels, whiskers
from lisa_analysis.views.html_report.format import correlation, count, loss, signed
from lisa_analysis.views.html_report.tables import Table, frame_table, series_table
from lisa_analysis.views.plots import style

_MOST_PAIRS, _MOST_PANELS = 12, 18


def comparison_figures(
    contents: Sequence[RunContent],
    comparison: Comparison | None,
    budget: Budget,
) -> list[ReportFigure]:
    """Differences, losses, gradient norms and agreement of profiles; nothing for a run alone."""
    if comparison is None:
        return []
    grouped = {name: [contents[i].run for i in at] for name, at in groups(comparison).items()}
    found: list[ReportFigure | None] = [
        differences_figure("all-differences", comparison),
        comparison_figure("all-held-out", grouped, "loss", budget, held_out=True),
        comparison_figure("all-loss", grouped, "loss", budget),
        comparison_figure("all-grad", grouped, "grad_norm", budget),
        agreement_figure("all-agreement", comparison.rank_agreement),
    ]
    return [figure for figure in found if figure is not None]


def differences_figure(slug: str, comparison: Comparison) -> ReportFigure | None:
    """Paired differences between arms; None where no two have a loss at equal steps."""
    known = comparison.differences.dropna(subset=["mean"])
    if known.empty:
        return None
    called = dict(zip(comparison.arms["arm"], groups(comparison), strict=True))
    known = known.head(_MOST_PAIRS).assign(a=known["a"].map(called), b=known["b"].map(called))
    title = "Differences in held-out loss between arms"
    with svg.ink(slug):
        ax = canvas(WIDE, 0.85 + 0.28 * max(len(known), 2), left=3.2, top=0.1)
        plots.differences(known, ax=ax)
        image = svg.to_svg(ax, slug, title, extremes("Marks with intervals.", known["mean"]))
        spoken = readout.points(
            readout.places(ax, known["mean"], range(len(known))[::-1]),
            [_difference_words(row) for row in known.to_dict("records")],
        )
    caption = (
        "Left of the line the first arm has the lower loss at equal steps. Paired where both have "
        "runs of one seed. Filled: the interval over seeds is without zero; open: seeds may "
        "explain it; without whiskers: too few seeds, so that nothing is shown."
    )
    return ReportFigure(slug, title, caption, image, _differences(known), readout=spoken)


def _difference_words(row: Mapping[Any, Any]) -> str:
    text = f"{row['a']} − {row['b']}: {signed(row['mean'])}"
    if row["low"] != row["low"]:
        return f"{text}, no interval"
    how = f"{row['pairs']} pairs of one seed" if row["pairs"] else "not paired"
    return f"{text} ({signed(row['low'])} to {signed(row['high'])}), {how}"


def profiles_figure(analysis: Analysis) -> ReportFigure | None:
    """The profiles of all arms with their intervals: the first screen of several runs."""
    profiles = {name: p for name, p in analysis.arm_profiles.items() if np.isfinite(p.scores).any()}
    if not profiles:
        return None
    shown = dict(list(profiles.items())[:_MOST_PANELS])
    rest = len(profiles) - len(shown)
    metrics = ", ".join(dict.fromkeys(p.metric for p in shown.values()))
    alone = analysis.profile if len(shown) == 1 else None
    seeds = "" if alone is None or alone.seeds is None else len(alone.seeds.runs)
    # An ablation of any of them that does not bear its profile out takes the word from all.
    denied = any(one.profile is not None and one.profile.agrees_with_ablation is False
                 for one in analysis.runs)  # fmt: skip
    what = "Score" if denied else "Importance"
    title = f"{what} of each layer{f' over {seeds} seeds' if seeds else ''}: {metrics}"
    over = any(p.seeds is not None for p in shown.values())
    caption = whiskers(next(iter(shown.values())).confidence)
    if over:
        caption += " Of several runs: for the mean over seeds."
    if rest:
        caption += f" {rest} more arms are in the table."
    names = {tuple(p.layers["name"]) for p in shown.values()}
    text = f"{len(shown)} bar charts on shared axes."
    figure = ReportFigure("all-profiles", title, caption, None, _profiles_table(title, profiles))
    return panels(figure, shown, text, names.pop() if len(names) == 1 else ())


def _profiles_table(title: str, profiles: Mapping[str, ImportanceProfile]) -> Table:
    """Every layer of every arm."""
    frames = [p.to_frame().assign(arm=name) for name, p in profiles.items()]
    frame = pd.concat([f.dropna(axis=1, how="all") for f in frames], ignore_index=True)
    return frame_table(
        title,
        frame,
        [("arm", "arm"), ("layer", "layer"), ("name", "name"), ("score", "score"),
         ("low", "low"), ("high", "high"), ("joint_low", "low, all at once"),
         ("joint_high", "high, all at once"), ("standing", "stands")],
        layer="layer",
    )  # fmt: skip


def groups(comparison: Comparison) -> dict[str, list[int]]:
    """Positions of the runs of each arm, under a name that people recognise.

    An arm that was repeated is called as in ``Comparison.arms``, one that was not by its run. The
    order is that of ``Comparison.arms``.
    """
    table = comparison.table.reset_index(drop=True)
    found = {}
    for arm, rows in table.groupby("arm", sort=False):
        name = METHODS.get(str(arm), str(arm)) if len(rows) > 1 else rows["run"].iloc[0]
        found[str(name)] = rows.index.tolist()
    return found


def arms_table(comparison: Comparison | None) -> Table | None:
    """Repetitions of one arm together; None when nothing was repeated."""
    if comparison is None or comparison.arms["runs"].max() < 2:
        return None
    return frame_table(
        "Arms: runs that differ in nothing but the seed, with an interval over seeds from three on",
        comparison.arms.assign(arm=list(groups(comparison))),
        [
            ("arm", "arm"),
            ("runs", "runs", count),
            ("seeds", "seeds", count),
            ("mean", "held-out loss at equal steps", loss),
            ("low", "low", loss),
            ("high", "high", loss),
            ("kendall", "agreement of rankings (τ)", correlation),
        ],
    )


def _differences(frame: pd.DataFrame) -> Table:
    return frame_table(
        "Differences in held-out loss between arms, a less b; paired where seeds are the same",
        frame,
        [
            ("a", "a"),
            ("b", "b"),
            ("mean", "a − b", signed),
            ("low", "low", signed),
            ("high", "high", signed),
            ("pairs", "pairs of one seed", count),
        ],
    )


def comparison_figure(
    slug: str,
    groups: Mapping[str, Sequence[Any]],
    quantity: str,
    budget: Budget,
    *,
    held_out: bool = False,
) -> ReportFigure | None:
    """One quantity of all runs, repetitions together; None when no run logged it."""
    named = []
    for name, members in groups.items():
        series = group_series(members, quantity, held_out=held_out, most=budget.points)
        if len(series):
            named.append((name, series))
    if not named:
        return None
    name = "held-out loss" if held_out else QUANTITIES[quantity]
    title = f"{name[:1].upper()}{name[1:]} of all runs"
    with svg.ink(slug):
        ax = canvas(WIDE, 3.2, top=_legend_room(len(groups)))
        plots.comparison(groups, quantity, held_out=held_out, ax=ax, most=budget.points)
        short_label(ax)
        image = svg.to_svg(ax, slug, title, f"Line chart of {len(named)} groups of runs.")
    caption = "One line per arm: mean over its runs; the band is the range of its seeds."
    caption += thinned(max(series.group for _, series in named), "point")
    table, spoken = series_table(title, named), readout.of_series(ax, named)
    return ReportFigure(slug, title, caption, image, table, readout=spoken)


def _legend_room(entries: int) -> float:
    """Inches above the axes that a legend of so many entries takes."""
    return 0.2 + 0.17 * math.ceil(entries / style.LEGEND_COLUMNS)


def agreement_figure(slug: str, pairs: pd.DataFrame) -> ReportFigure | None:
    """Rank agreement of the profiles; None when no two runs can be compared."""
    if pairs.empty or not pairs["kendall"].notna().any():
        return None
    title = "Do the runs rank the layers alike?"
    square = agreement_square(pairs)
    size = len(square)
    with svg.ink(slug):
        ax = style.axes_or_new(None, (min(WIDE, 3.6 + 0.5 * size), 1.6 + 0.42 * size))
        plots.rank_stability(square, ax=ax)
        image = svg.to_svg(ax, slug, title, f"Colour map of {size} by {size} runs.")
        names = [str(name) for name in square.index]
        spoken = readout.cells(ax, names, names, square.to_numpy(dtype=float))
    table = frame_table(
        title,
        pairs,
        [
            ("run_a", "run"),
            ("run_b", "and run"),
            ("kendall", "τ as measured"),
            ("kendall_low", "low"),
            ("kendall_high", "high"),
            ("agreement", "τ without noise"),
            ("agreement_low", "low"),
            ("agreement_high", "high"),
            ("spearman", "Spearman"),
            ("top_overlap", "top quarter in common"),
            ("divergence", "divergence"),
            ("noise_floor", "divergence of noise"),
        ],
    )
    caption = (
        "Kendall's τ between the layer scores as they were measured: 1 same order, 0 unrelated, −1 "
        "reversed. Noise lowers it; the table has τ with the noise within the runs taken off."
    )
    return ReportFigure(slug, title, caption, image, table, readout=spoken)
