"""What a profile says, in sentences."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.metrics.registry import Metric
from lisa_analysis.profiles.parts import Initialisation
from lisa_analysis.profiles.thresholds import Thresholds
from lisa_analysis.profiles.verdict import Judgement
from lisa_analysis.statistics.estimate import Fit


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
    with np.errstate(invalid="ignore"):
        below = fit.high < 0
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
    fit: Fit,
    judged: Judgement,
    start: Initialisation | None,
    limits: Thresholds,
    special: Sequence[str],
    trained: NDArray[np.bool_],
    stacks: int = 1,
) -> str:
    """What a person should take away, in sentences."""
    seen, unknown = fit.seen, ~(fit.seen | fit.zero)
    sentences = []
    never, without = int((unknown & ~trained).sum()), int((unknown & trained).sum())
    if unknown.all():
        why = f"No {by} was observed training" if not without else "No recorded step gave a value"
        return f"{why}: nothing is known about {metric}."
    if never:
        sentences.append(f"Never observed training, and so unknown: {never} of {len(seen)} {by}s.")
    if without:
        sentences.append(
            f"Trained, and still without a value: {without} of {len(seen)} {by}s are unknown."
        )
    sentences += special
    if not seen.any():
        return " ".join(sentences)
    if fit.samples is None:
        least = float(fit.n_eff[seen].min())
        sentences.append(
            f"The data are insufficient for intervals ({least:.0f} effective observations in the "
            f"least known {by}, {limits.min_effective:.0f} needed): differences between {by}s may "
            "be noise."
        )
    sentences.append(shape_words(judged, by, stacks))
    stable = judged.reliability
    if stable.steps_needed is not None and not stable.enough:
        if np.isinf(stable.steps_needed) and fit.samples is not None:
            sentences.append(f"The {by}s do not differ beyond noise.")
        elif 0 < stable.steps_needed < np.inf:
            sentences.append(
                f"About {stable.steps_needed:,.0f} more steps like these would make the ranking "
                f"reliable ({limits.reliable:g})."
            )
    if stable.drift:
        where = "" if stable.drift_step is None else f", first seen near step {stable.drift_step}"
        sentences.append(f"The profile drifted during the run{where}: it is an average of stages.")
    if start is not None:
        sentences.append(start.statement)
    return " ".join(sentences)


def shape_words(judged: Judgement, by: str, stacks: int = 1) -> str:
    """Say the verdict, and what sampling by it could gain."""
    shape, gain = judged.shape, judged.concentration.headroom
    limit = "" if gain.high is None else f" (at most ×{gain.high:.2f} with the interval)"
    ceiling = f"sampling in proportion could gain ×{gain.value:.2f} over uniform{limit}"
    if by != "layer":
        return f"Depth shapes are judged by layer only; {ceiling}."
    if stacks > 1:
        return f"The {stacks} stacks have no common depth to judge a shape by; {ceiling}."
    words = {
        "U": "The profile is a U: the first and last layers stand above the middle",
        "inverted U": "The profile is an inverted U: the middle layers stand above the ends",
        "ramp": f"The profile is a ramp that {'rises' if shape.slope.value > 0 else 'falls'} "
        "with depth",
        "flat": "The profile is flat: no difference worth sampling for",
        "undecided": "The shape is undecided",
    }[shape.verdict]
    if shape.rests_on is not None:
        words += f"; one layer stands out, and no shape holds without layer {shape.rests_on}"
    return f"{words}; {ceiling}."
