"""What a profile says, in sentences."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.metrics.registry import Metric
from lisa_analysis.profiles.parts import Initialisation
from lisa_analysis.profiles.standing import Standing
from lisa_analysis.profiles.thresholds import Thresholds
from lisa_analysis.profiles.verdict import Judgement
from lisa_analysis.statistics import Shape
from lisa_analysis.statistics.fit import Fit
from lisa_analysis.statistics.persistence import MIN_ROWS


def remarks(metric: Metric, by: str, names: Sequence[str], fit: Fit) -> tuple[str, ...]:
    """What is special about single layers: no gradient at all, or a score below zero."""
    said = []
    if fit.zero.any():
        rows = name_rows(by, names, fit.zero)
        its = f"{'their' if fit.zero.sum() > 1 else 'its'} {metric.id} is exactly 0 throughout"
        said.append(
            f"No gradient reaches {rows}: {its}."
            if metric.of_gradients
            else f"{rows[0].upper()}{rows[1:]}: {its}."
        )
    partly = (fit.zeros > 0) & ~fit.zero
    if fit.log and partly.any():
        said.append(
            f"Exactly 0 at some steps, which are left out: {name_rows(by, names, partly)} (at most "
            f"{int(fit.zeros[partly].max())} steps)."
        )
    joint = fit.joint_high if len(fit.joint_high) else fit.high
    with np.errstate(invalid="ignore"):  # as standings are: for all layers at once, where known
        below = np.where(np.isfinite(joint), joint, fit.high) < 0
    if below.any():
        rows = name_rows(by, names, below)
        did = f" {metric.below_zero}" if metric.below_zero else ""
        said.append(
            f"{rows[0].upper()}{rows[1:]}{did}: "
            f"{'their scores are' if below.sum() > 1 else 'its score is'} below 0 with the whole "
            "interval."
        )
    return tuple(said)


def name_rows(by: str, names: Sequence[str], chosen: NDArray[np.bool_], limit: int = 6) -> str:
    """``layer 3`` or ``layers 0, 1, 2, 3, 4, 5 and 9 more``; rows of other levels by their name."""
    rows = np.flatnonzero(chosen).tolist()
    shown = ", ".join(str(row) if by == "layer" else str(names[row]) for row in rows[:limit])
    more = f" and {len(rows) - limit} more" if len(rows) > limit else ""
    return f"{by}{'s' if len(rows) > 1 else ''} {shown}{more}"


def statement(
    metric: str,
    by: str,
    names: Sequence[str],
    fit: Fit,
    judged: Judgement,
    start: Initialisation | None,
    limits: Thresholds,
    special: Sequence[str],
    trained: NDArray[np.bool_],
    *,
    confidence: float,
    estimand: str,
    cost: str = "",
) -> str:
    """What a person should take away, in sentences."""
    seen, unknown = fit.seen, ~(fit.seen | fit.zero)
    never, without = int((unknown & ~trained).sum()), int((unknown & trained).sum())
    if unknown.all():
        why = f"No {by} was observed training" if not without else "No recorded step gave a value"
        return f"{why}: nothing is known about {metric}."
    # What is known comes first, what is not after it.
    sentences: list[str] = []
    if fit.samples is not None:
        sentences.append(standing_words(by, names, judged.standing, confidence))
    elif seen.any():
        sentences.append(
            f"The data are insufficient for intervals ({why_unknown(fit, seen, limits)}): "
            f"differences between {by}s may be noise."
        )
    if never:
        sentences.append(f"Never observed training, and so unknown: {never} of {len(seen)} {by}s.")
    if without:
        sentences.append(
            f"Trained, and still without a value: {without} of {len(seen)} {by}s are unknown."
        )
    sentences += special
    if not seen.any():
        return " ".join(sentences)
    sentences += _of_intervals(by, names, fit, limits)
    sentences.append(shape_words(judged, by))
    if judged.reliability.drift:
        sentences.append(drift_words(judged, by, names, confidence))
    if cost:
        sentences.append(cost)
    if fit.samples is not None and estimand:
        sentences.append(f"Intervals ({confidence:.0%}) are for {estimand}.")
    if start is not None:
        sentences.append(start.statement)
    return " ".join(sentences)


def _of_intervals(by: str, names: Sequence[str], fit: Fit, limits: Thresholds) -> list[str]:
    """Rows seen that have no interval, and those whose interval is of their own rhythm."""
    said = []
    missing = fit.seen & ~fit.known
    if fit.samples is not None and missing.any():
        rows = name_rows(by, names, missing)
        said.append(
            f"{rows[0].upper()}{rows[1:]} {'have' if missing.sum() > 1 else 'has'} no interval "
            f"({why_unknown(fit, missing, limits)})."
        )
    if fit.departs.any() and fit.parts is not None:
        rows = name_rows(by, names, fit.departs & fit.seen)
        verb = "vary" if (fit.departs & fit.seen).sum() > 1 else "varies"
        said.append(
            f"{rows[0].upper()}{rows[1:]} {verb} in another rhythm than the others: the memory "
            "that all layers share is not used there."
        )
    return said


def why_unknown(fit: Fit, rows: NDArray[np.bool_], limits: Thresholds) -> str:
    """Why these rows have no interval."""
    n = int(fit.observations[rows].max(initial=0))
    least = float(np.nanmin(fit.n_eff[rows])) if np.isfinite(fit.n_eff[rows]).any() else 0.0
    if n < 2:
        return "one observation of each"
    if fit.adjusted_by_visits:
        return f"seen in fewer than {limits.min_visits:g} periods between two draws"
    if n < MIN_ROWS:
        return f"{n} records, at least {MIN_ROWS} needed"
    if not np.isfinite(fit.error[rows]).any():
        return "nothing varies"
    if least >= limits.min_effective:
        return (
            "how far a course about as long as the run moves them cannot be told: more steps, "
            "other seeds or a probe can"
        )
    counted = f"{least:.1f} effective observations, {limits.min_effective:g} needed"
    with np.errstate(invalid="ignore"):
        slow = bool((fit.slow[rows] > 0.5).all())
    return f"courses slower than a fifth of the run: {counted}" if slow else counted


def standing_words(
    by: str, names: Sequence[str], standing: Standing, confidence: float, limit: int = 8
) -> str:
    """Name the rows that stand above and below the others, and those unknown, in a sentence."""
    said = named(by, names, standing.above, standing.below, standing.unknown, limit)
    return f"{said} ({confidence:.0%} for all {by}s at once)."


def named(
    by: str,
    names: Sequence[str],
    above: NDArray[np.bool_],
    below: NDArray[np.bool_],
    unknown: NDArray[np.bool_],
    limit: int = 8,
) -> str:
    """``Layers 0 and 29 stand above the others; layer 17 below; layer 9 is unknown``."""

    def rows(mask: NDArray[np.bool_]) -> str:
        return f"{by}{'s' if mask.sum() > 1 else ''} {listed(by, names, mask, limit)}"

    parts: list[str] = []
    for mask, word in ((above, "above"), (below, "below")):
        if mask.any() and parts:
            parts.append(f"{rows(mask)} {word}")
        elif mask.any():
            verb = "stands" if mask.sum() == 1 else "stand"
            parts.append(f"{rows(mask)} {verb} {word} the others")
    if not parts:
        parts.append(f"no {by} is known to stand apart from the others")
    if unknown.any():
        parts.append(f"{rows(unknown)} {'is' if unknown.sum() == 1 else 'are'} unknown")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}"


def drift_words(judged: Judgement, by: str, names: Sequence[str], confidence: float) -> str:
    """Say that the profile drifted, and what each half of the run shows."""
    step = judged.reliability.drift_step
    where = "" if step is None else f", first seen near step {step}"
    text = f"The profile drifted during the run{where}: it is an average of stages."
    if judged.parts is None:
        return text
    first, second = judged.parts
    if (first.above == second.above).all() and first.above.any():
        rows = listed(by, names, first.above)
        several = first.above.sum() > 1
        return (
            f"{text} In both halves {by}{'s' if several else ''} {rows} "
            f"{'stand' if several else 'stands'} above the others."
        )
    halves = []
    for half, part in zip(("first", "second"), judged.parts, strict=True):
        if part.above.any():
            said = f"{by}{'s' if part.above.sum() > 1 else ''} {listed(by, names, part.above)}"
        else:
            said = f"no {by}"
        verb = "stand" if part.above.sum() > 1 else "stands"
        halves.append(f"in the {half} half {said} {verb} above the others")
    return f"{text} {halves[0][0].upper()}{halves[0][1:]}; {halves[1]}."


def listed(by: str, names: Sequence[str], mask: NDArray[np.bool_], limit: int = 8) -> str:
    """``0, 11 and 29``; beyond `limit` the others are counted."""
    found = np.flatnonzero(mask).tolist()
    words = [str(row) if by == "layer" else str(names[row]) for row in found]
    if len(words) > limit + 1:
        words = [*words[:limit], f"{len(words) - limit} more"]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def shape_words(judged: Judgement, by: str) -> str:
    """Say the verdict, and how far the scores are spread."""
    found = judged.concentration.headroom
    between = (
        "" if found.low is None or found.high is None else f" ({found.low:.2f} … {found.high:.2f})"
    )
    spread = f"the spread of the scores, 1 + CV², is {found.value:.2f}{between}"
    if by != "layer":
        return f"Depth shapes are judged by layer only; {spread}."
    if not judged.stacks:
        return f"{_course(judged.shape, found.sufficient)}; {spread}."
    each = []
    for stack in judged.stacks:
        words = _course(stack.shape, found.sufficient)
        each.append(f"In {stack.path} (layers {stack.first} to {stack.last}): "
                    f"{words[0].lower()}{words[1:]}.")  # fmt: skip
    return (
        f"The {len(each)} stacks have no common depth, and each is judged by itself. "
        f"{' '.join(each)} Over all of them {spread}."
    )


def _course(shape: Shape, sufficient: bool) -> str:
    """The verdict on one stack, without its full stop."""
    spikes = ", ".join(map(str, shape.spikes[:-1]))
    spikes = f"{spikes} and {shape.spikes[-1]}" if spikes else "".join(map(str, shape.spikes))
    several = "s" if len(shape.spikes) > 1 else ""
    words = {
        "U": "The profile is a U: the first and last layers stand above the middle",
        "U with a spike": f"The profile is a U, the first and last layers above the middle, with "
        f"{'spikes' if several else 'a spike'} at layer{several} {spikes}",
        "inverted U": "The profile is an inverted U: the middle layers stand above the ends",
        "ramp": f"The profile is a ramp that {'rises' if shape.slope.value > 0 else 'falls'} "
        "with depth",
        "spikes": f"The profile is one of spikes (layer{several} {spikes}), not of a course over "
        "depth",
        "uneven": "The layers are unequal, and follow no course over depth that has a name",
        "flat": "The profile is flat: no difference worth sampling for",
        "drifting": "No shape is named, since the profile drifted",
        "apart": "No course over depth can be told from noise",
        "undecided": "No course over depth can be told from noise"
        if sufficient
        else "Nothing can be said of its shape",
    }[shape.verdict]
    if shape.rests_on is not None and shape.verdict in ("apart", "undecided"):
        words += f"; the shape that there seems to be does not hold without layer {shape.rests_on}"
    return words
