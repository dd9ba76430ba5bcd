"""Whether two profiles rank the layers alike, and whether they differ beyond noise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lisa_analysis import statistics as st
from lisa_analysis.contract.layers import plain_name, same_layers
from lisa_analysis.profiles.profile import ImportanceProfile
from lisa_analysis.statistics.disattenuation import NoisyTau, noisy_tau

Array = NDArray[np.float64]

PAIRS = 400
# Share of the layers that must have an interval for intervals of an agreement.
_MOST = 0.8
_NAN = float("nan")


@dataclass(frozen=True)
class Agreement:
    """Agreement of two profiles on the layers that both know; NaN or None is unknown.

    Attributes
    ----------
    kendall, kendall_low, kendall_high
        Repeatability: Kendall's τ between the two rankings as they were measured, and an interval
        for its mean over such pairs of measurements. Noise lowers it: two runs of one true
        profile do not reach 1.
    agreement, agreement_low, agreement_high
        Kendall's τ between the true rankings: the same with what the noise of both takes away
        given back (`lisa_analysis.statistics.disattenuation`). Unknown without bootstrap samples,
        and where most of what is seen is noise. Noise is that within runs, or over seeds for
        profiles over seeds.
    reliability
        What the noise leaves of a perfect agreement, on the scale of sin(π τ / 2).
    spearman
        Spearman's rank correlation, as measured.
    top_overlap
        Jaccard overlap of the top quarters.
    divergence, noise_floor
        Jensen–Shannon divergence of the shares, and what noise alone reaches when both have the
        same true profile.
    beyond_noise
        Whether the divergence, of the layers with an interval, is above the floor.
    layers
        Layers that both know; 0 where the two are of different layers.
    """

    kendall: float = _NAN
    kendall_low: float = _NAN
    kendall_high: float = _NAN
    agreement: float = _NAN
    agreement_low: float = _NAN
    agreement_high: float = _NAN
    reliability: float = _NAN
    spearman: float = _NAN
    top_overlap: float = _NAN
    divergence: float = _NAN
    noise_floor: float = _NAN
    beyond_noise: bool | None = None
    layers: int = 0


def agree(
    a: ImportanceProfile, b: ImportanceProfile, *, confidence: float = 0.95, seed: int = 0
) -> Agreement:
    """Compare two profiles of the same layers, of any metric and from anywhere.

    Parameters
    ----------
    a, b
        The profiles.
    confidence, seed
        Of the interval and its bootstrap.
    """
    if not same_layers(a.layers["name"], b.layers["name"]):
        return Agreement()
    known = np.isfinite(a.scores) & np.isfinite(b.scores)
    layers = int(known.sum())
    if layers < 3:
        return Agreement(layers=layers)
    x, y = a.scores[known], b.scores[known]
    positive = bool((x > 0).any() and (y > 0).any())
    divergence = _NAN
    if positive:
        divergence = float(st.jensen_shannon(np.maximum(x, 0), np.maximum(y, 0)))
    tau, floor, beyond = NoisyTau(st.kendall_tau(x, y)), _NAN, None
    # Noise is known of the layers with an interval; where most have one they speak for the rest.
    sure = known & _resampled(a) & _resampled(b)
    enough = sure.sum() >= max(3.0, _MOST * layers)
    if enough and a.samples is not None and b.samples is not None:
        rng = np.random.default_rng(seed)
        x, y, first, second = a.scores[sure], b.scores[sure], a.samples[:, sure], b.samples[:, sure]
        (one, noise_one), (other, noise_other) = _with_noise(x, first), _with_noise(y, second)
        tau = noisy_tau(one, other, noise_one, noise_other, confidence, rng, measured=tau.measured)
        if positive and (x > 0).any() and (y > 0).any():
            rows = rng.integers(0, (len(first), len(second)), size=(PAIRS, 2))
            floor = _noise_floor(x, y, first[rows[:, 0]], second[rows[:, 1]], confidence)
            apart = float(st.jensen_shannon(np.maximum(x, 0), np.maximum(y, 0)))
            beyond = bool(apart > floor)
    x, y = a.scores[known], b.scores[known]
    return Agreement(
        tau.measured, tau.measured_low, tau.measured_high, tau.true, tau.true_low, tau.true_high,
        tau.reliability, st.spearman(x, y), st.top_jaccard(x, y), divergence, floor, beyond, layers,
    )  # fmt: skip


def _resampled(profile: ImportanceProfile) -> NDArray[np.bool_]:
    """Layers with bootstrap samples."""
    if profile.samples is None:
        return np.zeros(len(profile), dtype=bool)
    return np.asarray(np.isfinite(profile.samples).all(axis=0))


def _with_noise(scores: Array, samples: Array) -> tuple[Array, Array]:
    """Scores and deviations of their samples; logarithms where they exist: noise is relative."""
    if (scores > 0).all() and (samples > 0).all():
        scores, samples = np.log(scores), np.log(samples)
    return scores, samples - scores


def _noise_floor(x: Array, y: Array, first: Array, second: Array, confidence: float) -> float:
    """Divergence that noise alone gives when both runs have the same true profile."""
    with np.errstate(divide="ignore", invalid="ignore"):
        middle = np.sqrt(np.maximum(x, 0) / x.sum() * np.maximum(y, 0) / y.sum())
        relative_a, relative_b = first / x, second / y
    first = np.maximum(np.nan_to_num(middle * relative_a), 0)
    second = np.maximum(np.nan_to_num(middle * relative_b), 0)
    known = (first.sum(axis=1) > 0) & (second.sum(axis=1) > 0)  # a draw below zero has no shares
    null = st.jensen_shannon(first[known], second[known])
    return float(np.quantile(null, confidence))


def shares(profiles: Mapping[str, ImportanceProfile]) -> pd.DataFrame:
    """Shares of the total score, layers by the name and in the order of first appearance."""
    columns, known = {}, dict[str, str]()
    for label, profile in profiles.items():
        scores = np.maximum(profile.scores, 0)
        total = np.nansum(scores)
        share = scores / total if total > 0 else np.full(len(scores), np.nan)
        index = [known.setdefault(plain_name(name), name) for name in profile.layers["name"]]
        columns[label] = pd.Series(share, index=index)
    frame = pd.DataFrame(columns, index=list(known.values()))
    return frame.rename_axis("name").reset_index()


def concordance(profiles: Sequence[ImportanceProfile]) -> float:
    """Kendall's W of three or more profiles of the same layers, else NaN."""
    tables = [tuple(map(plain_name, profile.layers["name"])) for profile in profiles]
    if len(tables) < 3 or len(set(tables)) > 1:
        return _NAN
    scores = np.stack([profile.scores for profile in profiles])
    known = np.isfinite(scores).all(axis=0)
    return st.kendall_w(scores[:, known]) if known.sum() > 2 else _NAN


def agreement_square(pairs: pd.DataFrame) -> pd.DataFrame:
    """Turn one row per pair (``run_a``, ``run_b``, ``kendall``) into a symmetric table."""
    names = list(dict.fromkeys([*pairs["run_a"], *pairs["run_b"]]))
    square = pd.DataFrame(np.eye(len(names)), index=names, columns=names)
    for a, b, value in zip(pairs["run_a"], pairs["run_b"], pairs["kendall"], strict=True):
        square.loc[a, b] = square.loc[b, a] = value
    return square
