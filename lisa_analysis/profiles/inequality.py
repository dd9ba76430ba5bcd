"""How unequal the scores of a profile are, beyond what noise makes of equal ones."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lisa_analysis import statistics as st
from lisa_analysis.statistics import Concentration, Interval
from lisa_analysis.statistics.fit import Fit

Array = NDArray[np.float64]


def concentration(fit: Fit, confidence: float, has_depth: bool = True) -> Concentration:
    """Inequality of the profile, with intervals that account for the noise of the scores.

    `has_depth` says whether the rows are layers of one stack: others have no ends and no middle.

    Noise makes any profile look unequal. Each figure is compared with its distribution when all
    layers are equal (the bootstrap deviations alone): inside that distribution the interval
    reaches down to equality, and elsewhere the bootstrap bias is taken off (basic bootstrap).
    """
    part = fit.seen
    scores = fit.score[part]
    if not len(scores) or not (np.maximum(scores, 0) > 0).any():
        nothing = Interval(float("nan"))
        return Concentration(*[nothing] * 7)
    samples = noise = None
    if fit.samples is not None and fit.noise is not None:
        # Layers without an interval keep their place and, where they have one, their error.
        deviations = np.nan_to_num(fit.noise[:, part])
        samples = fit.scale(fit.effect[part] + deviations)
        # Relative noise about a flat profile at the level of this one.
        noise = fit.scale(fit.effect[part].mean() + deviations)

    def interval(
        measure: Callable[[Array], Array], equal: float, sign: int = 1, power: int = 1
    ) -> Interval:
        value = float(measure(scores))
        if samples is None or noise is None:
            return Interval(value)
        excess = [
            np.maximum(sign * (measure(part) - equal), 0.0) ** power
            for part in (scores, samples, noise)
        ]
        low, high = _excess_bounds(float(excess[0]), excess[1], excess[2], confidence)
        bounds = equal + sign * low ** (1 / power), equal + sign * high ** (1 / power)
        return Interval(value, min(bounds), max(bounds))

    n = len(scores)
    floor = Interval(float("nan"))
    if noise is not None:
        null = st.gini(noise)
        low, high = np.quantile(null, [(1 - confidence) / 2, (1 + confidence) / 2])
        floor = Interval(float(null.mean()), float(low), float(high))
    return Concentration(
        ends_to_middle=_ends_to_middle(fit, confidence, has_depth),
        gini=interval(st.gini, 0.0, power=2),
        gini_floor=floor,
        top_share=interval(st.top_share, max(1, round(0.1 * n)) / n),
        effective_layers=interval(st.effective_layers, float(n), -1),
        cv=interval(st.coefficient_of_variation, 0.0, power=2),
        headroom=interval(st.headroom, 1.0),
    )


def _ends_to_middle(fit: Fit, confidence: float, has_depth: bool) -> Interval:
    """Ends over middle of all layers in their places, of which some may be unknown."""
    if not has_depth:
        return Interval(float("nan"))
    value = float(st.ends_to_middle(np.where(fit.zero, 0.0, fit.score)))
    if fit.samples is None or fit.noise is None or not np.isfinite(value):
        return Interval(value)
    samples = fit.scale(fit.effect + np.nan_to_num(fit.noise))
    return _either_way(value, st.ends_to_middle(np.where(fit.zero, 0.0, samples)), confidence)


def _either_way(value: float, samples: Array, confidence: float) -> Interval:
    """Percentile and basic bounds together, for a ratio with a median whose bias has no sign."""
    samples = samples[np.isfinite(samples)]
    if not len(samples):
        return Interval(value)
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(min(low, 2 * value - high)), float(max(high, 2 * value - low)))


def _excess_bounds(
    excess: float, samples: Array, noise: Array, confidence: float
) -> tuple[float, float]:
    """Bounds of an inequality measured as its excess over equal layers, not negative.

    Noise adds to a variance-like excess, so the samples overstate it as much as the estimate
    does, and the basic bootstrap takes that off (measures that act like a standard deviation come
    squared). Where the excess is within what noise alone reaches, equal layers are not excluded,
    and the truth may still be as large as noise could hide.
    """
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
    low, high = max(2 * excess - float(high), 0.0), max(2 * excess - float(low), 0.0)
    reach = float(np.quantile(noise, confidence))
    if excess <= reach:
        low, high = 0.0, max(high, reach, excess)
    return low, max(low, high)
