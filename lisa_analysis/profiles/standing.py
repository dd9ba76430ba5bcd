"""Which layers stand above or below the others, all of them judged at once."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lisa_analysis import statistics as st
from lisa_analysis.profiles.thresholds import Thresholds
from lisa_analysis.statistics.fit import Fit

Array = NDArray[np.float64]

Stands = Literal["above", "below", "within", "unknown", "zero"]
# Fewer layers than these have no others to stand above.
MIN_LAYERS = 3


@dataclass(frozen=True, eq=False)
class Standing:
    """Masks of shape (layers,): what is known of every layer beside the others.

    A layer stands above when its joint band lies above the median of the known layers, and its
    score by more than `Thresholds.material`. `clear` are those of them that a band so much wider
    still excludes that equal layers are rarely called unequal, and whose score is
    `Thresholds.spike` times the median.
    """

    above: NDArray[np.bool_]
    below: NDArray[np.bool_]
    unknown: NDArray[np.bool_]
    zero: NDArray[np.bool_]
    clear: NDArray[np.bool_]

    @property
    def apart(self) -> NDArray[np.bool_]:
        """Layers that are not within the others."""
        return self.above | self.below

    @property
    def words(self) -> list[Stands]:
        """One of ``above``, ``below``, ``within``, ``unknown`` and ``zero`` for every layer."""
        found: list[Stands] = ["within"] * len(self.above)
        for mask, word in (
            (self.unknown, "unknown"), (self.above, "above"), (self.below, "below"),
            (self.zero, "zero"),
        ):  # fmt: skip
            for layer in np.flatnonzero(mask):
                found[int(layer)] = word  # type: ignore[call-overload]
        return found


def standing_of(fit: Fit, confidence: float, limits: Thresholds) -> Standing:
    """Judge the layers of a fit by its joint band."""
    low, high = (_onto(fit, bound) for bound in (fit.joint_low, fit.joint_high))
    return _standing(fit, fit.effect, low, high, fit.known, _strict(fit, confidence), limits)


def standing_of_parts(
    fit: Fit, confidence: float, limits: Thresholds
) -> tuple[Standing, Standing] | None:
    """Judge the halves of a run each by itself; None where they are not known."""
    parts = fit.parts
    if parts is None:
        return None
    known = np.isfinite(parts.error) & np.isfinite(parts.early) & np.isfinite(parts.late)
    known &= fit.seen
    if not known.any():
        return None
    # Bonferroni over the layers; there are no samples of the halves.
    looks = 1 - (1 - confidence) / (2 * int(known.sum()))
    reach = st.t_quantile(looks, np.where(known, parts.degrees, 1.0)) * parts.error
    strict = np.where(known, 1.3 * reach, np.nan)
    found = [
        _standing(fit, effect, effect - reach, effect + reach, known, strict, limits)
        for effect in (parts.early, parts.late)
    ]
    return found[0], found[1]


def _standing(
    fit: Fit,
    effect: Array,
    low: Array,
    high: Array,
    known: NDArray[np.bool_],
    strict: Array,
    limits: Thresholds,
) -> Standing:
    nothing = np.zeros(len(effect), dtype=bool)
    unknown = ~known & ~fit.zero
    if known.sum() < MIN_LAYERS:
        return Standing(nothing, nothing, unknown, fit.zero, nothing)
    middle = float(np.median(effect[known]))
    with np.errstate(invalid="ignore"):
        material, spike = (_beyond(fit, effect, middle, by)
                           for by in (limits.material, limits.spike - 1))  # fmt: skip
        above = known & (low > middle) & (material > 0)
        below = known & (high < middle) & (material < 0)
        clear = above & (effect - strict > middle) & (spike > 0)
    return Standing(above, below, unknown, fit.zero, clear)


def _beyond(fit: Fit, effect: Array, middle: float, by: float) -> NDArray[np.int64]:
    """1, −1 or 0: above the middle by this share, below it, or neither."""
    if fit.log:
        away, limit = effect - middle, np.log1p(by)
    else:
        away, limit = effect - middle, by * abs(middle)
    return np.asarray((away > limit).astype(np.int64) - (away < -limit))


def _strict(fit: Fit, confidence: float) -> Array:
    """Half-widths that hold for all layers in all but a tenth of the cases that may fail."""
    if fit.noise is None or not fit.known.any():
        return np.full(len(fit.effect), np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        largest = np.abs(fit.noise[:, fit.known] / fit.error[fit.known]).max(axis=1)
    widened = fit.widened if len(fit.widened) else 1.0
    return np.asarray(float(np.quantile(largest, 1 - (1 - confidence) / 10)) * widened * fit.error)


def _onto(fit: Fit, bound: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.log(bound) if fit.log else bound
