"""Profiles over their own means, so that runs of any scale compare."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from lisa_analysis.profiles.profile import ImportanceProfile


def relative_frame(profile: "ImportanceProfile") -> pd.DataFrame:
    """`ImportanceProfile.to_frame` with scores and bounds over the mean of the known layers.

    Scores whose mean is not above zero, as an ablation may have, stay in their own unit;
    ``frame.attrs["relative"]`` says which it is.
    """
    frame = profile.to_frame().copy()
    columns = ["score", "low", "high", "joint_low", "joint_high"]
    columns += [name for name in ("initial",) if name in frame]
    numbers = frame[columns].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
    known = numbers[np.isfinite(numbers[:, 0]), 0]
    mean = float(known.mean()) if len(known) else np.nan
    relative = bool(mean > 0)
    frame[columns] = numbers / mean if relative else numbers
    frame.attrs["relative"] = relative
    return frame


def relative_scores(
    profile: "ImportanceProfile | Sequence[ImportanceProfile]",
) -> pd.DataFrame:
    """Return ``layer`` and ``relative``, the score over the mean of the layers that have one.

    For several profiles of one model their mean, with ``low`` and ``high``, the smallest and the
    largest; a layer that none of them knows is NaN.
    """
    several: Sequence[Any] = profile if isinstance(profile, Sequence) else [profile]
    rows = []
    for item in several:
        score = item.to_frame()["score"].to_numpy(dtype=np.float64, na_value=np.nan)
        known = np.isfinite(score)
        with np.errstate(divide="ignore", invalid="ignore"):
            rows.append(score / (score[known].mean() if known.any() else np.nan))
    table = pd.DataFrame(rows)
    return pd.DataFrame(
        {
            "layer": several[0].to_frame()["layer"],
            "relative": table.mean().to_numpy(),
            "low": table.min().to_numpy(),
            "high": table.max().to_numpy(),
        }
    )
