"""Shape and reliability of a profile, from its fit, and all that is judged of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lisa_analysis import statistics as st
from lisa_analysis.profiles.inequality import concentration
from lisa_analysis.profiles.parts import Reliability, StackShape
from lisa_analysis.profiles.standing import Standing, standing_of, standing_of_parts
from lisa_analysis.profiles.thresholds import Thresholds
from lisa_analysis.statistics import Concentration, Interval, Shape
from lisa_analysis.statistics import shape as shapes
from lisa_analysis.statistics.estimate import of_each_stack
from lisa_analysis.statistics.fit import Fit

Array = NDArray[np.float64]

# Share of the layers that must be known before a course over depth has a name.
KNOWN = 2 / 3


@dataclass(frozen=True)
class Judgement:
    """What a fit is worth: how unequal, of what shape, how reliable, and which layers stand apart.

    `parts` holds the standing of the layers in the earlier and the later half, where the profile
    drifted; `stacks` the shape of each stack, where there are several: they have no common one.
    """

    concentration: Concentration
    shape: Shape
    reliability: Reliability
    standing: Standing
    parts: tuple[Standing, Standing] | None = None
    stacks: tuple[StackShape, ...] = ()


def judge(
    fit: Fit,
    confidence: float,
    limits: Thresholds,
    *,
    steps: NDArray[np.int64],
    period: NDArray[np.int64] | None,
    rng: np.random.Generator,
    stacks: Sequence[str],
) -> Judgement:
    """Judge a fit.

    Parameters
    ----------
    fit, confidence, limits
        The fit, the coverage of its intervals, and the limits to judge by.
    steps, period
        Recorded steps behind the fit, and the period of each (None without LISA).
    rng
        Of the drift's noise floor.
    stacks
        The stack that each layer is in, in order; empty where the rows are no layers.
    """
    has_depth = len(set(stacks)) == 1
    found = concentration(fit, confidence, has_depth)
    stable = reliability(fit, steps, period, rng, limits)
    apart = standing_of(fit, confidence, limits)
    said = shape(fit, confidence, found, limits, has_depth, apart)
    each = _of_stacks(fit, confidence, limits, stacks)
    if stable.drift:
        # One word for all of a run that changed its profile would be the word for none of it.
        said, *shapes = (replace(one, verdict="drifting", rests_on=None, spikes=())
                         for one in (said, *(stack.shape for stack in each)))  # fmt: skip
        each = tuple(replace(s, shape=one) for s, one in zip(each, shapes, strict=True))
    parts = standing_of_parts(fit, confidence, limits) if stable.drift else None
    return Judgement(found, said, stable, apart, parts, each)


def _of_stacks(
    fit: Fit, confidence: float, limits: Thresholds, stacks: Sequence[str]
) -> tuple[StackShape, ...]:
    """Shape of each of several stacks; all of them together err as rarely as one alone does."""
    masks = of_each_stack(stacks)
    if len(masks) < 2:
        return ()
    shared = 1 - (1 - confidence) / len(masks)
    found = []
    for path, mask in zip(dict.fromkeys(stacks), masks, strict=True):
        part, layers = fit.only(mask), np.flatnonzero(mask)
        said = shape(part, shared, concentration(part, shared), limits)
        if said.rests_on is not None:
            said = replace(said, rests_on=int(layers[said.rests_on]))
        said = replace(said, spikes=tuple(int(layers[spike]) for spike in said.spikes))
        found.append(StackShape(path, int(layers[0]), int(layers[-1]), said))
    return tuple(found)


def shape(
    fit: Fit,
    confidence: float,
    found: Concentration,
    limits: Thresholds,
    has_depth: bool = True,
    apart: Standing | None = None,
) -> Shape:
    """U-test on the log-scores of the known layers, and a word for what it leaves open.

    ``spikes`` where up to a quarter of the layers stand out clearly, ``uneven`` where more or other
    layers stand apart, ``flat`` when nothing worth sampling for can be there, and ``apart`` where
    layers are named and no more can be said: equal layers have one named as often as a joint band
    fails, a shape far less often. What is left is ``undecided``.
    """
    apart = standing_of(fit, confidence, limits) if apart is None else apart
    left_open = "apart" if apart.apart.any() else "undecided"
    seen = fit.known if fit.samples is not None else fit.seen
    n = len(seen)
    x = shapes.depth(n)[seen]
    effect, error = fit.effect[seen], fit.error[seen] if len(fit.error) else None
    noise = fit.noise if fit.over_depth is None else fit.over_depth
    samples = None if fit.samples is None or noise is None else effect + noise[:, seen]
    if not has_depth or not len(effect):
        nothing = Interval(float("nan"))
        return Shape(nothing, nothing, nothing, nothing, left_open)
    # Of a stack with many unknown layers no course over depth can be told.
    if seen.sum() < KNOWN * (n - fit.zero.sum()):
        samples = None
    if not fit.log:
        positive = len(effect) > 0 and bool((effect > 0).all())
        # Signed scores have no logarithm; their relative size keeps the meaning of a slope.
        scale = float(np.abs(effect).mean()) or 1.0
        effect, samples = (
            (np.log(effect), None if samples is None else np.log(np.maximum(samples, 1e-300)))
            if positive
            else (effect / scale, None if samples is None else samples / scale)
        )
        if error is not None:
            error = error / (np.exp(effect) if positive else scale)
    result = st.u_shape(effect, samples, x, confidence, limits.material)
    if result.rests_on is not None:
        result = replace(result, rests_on=int(np.flatnonzero(seen)[result.rests_on]))
    if result.verdict == "U" and error is not None:
        return _with_spikes(result, fit, effect, error, x, apart)
    if result.verdict != "undecided":
        return result
    clear = np.flatnonzero(apart.clear)
    if len(clear):
        few = apart.above.sum() <= max(1, n // 4)
        which = tuple(int(layer) for layer in np.flatnonzero(apart.above)) if few else ()
        return replace(result, verdict="spikes" if few else "uneven", spikes=which)
    high = found.headroom.high
    if samples is not None and high is not None and high <= limits.headroom:
        return replace(result, verdict="flat", rests_on=None)
    return replace(result, verdict=left_open)


def _with_spikes(
    found: Shape, fit: Fit, effect: Array, error: Array, x: Array, apart: Standing
) -> Shape:
    """A U whose middle holds single layers as high as its ends is said to have spikes."""
    known = np.flatnonzero(fit.known)
    reach = st.t_quantile(0.999, fit.degrees[known])
    beyond = shapes.above_the_course(effect, error, x, reach) & (np.abs(x) < 0.75)
    which = tuple(int(layer) for layer in known[beyond] if apart.above[layer])
    if not which:
        return found
    return replace(found, verdict="U with a spike", spikes=which)


def reliability(
    fit: Fit,
    steps: NDArray[np.int64],
    period: NDArray[np.int64] | None,
    rng: np.random.Generator,
    limits: Thresholds,
) -> Reliability:
    """Split-half reliability, rank stability, steps still needed and drift."""
    nan = float("nan")
    whole, fit = fit, fit.only(fit.known if fit.samples is not None else ~fit.zero)
    split = overlap = nan
    if fit.halves is not None and np.isfinite(fit.halves).all() and fit.halves.shape[1] > 2:
        split = st.spearman_brown(st.pearson(*fit.halves))
        overlap = st.top_jaccard(*fit.halves)
    rank_low = nan
    if fit.samples is not None and fit.effect.size > 2:
        taus = st.kendall_taus(fit.samples[:200], fit.effect)
        rank_low = float(np.quantile(taus[np.isfinite(taus)], 0.05)) if np.ptp(fit.effect) else nan
    divergence, floor, drift = nan, nan, None
    in_time = fit.parts is not None and np.isfinite(fit.parts.error).any() and period is None
    if fit.noise is not None and in_time:
        divergence, floor = _halves_in_time(fit, rng, limits.drift_level)
        if np.isfinite(divergence) and np.isfinite(floor):
            drift = bool(divergence > floor) and _moved(fit) > limits.material
    needed = _steps_needed(whole, steps, limits)
    alarm = _first_alarm(whole.only(whole.seen), steps, limits.drift_alarm) if drift else None
    enough = bool(
        fit.samples is not None
        and split >= limits.reliable
        and rank_low >= limits.stable_tau
        and overlap >= limits.stable_overlap
        and not drift
    )
    return Reliability(split, rank_low, overlap, needed, drift, alarm, divergence, floor, enough)


def _halves_in_time(fit: Fit, rng: np.random.Generator, level: float) -> tuple[float, float]:
    """Divergence of the later from the earlier half, and its level without any drift.

    The level is that of two halves of the same profile with the errors that what varies within
    halves leads to expect, stretched as Student's t is: few blocks have not told them.
    """
    parts = fit.parts
    if parts is None or fit.noise is None:
        return float("nan"), float("nan")
    known = np.isfinite(parts.error) & np.isfinite(parts.early) & np.isfinite(parts.late)
    if not known.any():
        return float("nan"), float("nan")
    deviates = fit.noise[:, known] / fit.error[known]
    spread = deviates.std(axis=0)
    deviates /= np.where(spread > 0, spread, 1.0)
    degrees = max(float(np.median(parts.degrees[known])), 2.0)
    half = len(deviates) // 2
    stretch = np.sqrt(degrees / rng.chisquare(degrees, size=half))[:, None] * parts.error[known]
    drawn = [
        fit.effect[known] + stretch * part for part in (deviates[:half], deviates[half : 2 * half])
    ]
    found, null = (
        st.jensen_shannon(*(np.maximum(fit.scale(part), 0.0) for part in pair))
        for pair in ((parts.early[known], parts.late[known]), drawn)
    )
    null = null[np.isfinite(null)]  # a draw below zero has no shares
    return float(found), float(np.quantile(null, level)) if len(null) else float("nan")


def _moved(fit: Fit) -> float:
    """How far layers moved from half to half, relative to their size, noise taken off."""
    parts = fit.parts
    if parts is None:
        return 0.0
    known = np.isfinite(parts.error)
    away = (parts.late - parts.early)[known]
    square = float((away**2).mean() - 2 * (parts.error[known] ** 2).mean())
    size = 1.0 if fit.log else float(np.abs(fit.effect[known]).mean()) or 1.0
    return float(np.sqrt(max(square, 0.0))) / size


def _steps_needed(fit: Fit, steps: NDArray[np.int64], limits: Thresholds) -> float | None:
    """Further optimizer steps until the ranking is reliable and every layer has an interval."""
    seen = fit.seen & np.isfinite(fit.error)
    if fit.noise is None or seen.sum() < 3 or len(steps) < 2 or not fit.n_eff[seen].min() > 0:
        return None
    error = float((fit.error[seen] ** 2).mean())
    between = max(float(fit.effect[seen].var(ddof=1)) - error, 0.0)
    if between <= 0:
        return float("inf")
    odds = limits.reliable / (1 - limits.reliable)
    lengthen = odds * error / between
    if not fit.known[seen].all():
        least = limits.min_effective if fit.parts is not None else limits.min_visits
        lengthen = max(lengthen, least / float(fit.n_eff[seen].min()))
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
