"""Concentration, shape and reliability of a profile, from its fit."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lisa_analysis import statistics as st
from lisa_analysis.profiles.parts import Reliability
from lisa_analysis.profiles.thresholds import Thresholds
from lisa_analysis.statistics import Concentration, Interval, Shape
from lisa_analysis.statistics import shape as shapes
from lisa_analysis.statistics.estimate import Fit

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Judgement:
    """What a fit is worth: how unequal, of what shape, how reliable."""

    concentration: Concentration
    shape: Shape
    reliability: Reliability


def judge(
    fit: Fit,
    confidence: float,
    limits: Thresholds,
    *,
    steps: NDArray[np.int64],
    interval: NDArray[np.int64] | None,
    rng: np.random.Generator,
    has_depth: bool,
) -> Judgement:
    """Judge a fit.

    Parameters
    ----------
    fit, confidence, limits
        The fit, the coverage of its intervals, and the limits to judge by.
    steps, interval
        Recorded steps behind the fit, and the activation interval of each (None without LISA).
    rng
        Of the drift's noise floor.
    has_depth
        Whether the rows are the layers of one stack, in order.
    """
    found = concentration(fit, confidence)
    return Judgement(
        found,
        shape(fit, confidence, found, limits, has_depth),
        reliability(fit, steps, interval, rng, limits),
    )


def concentration(fit: Fit, confidence: float) -> Concentration:
    """Inequality of the profile, with intervals that account for the noise of the scores.

    Noise makes any profile look unequal. Each figure is compared with its distribution when all
    layers are equal (the bootstrap deviations alone): inside that distribution the interval
    reaches down to equality, and elsewhere the bootstrap bias is taken off (basic bootstrap).
    """
    scores = fit.score[fit.seen]
    if not len(scores) or not (np.maximum(scores, 0) > 0).any():
        nothing = Interval(float("nan"))
        return Concentration(*[nothing] * 7)
    samples = noise = None
    if fit.samples is not None:
        deviations = fit.samples[:, fit.seen] - fit.effect[fit.seen]
        samples = fit.scale(fit.samples[:, fit.seen])
        # Relative noise about a flat profile at the level of this one.
        noise = fit.scale(fit.effect[fit.seen].mean() + deviations)

    def interval(
        measure: Callable[[Array], Array], equal: float | None, sign: int = 1, power: int = 1
    ) -> Interval:
        value = float(measure(scores))
        if samples is None or noise is None:
            return Interval(value)
        if equal is None:
            return _either_way(value, measure(samples), confidence)
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
        ends_to_middle=interval(st.ends_to_middle, None),
        gini=interval(st.gini, 0.0, power=2),
        gini_floor=floor,
        top_share=interval(st.top_share, max(1, round(0.1 * n)) / n),
        effective_layers=interval(st.effective_layers, float(n), -1),
        cv=interval(st.coefficient_of_variation, 0.0, power=2),
        headroom=interval(st.headroom, 1.0),
    )


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


def shape(
    fit: Fit, confidence: float, found: Concentration, limits: Thresholds, has_depth: bool = True
) -> Shape:
    """U-test on log-scores, and ``flat`` when nothing worth sampling for can be there."""
    seen = fit.seen
    n = len(seen)
    x = shapes.depth(n)[seen]
    effect = fit.effect[seen]
    samples = None if fit.samples is None else fit.samples[:, seen]
    if not has_depth or not len(effect):
        nothing = Interval(float("nan"))
        return Shape(nothing, nothing, nothing, nothing, "undecided")
    if not fit.log:
        positive = len(effect) > 0 and bool((effect > 0).all())
        # Signed scores have no logarithm; their relative size keeps the meaning of a slope.
        scale = float(np.abs(effect).mean()) or 1.0
        effect, samples = (
            (np.log(effect), None if samples is None else np.log(np.maximum(samples, 1e-300)))
            if positive
            else (effect / scale, None if samples is None else samples / scale)
        )
    result = st.u_shape(effect, samples, x, confidence, limits.material)
    if result.rests_on is not None:
        result = replace(result, rests_on=int(np.flatnonzero(seen)[result.rests_on]))
    high = found.headroom.high
    open_question = result.verdict == "undecided" and result.rests_on is None
    if open_question and high is not None and high <= limits.headroom:
        return replace(result, verdict="flat")
    return result


def reliability(
    fit: Fit,
    steps: NDArray[np.int64],
    interval: NDArray[np.int64] | None,
    rng: np.random.Generator,
    limits: Thresholds,
) -> Reliability:
    """Split-half reliability, rank stability, steps still needed and drift."""
    nan = float("nan")
    fit = fit.only(~fit.zero)
    split = overlap = nan
    if fit.halves is not None and np.isfinite(fit.halves).all() and fit.halves.shape[1] > 2:
        split = st.spearman_brown(st.pearson(*fit.halves))
        overlap = st.top_jaccard(*fit.halves)
    rank_low = nan
    if fit.samples is not None and fit.effect.size > 2:
        taus = st.kendall_taus(fit.samples[:200], fit.effect)
        rank_low = float(np.quantile(taus[np.isfinite(taus)], 0.05)) if np.ptp(fit.effect) else nan
    divergence, floor, drift = nan, nan, None
    in_blocks = len(fit.blocks) >= limits.min_blocks and interval is None
    if fit.samples is not None and fit.log and in_blocks:
        divergence, floor = _halves_in_time(fit, rng, limits.drift_level)
        drift = bool(divergence > floor)
    needed = _steps_needed(fit, steps, limits)
    alarm = _first_alarm(fit, steps, limits.drift_alarm) if drift else None
    enough = bool(
        fit.samples is not None
        and split >= limits.reliable
        and rank_low >= limits.stable_tau
        and overlap >= limits.stable_overlap
        and not drift
    )
    return Reliability(split, rank_low, overlap, needed, drift, alarm, divergence, floor, enough)


def _halves_in_time(
    fit: Fit, rng: np.random.Generator, level: float, replicates: int = 200
) -> tuple[float, float]:
    """Divergence of the later from the earlier half, and its level without any drift."""
    blocks = fit.blocks
    half = len(blocks) // 2
    early, late = np.nanmean(blocks[:half], axis=0), np.nanmean(blocks[half:], axis=0)
    divergence = float(st.jensen_shannon(np.exp(early), np.exp(late)))
    draws = rng.integers(0, len(blocks), size=(replicates, 2, half))
    # Take the mean shift between the halves out first, or drift would hide itself in the floor.
    centred = np.concatenate([blocks[:half] - early, blocks[half:] - late]) + fit.effect
    parts = centred[draws].mean(axis=2)
    null = st.jensen_shannon(np.exp(parts[:, 0]), np.exp(parts[:, 1]))
    return divergence, float(np.quantile(null, level))


def _steps_needed(fit: Fit, steps: NDArray[np.int64], limits: Thresholds) -> float | None:
    """Further optimizer steps until the ranking is reliable and every layer has an interval."""
    seen = fit.seen
    if fit.noise is None or seen.sum() < 3 or len(steps) < 2 or not fit.n_eff[seen].min() > 0:
        return None
    error = float(fit.noise[:, seen].var(axis=0).mean())
    between = max(float(fit.effect[seen].var(ddof=1)) - error, 0.0)
    per_unit = float(fit.n_eff[seen].min())
    if between <= 0:
        return float("inf")
    odds = limits.reliable / (1 - limits.reliable)
    lengthen = max(odds * error / between, limits.min_effective / per_unit)
    total = float(steps[-1] - steps[0] + 1)
    return float(np.ceil(max(lengthen - 1, 0.0) * total))


def _first_alarm(fit: Fit, steps: NDArray[np.int64], limit: float) -> int | None:
    """Recorded step at which the first layer moved, by Page–Hinkley on block means."""
    deviation = fit.blocks - fit.effect
    scale = np.nanstd(np.diff(deviation, axis=0), axis=0) / np.sqrt(2)
    alarms = [
        st.page_hinkley(np.nan_to_num(deviation[:, column] / scale[column]), threshold=limit)
        for column in np.flatnonzero(scale > 0)
    ]
    found = [alarm for alarm in alarms if alarm is not None]
    if not found:
        return None
    return int(steps[min(len(steps) - 1, min(found) * len(steps) // len(fit.blocks))])
