"""Intervals hold the truth as often as they say: synthetic AR(1) logs with known profiles."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from lisa_analysis import statistics as st
from lisa_analysis.profiles import verdict as judgement
from lisa_analysis.profiles.thresholds import THRESHOLDS
from lisa_analysis.statistics.estimate import fit_series

LAYERS = 32
X = np.linspace(-1, 1, LAYERS)
TRUTHS = {"U": np.log(0.2 + X**4), "mild": 0.1 * X**2, "flat": 0.0 * X}
FIGURES = {
    "gini": st.gini,
    "cv": st.coefficient_of_variation,
    "headroom": st.headroom,
    "effective_layers": st.effective_layers,
    "top_share": st.top_share,
    "ends_to_middle": st.ends_to_middle,
}


def ar1(rng, n, columns, rho):
    noise = rng.standard_normal((n, columns))
    noise[1:] *= np.sqrt(1 - rho**2)
    for t in range(1, n):
        noise[t] += rho * noise[t - 1]
    return noise


def simulate(truth, rho, n, rng, lisa=None):
    """Log of layer norms: truth + AR(1) noise of sd 0.5 + a common AR(1) course."""
    logs = truth + 0.5 * ar1(rng, n, LAYERS, rho) + 0.3 * ar1(rng, n, 1, 0.9)
    if lisa is None:
        return logs, None
    interval, k = lisa
    seen = np.zeros((n, LAYERS), dtype=bool)
    for start in range(0, n, interval):
        seen[start : start + interval, rng.choice(LAYERS, k, replace=False)] = True
    return np.where(seen, logs, np.nan), np.arange(n) // interval


def coverage(truth, rho, n, repetitions, lisa=None):
    """Share of intervals that hold the truth, by figure, and the verdicts."""
    held, verdicts = defaultdict(list), Counter()
    relative, weights = truth - truth.mean(), np.exp(truth)
    for repetition in range(repetitions):
        rng = np.random.default_rng([repetition, n])
        logs, clusters = simulate(truth, rho, n, rng, lisa)
        fit = fit_series(np.exp(logs), log=True, clusters=clusters, confidence=0.95, rng=rng,
                         replicates=400)  # fmt: skip
        level = fit.effect.mean()
        low, high = np.log(fit.low) - level, np.log(fit.high) - level
        held["layer"].append(((low <= relative) & (relative <= high)).mean())
        found = judgement.concentration(fit, 0.95)
        for name, figure in FIGURES.items():
            interval, value = getattr(found, name), float(figure(weights))
            held[name].append(interval.low - 1e-9 <= value <= interval.high + 1e-9)
        shape = judgement.shape(fit, 0.95, found, THRESHOLDS)
        curvature = st.quadratic_fit(truth, X)[2]
        held["curvature"].append(shape.curvature.low <= curvature <= shape.curvature.high)
        verdicts[shape.verdict] += 1
    return {name: float(np.mean(values)) for name, values in held.items()}, verdicts


# n_eff about 110 in each: the acceptance level of the reference is 0.85 at n_eff >= 100.
CASES = [(0.8, 1000, None), (0.5, 1200, (20, 8))]


@pytest.mark.parametrize(("rho", "n", "lisa"), CASES)
def test_intervals_of_a_u_hold_the_truth(rho, n, lisa):
    held, verdicts = coverage(TRUTHS["U"], rho, n, 40, lisa)
    assert held["layer"] > 0.9
    # 40 repetitions: four standard errors below 0.95 is 0.81.
    assert min(held.values()) > 0.8, held
    assert verdicts == {"U": 40}


@pytest.mark.parametrize(("rho", "n", "lisa"), CASES)
def test_pure_noise_is_called_flat(rho, n, lisa):
    held, verdicts = coverage(TRUTHS["flat"], rho, n, 40, lisa)
    assert verdicts["flat"] >= 36, verdicts
    assert min(held.values()) > 0.8, held


def test_independent_resampling_would_not_hold_the_truth():
    """Why blocks: at ρ = 0.8 the interval for independent steps holds the truth half the time."""
    held = []
    for repetition in range(60):
        rng = np.random.default_rng(repetition)
        logs, _ = simulate(TRUTHS["U"], 0.8, 1000, rng)
        logs -= logs.mean(axis=1, keepdims=True)
        mean, error = logs.mean(axis=0), logs.std(axis=0) / np.sqrt(1000)
        truth = TRUTHS["U"] - TRUTHS["U"].mean()
        held.append((np.abs(mean - truth) < 1.96 * error).mean())
    assert np.mean(held) < 0.6


@pytest.mark.parametrize(("rho", "n"), [(0.95, 200), (0.99, 1000)])
def test_below_25_effective_observations_there_is_no_interval(rho, n):
    rng = np.random.default_rng(0)
    logs, _ = simulate(TRUTHS["U"], rho, n, rng)
    fit = fit_series(np.exp(logs), log=True, clusters=None, confidence=0.95, rng=rng)
    assert np.median(fit.n_eff) < 25
    assert np.isnan(fit.low[fit.n_eff < 25]).all()
    assert fit.samples is None
    assert not judgement.concentration(fit, 0.95).gini.sufficient


def test_effective_size_counts_independent_observations():
    """n_eff is the variance of one observation over that of the mean."""
    rng = np.random.default_rng(1)
    logs, _ = simulate(TRUTHS["flat"], 0.8, 2000, rng)
    fit = fit_series(np.exp(logs), log=True, clusters=None, confidence=0.95, rng=rng)
    assert np.median(fit.n_eff) == pytest.approx(2000 * 0.2 / 1.8, rel=0.1)


def test_a_series_that_is_averaged_first_gives_the_same_scores():
    rng = np.random.default_rng(2)
    logs, _ = simulate(TRUTHS["U"], 0.5, 20_000, rng)
    long = fit_series(np.exp(logs), log=True, clusters=None, confidence=0.95, rng=rng)
    np.testing.assert_allclose(np.log(long.score), logs.mean(axis=0), atol=1e-3)
    # Averaging leaves less correlation than AR(1) at its lag 1: a count on the safe side.
    assert 0.4 < np.median(long.n_eff) / (20_000 / 3) < 1.1


@pytest.mark.slow
@pytest.mark.parametrize("name", TRUTHS)
@pytest.mark.parametrize(
    ("rho", "n", "lisa"),
    [(0.0, 200, None), (0.8, 1000, None), (0.9, 1500, None), (0.5, 4000, (20, 4)), *CASES[1:]],
)
def test_coverage_at_length(name, rho, n, lisa):
    held, verdicts = coverage(TRUTHS[name], rho, n, 200, lisa)
    assert held["layer"] > 0.92, held
    assert min(held.values()) >= 0.85, held
    if name == "flat":
        assert verdicts["flat"] >= 0.93 * 200, verdicts
