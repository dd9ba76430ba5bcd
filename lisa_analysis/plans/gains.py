"""What unequal probabilities collect of the scores, beside uniform ones (numpy)."""

import math

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.plans.stacks import Division

Array = NDArray[np.float64]

# What draws by a probe were worth: reports/2026-11-27-sampling.
STUDIED = (
    " On five tasks of small models a probe's draws came to a quarter of the way from uniform ones "
    "to full fine-tuning at strength 3, to a tenth at 1, and did not help on six layers "
    "(docs/steering.md)."
)


def gain(pi: Array, scores: Array, division: Division | None = None) -> float:
    """Mean score of a layer that π draws over that of a uniformly drawn one; NaN without scores.

    Over the layers that have a score; below zero counts as zero. π in proportion to the scores
    gives their spread 1 + CV². Of several stacks the uniform draw takes as many of each.
    """
    known = np.isfinite(scores) & np.isfinite(pi)
    if not (np.maximum(scores[known], 0.0).any() and pi[known].sum() > 0):
        return math.nan
    score = np.maximum(scores, 0.0) / scores[known].max()
    places = (range(len(pi)),) if division is None else division.places
    numbers = (1,) if division is None or len(places) == 1 else division.numbers
    drawn = even = 0.0
    for layers, number in zip(places, numbers, strict=True):
        inside = [i for i in layers if known[i]]
        if inside and pi[inside].sum() > 0:
            drawn += number * float(pi[inside] @ score[inside]) / float(pi[inside].sum())
            even += number * float(score[inside].mean())
    return drawn / even if even > 0 else math.nan


def spread_of(scores: Array, division: Division | None = None) -> float:
    """What π in proportion to the scores would gain: 1 + CV²."""
    return gain(np.maximum(scores, 0.0), scores, division)
