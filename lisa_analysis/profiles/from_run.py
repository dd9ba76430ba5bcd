"""importance(run, metric) -> ImportanceProfile: scores, intervals, verdict, and step 0."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.metrics.log import Measurements, measurements
from lisa_analysis.metrics.registry import Metric, find_metric
from lisa_analysis.metrics.step_tables import Grouping
from lisa_analysis.profiles import ablated, of_weights
from lisa_analysis.profiles.cost import cadence, cost_words
from lisa_analysis.profiles.initialisation import compare_with_start, initial_scores
from lisa_analysis.profiles.metric_fit import evaluate, fit_groups, stacks_in
from lisa_analysis.profiles.parts import Initialisation
from lisa_analysis.profiles.profile import ImportanceProfile
from lisa_analysis.profiles.sentences import remarks, statement
from lisa_analysis.profiles.thresholds import THRESHOLDS, Thresholds
from lisa_analysis.profiles.verdict import Judgement, judge
from lisa_analysis.rundir.logs.others_log import ATTACH
from lisa_analysis.rundir.opening import RunLike, opened
from lisa_analysis.rundir.parts import parts_of
from lisa_analysis.rundir.run import Run
from lisa_analysis.rundir.weights.plain import PlainWeights
from lisa_analysis.statistics.fit import Fit
from lisa_analysis.statistics.persistence import MIN_ROWS

Array = NDArray[np.float64]

# Under Adam every layer moves by about the learning rate, so update norms say little about layers.
DEFAULT_METRIC = "grad_rms"


def default_metric(run: Run) -> str:
    """Metric that a run is profiled by unless another one is asked for."""
    if isinstance(run, PlainWeights):
        return run.default_metric
    return "grad_signal" if run.is_probe else DEFAULT_METRIC


def importance(
    run: RunLike | Sequence[RunLike],
    metric: str | Metric | Callable[[Measurements], Array] | None = None,
    *,
    by: str = "layer",
    confidence: float = 0.95,
    reference: RunLike | None = None,
    seed: int = 0,
    thresholds: Thresholds = THRESHOLDS,
) -> ImportanceProfile:
    """Score every layer of a run and say what the scores are worth.

    Parameters
    ----------
    run
        A run directory opened with `load`, or its path; or a list of them that differ in nothing
        but the seed, whose profile is over seeds (`ImportanceProfile.seeds` shows each).
    metric
        Id of a metric in `lisa_analysis.METRICS`, or a callable that takes `Measurements` and
        returns values of shape (recorded steps, groups), NaN where a group was not observed. Its
        attributes `id`, `definition`, `scale` and so on are used where it has them; a plain
        function goes by its name, the first line of its docstring, and ``log``. None takes
        ``grad_rms``, of a probe ``grad_signal``.
    by
        ``layer``, ``kind`` (attn.q … mlp.down over the whole stack), ``module`` (a kind within
        a layer) or ``tensor``.
    confidence
        Coverage of the intervals.
    reference
        The full fine-tuning run, for the two metrics that compare a LoRA run with one; refused
        for any other.
    seed
        Of the bootstrap; the same run gives the same profile.
    thresholds
        Limits of intervals and verdict.

    Returns
    -------
    ImportanceProfile
        Layers are judged on the steps in which they trained; a layer never trained is NaN, one
        that was exactly zero whenever it was observed has the score 0 and no interval. With
        LISA the layers are compared with those active at the same steps, and whole activation
        intervals are resampled.

    Raises
    ------
    LisaError
        When the metric is unknown, the run did not record what it needs, or several runs are not
        seeds of one arm.

    Notes
    -----
    Intervals are those of a layer relative to the others: what all layers share at a step
    (learning rate, difficulty of the batch) is removed, from logarithms as a mean, from linear
    metrics as a size. They are Student's t with one memory from step to step that all layers share
    (periods for LISA, batches for a probe) and variances moderated over layers; the
    joint band is the max-t of bootstrap samples with layers kept together. A layer below
    `Thresholds.min_effective` effective observations is unknown, and silences no other. A logarithm
    has no zero: single steps at which a layer was exactly zero are left out, and the statement
    says so. See docs/statistics.md.
    """
    check_confidence(confidence)
    _check_seed(seed)
    if not isinstance(thresholds, Thresholds):
        raise LisaError(f"thresholds are a {type(thresholds).__name__}: expected Thresholds(…).")
    if isinstance(run, list | tuple):
        from lisa_analysis.profiles.across_seeds import importance_over_seeds

        return importance_over_seeds(
            run, metric, by=by, confidence=confidence, reference=reference, seed=seed,
            thresholds=thresholds,
        )  # fmt: skip
    run = opened(run, "importance")
    chosen = _metric_of(run, metric, reference)
    return _of_run(run, chosen, by, confidence, seed, thresholds)


def _of_run(
    run: Run, chosen: Metric, by: str, confidence: float, seed: int, thresholds: Thresholds
) -> ImportanceProfile:
    """Fit, judge and put into words what one metric says of one run."""
    data = measurements(run, by)
    values = evaluate(chosen, data)
    fit, outside, steps, period, rng = fit_groups(
        chosen, data, values, by, confidence, thresholds, seed
    )
    scores = np.concatenate([fit.score, *(part.score for part in outside)])
    initial = initial_scores(chosen, data, values)
    # What is forgotten within a fifth of the run is noise of a step, what lasts longer a change.
    # Of a few records that cannot be told apart.
    told = fit.observations.max(initial=0) >= MIN_ROWS
    batch = fit.within**2 * fit.passing if told else float("nan")
    start = compare_with_start(chosen, data, scores, initial, thresholds, batch)
    judged = judge(
        fit, confidence, thresholds, steps=steps, period=period, rng=rng,
        stacks=stacks_in(data.table.groups, by),
    )  # fmt: skip
    groups = data.table.groups
    if chosen.rows == "examples":
        split = ablated.split_half(np.asarray(values[:, : groups.inside], np.float64))
        judged = replace(judged, reliability=replace(judged.reliability, split_half=split))
    special = remarks(chosen, by, groups.names, fit)
    visits = _visits(data, values.shape[1])
    said, agrees = _said(
        chosen, data, by, fit, judged, start, thresholds, special, confidence=confidence
    )
    return ImportanceProfile(
        metric=chosen.id,
        definition=chosen.definition,
        sources=(str(run.run_id),),
        method=str(run.method),
        model=str((run.manifest.get("model") or {}).get("name", "unknown")),
        by=by,
        confidence=confidence,
        layers=_frame(groups, slice(0, groups.inside), [fit], visits, initial).assign(
            standing=judged.standing.words
        ),
        outside=_frame(groups, slice(groups.inside, None), outside, visits, initial).assign(
            standing="unknown"
        ),
        verdict=judged.shape.verdict,
        statement=said,
        concentration=judged.concentration,
        shape=judged.shape,
        stacks=judged.stacks,
        initialisation=start,
        reliability=judged.reliability,
        samples=_samples(fit),
        remarks=special,
        thresholds=thresholds,
        agrees_with_ablation=agrees,
        estimand=estimand(run, chosen),
    )


def _visits(data: Measurements, count: int) -> NDArray[Any]:
    """Periods in which each of `count` groups trained; 0 for what never did."""
    visits = data.visits[-1].copy() if len(data.visits) else np.zeros(count)
    visits[~data.table.trained.any(axis=0)] = 0
    return visits


def _check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise LisaError(f"seed is {seed!r}: expected a whole number from 0.")


def _metric_of(run: Run, asked: Any, reference: RunLike | None) -> Metric:
    """Find the metric to score a run by; refuse a run that has nothing to score."""
    other = None if reference is None else opened(reference, "reference")
    chosen = find_metric(default_metric(run) if asked is None else asked, other)
    if not run.has_layers:
        raise LisaError(f"{run.path} is a log without layers, nothing to score: {ATTACH}.")
    if chosen.rows == "steps" and (waiting := run.waiting) is not None:
        raise LisaError(f"{run.path} has no step to score: {waiting}.")
    return chosen


def _said(
    chosen: Metric,
    data: Measurements,
    by: str,
    fit: Fit,
    judged: Judgement,
    start: Initialisation | None,
    thresholds: Thresholds,
    special: tuple[str, ...],
    *,
    confidence: float,
) -> tuple[str, bool | None]:
    """The statement of a profile, and whether the run's ablation confirms it; None without one."""
    run, groups = data.run, data.table.groups
    if chosen.rows == "examples":
        said = ablated.statement(
            chosen.id, by, groups.names, fit, judged, thresholds, special, data, confidence
        )
        return said, None
    if chosen.rows == "weights" or isinstance(run, PlainWeights):
        return of_weights.statement(run, chosen, by, groups.names, fit, judged), None
    # A measuring pass sees what never trained as well.
    trained = np.asarray(data.table.trained[:, : groups.inside].any(axis=0))
    if chosen.rows != "steps":
        trained = np.zeros_like(trained)
    spent = cost_words(
        fit, judged, thresholds.reliable, by,
        cadence(run, gradients=chosen.of_gradients, batches=chosen.rows == "batches"),
    )  # fmt: skip
    said = statement(
        chosen.id, by, groups.names, fit, judged, start, thresholds, special, trained,
        confidence=confidence, estimand=estimand(run, chosen), cost=spent,
    )  # fmt: skip
    agrees, doubt = ablated.confirmed(data, fit.score)
    said = f"{said} {doubt}".rstrip()
    if by == "layer" and chosen.rows == "steps" and parts_of(run) is not None:
        said += (
            " This run trained layers in parts (lisa.by): of a layer only steps count at which "
            "all of it trained; look at the profile by module instead (by='module')."
        )
    return said, agrees


def estimand(run: Run, chosen: Metric) -> str:
    """What the intervals of a profile are for, in words; empty where it has none."""
    if chosen.rows == "batches":
        return "the mean over batches at these weights: no training is part of it"
    if chosen.rows == "examples":
        return "the mean over examples at these weights"
    if chosen.scale == "total":
        return ""
    # The memory that is fitted reaches to courses as long as the run (`decays`): what is slower is
    # a constant to it.
    return (
        "the mean of the process that this run is one course of (a change that outlasts the run is "
        "part of it, not noise): another seed is another process"
    )


def check_confidence(confidence: Any) -> None:
    """Refuse what is no coverage of an interval."""
    if not (isinstance(confidence, int | float) and 0.5 <= confidence < 1):
        raise LisaError(f"confidence is {confidence!r}: expected a number in [0.5, 1), as 0.95.")


def _samples(fit: Fit) -> Array | None:
    """Bootstrap samples of the scores; a layer that is zero throughout is zero in each."""
    if fit.samples is None:
        return None
    return np.where(fit.zero, 0.0, fit.scale(fit.samples))  # NaN for layers without an interval


def _frame(
    groups: Grouping, columns: slice, fits: list[Fit], visits: Array, initial: Array
) -> pd.DataFrame:
    names = list(groups.names[columns])

    def join(attribute: str) -> Array:
        parts = [getattr(fit, attribute) for fit in fits]
        return np.concatenate(parts) if parts else np.zeros(0)

    layer = groups.layer[columns]
    return pd.DataFrame(
        {
            "layer": pd.array(np.where(layer >= 0, layer, 0), dtype="Int64"),
            "name": names,
            "score": join("score"),
            "low": join("low"),
            "high": join("high"),
            "joint_low": join("joint_low"),
            "joint_high": join("joint_high"),
            "n_eff": join("n_eff"),
            "visits": visits[columns].astype(np.int64),
            "initial": initial[columns],
            "rho": join("rho"),
            "steps": join("observations").astype(np.int64),
            "zeros": join("zeros").astype(np.int64),
        }
    ).assign(layer=lambda frame: frame["layer"].mask(layer < 0))
