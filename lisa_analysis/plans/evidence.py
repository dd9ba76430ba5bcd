"""What a profile lets a plan rest on: scores with bounds, or why it must be uniform."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.contract.errors import ProbabilitiesError
from lisa_analysis.statistics.shrinkage import shrunk_scores

if TYPE_CHECKING:
    from lisa_analysis.profiles.profile import ImportanceProfile

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Evidence:
    """Scores of a profile as the stages take them.

    Attributes
    ----------
    score
        Shape (L,); NaN is unknown.
    low, high
        Bounds that hold for all layers at once where the profile has them, else those of each;
        all NaN where the profile is undecided, None where the scores are taken as certain.
    undecided
        Why nothing may follow from the scores, in a few words; empty where it may, or where the
        scores are taken as certain.
    doubt
        The same of a profile whose scores are taken as certain all the same.
    shrunk
        Shape (L,): the scores pulled towards their common level by how little is known of each
        (`shrunk_scores`, from the bounds of each layer by itself); None where they are taken as
        certain, or nothing follows from them.
    alone
        Bounds of each layer by itself, and their confidence, where `shrunk` is made of them.
    """

    score: Array
    low: Array | None
    high: Array | None
    undecided: str
    doubt: str = ""
    shrunk: Array | None = None
    alone: tuple[Array, Array, float] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, profile: "ImportanceProfile", use_intervals: bool = True) -> "Evidence":
        """Read a profile.

        Parameters
        ----------
        profile
            Of any metric, by layer or by any other level.
        use_intervals
            False takes the scores as if they were certain.

        Raises
        ------
        ProbabilitiesError
            For what is no profile, or for an infinite score.
        """
        check_profile(profile)
        frame = profile.layers
        score, low, high = (_column(frame, name) for name in ("score", "low", "high"))
        alone = [low, high]  # bounds of each layer by itself
        joint = _column(frame, "joint_low"), _column(frame, "joint_high")
        if np.isfinite(joint[0]).any():
            low, high = joint
            alone = [np.where(np.isfinite(a), a, b) for a, b in zip(alone, joint, strict=True)]
        if np.isinf(score).any():
            layer = int(np.argmax(np.isinf(score)))
            raise ProbabilitiesError(
                f"layer {layer} has an infinite score: expected finite ones, NaN where it is "
                "unknown."
            )
        zero = list(profile.zero)
        reason = _undecided(profile, low, high, zero)
        if not use_intervals:
            bare = np.isfinite(score) & np.isnan(low) & np.isnan(high)
            bare[zero] = False
            rest = f"{int(bare.sum())} of {len(score)} {profile.by}s have no interval"
            return cls(score, None, None, "", reason or (rest if bare.any() else ""))
        if reason:
            low = high = np.full(len(score), np.nan)
            return cls(np.where(score == 0, np.nan, score), low, high, reason)
        low[zero] = high[zero] = 0.0
        known = np.isfinite(score) & (np.isfinite(low) | np.isfinite(high))
        own = alone[0], alone[1], float(profile.confidence)
        return cls(score, low, high, reason, shrunk=_shrunk(score, known, own), alone=own)

    def of_stack(self, layers: list[int]) -> "Evidence":
        """Return the evidence of the layers of one stack, pulled towards their own common level."""
        score = self.score[layers]
        low, high = (None if b is None else b[layers] for b in (self.low, self.high))
        if self.alone is None or self.shrunk is None:
            return replace(self, score=score, low=low, high=high)
        own = self.alone[0][layers], self.alone[1][layers], self.alone[2]
        shrunk = _shrunk(score, np.isfinite(self.shrunk[layers]), own)
        return replace(self, score=score, low=low, high=high, shrunk=shrunk, alone=own)


def _shrunk(score: Array, known: NDArray[np.bool_], alone: tuple[Array, Array, float]) -> Array:
    """Return the careful scores of the layers that are known; NaN of the others."""
    shrunk = np.full(len(score), np.nan)
    low, high, confidence = alone
    if known.any():
        shrunk[known] = shrunk_scores(score[known], low[known], high[known], confidence)
    return shrunk


def check_profile(profile: Any) -> None:
    """Refuse what is no profile."""
    if not all(hasattr(profile, name) for name in ("layers", "by", "concentration")):
        raise ProbabilitiesError(
            f"plans are made from a profile, got a {type(profile).__name__}: make one with "
            "importance(run), or of scores with ImportanceProfile.from_scores."
        )


def _column(frame: Any, name: str) -> Array:
    if name not in frame:
        return np.full(len(frame), np.nan)
    return np.array(frame[name].to_numpy(dtype=np.float64, copy=True))


def _undecided(profile: "ImportanceProfile", low: Array, high: Array, zero: list[int]) -> str:
    """Why a profile decides nothing; empty where it does."""
    if profile.initialisation is not None and profile.initialisation.explained:
        return "the profile is explained by adapter initialisation"
    score = _column(profile.layers, "score")
    known = np.isfinite(score) & (np.isfinite(low) | np.isfinite(high))
    if not known.any():
        never = len(profile.unseen)
        seen = f"{never} of {profile.n_layers} {profile.by}s were never seen, and " if never else ""
        return f"{seen}the data are insufficient for intervals of the scores"
    apart = {"above", "below", "zero"}
    if "standing" in profile.layers and not apart & set(profile.layers["standing"]):
        return "no layer is known to stand above or below the others"
    # Beside the layer in the middle, as the profile's words are: a band may lie above it and still
    # reach into that of the lowest. Scores below zero count as zero: two of them are not apart.
    # Of an even number the two in the middle: the profile's own median lies between them.
    ordered = np.maximum(np.sort(score[known]), 0.0)
    lower, upper = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    bottom = np.where(np.isfinite(low[known]), low[known], -np.inf)
    top = np.where(np.isfinite(high[known]), high[known], np.inf)
    if zero:
        bottom, top = np.append(bottom, 0.0), np.append(top, 0.0)
    if not ((bottom > lower) | (np.maximum(top, 0.0) < upper)).any():
        return "no layer is known to stand above or below the others"
    return ""
