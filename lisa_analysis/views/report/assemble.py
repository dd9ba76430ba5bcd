"""Runs -> the template's context: contents of every run, key numbers, comparison, definitions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.schema import METRICS_TABLE, SCALARS_TABLE, SCHEMA_VERSION
from lisa_analysis.metrics.step_table import step_table
from lisa_analysis.profiles.from_run import DEFAULT_METRIC
from lisa_analysis.rundir.run import load
from lisa_analysis.runs import losses
from lisa_analysis.runs.compare import Comparison, compare
from lisa_analysis.runs.configurations import labels
from lisa_analysis.views.report import figures
from lisa_analysis.views.report.comparing import comparison_figures, seeds_table
from lisa_analysis.views.report.content import (
    METHODS,
    STATES,
    RunContent,
    gather,
    mapping,
    reproduction,
    troubles,
)
from lisa_analysis.views.report.figures import Budget
from lisa_analysis.views.report.format import count, interval, loss, seconds, size
from lisa_analysis.views.report.tables import Table, frame_table


def assemble(
    runs: Sequence[Any], metric: Any, probabilities: Any, title: str | None
) -> dict[str, Any]:
    """Gather everything that the page shows; see `lisa_analysis.views.report.report`."""
    runs = [load(run) if isinstance(run, str | Path) else run for run in runs]
    if not runs:
        raise LisaError("report needs at least one run, got none: give a run directory.")
    budget = Budget.for_runs(len(runs))
    alone = len(runs) == 1
    names = labels(runs)
    contents = [
        gather(run, i, name, metric, budget, alone=alone)
        for i, (run, name) in enumerate(zip(runs, names, strict=True))
    ]
    comparison = None if alone else compare(runs, metric or DEFAULT_METRIC)
    learned = None
    if probabilities is not None:
        learned = figures.probabilities_figure(
            "probabilities", probabilities, tuple(probabilities.layer_names)
        )
    return {
        "title": title or _title(runs, names),
        "runs": contents,
        "states": STATES,
        "troubles": troubles(contents),
        "key_numbers": _key_numbers(runs, names, comparison),
        "profile_numbers": _profile_numbers(contents),
        "probabilities": learned,
        "comparison": comparison,
        "comparison_figures": comparison_figures(runs, contents, comparison, budget),
        "seeds": seeds_table(comparison),
        "definitions": _definitions(contents),
        "limits": _limits(contents),
        "reproduction": [(content, reproduction(content.run)) for content in contents],
        "schema_version": SCHEMA_VERSION,
    }


def _title(runs: Sequence[Any], names: Sequence[str]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs compared"
    model = mapping(runs[0].manifest, "model").get("name")
    method = METHODS.get(runs[0].method, runs[0].method)
    return f"{Path(str(model)).name}, {method}" if model else names[0]


def _key_numbers(runs: Sequence[Any], names: Sequence[str], comparison: Comparison | None) -> Table:
    if comparison is None:
        frame = losses.table([losses.RunSummary.of(runs[0], names[0])])
    else:
        frame = comparison.to_frame()
    columns: list[Any] = [
        ("run", "run"),
        ("method", "method", lambda value: METHODS.get(value, str(value))),
        ("status", "status"),
        ("steps", "steps", count),
        ("tokens", "tokens", count),
        ("held_out_loss", "held-out loss", loss),
    ]
    if comparison is not None:
        columns.append(("loss_at_equal_steps", "at equal steps", loss))
    columns += [("seconds", "time", seconds), ("peak_memory_bytes", "peak memory", size)]
    return frame_table("Key numbers, one row per run", frame, columns)


def _profile_numbers(contents: Sequence[RunContent]) -> Table | None:
    """How unequal the layers are; each figure with its interval."""
    fields = [
        ("headroom", "headroom"),
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
    columns += [(name, heading, interval) for name, heading in fields]
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
    tables = [step_table(content.run) for content in contents]
    for column in METRICS_TABLE.columns:
        if any(column.name in table for table in tables):
            found.setdefault(column.name, column.meaning)
    for name in ("loss", "learning_rate", "clip_coef", "peak_memory_bytes"):
        found[name] = SCALARS_TABLE[name].meaning
    found["headroom"] = (
        "1 + CV² of the layer scores: the most that sampling in proportion to them can gain over "
        "uniform sampling, as a ratio of gradient variances"
    )
    found["ends / middle"] = (
        "mean of the first and last eighth of the layers over the median of the middle half"
    )
    return list(found.items())
