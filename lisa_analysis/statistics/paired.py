"""What changed from one set of repetitions to another of the same batches (numpy only)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lisa_analysis import statistics as st
from lisa_analysis.statistics import errors as er

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Change:
    """Differences of means over batches, shape (layers,) each; bounds are NaN where unknown.

    Attributes
    ----------
    difference
        Mean afterwards less mean before.
    low, high, joint_low, joint_high
        Bounds of each layer by itself, and of all layers at once (max-t).
    error
        Standard error of `difference`.
    paired
        Whether the differences were taken batch by batch.
    """

    difference: Array
    low: Array
    high: Array
    joint_low: Array
    joint_high: Array
    error: Array
    paired: bool


def change(
    before: Array,
    after: Array,
    *,
    confidence: float,
    rng: np.random.Generator,
    least: float,
    replicates: int = st.bootstrap.REPLICATES,
) -> Change:
    """Differences of the means of layers over batches, with intervals.

    Parameters
    ----------
    before, after
        Shape (batches, layers) each: independent repetitions whose means are compared. With as
        many batches on both sides the difference is taken batch by batch. That holds whether they
        are the same batches or not; of the same ones it is narrower.
    confidence
        Of the bounds.
    rng, replicates
        Of the bootstrap behind the joint band.
    least
        Batches below which there are no bounds.

    Notes
    -----
    Variances are moderated over layers on the scale of the larger of the two means, since layers
    that changed by nothing have no scale of their own. With unequal numbers of batches the
    squared errors of both sides add up, with the degrees of freedom of Welch (1947).
    """
    scale = np.maximum(np.abs(before.mean(axis=0)), np.abs(after.mean(axis=0)))
    scale = np.where(scale > 0, scale, 1.0)
    difference = after.mean(axis=0) - before.mean(axis=0)
    paired = len(before) == len(after)
    sides = [after - before] if paired else [before, after]
    found = [er.of_repetitions(side - side.mean(axis=0), scale) for side in sides]
    squares = np.stack([one.error**2 for one in found])
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.sqrt(squares.sum(axis=0))
        parts = sum(s**2 / one.degrees for s, one in zip(squares, found, strict=True))
        degrees = np.where(error > 0, error**4 / parts, found[0].degrees)
        known = np.isfinite(error) & np.isfinite(degrees) & (min(map(len, sides)) >= least)
    point = joint = np.full(len(scale), np.nan)
    if known.any():
        normal = np.zeros((replicates, len(scale)))
        for side, one in zip(sides, found, strict=True):
            eye = np.eye(len(scale))
            shape = er.deviates(side - side.mean(axis=0), None, one, eye, rng, replicates)
            if shape is not None:
                normal += shape.both * np.nan_to_num(one.error)
        with np.errstate(invalid="ignore", divide="ignore"):
            largest = np.abs(normal / error)[:, known & (error > 0)].max(axis=1, initial=0.0)
        point, joint = er.reaches(
            float(np.quantile(largest, confidence)), np.where(known, degrees, np.inf), confidence
        )
    half, wide = (np.where(known, reach * error, np.nan) for reach in (point, joint))
    return Change(
        difference, difference - half, difference + half, difference - wide, difference + wide,
        error, paired,
    )  # fmt: skip
