"""Means over seeds against known truth: coverage, joint bounds, missing layers, both scales."""

import numpy as np
import pytest
import scipy.stats

from lisa_analysis.statistics.over_seeds import seed_means

LAYERS = 30
TRUTH = 0.5 * np.linspace(-1, 1, LAYERS) ** 2


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def seeds_of(rng, count, spread, smooth=False):
    """Log-scores of seeds about `TRUTH`, with a level of their own each."""
    noise = rng.standard_normal((count, LAYERS))
    if smooth:  # deviations that go together over depth, ρ = .7
        for layer in range(1, LAYERS):
            noise[:, layer] = 0.7 * noise[:, layer - 1] + np.sqrt(1 - 0.49) * noise[:, layer]
    return TRUTH + spread * noise + rng.standard_normal((count, 1))


def means(values, log=True, **options):
    return seed_means(
        values, log=log, confidence=0.95, rng=np.random.default_rng(0), replicates=400, **options
    )


def centred(values):
    return values - np.nanmean(values)


@pytest.mark.parametrize(("count", "smooth"), [(2, False), (3, False), (3, True), (5, False)])
def test_intervals_hold_the_mean_over_seeds(rng, count, smooth):
    spread = 0.05 * np.exp(0.2 * rng.standard_normal(LAYERS))
    inside, joint = [], []
    for _ in range(120):
        found = means(seeds_of(rng, count, spread, smooth))
        shift = found.effect.mean() - TRUTH.mean()
        truth = TRUTH + shift
        inside.append(((found.low <= truth) & (truth <= found.high)).mean())
        joint.append(((found.joint_low <= truth) & (truth <= found.joint_high)).all())
    assert 0.92 <= np.mean(inside) <= 0.98
    assert np.mean(joint) >= (0.85 if smooth else 0.9)


def test_one_spread_gives_the_pooled_t(rng):
    """Equal variances: Student's t with the degrees of all layers together, by hand."""
    values = seeds_of(rng, 3, 0.1)
    found = means(values, ordered=False)
    relative = values - values.mean(axis=1, keepdims=True)
    pooled = relative.var(axis=0, ddof=1).mean() * LAYERS / (LAYERS - 1)
    half = scipy.stats.t.ppf(0.975, 2 * LAYERS) * np.sqrt(pooled / 3)
    np.testing.assert_allclose(found.effect - values.mean(), centred(relative.mean(axis=0)))
    np.testing.assert_allclose(found.high - found.effect, half, rtol=0.01)


def test_a_level_of_a_seed_changes_nothing(rng):
    values = seeds_of(rng, 3, 0.1)
    found, moved = means(values), means(values + np.array([[0.0], [5.0], [-3.0]]))
    np.testing.assert_allclose(moved.error, found.error)
    np.testing.assert_allclose(centred(moved.effect), centred(found.effect))


def test_layers_that_a_seed_does_not_know(rng):
    values = seeds_of(rng, 3, 0.02)
    values[0, 4] = values[:2, 7] = values[:, 9] = np.nan
    found = means(values)
    assert found.seeds[[3, 4, 7, 9]].tolist() == [3, 2, 1, 0]
    assert found.error[4] == pytest.approx(found.error[3] * np.sqrt(1.5), rel=0.35)
    assert np.isnan(found.low[[7, 9]]).all()
    assert np.isfinite(found.effect[7])
    assert np.isnan(found.effect[9])
    assert abs(centred(found.effect)[4] - centred(TRUTH)[4]) < 0.1


def test_resampled_means_have_the_tail_of_t_for_every_contrast(rng):
    values = seeds_of(rng, 4, 0.1, smooth=True)
    found = seed_means(values, log=True, confidence=0.95, rng=rng, replicates=40_000)
    ends = np.where(np.arange(LAYERS) < 4, 1 / 4, -1 / (LAYERS - 4))
    by_seed = values @ ends
    half = scipy.stats.t.ppf(0.975, 3) * scipy.stats.sem(by_seed)
    assert np.quantile(found.noise @ ends, 0.975) == pytest.approx(half, rel=0.05)


def test_signed_scores_are_averaged_over_their_common_size(rng):
    truth = np.linspace(-1, 3, LAYERS)
    inside = []
    for _ in range(100):
        size = np.exp(rng.standard_normal((4, 1)))
        found = means(size * (truth + 0.1 * rng.standard_normal((4, LAYERS))), log=False)
        scale = (found.effect @ truth) / (truth @ truth)
        inside.append(((found.low <= scale * truth) & (scale * truth <= found.high)).mean())
    assert 0.91 <= np.mean(inside) <= 0.98


def test_two_seeds_do_not_overflow(rng):
    found = means(seeds_of(rng, 2, 3.0))
    assert np.isfinite(np.exp(found.noise)).all()
