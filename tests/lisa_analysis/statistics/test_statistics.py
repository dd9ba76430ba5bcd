"""The statistics against brute force, closed forms and scipy."""

import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as hs

from lisa_analysis import statistics as st
from lisa_analysis.statistics import autocorrelation, effects, shape

profiles = hs.lists(hs.floats(0.01, 100), min_size=3, max_size=40).map(np.array)


def ar1_series(rng: np.random.Generator, n: int, columns: int, rho: float) -> np.ndarray:
    noise = rng.standard_normal((n, columns))
    noise[1:] *= np.sqrt(1 - rho**2)
    for t in range(1, n):
        noise[t] += rho * noise[t - 1]
    return noise


class TestConcentration:
    @given(profiles)
    def test_gini_is_the_mean_absolute_difference(self, w):
        expected = np.abs(w[:, None] - w).mean() / (2 * w.mean())
        assert st.gini(w) == pytest.approx(expected, abs=1e-12)

    def test_gini_of_the_reference(self):
        # Pure noise of log-sd s gives about s/√π.
        rng = np.random.default_rng(0)
        noise = np.exp(0.1 * rng.standard_normal((4000, 32)))
        assert st.gini(noise).mean() == pytest.approx(0.055, abs=0.002)

    @given(profiles)
    def test_effective_layers_lie_between_one_and_all(self, w):
        p = w / w.sum()
        assert st.effective_layers(w) == pytest.approx(np.exp(scipy.stats.entropy(p)))
        assert 1 <= st.effective_layers(w) <= len(w) + 1e-9

    def test_equal_layers(self):
        w = np.full(20, 3.0)
        assert st.gini(w) == pytest.approx(0)
        assert st.effective_layers(w) == pytest.approx(20)
        assert st.top_share(w) == pytest.approx(0.1)
        assert st.headroom(w) == pytest.approx(1)
        assert st.ends_to_middle(w) == pytest.approx(1)

    def test_one_layer_holds_everything(self):
        w = np.eye(10)[3]
        assert st.gini(w) == pytest.approx(0.9)
        assert st.effective_layers(w) == pytest.approx(1)
        assert st.headroom(w) == pytest.approx(10)

    def test_headroom_is_the_variance_ratio_of_uniform_and_proportional_sampling(self):
        # Estimating Σw from one draw: E[(w/p)²] is n·Σw² when uniform, (Σw)² when proportional.
        w = np.random.default_rng(1).lognormal(size=12)
        uniform, proportional = len(w) * (w**2).sum(), w.sum() ** 2
        assert st.headroom(w) == pytest.approx(uniform / proportional)

    def test_negative_scores_count_as_nothing(self):
        assert st.gini(np.array([-1.0, 1, 1])) == pytest.approx(st.gini(np.array([0.0, 1, 1])))

    def test_a_ramp_also_passes_the_ends_to_middle_ratio(self):
        # The trap of the reference: a monotone e^x gives 1.44.
        assert st.ends_to_middle(np.exp(np.linspace(-1, 1, 32))) == pytest.approx(1.44, abs=0.02)

    def test_ends_and_middle_are_places_in_the_stack(self):
        nan = np.nan
        whole = np.array([4.0, 1, 2, 1, 1, 2, 1, 6])
        assert st.ends_to_middle(whole) == pytest.approx(5 / 1.5)
        # Unknown layers of the middle leave its others; unknown ends leave nothing.
        assert st.ends_to_middle(np.array([4.0, 1, 2, nan, 1, 2, 1, 6])) == pytest.approx(5 / 2)
        for unknown in ([0], [7], [2, 3, 4], range(5), range(8)):
            part = whole.copy()
            part[list(unknown)] = nan
            assert np.isnan(st.ends_to_middle(part)), unknown
        assert np.isnan(st.ends_to_middle(np.array([1.0, 2, 3])))
        # Of longer ends half is enough: LISA may leave a layer of them out.
        deep = np.array([3.0, nan, 5, *np.ones(18), nan, 4, 9])
        assert st.ends_to_middle(deep) == pytest.approx((3 + 5 + 4 + 9) / 4)
        deep[[0, -1]] = nan
        assert np.isnan(st.ends_to_middle(deep))
        both = st.ends_to_middle(np.stack([whole, np.append(whole[:7], nan)]))
        assert both[0] == pytest.approx(5 / 1.5)
        assert np.isnan(both[1])


class TestAutocorrelation:
    def test_block_length_follows_its_formula(self):
        expected = 6 ** (1 / 3) * (0.8 / 0.36) ** (2 / 3) * 1000 ** (1 / 3)
        assert st.block_length(1000, 0.8) == int(np.ceil(expected))
        assert st.block_length(1000, 0.0) == 1
        assert st.block_length(40, 0.99) == 10
        assert st.block_length(3, 0.5) == 1

    def test_intraclass_correlation_is_the_planted_one(self):
        rng = np.random.default_rng(6)
        clusters = np.repeat(np.arange(400), 10)
        shared = np.repeat(rng.standard_normal((400, 4)), 10, axis=0)
        values = np.sqrt(0.3) * shared + np.sqrt(0.7) * rng.standard_normal((4000, 4))
        assert st.intraclass_correlation(values, clusters) == pytest.approx(0.3, abs=0.03)

    def test_intraclass_correlation_without_repeats_is_one(self):
        assert st.intraclass_correlation(np.ones((4, 2)), np.zeros(4, dtype=int)) == 1.0

    def test_cluster_sums_against_pandas(self):
        import pandas as pd

        rng = np.random.default_rng(7)
        values = rng.standard_normal((50, 3))
        values[rng.random((50, 3)) < 0.3] = np.nan
        labels = rng.integers(0, 6, 50)
        totals, counts = autocorrelation.cluster_sums(values, labels)
        groups = pd.DataFrame(values).groupby(labels)
        np.testing.assert_allclose(totals, groups.sum())
        np.testing.assert_array_equal(counts, groups.count())


class TestEffects:
    def test_balanced_effects_are_means_over_time(self):
        values = np.random.default_rng(8).standard_normal((60, 9))
        fit = st.additive_effects(values)
        np.testing.assert_allclose(fit.layer, values.mean(axis=0), atol=1e-12)
        np.testing.assert_allclose(fit.residuals.sum(axis=0), 0, atol=1e-10)

    @pytest.mark.parametrize("k", [2, 3])
    def test_unbalanced_effects_are_the_least_squares_fit(self, k):
        """Against a dense two-way regression solved by lstsq."""
        rng = np.random.default_rng(9)
        layers, steps = 7, 60
        values = np.full((steps, layers), np.nan)
        for t in range(steps):
            active = rng.choice(layers, k, replace=False)
            values[t, active] = rng.standard_normal(k) + active + np.sin(t)
        fit = st.additive_effects(values)
        t, i = np.nonzero(np.isfinite(values))
        design = np.zeros((len(t), layers + steps))
        design[np.arange(len(t)), i] = 1
        design[np.arange(len(t)), layers + t] = 1
        solution = np.linalg.lstsq(design, values[t, i], rcond=None)[0]
        expected = solution[:layers] + solution[layers:].mean()
        np.testing.assert_allclose(fit.layer, expected, atol=1e-9)
        np.testing.assert_allclose(fit.residuals[t, i], values[t, i] - design @ solution, atol=1e-9)
        assert fit.adjusted == "steps"

    def test_identical_layers_are_equal_whenever_they_were_drawn(self):
        """Early draws saw large gradients; a plain mean would credit the layers drawn early."""
        rng = np.random.default_rng(10)
        trend = np.linspace(3, 0, 200)
        values = np.full((200, 6), np.nan)
        for block in range(20):
            weights = np.array([9, 5, 3, 2, 1, 1]) if block < 10 else np.array([1, 1, 2, 3, 5, 9])
            active = rng.choice(6, 2, replace=False, p=weights / weights.sum())
            values[block * 10 : block * 10 + 10, active] = trend[block * 10 : block * 10 + 10, None]
        naive = np.nanmean(values, axis=0)
        fit = st.additive_effects(values)
        assert np.ptp(naive) > 0.3
        assert np.ptp(fit.layer) < 1e-9

    def test_one_layer_at_a_time_falls_back_to_a_trend(self):
        values = np.full((120, 4), np.nan)
        time = np.arange(120)
        values[time, (time // 5) % 4] = 2 - time / 60
        fit = st.additive_effects(values)
        assert fit.adjusted == "trend"
        assert np.ptp(fit.layer) < 1e-9

    def test_unseen_layers_are_unknown(self):
        values = np.random.default_rng(0).standard_normal((20, 4))
        values[:, 2] = np.nan
        fit = st.additive_effects(values)
        assert np.isnan(fit.layer[2])
        assert np.isfinite(np.delete(fit.layer, 2)).all()
        assert np.isnan(st.additive_effects(np.full((5, 3), np.nan)).layer).all()

    def test_two_islands_of_layers_are_not_compared_by_steps(self):
        values = np.full((40, 4), np.nan)
        values[:20, :2] = 1.0
        values[20:, 2:] = 2.0
        assert st.additive_effects(values).adjusted == "trend"
        assert not effects._connected(np.zeros((3, 3)), np.array([True, True, False]))


class TestBootstrap:
    def test_block_totals_keep_rows_together(self):
        rows = np.arange(40.0)
        both = np.stack([rows, 2 * rows], axis=1)
        totals = st.block_totals(both, 7, np.random.default_rng(0), 50)
        np.testing.assert_allclose(totals[:, 1], 2 * totals[:, 0])

    def test_block_totals_have_the_circular_block_variance(self):
        """Closed form: n/b independent blocks, each a uniform draw of the n circular ones."""
        series = ar1_series(np.random.default_rng(1), 60, 1, 0.7)
        series -= series.mean(axis=0)
        length = 6
        wrapped = np.concatenate([series, series])[:, 0]
        blocks = np.array([wrapped[i : i + length].sum() for i in range(60)])
        totals = st.block_totals(series, length, np.random.default_rng(2), 40_000)
        assert totals.var() == pytest.approx(10 * blocks.var(), rel=0.03)

    def test_every_row_is_drawn_equally_often_whatever_the_length(self):
        for length in (1, 4, 7):
            totals = st.block_totals(np.eye(10), length, np.random.default_rng(3), 20_000)
            assert totals.sum(axis=1) == pytest.approx(10)
            assert totals.mean(axis=0) == pytest.approx(np.ones(10), abs=0.05)

    def test_cluster_totals_draw_whole_intervals(self):
        clusters = np.repeat(np.arange(8), 5)
        totals = st.cluster_totals(np.eye(40), clusters, np.random.default_rng(4), 200)
        for start in range(0, 40, 5):
            assert (totals[:, start : start + 5] == totals[:, [start]]).all()
        assert totals.sum(axis=1) == pytest.approx(40)

    @pytest.mark.parametrize("probability", [0.9, 0.975, 0.995])
    def test_t_quantile_against_scipy(self, probability):
        degrees = np.array([1, 2, 3, 5, 10, 30, 200])
        expected = scipy.stats.t.ppf(probability, degrees)
        np.testing.assert_allclose(st.t_quantile(probability, degrees), expected, rtol=0.03)


class TestShape:
    x = np.linspace(-1, 1, 32)

    def verdict(self, truth, noise=0.02, n=400, seed=0):
        rng = np.random.default_rng(seed)
        estimate = truth + noise * rng.standard_normal(32)
        samples = estimate + noise * rng.standard_normal((n, 32))
        return st.u_shape(estimate, samples, self.x, 0.95).verdict

    def test_planted_shapes(self):
        assert self.verdict(0.4 * self.x**2) == "U"
        assert self.verdict(-0.4 * self.x**2) == "inverted U"
        assert self.verdict(0.4 * self.x) == "ramp"
        assert self.verdict(np.zeros(32)) == "undecided"

    def test_a_bent_ramp_is_no_u(self):
        """Curvature alone would call e^x on an exponential bend a U; both arms must turn."""
        assert self.verdict(0.3 * (self.x + 1) ** 2) == "ramp"

    def test_a_u_away_from_the_middle_is_a_u(self):
        assert self.verdict(0.5 * (self.x - 0.3) ** 2) == "U"

    @pytest.mark.parametrize("layer", [0, 15, 31])
    @pytest.mark.parametrize("height", [1.1, -1.1])
    def test_one_layer_makes_no_shape(self, layer, height):
        truth = np.where(np.arange(32) == layer, height, 0.0)
        for seed in range(5):
            assert self.verdict(truth, seed=seed) == "undecided"

    def test_the_layer_that_a_shape_rests_on_is_named(self):
        estimate = np.where(np.arange(32) == 31, 1.1, 0.001 * np.cos(np.arange(32)))
        samples = estimate + 0.02 * np.random.default_rng(0).standard_normal((400, 32))
        assert st.u_shape(estimate, samples, self.x, 0.95).rests_on == 31
        both = 0.4 * self.x + np.where(np.arange(32) == 31, 1.1, 0.0)
        found = st.u_shape(both, samples - estimate + both, self.x, 0.95)
        assert (found.verdict, found.rests_on) == ("ramp", None)

    def test_noise_is_rarely_given_a_shape(self):
        named = sum(self.verdict(np.zeros(32), seed=s) != "undecided" for s in range(200))
        assert named <= 16  # at most 5 % by design, and the material size makes it less

    def test_coefficients(self):
        fit = st.quadratic_fit(1 + 2 * self.x + 3 * self.x**2, self.x)
        np.testing.assert_allclose(fit, [1, 2, 3], atol=1e-12)
        np.testing.assert_allclose(st.two_lines(np.abs(self.x), self.x), [-1, 1], atol=1e-12)
        assert shape.sign(st.Interval(1.0)) == 0

    def test_without_intervals_nothing_is_decided(self):
        assert st.u_shape(self.x**2, None, self.x, 0.95).verdict == "undecided"


class TestStability:
    @given(hs.lists(hs.integers(0, 5), min_size=4, max_size=25), hs.randoms())
    @settings(max_examples=60)
    def test_rank_statistics_against_scipy(self, values, random):
        a = np.array(values, dtype=float)
        b = np.array(random.sample(values, len(values)), dtype=float)
        if np.ptp(a) == 0:
            assert np.isnan(st.kendall_tau(a, b))
            assert np.isnan(st.spearman(a, b))
            return
        assert st.kendall_tau(a, b) == pytest.approx(scipy.stats.kendalltau(a, b)[0], abs=1e-12)
        assert st.spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b)[0], abs=1e-12)
        np.testing.assert_allclose(st.ranks(a), scipy.stats.rankdata(a))

    def test_kendall_tau_of_many_samples(self):
        rng = np.random.default_rng(0)
        a, b = rng.standard_normal((5, 8)), rng.standard_normal(8)
        expected = [scipy.stats.kendalltau(row, b)[0] for row in a]
        np.testing.assert_allclose(st.kendall_taus(a, b), expected)

    def test_kendall_w_is_linear_in_the_mean_spearman(self):
        rng = np.random.default_rng(1)
        table = rng.standard_normal((4, 10))
        pairs = [st.spearman(a, b) for a, b in itertools.combinations(table, 2)]
        assert st.kendall_w(table) == pytest.approx((np.mean(pairs) * 3 + 1) / 4)
        assert st.kendall_w(np.tile(table[0], (3, 1))) == pytest.approx(1)

    def test_jensen_shannon_against_scipy(self):
        from scipy.spatial.distance import jensenshannon

        rng = np.random.default_rng(2)
        p, q = rng.random(9), rng.random(9)
        assert st.jensen_shannon(p, q) == pytest.approx(jensenshannon(p, q) ** 2)
        assert st.jensen_shannon(np.eye(2)[0], np.eye(2)[1]) == pytest.approx(np.log(2))
        rows = np.array([[1.0, 3.0], [0.0, 0.0]])
        np.testing.assert_array_equal(st.jensen_shannon(rows, rows), [0.0, np.nan])
        assert st.jensen_shannon(p, 3 * p) == pytest.approx(0, abs=1e-15)

    def test_spearman_brown_predicts_the_whole_from_halves(self):
        rng = np.random.default_rng(3)
        truth = rng.standard_normal(20_000)
        halves = truth + rng.standard_normal((2, 20_000))
        again = truth + rng.standard_normal((2, 20_000))
        whole = np.corrcoef(halves.mean(axis=0), again.mean(axis=0))[0, 1]
        assert st.spearman_brown(st.pearson(*halves)) == pytest.approx(whole, abs=0.02)
        assert st.spearman_brown(-0.2) == 0

    def test_page_hinkley_finds_a_shift_and_not_noise(self):
        rng = np.random.default_rng(4)
        noise = rng.standard_normal((400, 60))
        assert not any(st.page_hinkley(row, threshold=12.0) for row in noise.T)
        shifted = noise[:, 0] + 2 * (np.arange(400) >= 200)
        alarm = st.page_hinkley(shifted, threshold=12.0)
        assert alarm is not None
        assert 200 < alarm < 240
        down = st.page_hinkley(-shifted, threshold=12.0)
        assert down == alarm

    def test_top_jaccard(self):
        a = np.arange(8.0)
        assert st.top_jaccard(a, a) == 1
        assert st.top_jaccard(a, -a) == 0
