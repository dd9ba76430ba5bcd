"""Figures and tables of the report that put several runs side by side."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from lisa_analysis import plots
from lisa_analysis.profiles.agreement import agreement_square
from lisa_analysis.profiles.profile import ImportanceProfile
from lisa_analysis.profiles.relative import relative_scores
from lisa_analysis.runs.comparison import Comparison
from lisa_analysis.runs.curves import QUANTITIES, group_series
from lisa_analysis.views.plots import style
from lisa_analysis.views.report import svg
from lisa_analysis.views.report.content import METHODS, RunContent
from lisa_analysis.views.report.figure import (
    WIDE,
    Budget,
    ReportFigure,
    canvas,
    short_label,
    thinned,
)
from lisa_analysis.views.report.figures import profile_figure
from lisa_analysis.views.report.format import correlation, count, loss, signed
from lisa_analysis.views.report.tables import Table, frame_table, series_table


def comparison_figures(
    contents: Sequence[RunContent],
    comparison: Comparison | None,
    budget: Budget,
) -> list[ReportFigure]:
    """Loss, gradient norm, profiles and their agreement; nothing for a run alone."""
    if comparison is None:
        return []
    grouped = {name: [contents[i].run for i in at] for name, at in groups(comparison).items()}
    found: list[ReportFigure | None] = [
        comparison_figure("all-held-out", grouped, "loss", budget, held_out=True),
        comparison_figure("all-loss", grouped, "loss", budget),
        comparison_figure("all-grad", grouped, "grad_norm", budget),
    ]
    found.append(profiles_figure("all-profiles", _grouped_profiles(contents, comparison)))
    found.append(agreement_figure("all-agreement", comparison.rank_agreement))
    return [figure for figure in found if figure is not None]


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


def differences_table(comparison: Comparison | None) -> Table | None:
    """Differences between arms; None where no pair of arms has an interval."""
    if comparison is None or not comparison.differences["low"].notna().any():
        return None
    return frame_table(
        "Differences in held-out loss between arms, a less b; paired where seeds are the same",
        comparison.differences,
        [
            ("a", "a"),
            ("b", "b"),
            ("mean", "a − b", signed),
            ("low", "low", signed),
            ("high", "high", signed),
            ("pairs", "pairs of one seed", count),
        ],
    )


def seeds_figure(profile: ImportanceProfile | None) -> ReportFigure | None:
    """The profile over seeds with its intervals; None where runs are not seeds of one arm."""
    if profile is None or profile.seeds is None:
        return None
    figure = profile_figure("over-seeds", profile, tuple(profile.layers["name"]))
    return replace(
        figure,
        title=f"Importance of each layer over {len(profile.seeds.runs)} seeds: {profile.metric}",
        caption=f"{profile.definition} Whiskers are {100 * profile.confidence:g} % intervals for "
        "the mean over seeds.",
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
    return ReportFigure(slug, title, caption, image, series_table(title, named))


def _grouped_profiles(
    contents: Sequence[RunContent], comparison: Comparison
) -> dict[str, dict[str, ImportanceProfile]]:
    """Profiles of each arm by run; one of another depth than its group's goes alone."""
    found: dict[str, dict[str, ImportanceProfile]] = {}
    for name, at in groups(comparison).items():
        depth = None
        for content in (contents[i] for i in at):
            if content.profile is not None:
                depth = depth or content.profile.n_layers
                group = name if content.profile.n_layers == depth else content.name
                found.setdefault(group, {})[content.name] = content.profile
    return found


def profiles_figure(
    slug: str, profiles: Mapping[str, Mapping[str, ImportanceProfile]]
) -> ReportFigure | None:
    """Profiles over their own means, repetitions together; None when there is nothing to compare.

    One profile would be compared with nothing.
    """
    members = {run: p for group in profiles.values() for run, p in group.items()}
    if len(members) < 2:
        return None
    title = "Profiles side by side"
    metrics = ", ".join(sorted({str(p.metric) for p in members.values()}))
    with svg.ink(slug):
        ax = canvas(WIDE, 3.4, top=_legend_room(len(profiles)))
        plots.profiles({name: list(group.values()) for name, group in profiles.items()}, ax=ax)
        image = svg.to_svg(ax, slug, title, f"Line chart of {len(members)} profiles.")
    columns = {
        run: relative_scores(profile).set_index("layer")["relative"]
        for run, profile in members.items()
    }
    frame = pd.DataFrame(columns).rename_axis("layer").reset_index()
    caption = (
        f"{metrics[:1].upper()}{metrics[1:]} over the mean of the layers (dashed). One line per "
        "arm: mean over its runs; the band is the range of its seeds."
    )
    table = frame_table(title, frame, [(str(c), str(c)) for c in frame], layer="layer")
    return ReportFigure(slug, title, caption, image, table)


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
    return ReportFigure(slug, title, caption, image, table)
