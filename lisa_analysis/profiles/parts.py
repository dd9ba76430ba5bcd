"""Parts of a profile: one row, its reliability, and what of it was there before training."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lisa_analysis.profiles.plain_values import to_plain
from lisa_analysis.statistics import Shape

Array = NDArray[np.float64]

# Columns of a row where unknown is NaN; elsewhere it is None.
NUMBERS = ("score", "low", "high", "joint_low", "joint_high", "n_eff", "initial", "rho")


@dataclass(frozen=True)
class Initialisation:
    """How much of a profile was there at step 0.

    Attributes
    ----------
    share
        Share of the spread between groups (layers, embedding, head) that the profile at step 0
        already shows; NaN when the groups do not differ.
    level
        Geometric mean of initial over final score, at most 1.
    explained
        Whether the profile is that of the adapter initialisation.
    expected
        Shape (layers,): norms that PEFT's default initialisation gives by formula (√(r/3) per
        adapted linear map), NaN where it does not apply.
    statement
        The same in words.
    """

    share: float
    level: float
    explained: bool
    expected: Array = field(repr=False, compare=False)
    statement: str


@dataclass(frozen=True)
class StackShape:
    """The shape of one stack of several, an encoder's or a decoder's.

    Attributes
    ----------
    path
        Path of the stack in the model.
    first, last
        Its layers, as the profile numbers them.
    shape
        Its shape over its own depth; layers in it are those of the profile.
    """

    path: str
    first: int
    last: int
    shape: Shape


@dataclass(frozen=True)
class Reliability:
    """Whether the ranking of the layers would come out the same again.

    Attributes
    ----------
    split_half
        Spearman–Brown reliability of odd against even blocks; NaN when there are too few.
    rank_low
        Lower 5 % of Kendall's τ between the profile and its bootstrap samples.
    top_overlap
        Jaccard overlap of the top quarters of the two halves.
    steps_needed
        Further optimizer steps until the reliability is 0.9; 0 when it is, inf when the layers
        do not differ, None when it cannot be said.
    drift
        True when the profile of the second half differs from the first beyond noise and by more
        than `Thresholds.material`, None when the data do not allow to say.
    drift_step
        First recorded step at which a layer's series is seen to have moved, or None.
    divergence, divergence_floor
        Jensen–Shannon divergence between the halves in time and the 95 % level of noise alone.
    enough
        The stopping rule: all of the above good enough to stop collecting.
    """

    split_half: float
    rank_low: float
    top_overlap: float
    steps_needed: float | None
    drift: bool | None
    drift_step: int | None
    divergence: float
    divergence_floor: float
    enough: bool


@dataclass(frozen=True)
class ProfileRow:
    """One layer of a profile; NaN or None is unknown.

    Attributes
    ----------
    layer, name
        Index in the stack (None where the row is no single layer) and name.
    score, low, high
        Score and its interval.
    joint_low, joint_high
        Bounds that hold for all rows at once: what is compared, is compared by these.
    n_eff, steps, visits, zeros
        Effective observations, observations, periods, and observations that were
        exactly zero.
    initial, rho
        Score at step 0, and correlation between neighbouring observations.
    standing
        ``above``, ``below`` or ``within`` the others, ``unknown``, or ``zero`` throughout.
    """

    layer: int | None
    name: str
    score: float
    low: float
    high: float
    joint_low: float
    joint_high: float
    n_eff: float
    visits: int | None
    initial: float
    rho: float
    steps: int | None
    zeros: int | None
    standing: str = "unknown"

    @classmethod
    def of(cls, values: "pd.Series[Any]") -> "ProfileRow":
        """Take one row of `ImportanceProfile.layers` or `outside`."""
        plain: dict[str, Any] = to_plain(values.to_dict())
        for name in NUMBERS:
            plain[name] = float("nan") if plain[name] is None else plain[name]
        return cls(**plain)
