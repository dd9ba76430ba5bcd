"""Scores -> shares, in stages: the one engine of files, exports and the learner (numpy only).

score with interval → careful score → power → mixed with the prior → floor and cap, with an exact
sum.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lisa_analysis.contract.errors import ProbabilitiesError
from lisa_analysis.plans.budget import allocate, apply_control, in_units, safe_scores
from lisa_analysis.plans.strength import Strength

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Stages:
    """Everything between scores and shares, each of shape (L,); NaN where a layer is unknown.

    Attributes
    ----------
    score, low, high
        What was given; a layer that is exactly 0 has the bounds 0.
    safe
        The careful score: pulled towards the others by how little is known of it where that was
        given (`shrunk_scores`), else the one inside its interval that makes sampling safest
        (`safe_scores`).
    power
        Safe score over its mean, to the power; of a pool 1 inside and 0 outside.
    mixed
        In proportion to it, none above 1, with the prior mixed in; a part of what the known
        layers get together.
    pi
        The shares: inclusion probabilities, or multiples of the uniform share.
    known
        Which layers are known: the others have the prior's share.
    strength
        The settings that were in force.
    """

    score: Array
    low: Array
    high: Array
    safe: Array
    power: Array
    mixed: Array
    pi: Array
    known: NDArray[np.bool_]
    strength: Strength


def probabilities_from_scores(
    scores: ArrayLike,
    low: ArrayLike | None = None,
    high: ArrayLike | None = None,
    *,
    k: float,
    strength: float | str | Strength = 1.0,
    mix: float = 0.25,
    floor: float = 0.25,
    cap: float = 4.0,
    prior: ArrayLike | None = None,
    control: str | None = None,
    seed: int = 0,
    costs: ArrayLike | None = None,
    shrunk: ArrayLike | None = None,
) -> Stages:
    """Turn scores into inclusion probabilities π with Σπ = k.

    A layer of a higher score never gets a smaller π than one of a lower score, where both are
    known. An unknown layer (without a score, or without an interval beside others that have one)
    gets the prior: its uniform share k/L, whatever the others get.

    Parameters
    ----------
    scores
        Shape (L,); NaN is unknown, 0 is exactly zero, below zero counts as zero.
    low, high
        Intervals of the scores, shape (L,); both None take the scores as certain. One missing
        bound (NaN or infinite) is open; both missing make a layer unknown.
    k
        Layers in each draw, 1 … L; with `costs` any number above 0 and below L.
    strength
        Power on the scores, ``"pool"`` or ``"pool=6"``, see `Strength`; or a `Strength`.
    mix, floor, cap
        Share of the prior that is mixed in, and bounds of π in units of k/L, at strengths up to 1.
    prior
        Inclusion probabilities of layers of which nothing is known, shape (L,), Σ = k; None is
        k/L for all.
    control
        ``permuted``, ``reversed`` or ``uniform``: the same π given to other layers; None or
        ``none`` leaves them.
    seed
        Of the permutation.
    costs
        For parts of layers of different sizes: their sizes over the mean, shape (L,), of mean 1.
        Σ cost·π = k then, and k/L is the share of all parameters that train. The prior's sum and
        the controls go by it too.
    shrunk
        Careful scores in the order of `scores`, shape (L,), see `shrunk_scores`; None takes the
        safest ones inside the bounds.

    Returns
    -------
    Stages
        `pi` sums to k up to rounding, which is checked.

    Raises
    ------
    ProbabilitiesError
        For an infinite score, settings out of range, bounds that no Σπ = k can meet, a layer that
        would never be drawn without a pool, or a pool of fewer than k layers.
    """
    scores = np.asarray(scores, dtype=np.float64)
    n = len(scores)
    price = None if costs is None else np.asarray(costs, dtype=np.float64)
    if price is not None:
        least = 1
    elif isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= n:
        raise ProbabilitiesError(
            f"activated_layers is {k!r}: expected a whole number from 1 to {n}, the number of "
            "layers."
        )
    else:
        least = int(k)
    if not isinstance(strength, Strength):
        strength = Strength.of(strength, mix=mix, floor=floor, cap=cap)
    result = _stages(
        scores, low, high, float(k), 1.0, strength, prior, least=least, price=price, shrunk=shrunk
    )
    if strength.pool is None and not (result.pi > 0).all():
        raise ProbabilitiesError(
            f"layer {int(np.argmin(result.pi))} would never be drawn: use a floor or a mix above "
            "0, or strength='pool' to leave layers out."
        )
    return _controlled(result, control, seed, price)


def multiples_from_scores(
    scores: ArrayLike,
    low: ArrayLike | None = None,
    high: ArrayLike | None = None,
    *,
    mean: float = 1.0,
    most: float = math.inf,
    strength: float | str | Strength = 1.0,
    mix: float = 0.25,
    floor: float = 0.25,
    cap: float = 4.0,
    control: str | None = None,
    seed: int = 0,
    shrunk: ArrayLike | None = None,
) -> Stages:
    """Turn scores into shares of a given mean: for ranks, rates, merge weights and the like.

    The stages are those of `probabilities_from_scores`, except that a share may exceed 1; an
    unknown layer gets the mean.

    Parameters
    ----------
    scores, low, high, strength, mix, floor, cap, control, seed, shrunk
        As there; the bounds are in units of the mean.
    mean, most
        Mean of the shares, and what none of them exceeds.

    Returns
    -------
    Stages
        `pi` holds the shares; they sum to L·mean up to rounding.

    Raises
    ------
    ProbabilitiesError
        As there.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if not isinstance(strength, Strength):
        strength = Strength.of(strength, mix=mix, floor=floor, cap=cap)
    if not 0 < mean <= most:
        raise ProbabilitiesError(
            f"the mean share is {mean!r}: expected a number above 0 and at most {most:g}."
        )
    result = _stages(scores, low, high, len(scores) * mean, most, strength, None, shrunk=shrunk)
    return _controlled(result, control, seed)


def _stages(
    scores: Array,
    low: ArrayLike | None,
    high: ArrayLike | None,
    total: float,
    most: float,
    strength: Strength,
    prior: ArrayLike | None,
    *,
    least: int = 1,
    price: Array | None = None,
    shrunk: ArrayLike | None = None,
) -> Stages:
    """Every stage for shares that sum to `total`, none of them above `most`."""
    n = len(scores)
    uniform = total / n
    cost = np.ones(n) if price is None else price
    shares = _prior(prior, n, total, most, cost)
    score, bottom, top, known = _known(scores, low, high)
    safe, power, mixed = (np.full(n, np.nan) for _ in range(3))
    if known.any():
        safe[known] = (
            safe_scores(*_in_order(score[known], bottom[known], top[known]))
            if shrunk is None
            else np.asarray(shrunk, dtype=np.float64)[known]
        )
    if strength.pool is not None:
        least = max(least, math.ceil(total / most)) if math.isfinite(most) else least
        chosen = _pool(score, bottom, top, known, strength.pool, least)
        power[known] = chosen[known]
        mixed[known] = power[known] / chosen.sum()
        shares = np.where(chosen, min(most, total / math.fsum(cost[chosen])), 0.0)
    elif known.any():
        size = in_units(safe[known])
        power[known] = (size / size.mean()) ** strength.power if size.any() else 1.0
        left, expected = total - math.fsum((cost * shares)[~known]), shares[known]
        own = None if price is None else price[known]
        # What is certain to be drawn leaves the rest to the others before anything is mixed in:
        # else the mix takes over wherever a few scores stand far above all others.
        part = allocate(power[known], left, 0.0, most if own is not None else min(most, left), own)
        uniform_part = expected / (cost[known] * expected).sum()
        mixed[known] = (1 - strength.mix) * part / left + strength.mix * uniform_part
        bounds = min(most, strength.floor * uniform), min(most, strength.cap * uniform)
        shares[known] = allocate(mixed[known], left, *bounds, own)
    off = math.fsum(cost * shares) - total
    if not abs(off) <= 1e-12 * max(1.0, total):
        raise ProbabilitiesError(
            f"shares of {n} layers miss their sum {total:g} by {off:.3g}: choose other bounds."
        )
    return Stages(score, bottom, top, safe, power, mixed, shares, known, strength)


def _prior(prior: ArrayLike | None, n: int, total: float, most: float, cost: Array) -> Array:
    if prior is None:
        return np.full(n, total / n)
    shares = np.array(prior, dtype=np.float64)
    inside = shares.shape == (n,) and bool(((shares > 0) & (shares <= most)).all())
    if not inside or abs(math.fsum(cost * shares) - total) > 1e-9 * max(1.0, total):
        raise ProbabilitiesError(
            f"the prior has the shape {shares.shape} and the sum {shares.sum():.6g}: expected "
            f"{n} numbers above 0 and at most {most:g} that sum to {total:g}."
        )
    return shares


def _known(
    scores: Array, low: ArrayLike | None, high: ArrayLike | None
) -> tuple[Array, Array, Array, NDArray[np.bool_]]:
    """Scores and bounds (NaN where open), and which layers are known."""
    if scores.ndim != 1 or not len(scores):
        raise ProbabilitiesError(
            f"scores have the shape {scores.shape}: expected one number per layer."
        )
    if np.isinf(scores).any():
        raise ProbabilitiesError(
            f"layer {int(np.argmax(np.isinf(scores)))} has an infinite score: expected finite ones."
        )
    bounds = []
    for name, given in (("low", low), ("high", high)):
        missing = scores if low is None and high is None else np.full(len(scores), np.nan)
        bound = np.array(missing if given is None else given, dtype=np.float64)
        if bound.shape != scores.shape:
            raise ProbabilitiesError(
                f"{name} has the shape {bound.shape} for {len(scores)} scores: expected one each."
            )
        bounds.append(np.where(np.isfinite(bound), bound, np.nan))
    bottom, top = bounds
    nothing = np.isnan(bottom) & np.isnan(top)
    zero = nothing & (scores == 0)
    bottom[zero] = top[zero] = 0.0
    return scores, bottom, top, np.isfinite(scores) & (~nothing | zero)


def _in_order(score: Array, low: Array, high: Array) -> tuple[Array, Array]:
    """Intervals of what is true and in the order of the scores: no bound against that order.

    Every order-keeping truth inside the given intervals is inside these, and what is safest
    inside these keeps the order.
    """
    low = np.fmin(np.where(np.isnan(low), -np.inf, low), score)
    high = np.fmax(np.where(np.isnan(high), np.inf, high), score)
    below = score[None, :] <= score[:, None]
    return (
        np.where(below, low[None, :], -np.inf).max(axis=1),
        np.where(below.T, high[None, :], np.inf).min(axis=1),
    )


def _pool(
    score: Array, low: Array, high: Array, known: NDArray[np.bool_], size: int, least: int
) -> NDArray[np.bool_]:
    """Which layers share equally: `size` of the best, or those whose interval is above the mean.

    What counts as 0 is never one of them (where all do, scores are of a scale of their own).
    """
    n = len(score)
    chosen = np.zeros(n, dtype=bool)
    with np.errstate(invalid="ignore"):
        nothing = known & (np.fmax(score, high) <= 0) & bool((score[known] > 0).any())
    known = known & ~nothing
    if size:
        best = np.argsort(np.where(known, -score, np.inf), kind="stable")[:size]
        chosen[best[known[best]]] = True
        found, name = int(chosen.sum()), f"pool={size}"
        what = "known to be worth something" if nothing.any() else "known"
        if found < size:
            raise ProbabilitiesError(
                f"strength is {name!r}, but {int(known.sum())} of {n} layers are {what}: expected "
                "a pool of at most as many; make it smaller, or take scores without intervals as "
                "certain (--ignore-intervals, use_intervals=False)."
            )
    else:
        with np.errstate(invalid="ignore"):
            chosen[known] = (
                (low > score[np.isfinite(score)].mean())[known] if known.any() else False
            )
        found, name = int(chosen.sum()), "pool"
    if found < least:
        which = "" if size else " that stand above the mean with their whole interval"
        what = f"strength is {name!r}: a pool of {found} of {n} layers{which}"
        if least == 1:
            raise ProbabilitiesError(
                f"{what}; say how many of the best are wanted, as 'pool=4', or measure more."
            )
        raise ProbabilitiesError(
            f"{what}, but activated_layers is {least}, and every draw takes that many; lower "
            f"activated_layers, or give a pool of at least that size, as 'pool={2 * least}'."
        )
    return chosen


def _controlled(
    result: Stages, control: str | None, seed: int, price: Array | None = None
) -> Stages:
    pi = apply_control(result.pi, control, seed, result.score, price)
    return Stages(
        result.score, result.low, result.high, result.safe, result.power, result.mixed, pi,
        result.known, result.strength,
    )  # fmt: skip
