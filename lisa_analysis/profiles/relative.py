"""Profiles over their own means, so that runs of any scale compare."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd


def relative_scores(profile: Any) -> pd.DataFrame:
    """Return ``layer`` and ``relative``, the score over the mean of the layers that have one.

    For several profiles of one model their mean, with ``low`` and ``high``, the smallest and the
    largest; a layer that none of them knows is NaN.
    """
    several = profile if isinstance(profile, Sequence) else [profile]
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
