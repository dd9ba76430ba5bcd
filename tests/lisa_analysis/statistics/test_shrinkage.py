"""Scores pulled together by their errors: what they are, and what sampling by them costs."""

from pathlib import Path

import numpy as np
import pytest

import lisa_analysis as la
from lisa_analysis.plans.budget import safe_scores
from lisa_analysis.plans.stages import probabilities_from_scores
from lisa_analysis.statistics.shrinkage import in_order, pulled, shrunk_scores

SKEW = Path(__file__).parents[3] / "reports" / "2026-11-23-skew" / "runs"
LAYERS = 30
X = np.linspace(-1, 1, LAYERS)
TWICE, ENDS, SPIKES = np.zeros(LAYERS), np.zeros(LAYERS), -0.2 + 0 * X
TWICE[5] = ENDS[0] = ENDS[29] = np.log(2)
SPIKES[[0, 11, 29]], SPIKES[[1, 2]] = 0.7, 0.35
WORLDS = {"equal": 0 * X, "twice": TWICE, "ends": ENDS, "spikes": SPIKES, "ramp": 0.3 * X,
          "U": np.log(0.2 + X**4)}  # fmt: skip


def bounds(x, error):
    return np.exp(x), np.exp(x - 1.96 * error), np.exp(x + 1.96 * error)


def test_equal_errors_give_the_means_of_james_and_stein():
    """τ² is then the spread less the error, and every score keeps 1 − error²/spread."""
    x, error = np.random.default_rng(0).normal(size=20), 0.4
    kept = 1 - error**2 / x.var(ddof=1)
    expected = x.mean() + kept * (x - x.mean())
    np.testing.assert_allclose(pulled(x, np.full(20, error)), expected, rtol=1e-9)


def test_means_solve_the_equation_of_paule_and_mandel():
    rng = np.random.default_rng(1)
    error = rng.uniform(0.1, 1.0, 30)
    x = rng.normal(size=30) + error * rng.normal(size=30)
    mean = pulled(x, error)
    # Two layers tell the level and τ² that all of them must have been pulled by.
    odds = np.linspace(0.01, 5, 200_000)
    weight = 1 / (odds[:, None] + error**2)
    level = (weight * x).sum(axis=1) / weight.sum(axis=1)
    excess = (weight * (x - level[:, None]) ** 2).sum(axis=1) - 29
    best = int(np.argmin(np.abs(excess)))
    expected = level[best] + odds[best] * weight[best] * (x - level[best])
    np.testing.assert_allclose(mean, expected, atol=1e-4)


def test_certain_scores_are_left_alone_and_noise_is_levelled():
    score = np.array([3.0, 1.0, 2.0])
    np.testing.assert_array_equal(pulled(score, np.zeros(3)), score)
    np.testing.assert_allclose(shrunk_scores(score, score, score), score)
    x = 0.1 * np.random.default_rng(2).normal(size=12)
    assert np.ptp(shrunk_scores(*bounds(x, np.full(12, 1.0)))) < 1e-12


def test_order_is_kept_whatever_the_intervals():
    rng = np.random.default_rng(3)
    for _ in range(200):
        x = np.round(rng.normal(size=12), 1)
        found = shrunk_scores(*bounds(x, rng.uniform(0, 2, 12)))
        order = np.argsort(x, kind="stable")
        assert (np.diff(found[order]) >= -1e-12).all()
        assert all(len(set(found[x == value].tolist())) == 1 for value in set(x.tolist()))


def test_pooled_means_are_the_nearest_in_order():
    """Isotonic regression against a quadratic programme."""
    import scipy.optimize

    rng = np.random.default_rng(4)
    values, means = np.arange(7.0), rng.normal(size=7)
    rising = {"type": "ineq", "fun": np.diff}
    nearest = scipy.optimize.minimize(
        lambda y: ((y - means) ** 2).sum(), np.zeros(7), constraints=rising, tol=1e-12
    )
    np.testing.assert_allclose(in_order(values, means), nearest.x, atol=1e-5)


def test_signed_scores_count_from_zero():
    score, low, high = (np.array(v) for v in ([2.0, 0.5, -1.0, 0.0, 3.0],
                                              [1.5, -0.2, -1.4, np.nan, np.nan],
                                              [2.5, 1.2, -0.6, np.nan, 3.5]))  # fmt: skip
    found = shrunk_scores(score, low, high)
    assert found[2] == found[3] == 0.0
    assert found[4] > found[0] > found[1] > 0


def quality(truth, weights):
    """Σ s²/π at the truth, over that of uniform sampling."""
    size = np.exp(2 * truth)
    pi = probabilities_from_scores(weights, k=2).pi
    return (size / pi).sum() * 2 / size.sum() / LAYERS


def sampled(truth, noise, shared, runs):
    """Quality of careful scores, and of the safest in the joint band, over so many runs."""
    forms = np.stack([X, X**2 - 1 / 3, X**3])
    spread = np.sqrt(0.81 * 1.44 * (forms**2).sum(axis=0) + 0.09) if shared else np.ones(LAYERS)
    rng, careful, safest = np.random.default_rng(0), [], []
    for _ in range(runs):
        errors = rng.standard_normal(LAYERS)
        if shared:
            errors = 0.9 * 1.2 * rng.standard_normal(3) @ forms + 0.3 * errors
        stated = noise * spread * np.sqrt(rng.chisquare(20) / 20)
        x = truth + noise * errors
        low, high = x - 3.5 * stated, x + 3.5 * stated
        # A profile in which no layer stands apart is undecided, and gives uniform sampling.
        apart = ((low > np.median(x)) | (high < np.median(x))).any()
        careful.append(quality(truth, shrunk_scores(*bounds(x, 1.06 * stated))) if apart else 1.0)
        safest.append(quality(truth, safe_scores(np.exp(low), np.exp(high))) if apart else 1.0)
    return np.mean(careful), np.mean(safest)


@pytest.mark.parametrize("shared", [False, True], ids=["own errors", "errors smooth over depth"])
@pytest.mark.parametrize("name", WORLDS)
def test_sampling_is_not_worse_than_uniform_and_gains_what_is_there(name, shared):
    """In the mean over runs; equal layers can only lose, and lose 4 parts in 1,000 at most."""
    truth = WORLDS[name]
    for noise in (0.05, 0.15, 0.3):
        careful, safest = sampled(truth, noise, shared, runs=80)
        assert careful <= 1.004
        if name in ("spikes", "U") and noise == 0.15:
            most = 1 - quality(truth, np.exp(truth))
            assert 1 - careful >= 0.65 * most
            assert careful < safest


def test_a_layer_of_twice_the_score_is_drawn_visibly_more():
    """In lora-1 layer 0 had twice the score of the others, and the probability 1.01 k/L."""
    profile = la.importance(la.load(SKEW / "lora-1"))
    made = la.sampling_probabilities(profile, 2)
    pi = np.array(made.inclusion_probabilities) * 15
    score = profile.scores
    assert 0 in profile.above
    assert pi[0] > 1.25
    order = np.argsort(score)
    assert (np.diff(pi[order]) >= -1e-12).all()
    assert made.justified
