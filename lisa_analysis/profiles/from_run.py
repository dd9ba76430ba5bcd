"""importance(run, metric) -> ImportanceProfile: scores, intervals, verdict, and step 0."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.metrics.definitions import Metric, find_metric, metric_name
from lisa_analysis.metrics.log import Measurements, measurements
from lisa_analysis.metrics.series import last_known
from lisa_analysis.metrics.step_table import Grouping
from lisa_analysis.profiles import verdict as judgement
from lisa_analysis.profiles.initialisation import initial_scores, initialisation
from lisa_analysis.profiles.profile import ImportanceProfile
from lisa_analysis.statistics.estimate import Fit, fit_series

Array = NDArray[np.float64]

# Under Adam every layer moves by about the learning rate, so update norms say little about layers.
DEFAULT_METRIC = "grad_rms"


def importance(
    run: Any,
    metric: str | Metric | Callable[[Measurements], Array] = DEFAULT_METRIC,
    *,
    by: str = "layer",
    confidence: float = 0.95,
    reference: Any = None,
    seed: int = 0,
) -> ImportanceProfile:
    """Score every layer of a run and say what the scores are worth.

    Parameters
    ----------
    run
        A run directory opened with `load`.
    metric
        Id of a metric in `lisa_analysis.metrics.definitions.METRICS`, or a callable that takes
        `Measurements` and returns values of shape (recorded steps, groups), NaN where a group
        was not observed. Its attributes `id`, `definition` and `scale` are used where it has
        them; a plain function goes by its name, the first line of its docstring, and ``log``.
    by
        ``layer``, ``kind`` (attn.q … mlp.down over the whole stack), ``module`` (a kind within
        a layer) or ``tensor``.
    confidence
        Coverage of the intervals.
    reference
        The full fine-tuning run, for the two metrics that compare a LoRA run with one.
    seed
        Of the bootstrap; the same run gives the same profile.

    Returns
    -------
    ImportanceProfile
        Layers are judged on the steps in which they trained; a layer never trained is NaN. With
        LISA the layers are compared with those active at the same steps, and whole activation
        intervals are resampled.

    Raises
    ------
    LisaError
        When the metric is unknown, or the run did not record what it needs.

    Notes
    -----
    Intervals are those of a layer relative to the others: what all layers share at a step
    (learning rate, difficulty of the batch) is removed from logarithmic metrics. They come from
    a circular block bootstrap over time with layers kept together (activation intervals for
    LISA), and are missing below 25 effective observations.
    """
    if not 0.5 <= confidence < 1:
        raise LisaError(f"confidence is {confidence}: expected a number in [0.5, 1), as 0.95.")
    chosen = find_metric(metric, reference) if isinstance(metric, str) else metric
    data = measurements(run, by)
    name = metric_name(chosen)
    values = _evaluate(chosen, name, data)
    scale = getattr(chosen, "scale", "log")
    probes = getattr(chosen, "rows", "steps") == "probes"
    steps = data.table.probe_steps if probes else data.table.steps
    interval = None if probes else data.interval
    rng = np.random.default_rng(seed)
    inside = data.table.groups.inside
    fit = _fit(values[:, :inside], scale, interval, confidence, rng)
    outside = [
        _fit(values[:, [column]], scale, None, confidence, rng)
        for column in range(inside, values.shape[1])
    ]
    scores = np.concatenate([fit.score, *(part.score for part in outside)])
    initial = initial_scores(name, data, values)
    start = initialisation(name, data, scores, initial)
    concentration = judgement.concentration(fit, confidence)
    # An encoder and a decoder have no common depth.
    stacks = len({layer.get("stack") for layer in run.manifest.get("layers", [])})
    shape = judgement.shape(fit, confidence, concentration, by == "layer" and stacks <= 1)
    reliability = judgement.reliability(fit, steps, interval, rng)
    visits = data.visits[-1].copy() if len(data.visits) else np.zeros(values.shape[1])
    visits[~data.table.trained.any(axis=0)] = 0
    layers = _frame(data.table.groups, slice(0, inside), [fit], visits, initial)
    others = _frame(data.table.groups, slice(inside, None), outside, visits, initial)
    definition = str(getattr(chosen, "definition", (chosen.__doc__ or name).strip().split("\n")[0]))
    return ImportanceProfile(
        metric=name,
        definition=definition,
        run_id=str(run.run_id),
        method=str(run.method),
        model=str((run.manifest.get("model") or {}).get("name", "unknown")),
        by=by,
        confidence=confidence,
        layers=layers,
        outside=others,
        verdict=shape.verdict,
        statement=judgement.statement(
            name, by, fit, concentration, shape, reliability, start, stacks
        ),
        concentration=concentration,
        shape=shape,
        initialisation=start,
        reliability=reliability,
        samples=None if fit.samples is None else fit.scale(fit.samples),
    )


def _evaluate(chosen: Any, name: str, data: Measurements) -> NDArray[np.floating]:
    """Call the metric; a missing column or a wrong shape is a sentence, not a traceback."""
    try:
        values = np.asarray(chosen(data))
    except KeyError as error:
        raise LisaError(
            f"importance metric {name!r} cannot be computed for run {data.run.run_id}: "
            f"{error.args[0]}; choose another metric or record the column."
        ) from None
    if values.shape not in (data.table.trained.shape, data.table.probe.shape):
        raise LisaError(
            f"importance metric {name!r} returned an array of shape {values.shape}: expected "
            f"(recorded steps, groups) = {data.table.trained.shape}."
        )
    return values


def _fit(
    values: NDArray[np.floating],
    scale: str,
    interval: NDArray[np.int64] | None,
    confidence: float,
    rng: np.random.Generator,
) -> Fit:
    if scale == "total":
        # The state at the end of a run is one observation: it has no interval of its own.
        values, interval = last_known(values)[None, :], None
    return fit_series(
        values,
        log=scale == "log",
        clusters=interval,
        confidence=confidence,
        rng=rng,
        remove_common=scale == "log",
    )


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
            "n_eff": join("n_eff"),
            "visits": visits[columns].astype(np.int64),
            "initial": initial[columns],
            "rho": join("rho"),
            "steps": join("observations").astype(np.int64),
        }
    ).assign(layer=lambda frame: frame["layer"].mask(layer < 0))
