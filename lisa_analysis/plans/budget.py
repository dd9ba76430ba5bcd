"""A budget shared out over layers: safe scores, weights, shares of an exact sum (numpy only)."""

import math
from numbers import Integral
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.contract.errors import ProbabilitiesError, suggest

Array = NDArray[np.float64]
Control = Literal["none", "permuted", "reversed", "uniform"]

CONTROLS = ("none", "permuted", "reversed", "uniform")


def safe_scores(low: Array, high: Array) -> Array:
    """Scores inside their intervals that make the sampling safest against being wrong.

    c_i = clip(m, low_i, high_i) with m = ‖c‖²/‖c‖₁: sampling in proportion to them has never more
    variance than uniform sampling, for any truth inside all the intervals at once (Stich, Raj &
    Jaggi, NeurIPS 2017). A missing bound is 0 or ∞.
    """
    low = np.maximum(np.where(np.isnan(low), 0.0, low), 0.0)
    high = np.maximum(np.where(np.isnan(high), np.inf, high), low)
    bounds = np.concatenate([low[low > 0], high[np.isfinite(high)]])
    if not len(bounds) or bounds.max() <= 0:
        return np.ones(len(low))
    unit = math.frexp(float(bounds.max()))[1]
    low, high = np.ldexp(low, -unit), np.ldexp(high, -unit)
    left, right = 0.0, 1.0
    while True:
        middle = (left + right) / 2
        if middle in (left, right):
            break
        clipped = np.minimum(np.maximum(middle, low), high)
        if np.add.reduce(clipped * (clipped - middle)) > 0:
            left = middle
        else:
            right = middle
    return np.ldexp(np.clip(right, low, high), unit)


def inclusion_probabilities(
    weights: Array, k: int, *, floor: float = 0.0, cap: float = math.inf
) -> Array:
    """π = clip(λ·w, floor·k/L, min(1, cap·k/L)) with λ such that Σπ = k.

    A layer of weight 0 gets the floor. Only what all other layers leave, each of them at the cap,
    is shared equally among those of weight 0.

    Raises
    ------
    ProbabilitiesError
        When no λ gives Σπ = k, or a layer could never be drawn.
    """
    n = len(weights)
    if not (floor >= 0 and cap >= 0):
        raise ProbabilitiesError(
            f"floor is {floor!r} and cap {cap!r}: expected numbers that are not negative."
        )
    lower, upper = min(1.0, floor * k / n), min(1.0, cap * k / n)
    if not 1 <= k <= n or n * lower > k * (1 + 1e-12) or n * upper < k * (1 - 1e-12):
        raise ProbabilitiesError(
            f"no probabilities between {lower:.4g} and {upper:.4g} for {n} layers sum to {k}: "
            "choose floor ≤ 1 ≤ cap and at most as many activated layers as there are."
        )
    pi = allocate(weights, k, lower, upper)
    if not (pi > 0).all():
        raise ProbabilitiesError(
            f"layer {int(np.argmin(pi))} would never be drawn: use a floor or a mix above 0."
        )
    return pi


def allocate(
    weights: Array, total: float, lower: float, upper: float, costs: Array | None = None
) -> Array:
    """Share `total` out in proportion to the weights, between bounds.

    clip(λ·w, lower, upper) with λ such that the sum is `total`: the one engine behind whatever is
    budgeted over layers. Shares of weight 0 stay at `lower` as long as the others can take the
    rest, and are equal.

    Parameters
    ----------
    weights
        Shape (n,), finite and not negative; of any size.
    total
        Between Σcost·lower and Σcost·upper.
    lower, upper
        Bounds of every share.
    costs
        What one of each share costs of `total`, shape (n,), above 0; None is 1 for all. Shares are
        in proportion to the weights all the same, and Σ cost·share is `total`.

    Returns
    -------
    ndarray
        Shape (n,); its cost is `total` up to rounding, which is checked.

    Raises
    ------
    ProbabilitiesError
        When weights are not finite or negative, or no shares between the bounds sum to `total`.
    """
    weights = np.asarray(weights, dtype=np.float64)
    n = len(weights)
    if not (weights >= 0).all() or not np.isfinite(weights).all():
        raise ProbabilitiesError("weights of layers must be finite and not negative.")
    price = np.ones(n) if costs is None else np.asarray(costs, dtype=np.float64)
    if costs is None:
        upper = min(upper, max(total, lower))  # no share exceeds what all of them sum to
    positive = weights > 0
    dear, free = math.fsum(price[positive]), math.fsum(price[~positive])
    if not positive.any() or upper - lower < 1e-15:
        shares = np.full(n, total / (dear + free))
    elif dear * upper + free * lower <= total:
        shares = np.full(n, upper)
        if not positive.all():
            shares[~positive] = (total - dear * upper) / free
    else:
        shares = _proportional(weights, total, lower, upper, price)
    shares = np.clip(shares, lower, upper)
    off = math.fsum(price * shares) - total
    if not abs(off) <= 1e-12 * max(1.0, abs(total)):
        raise ProbabilitiesError(
            f"no shares between {lower:.6g} and {upper:.6g} in proportion to the weights sum to "
            f"{total:g}: they miss it by {off:.3g}."
        )
    return shares


def whole_shares(
    weights: Array, costs: Array, budget: float, *, least: int = 1, most: float = math.inf
) -> NDArray[np.int64]:
    """Whole numbers in proportion to the weights whose cost stays within a budget: ranks.

    The largest λ such that Σ cost·clip(λ·weight, least, most) is within the budget, rounded down;
    what is left goes, one each, to those that lost most by rounding, as far as it goes. Equal
    weights get equal shares: either all of them get one more, or none.

    Parameters
    ----------
    weights
        Shape (n,), above 0 and finite.
    costs
        Shape (n,): what one unit of each share costs, above 0.
    budget
        What all of it may cost.
    least, most
        Bounds of every share.

    Returns
    -------
    ndarray
        Shape (n,). A larger weight never gets a smaller share.

    Raises
    ------
    ProbabilitiesError
        When the least shares are beyond the budget already.
    """
    weights, costs = np.asarray(weights, np.float64), np.asarray(costs, np.float64)
    if not ((weights > 0).all() and np.isfinite(weights).all() and (costs > 0).all()):
        raise ProbabilitiesError("weights and costs of shares must be finite and above 0.")
    smallest = float(costs.sum()) * least
    if smallest > budget:
        raise ProbabilitiesError(
            f"the budget is {budget:,.0f} parameters, but {least} for each already takes "
            f"{smallest:,.0f}: give more, or fewer modules or layers."
        )
    weights = in_units(weights)

    def at(log: float) -> Array:
        return np.clip(np.exp(log) * weights, least, most)

    low, high = -800.0, 700.0
    if float(costs @ at(high)) <= budget:
        return at(high).astype(np.int64)
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if float(costs @ at(middle)) <= budget else (low, middle)
    exact = at(low)
    shares = np.floor(exact * (1 + 1e-9))
    left = budget - float(costs @ shares)
    lost = np.round(exact - shares, 6)
    for part in np.unique(lost[lost > 0])[::-1]:
        group = lost == part
        if float(costs[group].sum()) > left:
            break
        shares[group] += 1
        left -= float(costs[group].sum())
    return shares.astype(np.int64)


def _proportional(weights: Array, total: float, lower: float, upper: float, price: Array) -> Array:
    """Shares where some λ gives the total. ln λ is found among its breakpoints, then exactly."""
    with np.errstate(divide="ignore"):
        logs, low, high = np.log(weights), np.log(lower), np.log(upper)
    # Below ln λ = `leaves` a share is at its lower bound, from `arrives` on at its upper one.
    # A share of weight 0 never leaves it.
    leaves, arrives = (
        np.subtract(bound, logs, where=weights > 0, out=np.full(len(weights), np.inf))
        for bound in (low, high)
    )
    points = np.concatenate([leaves, arrives])
    points = np.sort(points[np.isfinite(points)])

    def shares_at(point: float) -> Array:
        return np.exp(np.maximum(np.minimum(point + logs, high), low))

    first, last = 0, len(points) - 1
    while first < last:  # the first breakpoint at which the total is reached
        middle = (first + last) // 2
        if math.fsum(price * shares_at(points[middle])) < total:
            first = middle + 1
        else:
            last = middle
    before = points[first - 1] if first else -math.inf
    # Which shares are free is the same all the way to the breakpoint before.
    inside = (before + points[first]) / 2 if first else points[0] - 1
    shares = np.where(arrives <= inside, upper, lower)
    free = (leaves < inside) & (arrives > inside)
    if free.any():
        relative = weights[free] / weights[free].max()
        rest = total - math.fsum((price * shares)[~free])
        shares[free] = relative * (rest / math.fsum(price[free] * relative))
    return shares


def in_units(scores: Array) -> Array:
    """Scores over the power of two next to the largest: no sum or square can overflow."""
    return np.ldexp(scores, -math.frexp(float(scores.max()))[1])


def apply_control(
    shares: Array,
    control: str | None,
    seed: int,
    scores: Array | None = None,
    costs: Array | None = None,
) -> Array:
    """Give the same shares to other layers, see `CONTROLS`; None leaves them, as ``none`` does.

    Parameters
    ----------
    shares
        Shape (L,).
    control
        ``permuted`` at random, ``reversed`` in rank, or ``uniform``.
    seed
        Of the permutation.
    scores
        Shape (L,); settle the rank of layers with equal shares, the unknown (NaN) in the middle.
    costs
        What one of each share costs, shape (L,): shares then change places only with those that
        cost the same, so that all together cost what they did.

    Raises
    ------
    ProbabilitiesError
        For an unknown control.
    """
    if control not in (None, *CONTROLS):
        raise ProbabilitiesError(
            f"control is {control!r}: expected one of {', '.join(CONTROLS)}."
            + suggest(str(control), CONTROLS)
        )
    if control in ("permuted", "reversed") and costs is not None:
        result = np.array(shares, dtype=np.float64)
        for number, cost in enumerate(np.unique(costs)):
            alike = np.flatnonzero(costs == cost)
            rank = None if scores is None else scores[alike]
            result[alike] = apply_control(result[alike], control, seed + number, rank)
        return result
    if control == "uniform":
        price = np.ones(len(shares)) if costs is None else costs
        return np.full(len(shares), (price * shares).sum() / price.sum())
    if control == "permuted":
        return np.random.default_rng(seed).permutation(shares)
    if control == "reversed":
        rank = np.zeros(len(shares)) if scores is None else scores
        known = np.isfinite(rank)
        rank = np.where(known, rank, np.median(rank[known]) if known.any() else 0.0)
        order = np.lexsort((rank, shares))
        result = np.empty_like(shares)
        result[order] = shares[order[::-1]]
        return result
    return shares


def seed_of_control(control: Control | None, seed: Any, name: str = "seed") -> int:
    """Seed of a control's permutation, 0 where none is given.

    Raises
    ------
    ProbabilitiesError
        For what is no seed, and for one beside the word ``none``, which is what `control` is where
        it was left out: the real thing would be taken for its placebo.
    """
    if seed is None:
        return 0
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise ProbabilitiesError(f"{name} is {seed!r}: expected a whole number from 0.")
    if control == "none":
        raise ProbabilitiesError(
            f"{name} is {seed}, but there is no control whose seed it could be: needs "
            + ("--control permuted." if name.startswith("--") else "control='permuted'.")
        )
    return int(seed)
