"""Runs -> the template's context: contents of every run, key numbers, comparison, definitions."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lisa_analysis.contract.schema import METRICS_TABLE, SCALARS_TABLE, SCHEMA_VERSION
from lisa_analysis.runs.comparison import Comparison
from lisa_analysis.runs.losses import score_columns
from lisa_analysis.runs.words import headline
from lisa_analysis.views.analysis import Analysis
from lisa_analysis.views.html_report import figures
from lisa_analysis.views.html_report.comparing import (
    arms_table,
    comparison_figures,
    profiles_figure,
)
from lisa_analysis.views.html_report.content import (
    METHODS,
    STATES,
    RunContent,
    gather,
    mapping,
    reproduction,
    troubles,
)
from lisa_analysis.views.html_report.figure import Budget, ReportFigure
from lisa_analysis.views.html_report.format import count, loss, seconds, size, with_bounds
from lisa_analysis.views.html_report.tables import Table, frame_table
from lisa_analysis.views.html_report.worth import validity_figures
from lisa_analysis.views.next_steps import next_step

# Words of the table of profiles, explained below it.
TERMS = (
    (
        "spread, 1 + CV²",
        "of the layer scores (`headroom` in the data): what a draw in proportion to them collects "
        "over a uniform one, in score; no promise of a lower loss",
    ),
    (
        "ends / middle",
        "mean of the first and last eighth of the layers over the median of the middle half",
    ),
    (
        "effective layers",
        "how many layers would share the score evenly, were it as concentrated as it is",
    ),
    ("Gini", "0 where all layers score alike, near 1 where one has it all"),
)


def assemble(analysis: Analysis, probabilities: Any, title: str | None) -> dict[str, Any]:
    """Gather everything that the page shows; see `lisa_analysis.views.html_report.report`."""
    budget = Budget.for_runs(len(analysis.runs))
    contents = [gather(one, i, budget, alone=analysis.alone) for i, one in enumerate(analysis.runs)]
    comparison = analysis.comparison
    found = analysis.validity
    learned = None
    if probabilities is not None:
        learned = figures.probabilities_figure(
            "probabilities", probabilities, tuple(probabilities.layer_names)
        )
    return {
        "title": title or _title(contents),
        "runs": contents,
        "states": STATES,
        "troubles": troubles(contents),
        "key_numbers": _key_numbers(analysis),
        "profile_numbers": _profile_numbers(contents),
        "probabilities": learned,
        "strengths": _strengths(analysis, probabilities),
        "validity_figures": [] if found is None else validity_figures(found),
        "validity_sentence": "" if found is None else found.sentence,
        "comparison": comparison,
        "headline": _headline(contents, comparison),
        "hero": _hero(analysis, contents),
        "next_step": next_step(analysis),
        "facts": _facts(analysis, contents),
        "terms": TERMS,
        "comparison_figures": comparison_figures(contents, comparison, budget),
        "arms": arms_table(comparison),
        "over_seeds": None if analysis.alone else analysis.profile,
        "definitions": _definitions(contents),
        "limits": _limits(contents),
        "reproduction": [(content, reproduction(content.run)) for content in contents],
        "schema_version": SCHEMA_VERSION,
    }


def _headline(contents: Sequence[RunContent], comparison: Comparison | None) -> str:
    """The answer in a sentence."""
    return contents[0].headline if comparison is None else headline(comparison)


def _hero(analysis: Analysis, contents: Sequence[RunContent]) -> ReportFigure | None:
    """The one figure of the first screen: the profiles of all runs, with intervals."""
    if not analysis.alone:
        return profiles_figure(analysis)
    return contents[0].profile_figures[0] if contents[0].profile_figures else None


def _facts(analysis: Analysis, contents: Sequence[RunContent]) -> list[tuple[str, Any]]:
    """Who, what and where; of several runs what they share, and how many there are."""
    if analysis.alone or analysis.comparison is None:
        return contents[0].facts
    runs = [content.run for content in contents]
    arms = len(analysis.comparison.arms)
    rows = [
        ("model", _some(one.model for one in analysis.runs)),
        ("data", _some(one.data for one in analysis.runs)),
        ("methods", _some(METHODS.get(run.method, str(run.method)) for run in runs)),
        ("runs", f"{len(runs)} in {arms} arm{'s' * (arms > 1)}"),
        ("layers", _some(str(run.n_layers) for run in runs)),
    ]
    return [(name, value) for name, value in rows if value]


def _some(names: Iterable[str], most: int = 3) -> str:
    """Different names, the first few of them."""
    found = [name for name in dict.fromkeys(names) if name]
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" * (len(found) > most))


def _strengths(analysis: Analysis, probabilities: Any) -> ReportFigure | None:
    """What other strengths would give; None of a profile that decides nothing."""
    found = analysis.plan.strengths(analysis.profile, probabilities)
    if found is None:
        return None
    names = tuple(probabilities.layer_names)
    return figures.strengths_figure("strengths", found, probabilities, names)


def _title(contents: Sequence[RunContent]) -> str:
    if len(contents) > 1:
        return f"{len(contents)} runs compared"
    [content] = contents
    model = mapping(content.run.manifest, "model").get("name")
    method = METHODS.get(content.run.method, content.run.method)
    return f"{Path(str(model)).name}, {method}" if model else content.name


def _key_numbers(analysis: Analysis) -> Table:
    columns: list[Any] = [("run", "run")]
    columns += [] if analysis.alone else [("arm", "arm, by what differs")]
    columns += [
        ("method", "method", lambda value: METHODS.get(value, str(value))),
        ("status", "status"),
        ("steps", "steps", count),
        ("tokens", "tokens", count),
        ("held_out_loss", "held-out loss", loss),
    ]
    scores = score_columns(analysis.numbers)
    columns += [(name, name.replace("_", " "), loss) for name in scores]
    if not analysis.alone:
        columns.append(("loss_at_equal_steps", "at equal steps", loss))
    columns += [("seconds", "time", seconds), ("peak_memory_bytes", "peak memory", size)]
    return frame_table("Key numbers, one row per run", analysis.numbers, columns)


def _profile_numbers(contents: Sequence[RunContent]) -> Table | None:
    """How unequal the layers are; each figure with its interval."""
    fields = [
        ("headroom", "spread, 1 + CV²"),
        ("ends_to_middle", "ends / middle"),
        ("effective_layers", "effective layers"),
        ("gini", "Gini"),
    ]
    rows = []
    for content in contents:
        if content.profile is None:
            continue
        measures = {name: getattr(content.profile.concentration, name) for name, _ in fields}
        rows.append({"run": content.name, "verdict": content.profile.verdict, **measures})
    if not rows:
        return None
    columns: list[Any] = [("run", "run"), ("verdict", "shape")]
    columns += [(name, heading, with_bounds) for name, heading in fields]
    return frame_table("How unequal the layers are", pd.DataFrame(rows), columns)


def _limits(contents: Sequence[RunContent]) -> list[tuple[str, str]]:
    """(runs, sentence): every sentence once, with the runs that it is about unless it is all."""
    about: dict[str, list[str]] = {}
    for content in contents:
        for sentence in content.limits:
            about.setdefault(sentence, []).append(content.name)
    return [
        ("" if len(names) == len(contents) else ", ".join(names), sentence)
        for sentence, names in about.items()
    ]


def _definitions(contents: Sequence[RunContent]) -> list[tuple[str, str]]:
    """What every word in the page means, in the words of the schema and of the metrics."""
    profiles = [content.profile for content in contents if content.profile is not None]
    found = {profile.metric: profile.definition for profile in profiles}
    for column in METRICS_TABLE.columns:
        if any(column.name in content.recorded for content in contents):
            found.setdefault(column.name, column.meaning)
    for name in ("loss", "learning_rate", "clip_coef", "peak_memory_bytes"):
        found[name] = SCALARS_TABLE[name].meaning
    return list((found | dict(TERMS)).items())
