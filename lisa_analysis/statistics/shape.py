"""The depth profile in words: U, inverted U, ramp, and single layers above such a course."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.statistics.bootstrap import Interval

Array = NDArray[np.float64]

# A fitted difference below 5 % between two depths is not worth a name.
MATERIAL = 0.05
MIN_LAYERS = 5


@dataclass(frozen=True)
class Shape:
    """Tests of the depth profile on log-scores, x running from −1 (first) to 1 (last layer).

    Attributes
    ----------
    curvature, slope
        Coefficients a₂ and a₁ of the quadratic fit.
    left, right
        Slopes of the two lines that meet in the middle layer.
    verdict
        ``U``, ``U with a spike``, ``inverted U``, ``ramp``, ``spikes``, ``uneven``, ``flat``,
        ``apart``, ``drifting`` or ``undecided``.
    rests_on
        Position among the tested layers of the one without which a U, its inverse or a ramp
        would not hold (the verdict is then not given); None otherwise.
    spikes
        Positions of the layers that the verdict calls spikes.
    """

    curvature: Interval
    slope: Interval
    left: Interval
    right: Interval
    verdict: str
    rests_on: int | None = None
    spikes: tuple[int, ...] = ()


def depth(layers: int) -> Array:
    """Relative depth of every layer, −1 … 1."""
    return np.linspace(-1.0, 1.0, layers) if layers > 1 else np.zeros(layers)


def quadratic_fit(values: Array, x: Array) -> Array:
    """Least-squares coefficients (a₀, a₁, a₂) of values ≈ a₀ + a₁x + a₂x², shape (..., 3)."""
    basis = np.stack([np.ones_like(x), x, x**2], axis=1)
    return np.asarray(np.asarray(values) @ np.linalg.pinv(basis).T)


def two_lines(values: Array, x: Array, split: float = 0.0) -> Array:
    """Slopes left and right of `split`, shape (..., 2) (Simonsohn 2018, interrupted regression)."""
    values = np.asarray(values)
    slopes = []
    for side in (x <= split, x >= split):
        # A side with fewer than two layers (unseen ones are missing) has no slope.
        centred = x[side] - x[side].mean() if side.any() else x[side]
        scale = float(centred @ centred)
        slopes.append((values[..., side] @ centred) / scale if scale > 0 else values[..., 0] * 0)
    return np.stack(slopes, axis=-1)


def u_shape(
    estimate: Array,
    samples: Array | None,
    x: Array,
    confidence: float,
    material: float = MATERIAL,
) -> Shape:
    """Test a log-profile for a U, its inverse and a ramp.

    Parameters
    ----------
    estimate
        Shape (layers,), log-scores of the layers that are known.
    samples
        Shape (replicates, layers), bootstrap samples of it, or None when they are insufficient.
    x
        Depth of these layers in [−1, 1].
    confidence
        Confidence of the verdict as a whole: each of its three questions (U, inverted U, ramp)
        takes a third of the error.
    material
        Fitted relative difference between two depths below which a shape has no name.

    Returns
    -------
    Shape
        ``U`` needs curvature and *both* arms, so that a ramp with a bend does not pass. Every
        shape must hold without any single layer, and a U without the best layer of both arms at
        once: two high ends are no bowl. The other words are left to the caller, who knows which
        layers stand out.
    """
    if len(estimate) < MIN_LAYERS:
        unknown = Interval(float("nan"))
        return Shape(unknown, unknown, unknown, unknown, "undecided")
    if samples is None:
        fit, linear, arms, _ = _coefficients(estimate, x)
        curvature, slope, left, right = (
            Interval(float(v)) for v in (fit[2], linear, arms[0], arms[1])
        )
        return Shape(curvature, slope, left, right, "undecided")
    tail = (1 - confidence) / 6
    found = _test(estimate, samples, x, tail, material)
    if found.verdict == "undecided":
        return found
    rests_on = _indispensable(found, estimate, samples, x, tail, material)
    if rests_on is None and found.verdict != "ramp":
        rests_on = _two_ends(found, estimate, samples, x, tail, material)
    return found if rests_on is None else replace(found, verdict="undecided", rests_on=rests_on)


def above_the_course(estimate: Array, error: Array, x: Array, reach: Array) -> NDArray[np.bool_]:
    """Layers above a smooth course through the others: spikes of a U.

    Parameters
    ----------
    estimate, error, x
        Shape (layers,): log-scores, their standard errors and depths.
    reach
        Shape (layers,): standard errors that a layer must be above.

    Returns
    -------
    ndarray
        Layers whose distance from the quadratic through all the others is beyond what is usual
        among the layers (three times the robust standard deviation) and its own error.
    """
    basis = np.stack([np.ones_like(x), x, x**2], axis=1)
    taken = np.einsum("ij,ji->i", basis, np.linalg.pinv(basis))
    away = (estimate - basis @ quadratic_fit(estimate, x)) / np.maximum(1 - taken, 1e-9)
    usual = 1.4826 * float(np.median(np.abs(away - np.median(away))))
    return np.asarray(away > 3 * usual + reach * error)


def _coefficients(estimate: Array, x: Array) -> tuple[Array, Array, Array, float]:
    """Quadratic fit, slope of the line, slopes of the two arms, and where the arms meet."""
    fit = quadratic_fit(estimate, x)
    vertex = -fit[1] / (2 * fit[2]) if fit[2] else 0.0
    split = float(vertex) if abs(vertex) < 0.8 else 0.0
    return fit, _line(estimate, x), two_lines(estimate, x, split), split


def _test(estimate: Array, samples: Array, x: Array, tail: float, material: float) -> Shape:
    """The three questions, asked of these layers."""
    fit, linear, arms, split = _coefficients(estimate, x)
    fits, sides = quadratic_fit(samples, x), two_lines(samples, x, split)
    curvature = _interval(fit[2], fits[:, 2], tail)
    slope = _interval(linear, _line(samples, x), tail)
    left, right = _interval(arms[0], sides[:, 0], tail), _interval(arms[1], sides[:, 1], tail)
    verdict = "undecided"
    if sign(curvature) and sign(left) == -sign(curvature) and sign(right) == sign(curvature):
        depth_of_arms = min(abs(arms[0]) * (split + 1), abs(arms[1]) * (1 - split))
        if depth_of_arms > material:
            verdict = "U" if sign(curvature) > 0 else "inverted U"
    elif _is_ramp(slope, material):
        verdict = "ramp"
    return Shape(curvature, slope, left, right, verdict)


def _is_ramp(slope: Interval, material: float) -> bool:
    return sign(slope) != 0 and abs(2 * slope.value) > material


def _indispensable(
    found: Shape, estimate: Array, samples: Array, x: Array, tail: float, material: float
) -> int | None:
    """Layer without which the shape does not hold: the one farthest from the median, or None."""
    for layer in np.argsort(-np.abs(estimate - np.median(estimate)), kind="stable"):
        kept = np.arange(len(x)) != layer
        rest = _test(estimate[kept], samples[:, kept], x[kept], tail, material)
        holds = (
            _is_ramp(rest.slope, material) and sign(rest.slope) == sign(found.slope)
            if found.verdict == "ramp"
            else rest.verdict == found.verdict
        )
        if not holds:
            return int(layer)
    return None


def _two_ends(
    found: Shape, estimate: Array, samples: Array, x: Array, tail: float, material: float
) -> int | None:
    """Best layer of all, where the arms do not turn without the best of each; else None."""
    _, _, _, split = _coefficients(estimate, x)
    height = estimate if found.verdict == "U" else -estimate
    best = [
        int(side[np.argmax(height[side])]) for side in map(np.flatnonzero, (x < split, x > split))
    ]
    kept = np.ones(len(x), dtype=bool)
    kept[best] = False
    if kept.sum() < MIN_LAYERS:
        return max(best, key=lambda layer: height[layer])
    rest = _test(estimate[kept], samples[:, kept], x[kept], tail, material)
    return None if rest.verdict == found.verdict else max(best, key=lambda layer: height[layer])


def sign(interval: Interval) -> int:
    """1 or −1 when the interval lies on one side of zero, else 0."""
    if interval.low is None or interval.high is None:
        return 0
    return int(interval.low > 0) - int(interval.high < 0)


def _line(values: Array, x: Array) -> Array:
    centred = x - x.mean()
    with np.errstate(divide="ignore", invalid="ignore"):  # one layer has no slope
        return np.asarray(np.asarray(values) @ centred / (centred @ centred))


def _interval(value: Array | float, samples: Array, tail: float) -> Interval:
    low, high = np.quantile(samples, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))
