"""Profiles of one method over seeds: layers that stand out, agreement (numpy, pandas)."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from seeds import CONFIDENCE

import lisa_analysis as la
from lisa_analysis import statistics as st

Array = NDArray[np.float64]


def relative(scores: Array) -> Array:
    """Scores over their geometric mean, shape (layers,); NaN for a layer never seen."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(scores)
    result: Array = np.exp(logs - np.nanmean(logs))
    return result


def layer_table(profiles: Sequence[la.ImportanceProfile]) -> pd.DataFrame:
    """One row per layer: relative score over seeds, its interval, and whether it stands out.

    `stands_out` allows for looking at all layers at once (Bonferroni over the layers). A layer
    that some seed never drew is left out.
    """
    logs = np.log(np.stack([relative(profile.scores) for profile in profiles]))
    known = np.isfinite(logs).all(axis=0)
    logs = logs[:, known]
    n, layers = logs.shape
    mean = logs.mean(axis=0)
    error = logs.std(axis=0, ddof=1) / np.sqrt(n)
    one = float(st.t_quantile(0.5 + CONFIDENCE / 2, n - 1))
    # Layers share one spread, or three seeds would be too few to tell anything: pooled over
    # layers it has layers × (seeds − 1) degrees of freedom.
    pooled = float(np.sqrt(logs.var(axis=0, ddof=1).mean() / n))
    many = float(st.t_quantile(1 - (1 - CONFIDENCE) / (2 * layers), layers * (n - 1)))
    return pd.DataFrame(
        {
            "layer": np.flatnonzero(known),
            "relative": np.exp(mean),
            "low": np.exp(mean - one * error),
            "high": np.exp(mean + one * error),
            "stands_out": np.abs(mean) > many * pooled,
        }
    )


def agreement(profiles: Mapping[str, Sequence[la.ImportanceProfile]]) -> pd.DataFrame:
    """Kendall's τ between rankings: within a method over pairs of seeds, between methods."""
    rows = []
    names = list(profiles)
    for i, a in enumerate(names):
        for b in names[i:]:
            taus = [
                st.kendall_tau(x.scores[known], y.scores[known])
                for p, x in enumerate(profiles[a])
                for q, y in enumerate(profiles[b])
                if (a != b or p < q)
                and (known := np.isfinite(x.scores) & np.isfinite(y.scores)).sum() > 2
            ]
            rows.append({"a": a, "b": b, "mean": np.mean(taus), "low": min(taus),
                         "high": max(taus), "pairs": len(taus)})  # fmt: skip
    return pd.DataFrame(rows)
