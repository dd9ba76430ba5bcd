"""Means over seeds against scipy, and variances moderated over layers against known truth."""

import numpy as np
import pytest
import scipy.special
import scipy.stats

from lisa_analysis import statistics as st
from lisa_analysis.statistics.moderation import (
    digamma,
    inverse_trigamma,
    moderated_variance,
    trigamma,
)
from lisa_analysis.statistics.repetitions import Mean, mean_difference, mean_over


class TestMeans:
    def test_a_mean_over_seeds_is_students(self):
        values = np.array([2.1, 2.2, 2.0, 2.3, np.nan])
        found = mean_over(values)
        known = values[:4]
        low, high = scipy.stats.t.interval(0.95, 3, known.mean(), scipy.stats.sem(known))
        assert (found.low, found.high) == pytest.approx((low, high), rel=1e-3)
        assert found.n == 4
        assert f"{found:.2f}" == "2.15 (1.94 … 2.36)"

    def test_ratios_are_averaged_geometrically(self):
        found = mean_over([1.0, 2.0, 4.0], log=True)
        assert found.value == pytest.approx(2)
        assert found.low * found.high == pytest.approx(4)

    def test_two_values_have_no_interval_and_none_have_no_mean(self):
        assert np.isnan(mean_over([1.0, 2.0]).low)
        assert np.isnan(mean_over([]).value)
        assert np.isnan(mean_difference([], [1.0]).value)
        assert np.isnan(mean_difference([1.0, 2.0], [1.0, 2.0, 3.0]).low)

    def test_a_difference_without_pairs_is_welchs(self):
        a, b = [1.0, 1.4, 1.1, 1.2], [1.5, 2.5, 1.0, 2.2, 1.9]
        interval = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval()
        found = mean_difference(a, b)
        assert (found.low, found.high) == pytest.approx(tuple(interval), rel=3e-3)
        assert mean_difference([1.0] * 3, [2.0] * 3) == Mean(-1.0, -1.0, -1.0, 6)


class TestModeration:
    def test_gamma_functions_against_scipy(self):
        x = np.array([0.05, 0.5, 1, 1.5, 3, 7.9, 8, 30, 1e4])
        np.testing.assert_allclose(digamma(x), scipy.special.digamma(x), atol=1e-11)
        np.testing.assert_allclose(trigamma(x), scipy.special.polygamma(1, x), rtol=1e-9)
        for value in (1e-4, 0.1, 1.0, 50.0):
            assert scipy.special.polygamma(1, inverse_trigamma(value)) == pytest.approx(value)

    def test_the_prior_is_found(self, rng):
        """Many layers tell s₀² and d₀ well."""
        layers, d0, s0 = 40_000, 6.0, 0.3
        truth = s0**2 * d0 / rng.chisquare(d0, layers)
        found = moderated_variance(truth * rng.chisquare(4, layers) / 4, np.full(layers, 4))
        assert found.prior == pytest.approx(s0**2, rel=0.03)
        assert found.prior_degrees == pytest.approx(d0, rel=0.08)

    @pytest.mark.parametrize("degrees", [2, 3])
    @pytest.mark.parametrize("d0", [4.0, 20.0, np.inf])
    def test_students_t_covers_with_few_repetitions(self, rng, degrees, d0):
        covered = []
        for _ in range(100):
            truth = np.ones(30) if np.isinf(d0) else d0 / rng.chisquare(d0, 30)
            found = moderated_variance(
                truth * rng.chisquare(degrees, 30) / degrees, np.full(30, degrees)
            )
            t = np.abs(rng.standard_normal(30)) * np.sqrt(truth / found.variance)
            covered.append((t < scipy.stats.t.ppf(0.975, found.degrees)).mean())
        assert 0.92 < np.mean(covered) < 0.97

    def test_a_layer_apart_is_named_and_keeps_its_own(self, rng):
        named, false = 0, 0
        for _ in range(50):
            variance = rng.chisquare(3, 30) / 3
            variance[7] *= 400
            found = moderated_variance(variance, np.full(30, 3))
            named += bool(found.departs[7])
            false += found.departs.sum() - found.departs[7]
            if found.departs[7]:
                assert found.variance[7] == variance[7]
                assert found.degrees[7] == 3
        assert named >= 40
        assert false <= 10

    def test_a_layer_seen_once_has_what_the_others_have(self):
        variance = np.array([1.0, 1.1, 0.9, np.nan, 1.0])
        found = moderated_variance(variance, np.array([2, 2, 2, 0, 2]))
        assert found.variance[3] == pytest.approx(found.prior)
        assert found.degrees[3] == pytest.approx(8)  # all layers together, no more
        nothing = moderated_variance(np.full(3, np.nan), np.zeros(3))
        assert np.isnan(nothing.variance).all()
        assert not nothing.departs.any()

    def test_equal_repetitions_have_no_variance(self):
        found = moderated_variance(np.zeros(5), np.full(5, 2))
        assert found.variance.tolist() == [0.0] * 5
        assert not found.departs.any()


def test_t_quantile_takes_moderated_degrees():
    assert st.t_quantile(0.975, np.array([np.inf, 1e9])) == pytest.approx(1.959964, rel=1e-5)


@pytest.fixture
def rng():
    return np.random.default_rng(3)
