"""importance([run, run, run]) -> one profile over seeds: intervals, spread, agreement of seeds."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.layers import stacks_of
from lisa_analysis.metrics.log import Measurements
from lisa_analysis.metrics.registry import METRICS, Metric, find_metric
from lisa_analysis.profiles.profile import ImportanceProfile
from lisa_analysis.profiles.seeds import Seeds, each_seed, rms
from lisa_analysis.profiles.sentences import name_rows, shape_words, standing_words
from lisa_analysis.profiles.thresholds import THRESHOLDS, Thresholds
from lisa_analysis.profiles.verdict import Judgement, judge
from lisa_analysis.rundir.configurations import (
    data_of,
    differing,
    distinct,
    labels,
    model_of,
    seeds_of,
    settings,
)
from lisa_analysis.rundir.opening import opened
from lisa_analysis.rundir.run import Run
from lisa_analysis.statistics.fit import Fit
from lisa_analysis.statistics.over_seeds import SeedMeans, seed_means
from lisa_analysis.statistics.repetitions import mean_over

Array = NDArray[np.float64]


def importance_over_seeds(
    runs: Sequence[Any],
    metric: str | Metric | Callable[[Measurements], Array] | None = None,
    *,
    by: str = "layer",
    confidence: float = 0.95,
    reference: Any = None,
    seed: int = 0,
    thresholds: Thresholds = THRESHOLDS,
) -> ImportanceProfile:
    """Profile of several seeds of one arm; see `importance`, which calls this for a list.

    Raises
    ------
    LisaError
        Without any run, or when runs differ in more than their seed, or not in their seed.
    """
    from lisa_analysis.profiles.from_run import default_metric, importance

    runs = [opened(run, "importance") for run in runs]
    if not runs:
        raise LisaError("importance takes a run or a list of seeds, got an empty list.")
    if metric is None:
        metric = default_metric(runs[0])
    check_seeds(runs)
    profiles = [
        importance(run, metric, by=by, confidence=confidence, reference=reference, seed=seed,
                   thresholds=thresholds)
        for run in runs
    ]  # fmt: skip
    if len(profiles) == 1:
        return profiles[0]
    return over_seeds_of_runs(
        runs, profiles, metric=find_metric(metric, reference), seed=seed, thresholds=thresholds
    )


def over_seeds_of_runs(
    runs: Sequence[Run],
    profiles: Sequence[ImportanceProfile],
    *,
    metric: Metric | None = None,
    seed: int = 0,
    thresholds: Thresholds = THRESHOLDS,
) -> ImportanceProfile:
    """Put the profiles of runs together that are seeds of one arm (`check_seeds` tells).

    Parameters
    ----------
    runs, profiles
        The runs, and the profile of each.
    metric
        What the profiles are by; None looks it up by the name.
    seed, thresholds
        See `over_seeds`.
    """
    if metric is None and profiles[0].metric in METRICS:
        metric = METRICS[profiles[0].metric]
    linear = metric is not None and metric.scale == "linear"
    return over_seeds(
        profiles, labels(runs), log=False if linear else None, seed=seed, thresholds=thresholds,
        beforehand=_shorter(runs),
    )  # fmt: skip


def _shorter(runs: Sequence[Run]) -> tuple[str, ...]:
    """Say which seeds have fewer steps than the longest: their scores are of those alone."""
    steps = {
        name: int(run.scalars["step"].max())
        for run, name in zip(runs, labels(runs), strict=True)
        if len(run.scalars)  # a probe makes no steps
    }
    most = max(steps.values(), default=0)
    fewer = [f"{name} has {count:,}" for name, count in steps.items() if count < most]
    if not fewer:
        return ()
    return (f"Of other lengths: {', '.join(fewer)} of the {most:,} steps that the longest has.",)


def check_seeds(runs: Sequence[Run]) -> None:
    """Refuse runs that are no seeds of one arm, saying what they differ in."""
    names = labels(runs)
    first, made = runs[0], [settings(run) for run in runs]
    for run, name, own in zip(runs[1:], names[1:], made[1:], strict=True):
        why = None
        if model_of(run) != model_of(first) or run.layer_names != first.layer_names:
            why = f"the model ({model_of(first) or 'unknown'}, {model_of(run) or 'unknown'})"
        elif data_of(run) != data_of(first):
            why = f"the data ({data_of(first) or 'unknown'}, {data_of(run) or 'unknown'})"
        elif run.method != first.method:
            why = f"the method ({first.method}, {run.method})"
        elif not own.agrees(made[0]):
            keys = differing([made[0], own]) or ["what they sampled"]
            why = ", ".join(keys[:3]) + (" …" if len(keys) > 3 else "")
        if why is not None:
            raise LisaError(
                f"{names[0]} and {name} are not seeds of one arm: they differ in {why}; give runs "
                "that differ in nothing but the seed, or put arms side by side with compare."
            )
    seen: dict[Any, str] = {}
    for run, name in zip(runs, names, strict=True):
        seeds = tuple(sorted(seeds_of(run).items()))
        key = seeds or run.path.resolve()
        if key in seen:
            raise LisaError(
                f"{seen[key]} and {name} have the same seed: one seed twice shows nothing of how "
                "seeds differ; give runs of different seeds."
            )
        seen[key] = name


def over_seeds(
    profiles: Sequence[ImportanceProfile],
    names: Sequence[str],
    *,
    log: bool | None = None,
    seed: int = 0,
    thresholds: Thresholds = THRESHOLDS,
    beforehand: Sequence[str] = (),
) -> ImportanceProfile:
    """Put profiles of the same rows, one per seed, together.

    Parameters
    ----------
    profiles
        Two or more.
    names
        What the seeds are called.
    log
        Average logarithms; None does where all scores are positive.
    seed
        Of the resampled means.
    thresholds
        Limits of the verdict.
    beforehand
        Sentences about the runs, said before what is special about single layers.
    """
    first = profiles[0]
    names = distinct(list(names))
    table = np.stack([p.scores for p in profiles])
    known = np.isfinite(table)
    zero = known.any(axis=0) & ((table == 0) | ~known).all(axis=0)
    zeros = ((table == 0) & known).sum(axis=0)
    if log is None:
        log = bool((table[known & ~zero] >= 0).all()) and bool((table[known] > 0).any())
    values = _to_average(np.where(zero, np.nan, table), log)
    rng = np.random.default_rng(seed)
    ordered = first.by == "layer"
    means = seed_means(values, log=log, confidence=first.confidence, rng=rng, ordered=ordered)
    fit = _fit(means, log, zero, zeros)
    judged = judge(
        fit, first.confidence, thresholds, steps=np.zeros(0, np.int64), period=None, rng=rng,
        stacks=stacks_of(first.layers["name"]) if ordered else (),
    )  # fmt: skip
    seeds = each_seed(profiles, names, means, log)
    special = (*beforehand, *_remarks(first, fit, means))
    return ImportanceProfile(
        metric=first.metric,
        definition=first.definition,
        sources=tuple(dict.fromkeys(source for p in profiles for source in p.sources)),
        method=first.method,
        model=first.model,
        by=first.by,
        confidence=first.confidence,
        layers=_frame(
            [p.layers for p in profiles], fit.score, fit.low, fit.high, means.seeds, log
        ).assign(
            joint_low=fit.joint_low, joint_high=fit.joint_high, standing=judged.standing.words
        ),
        outside=_outside(profiles, means, values, log),
        verdict=judged.shape.verdict,
        statement=_statement(first, fit, means, judged, seeds, special),
        concentration=judged.concentration,
        shape=judged.shape,
        stacks=judged.stacks,
        initialisation=None,
        reliability=judged.reliability,
        samples=None if fit.samples is None else np.where(zero, 0.0, fit.scale(fit.samples)),
        remarks=special,
        thresholds=thresholds,
        seeds=seeds,
        estimand="the mean over seeds of this arm",
    )


def _to_average(values: Array, log: bool) -> Array:
    """Scores on the scale on which seeds are averaged; what has no logarithm is NaN."""
    if not log:
        return values
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.log(np.where(values > 0, values, np.nan)))


def _fit(means: SeedMeans, log: bool, zero: NDArray[np.bool_], zeros: NDArray[np.int64]) -> Fit:
    """Means over seeds in the form that verdicts are made from."""
    back = np.exp if log else np.asarray
    known = np.isfinite(means.effect) & np.isfinite(means.error)
    nothing = np.full(len(known), np.nan)
    return Fit(
        score=np.where(zero, 0.0, back(means.effect)), low=back(means.low), high=back(means.high),
        effect=means.effect, samples=means.effect + means.noise if known.any() else None,
        noise=np.nan_to_num(means.noise), n_eff=means.seeds.astype(np.float64), rho=nothing,
        observations=means.seeds, within=rms(means.total),
        blocks=np.zeros((0, len(known))), length=1, halves=None, log=log, adjusted="seeds",
        zero=zero, zeros=np.where(zero, zeros, 0), joint_low=back(means.joint_low),
        joint_high=back(means.joint_high), error=means.error, degrees=means.degrees,
        departs=means.departs,
    )  # fmt: skip


def _frame(
    frames: Sequence[pd.DataFrame], score: Array, low: Array, high: Array,
    seeds: NDArray[np.int64], log: bool,
) -> pd.DataFrame:  # fmt: skip
    """Rows of the profile: counts are sums over seeds, `n_eff` is the number of seeds."""
    first = frames[0]
    start = np.stack([frame["initial"].to_numpy(dtype=np.float64) for frame in frames])
    with np.errstate(invalid="ignore", divide="ignore"):
        initial = np.exp(np.log(start).mean(axis=0)) if log else start.mean(axis=0)

    def total(column: str) -> Any:
        parts = [frame[column].astype("Int64") for frame in frames]
        return pd.concat(parts, axis=1).sum(axis=1, min_count=1).astype("Int64")

    return pd.DataFrame(
        {
            "layer": first["layer"], "name": first["name"], "score": score, "low": low,
            "high": high, "joint_low": np.nan, "joint_high": np.nan,
            "n_eff": seeds.astype(np.float64), "visits": total("visits"),
            "initial": initial, "rho": np.full(len(first), np.nan), "steps": total("steps"),
            "zeros": total("zeros"), "standing": "unknown",
        }
    )  # fmt: skip


def _outside(
    profiles: Sequence[ImportanceProfile], means: SeedMeans, values: Array, log: bool
) -> pd.DataFrame:
    """Embedding, head and norm over seeds, each beside the layers of its own seed."""
    table = np.stack([p.outside["score"].to_numpy(dtype=np.float64) for p in profiles])
    with np.errstate(invalid="ignore", divide="ignore"):
        if log:
            shared = _first_known(values - means.relative)
            relative = np.log(np.where(table > 0, table, np.nan)) - shared[:, None]
        else:
            relative = table / _first_known(values / means.relative)[:, None]
    rows = [mean_over(column, profiles[0].confidence) for column in relative.T]
    back = np.exp if log else np.asarray
    score, low, high = (
        back(np.array([getattr(row, name) for row in rows], dtype=np.float64))
        for name in ("value", "low", "high")
    )
    count = np.array([row.n for row in rows], dtype=np.int64)
    return _frame([p.outside for p in profiles], score, low, high, count, log)


def _first_known(rows: Array) -> Array:
    """What every row has in all its known places alike."""
    at = np.isfinite(rows).argmax(axis=1)
    return np.asarray(rows[np.arange(len(rows)), at])


def _remarks(first: ImportanceProfile, fit: Fit, means: SeedMeans) -> tuple[str, ...]:
    """What is special about single layers."""
    rows = list(first.layers["name"])
    return tuple(
        f"{text}: {name_rows(first.by, rows, chosen)}."
        for chosen, text in (
            (fit.zero, "Exactly 0 in every seed"),
            (means.seeds == 1, "Known from one seed only, and so without an interval"),
            (means.departs, "Other between seeds by more than the rest leads to expect"),
        )
        if chosen.any()
    )


def _statement(
    first: ImportanceProfile, fit: Fit, means: SeedMeans, judged: Judgement, seeds: Seeds,
    special: Sequence[str],
) -> str:  # fmt: skip
    """What a person should take away: estimand, layers that stand out, shape, seeds."""
    scored = [run for run in seeds.runs if seeds.scores[run].notna().any()]
    empty = [run for run in seeds.runs if run not in scored]
    but = f" ({', '.join(empty)} {'have' if len(empty) > 1 else 'has'} no score)" if empty else ""
    sentences = [
        f"Over {len(scored)} seeds{but}: intervals are for the mean over seeds of this arm "
        f"(Student's t, variances moderated over {first.by}s)."
    ]
    unknown = ~(fit.seen | fit.zero)
    if unknown.all():
        return f"No {first.by} has a score in any seed: nothing is known about {first.metric}."
    if unknown.any():
        sentences.append(
            f"Unknown in every seed: {name_rows(first.by, list(first.layers['name']), unknown)}."
        )
    sentences += special
    if fit.seen.any():
        if fit.samples is not None:
            names = list(first.layers["name"])
            sentences.append(
                standing_words(first.by, names, judged.standing, first.confidence, limit=12)
            )
        sentences.append(shape_words(judged, first.by))
    if seeds.statement:
        sentences.append(seeds.statement)
    return " ".join(sentences)
