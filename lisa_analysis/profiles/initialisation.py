"""How much of a profile was there before training: scores at step 0 and PEFT's formulas."""

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.metrics.log import Measurements
from lisa_analysis.metrics.registry import Metric
from lisa_analysis.profiles.parts import Initialisation
from lisa_analysis.profiles.standing import MIN_LAYERS
from lisa_analysis.profiles.thresholds import Thresholds
from lisa_analysis.rundir.trained import has_low_rank

Array = NDArray[np.float64]

# Drawn norms lie within a few per cent of their formula; beyond this they were not drawn so.
_ANOTHER = 0.25


def initial_scores(metric: Metric, data: Measurements, values: NDArray[np.floating]) -> Array:
    """Score of every group at step 0; NaN where the metric has none or it was not measured."""
    if metric.at_start is None:
        return np.full(values.shape[1], np.nan)
    return metric.at_start.scores(data, values)


def compare_with_start(
    metric: Metric,
    data: Measurements,
    scores: Array,
    initial: Array,
    limits: Thresholds,
    noise: float = 0.0,
) -> Initialisation | None:
    """Compare a profile with the one at step 0; None when that is unknown.

    `noise` is the variance that one step's batch gives a log-score: no change, and so taken off the
    difference from the first gradient (weights have none). Where it is not known, nothing is said
    of that: the first of a few records is a good part of their mean.

    The share is R² of the final log-profile given the initial one with slope 1, over layers and
    the groups outside the stack: 1 when training left the differences as they were. A profile is
    explained by its initialisation when this holds among the layers alone as well.
    """
    if metric.at_start is None:
        return None
    gradients = metric.at_start.of == "gradients"
    with np.errstate(divide="ignore", invalid="ignore"):
        final, start = np.log(scores), np.log(initial)
    known = np.isfinite(final) & np.isfinite(start)
    if gradients:
        # The embedding's gradient is of another size; it would make any profile look inherited.
        known[data.table.groups.inside :] = False
    # A LISA run's first step has gradients of the layers drawn first, which are no profile.
    if known.sum() < max(MIN_LAYERS if gradients else 2, 0.5 * np.isfinite(final).sum()):
        return None
    if gradients and not np.isfinite(noise):
        return None
    inside = data.table.groups.inside
    layers = known & (np.arange(len(known)) < inside)
    change = final[known] - start[known]
    level = float(min(np.exp(-abs(change.mean())), 1.0))
    share = _share(final[known], start[known], limits.material, noise if gradients else 0.0)
    if gradients and np.isnan(share):
        return None
    raw_adapters = not gradients and has_low_rank(data.run)
    # An embedding of ten times the norm hides what the layers learned: they must pass alone too.
    alone = _share(final[layers], start[layers], limits.material)
    measures = [level, *(part for part in (share, alone) if not np.isnan(part))]
    explained = raw_adapters and min(measures) >= limits.explained
    expected = default_lora_norms(data) if raw_adapters else np.full(len(scores), np.nan)
    statement = (
        f"{share:.0%} of the spread of this profile is that of the first gradient, which belongs "
        "to the untrained weights (that one step's noise taken off)."
        if gradients
        else _words(share, alone, level, explained, raw_adapters, limits)
    )
    if raw_adapters:
        statement += _formula_words(expected[:inside], initial[:inside], scores[:inside])
    return Initialisation(share, level, explained, expected[:inside], statement)


def _share(final: Array, start: Array, material: float, noise: float = 0.0) -> float:
    """R² of log-scores given those at step 0, slope 1; NaN where the scores do not differ."""
    spread = float(final.var()) if len(final) else 0.0
    # Differences of a few per cent are no profile: their share at step 0 would be that of noise.
    if spread <= material**2:
        return float("nan")
    # What the layers share is no part of a profile, and takes its share of the noise with it.
    changed = float((final - start).var()) - noise * (1 - 1 / len(final))
    return float(np.clip(1 - max(changed, 0.0) / spread, 0, 1))


def default_lora_norms(data: Measurements) -> Array:
    """Raw ‖(A, B)‖ of every group under PEFT's default initialisation.

    Linear maps: A ~ kaiming_uniform(√5), so ‖A‖² = r/3 on average, and B = 0. Embeddings: A = 0
    and B ~ N(0, 1), so ‖B‖² = hidden · r. NaN for groups without adapters.
    """
    groups, frame = data.table.groups, data.run.parameters
    squares = np.zeros(len(groups.names))
    columns = (frame["param_id"], frame["name"], frame["role"], frame["shape"], frame["numel"])
    for param_id, name, role, shape, numel in zip(*columns, strict=True):
        group = groups.of[param_id]
        if group < 0:
            continue
        if "lora_embedding_B" in name:
            squares[group] += float(numel)
        elif role == "lora_A" and "lora_embedding" not in name:
            squares[group] += int(str(shape).split("x")[0]) / 3
    return np.sqrt(np.where(squares > 0, squares, np.nan))


def _words(
    share: float,
    alone: float,
    level: float,
    explained: bool,
    raw_adapters: bool,
    limits: Thresholds,
) -> str:
    part = (
        f"layers, embedding and head differ by less than {limits.material:.0%}"
        if np.isnan(share)
        else f"{share:.0%} of the spread between layers, embedding and head was there at step 0"
    )
    if not np.isnan(alone) and f"{alone:.0%}" != f"{share:.0%}":
        part += f", {alone:.0%} of that among the layers alone"
    text = f"{part[0].upper()}{part[1:]}; {level:.0%} of the level was there at step 0."
    if explained:
        return (
            f"{text} This profile is explained by adapter initialisation: it shows how A and B "
            "were drawn, not which layers learned."
        )
    if raw_adapters:
        where = "The layers' raw" if share >= limits.explained > alone else "Raw"
        return f"{text} {where} adapter norms have moved away from their initialisation."
    if level > limits.explained:
        return f"{text} It is mostly the profile of the pretrained weights."
    return text


def _formula_words(expected: Array, initial: Array, final: Array) -> str:
    known = np.isfinite(expected) & np.isfinite(initial) & np.isfinite(final)
    if not known.any():
        return ""
    formula, start = expected[known].mean(), initial[known].mean()
    text = (
        f" PEFT's default initialisation gives a layer {formula:.4g} by formula; measured "
        f"{start:.4g} at step 0 and {final[known].mean():.4g} on average over training."
    )
    if abs(start / formula - 1) > _ANOTHER:
        text += " These adapters began in another way (PiSSA, an earlier training)."
    return text
