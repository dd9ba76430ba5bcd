"""compare(runs) -> Comparison: outcome at equal cost, arms and their differences, agreement."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from itertools import combinations
from typing import Any

import pandas as pd

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.metrics.registry import METRICS, find_metric, metric_name
from lisa_analysis.profiles.agreement import Agreement, agree, concordance, shares
from lisa_analysis.profiles.from_run import check_confidence, default_metric, importance
from lisa_analysis.profiles.profile import ImportanceProfile
from lisa_analysis.rundir.configurations import labels, settings
from lisa_analysis.rundir.opening import opened
from lisa_analysis.rundir.run import Run
from lisa_analysis.runs.arms import (
    Arm,
    arm_table,
    difference_table,
    find_arms,
    given_arms,
)
from lisa_analysis.runs.comparison import Comparison
from lisa_analysis.runs.losses import RunSummary
from lisa_analysis.runs.losses import table as table_of
from lisa_analysis.runs.words import comparison_words, missing_words


def compare(
    runs: Sequence[Any] | Mapping[str, Sequence[Any]],
    metric: Any = None,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    profiles: Sequence[ImportanceProfile | None] | None = None,
) -> Comparison:
    """Put runs side by side, the seeds of an arm together.

    Parameters
    ----------
    runs
        Run directories, opened with `load` or as paths, any number; layers are aligned by name.
        A mapping from a name to a list of runs says which of them are one arm.
    metric
        Importance metric whose profiles are compared: an id or a callable, see `importance`; None
        for that of the given profiles, or the default of the first run.
    confidence, seed
        Of the intervals and their bootstrap.
    profiles
        The profiles of the runs where they are known already, in their order, all of one metric;
        None for a run without one.

    Returns
    -------
    Comparison
        Without names, runs are one arm when their settings differ in seeds and folders alone and
        they sampled by the same probabilities (compared by content; the seeds of a permuted
        control have different orders and are one arm). Runs that did not record the metric, or
        have other layers, take no part in the agreement of profiles and keep their row in the
        table; where the metric was named, the statement says which did not record it.

    Raises
    ------
    LisaError
        Without any run, for an arm without any, or for a run in two arms; for a metric that was
        named and that no run gives, and for profiles that are not of one metric, or not of the
        one that was named.
    """
    runs, named = _runs(runs)
    check_confidence(confidence)
    names = labels(runs)
    if profiles is None:
        scored_by, known, without = _measured(runs, names, metric, confidence, seed)
    else:
        scored_by, known, without = *_given(runs, names, metric, profiles), ""
    summaries = [RunSummary.of(run, label) for run, label in zip(runs, names, strict=True)]
    table = table_of(summaries)
    made = [settings(run) for run in runs]
    arms = find_arms(runs, made) if named is None else given_arms(named, made)
    pairs = pd.DataFrame(
        [
            {"run_a": a, "run_b": b}
            | asdict(agree(known[a], known[b], confidence=confidence, seed=seed))
            for a, b in combinations(known, 2)
        ],
        columns=["run_a", "run_b", *(f.name for f in fields(Agreement))],
    )
    table.insert(1, "arm", _arm_of(arms, len(runs)))
    side_by_side = arm_table(arms, runs, table, pairs, confidence)
    differences = difference_table(arms, runs, table, confidence)
    curves = pd.concat([s.curve for s in summaries], ignore_index=True)
    words = comparison_words(runs, arms, table, side_by_side, differences, pairs, curves, without)
    return Comparison(
        metric=scored_by,
        table=table,
        arms=side_by_side,
        differences=differences,
        profiles=shares(known),
        rank_agreement=pairs,
        concordance=concordance(list(known.values())),
        curves=curves,
        statement=words,
    )


def _runs(given: Any) -> tuple[list[Run], dict[str, list[int]] | None]:
    """Open the runs; positions by arm where arms are named."""
    if isinstance(given, Mapping) and all(_listed(group) for group in given.values()):
        runs: list[Run] = []
        named: dict[str, list[int]] = {}
        for name, group in given.items():
            members = [opened(run, "compare") for run in group]
            if not members:
                raise LisaError(f"arm {name!r} has no run: give it one at least.")
            named[str(name)] = list(range(len(runs), len(runs) + len(members)))
            runs += members
        _once(runs, named)
        if runs:
            return runs, named
    elif _listed(given):
        runs = [opened(run, "compare") for run in given]
        if runs:
            return runs, None
    else:
        raise LisaError(
            "compare takes a list of runs, or a mapping from a name to the list of its runs, got "
            f"a {type(given).__name__}{' of other things' if isinstance(given, Mapping) else ''}."
        )
    raise LisaError("compare needs at least one run, got none.")


def _listed(given: Any) -> bool:
    if isinstance(given, str | os.PathLike | Mapping | Run):
        return False
    return isinstance(given, Iterable)


def _once(runs: Sequence[Run], named: Mapping[str, Sequence[int]]) -> None:
    """Refuse a run directory that stands in the arms twice."""
    seen: dict[Any, str] = {}
    for name, positions in named.items():
        for i in positions:
            path = runs[i].path.resolve()
            if path in seen:
                where = f"arms {seen[path]!r} and {name!r}" if seen[path] != name else f"{name!r}"
                raise LisaError(
                    f"run {runs[i].path.name} stands twice in {where}: give every run once."
                )
            seen[path] = name


def _arm_of(arms: Sequence[Arm], count: int) -> list[str]:
    names = [""] * count
    for arm in arms:
        for i in arm.runs:
            names[i] = arm.name
    return names


def _measured(
    runs: Sequence[Run], names: Sequence[str], asked: Any, confidence: float, seed: int
) -> tuple[str, dict[str, ImportanceProfile], str]:
    """Name of the metric, profiles by run, and which runs lack the one that was asked for."""
    metric = default_metric(runs[0]) if asked is None else asked
    chosen = METRICS[metric] if isinstance(metric, str) else find_metric(metric)
    known, missing = {}, {}
    for name, run in zip(names, runs, strict=True):
        try:
            known[name] = importance(run, chosen, confidence=confidence, seed=seed)
        except LisaError as error:  # the run keeps its row
            missing[name] = error
    if asked is None:
        return chosen.id, known, ""
    if not known:
        first = next(iter(missing.values()))
        if len(runs) == 1:
            raise first
        raise LisaError(f"no run has a profile of {chosen.id}: {first}")
    return chosen.id, known, missing_words(chosen.id, missing)


def _given(
    runs: Sequence[Run],
    names: Sequence[str],
    asked: Any,
    profiles: Sequence[ImportanceProfile | None],
) -> tuple[str, dict[str, ImportanceProfile]]:
    """Name of the metric of given profiles, and these by run; refuse those of any other."""
    if len(profiles) != len(names):
        raise LisaError(
            f"profiles are {len(profiles)} for {len(names)} runs: expected one of each, None "
            "for a run without one."
        )
    known = {name: p for name, p in zip(names, profiles, strict=True) if p is not None}
    found = list(dict.fromkeys(p.metric for p in known.values()))
    if len(found) > 1:
        raise LisaError(f"profiles are of {' and '.join(found)}: expected those of one metric.")
    if asked is not None and found not in ([], [metric_name(asked)]):
        raise LisaError(
            f"profiles are of {found[0]}, and the metric is {metric_name(asked)}: expected the "
            "same one; leave metric= or profiles= out."
        )
    return (found or [metric_name(default_metric(runs[0]) if asked is None else asked)])[0], known
