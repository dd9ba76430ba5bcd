"""Scores to shares: order, sums, unknown layers, strength, pools, controls."""

import contextlib
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as hs

from lisa_analysis.contract.errors import ProbabilitiesError
from lisa_analysis.plans.budget import safe_scores
from lisa_analysis.plans.stages import multiples_from_scores, probabilities_from_scores
from lisa_analysis.plans.strength import Strength

NAN = math.nan
POWERS = hs.one_of(hs.just(0.0), hs.floats(0.01, 16))


@hs.composite
def measured(draw):
    """Scores with intervals of any width, some unknown, some zero, some below zero."""
    n = draw(hs.integers(1, 24))
    score = np.array(draw(hs.lists(hs.floats(-2, 100), min_size=n, max_size=n)))
    widths = hs.lists(hs.floats(0, 50), min_size=n, max_size=n)
    low, high = score - draw(widths), score + draw(widths)
    for layer in range(n):
        kind = draw(hs.sampled_from(["known"] * 6 + ["zero", "unseen", "wide"]))
        if kind == "zero":
            score[layer] = 0.0
        if kind == "unseen":
            score[layer] = NAN
        if kind != "known":
            low[layer] = high[layer] = NAN
    return score, low, high


class TestOrder:
    @given(measured(), POWERS, hs.data())
    @settings(max_examples=400, deadline=None)
    def test_known_higher_never_gets_less_and_unknown_gets_the_prior(self, given, power, data):
        score, low, high = given
        n = len(score)
        k = data.draw(hs.integers(1, n))
        made = probabilities_from_scores(score, low, high, k=k, strength=power)
        unknown = np.isnan(low) & (np.isnan(score) | (score != 0))
        assert (made.known == ~unknown).all()
        assert abs(math.fsum(made.pi) - k) < 1e-12 * k
        np.testing.assert_array_equal(made.pi[unknown], k / n)
        for higher, lower in itertools.permutations(np.flatnonzero(~unknown), 2):
            if score[higher] >= score[lower]:
                assert made.pi[higher] >= made.pi[lower] - 1e-12
        above = max(1, power)
        assert (made.pi >= min(1, 0.25 / above * k / n) - 1e-12).all()
        assert (made.pi <= min(1, 4 * above * k / n) + 1e-12).all()

    def test_a_wide_interval_above_narrow_ones_keeps_its_place(self):
        """The safest scores alone give the layer of score 3 less than the one of score 2.5."""
        score, low, high = ([3, 2.5, 1, 1], [1, 2.4, 0.9, 0.9], [9, 2.6, 1.1, 1.1])
        alone = safe_scores(np.array(low), np.array(high))
        assert alone[0] < alone[1]
        made = probabilities_from_scores(score, low, high, k=1)
        assert made.safe[0] == made.safe[1] == pytest.approx(2.4)

    def test_never_more_variance_than_uniform_for_any_truth_in_the_order_of_the_scores(self):
        rng = np.random.default_rng(0)
        tried = 0
        for _ in range(40):
            score = np.sort(rng.random(5) + 0.2)
            low, high = score * (1 - 0.7 * rng.random(5)), score * (1 + 2 * rng.random(5))
            safe = probabilities_from_scores(score, low, high, k=1).safe
            p = safe / safe.sum()
            # Corners of the intervals, and truths within them, where they are in order.
            corners = np.array(list(itertools.product(*zip(low, high, strict=True))))
            inside = low + (high - low) * rng.random((2000, 5))
            for truth in np.concatenate([corners, inside]):
                if (np.diff(truth) >= 0).all():
                    tried += 1
                    assert (truth**2 / p).sum() <= 5 * (truth**2).sum() * (1 + 1e-9)
        assert tried > 2000

    def test_intervals_that_are_in_order_are_left_alone(self):
        low, high = np.array([1.0, 2, 3]), np.array([2.0, 3, 4])
        made = probabilities_from_scores((low + high) / 2, low, high, k=1)
        np.testing.assert_allclose(made.safe, safe_scores(low, high))


class TestUnknown:
    def test_what_the_others_get_does_not_move_an_unknown_layer(self):
        for top in (1.0, 5.0, 500.0):
            score = [1.0, top, NAN, 7.0]
            made = probabilities_from_scores(score, [1, top, NAN, NAN], [1, top, NAN, NAN], k=2)
            assert made.pi[2] == made.pi[3] == 0.5
            assert made.pi[0] + made.pi[1] == pytest.approx(1.0)
            assert np.isnan(made.safe[2:]).all()

    def test_nothing_known_is_uniform(self):
        nothing = np.full(5, NAN)
        assert (probabilities_from_scores(nothing, k=2).pi == 0.4).all()
        assert (probabilities_from_scores([1, 2, 3, 4, 5], nothing, nothing, k=2).pi == 0.4).all()

    def test_a_prior_of_ones_own(self):
        prior = [0.8, 0.6, 0.4, 0.2]
        unseen = probabilities_from_scores([NAN] * 4, k=2, prior=prior)
        np.testing.assert_array_equal(unseen.pi, prior)
        made = probabilities_from_scores([NAN, 1, 1, NAN], k=2, prior=prior, mix=1.0)
        np.testing.assert_allclose(made.pi, prior)
        made = probabilities_from_scores([NAN, 1, 1, NAN], k=2, prior=prior, mix=0.0)
        np.testing.assert_allclose(made.pi, [0.8, 0.5, 0.5, 0.2])
        for wrong in ([0.5] * 3, [0.5, 0.5, 0.5, 0.4], [2.0, 0, 0, 0]):
            with pytest.raises(ProbabilitiesError, match="the prior has"):
                probabilities_from_scores([1, 2, 3, 4], k=2, prior=wrong)

    def test_no_gradient_is_known_and_the_least(self):
        made = probabilities_from_scores([1, 0, 2], [0.9, NAN, 1.8], [1.1, NAN, 2.2], k=1)
        assert made.known.all()
        assert np.argmin(made.pi) == 1
        assert made.safe[1] == 0

    def test_infinite_scores_are_refused_and_infinite_bounds_are_open(self):
        for score in (math.inf, -math.inf):
            with pytest.raises(ProbabilitiesError, match="layer 1 has an infinite score"):
                probabilities_from_scores([1, score], k=1)
        open_ = probabilities_from_scores([1, 2], [0.9, 1.9], [1.1, math.inf], k=1)
        missing = probabilities_from_scores([1, 2], [0.9, 1.9], [1.1, NAN], k=1)
        np.testing.assert_array_equal(open_.pi, missing.pi)
        assert open_.known.all()

    @pytest.mark.parametrize(
        ("scores", "low", "message"),
        [([[1.0]], None, "one number per layer"), ([1.0, 2], [1.0], "low has the shape")],
    )
    def test_shapes_are_refused(self, scores, low, message):
        with pytest.raises(ProbabilitiesError, match=message):
            probabilities_from_scores(scores, low, k=1)


class TestStrength:
    scores = np.exp(np.linspace(-1, 1, 12))

    def made(self, strength, k=3, **options):
        return probabilities_from_scores(self.scores, k=k, strength=strength, **options)

    def test_zero_is_uniform_and_one_is_the_mild_default(self):
        np.testing.assert_allclose(self.made(0).pi, 0.25)
        expected = 0.75 * self.scores / self.scores.sum() + 0.25 / 12
        np.testing.assert_allclose(self.made(1).pi, 3 * expected)

    def test_above_one_mix_and_floor_fall_and_the_cap_rises(self):
        found = Strength.of(4, mix=0.2, floor=0.4, cap=3)
        assert (found.power, found.mix, found.floor, found.cap) == (4.0, 0.05, 0.1, 12.0)
        assert Strength.of(0.5) == Strength(0.5, 0.25, 0.25, 4.0)
        power = (self.scores / self.scores.mean()) ** 4
        mixed = 0.9375 * power / power.sum() + 0.0625 / 12
        made = self.made(4, k=1)
        np.testing.assert_allclose(made.mixed, mixed)
        np.testing.assert_allclose(made.pi, mixed)
        assert made.pi.max() > 4 / 12  # above the cap of strength 1

    def test_a_strong_profile_draws_its_best_nearly_always_and_the_rest_by_the_mix_alone(self):
        pi = self.made(16, k=3).pi
        assert 0.98 < pi.max() <= 1
        np.testing.assert_allclose(pi[0], 0.25 / 16 * 3 / 12, rtol=1e-4)

    @pytest.mark.parametrize("k", [1, 3, 8])
    def test_more_strength_never_collects_less_score(self, k):
        collected = [self.made(s, k=k).pi @ self.scores for s in (0, 0.5, 1, 2, 4, 8, 16)]
        assert (np.diff(collected) >= -1e-12).all()

    def test_gamma_is_the_power_alone(self):
        assert Strength.of(1.0, gamma=2.0) == Strength(2.0, 0.25, 0.25, 4.0)

    @pytest.mark.parametrize("text", ["2", " 2.0"])
    def test_numbers_from_the_command_line(self, text):
        assert Strength.of(text) == Strength.of(2.0)

    @pytest.mark.parametrize(
        "wrong", [-1, 17, NAN, True, None, "pol", "pool=", "pool=0", "pool=-1", "pool=1.5", "x", []]
    )
    def test_what_is_no_strength_is_refused(self, wrong):
        with pytest.raises(ProbabilitiesError, match=r"strength is .*'pool' or 'pool=6'"):
            Strength.of(wrong)

    def test_a_pool_has_no_power(self):
        with pytest.raises(ProbabilitiesError, match="leave gamma out"):
            Strength.of("pool", gamma=2.0)

    @pytest.mark.parametrize("name", ["mix", "floor", "cap"])
    def test_what_has_no_effect_is_refused(self, name):
        for strength in ("pool", "pool=6"):
            with pytest.raises(ProbabilitiesError, match=f"a pool has no {name}, .*leave {name}"):
                Strength.of(strength, **{name: 1.0})
        with pytest.raises(ProbabilitiesError, match=r"strength is 4 and gamma 2\.0: both are"):
            Strength.of(4, gamma=2.0)


class TestPool:
    def test_the_layers_above_the_mean_share_k(self):
        made = probabilities_from_scores([1, 5, 1, 6, 1, 4], k=2, strength="pool")
        np.testing.assert_allclose(made.pi, [0, 2 / 3, 0, 2 / 3, 0, 2 / 3])

    def test_above_the_mean_means_with_the_whole_interval(self):
        score = np.array([1, 5, 1, 6, 1, 4.0])  # mean 3
        low, high = score - [0.5, 1, 0.5, 1, 0.5, 1.5], score + 1
        made = probabilities_from_scores(score, low, high, k=2, strength="pool")
        np.testing.assert_allclose(made.pi, [0, 1, 0, 1, 0, 0])

    def test_the_m_best(self):
        made = probabilities_from_scores([1, 5, NAN, 6, 3, 4], k=2, strength="pool=4")
        np.testing.assert_allclose(made.pi, [0, 0.5, 0, 0.5, 0.5, 0.5])

    @given(measured(), hs.integers(1, 12), hs.data())
    @settings(max_examples=200, deadline=None)
    def test_sum_and_order_or_an_error(self, given, size, data):
        score, low, high = given
        k = data.draw(hs.integers(1, len(score)))
        strength = data.draw(hs.sampled_from(["pool", f"pool={size}"]))
        made = None
        known = np.isfinite(low) | (score == 0)
        worth = known & ~(np.fmax(score, high) <= 0)
        if not (score[known] > 0).any():  # a scale of its own, or nothing
            worth = known
        with contextlib.suppress(ProbabilitiesError):  # fewer than k: see below
            made = probabilities_from_scores(score, low, high, k=k, strength=strength)
        if made is None:
            assert strength == "pool" or min(size, worth.sum()) < max(k, size)
            return
        inside = made.pi > 0
        assert inside.sum() >= k
        assert abs(math.fsum(made.pi) - k) < 1e-12 * k
        assert worth[inside].all()
        np.testing.assert_allclose(made.pi[inside], k / inside.sum())
        if strength != "pool":
            assert inside.sum() == size
            assert score[inside].min() >= np.max(score[~inside & worth], initial=-np.inf)

    @pytest.mark.parametrize(
        ("strength", "k", "message"),
        [
            ("pool", 4, "a pool of 3 of 6 layers that stand above the mean"),
            ("pool=2", 3, "'pool=2': a pool of 2 of 6 layers, but activated_layers is 3"),
            ("pool=7", 2, "6 of 6 layers are known"),
        ],
    )
    def test_fewer_than_k_is_an_error(self, strength, k, message):
        with pytest.raises(ProbabilitiesError, match=message):
            probabilities_from_scores([1, 5, 1, 6, 1, 4], k=k, strength=strength)

    def test_without_any_interval_no_layer_is_known_to_stand_above(self):
        nothing = [NAN] * 3
        with pytest.raises(ProbabilitiesError, match="a pool of 0 of 3 layers"):
            probabilities_from_scores([1, 2, 9], nothing, nothing, k=1, strength="pool")

    def test_flat_scores_have_no_pool(self):
        with pytest.raises(ProbabilitiesError, match="a pool of 0 of 3"):
            probabilities_from_scores([2, 2, 2], k=1, strength="pool")


class TestControls:
    def test_the_worst_layers_of_a_reversed_pool(self):
        score = [1, 5, 2, 6, 3, 4]
        made = probabilities_from_scores(score, k=1, strength="pool=2", control="reversed")
        np.testing.assert_allclose(made.pi, [0.5, 0, 0.5, 0, 0, 0])

    def test_none_has_two_spellings(self):
        score = [1, 5, 2]
        for control in (None, "none"):
            made = probabilities_from_scores(score, k=1, control=control)
            np.testing.assert_array_equal(made.pi, probabilities_from_scores(score, k=1).pi)

    def test_the_permutation_follows_its_seed(self):
        score = np.arange(1.0, 20)
        first, again, other = (
            probabilities_from_scores(score, k=2, control="permuted", seed=seed).pi
            for seed in (3, 3, 4)
        )
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()
        np.testing.assert_array_equal(np.sort(first), np.sort(other))

    def test_an_unknown_control_gets_a_suggestion(self):
        with pytest.raises(ProbabilitiesError, match="Did you mean 'permuted'"):
            probabilities_from_scores([1, 2], k=1, control="permute")


class TestMultiples:
    def test_mean_one_and_bounds_in_their_own_unit(self):
        scores = np.exp(np.linspace(-2, 2, 10))
        made = multiples_from_scores(scores)
        assert made.pi.mean() == pytest.approx(1.0, abs=1e-14)
        assert made.pi.min() >= 0.25
        assert 1 < made.pi.max() <= 4
        np.testing.assert_allclose(multiples_from_scores(scores, strength=0).pi, 1.0)

    def test_unknown_is_one_and_a_pool_has_the_rest_at_zero(self):
        made = multiples_from_scores([1, NAN, 3])
        assert made.pi[1] == 1.0
        made = multiples_from_scores([1, 2, 9, 8], strength="pool")
        np.testing.assert_allclose(made.pi, [0, 0, 2, 2])

    def test_an_open_cap(self):
        made = multiples_from_scores([1, 1, 98], mix=0, floor=0, cap=math.inf)
        np.testing.assert_allclose(made.pi, [0.03, 0.03, 2.94])


def test_the_engine_needs_neither_pandas_nor_torch():
    code = (
        "import sys; from lisa_analysis.plans.stages import probabilities_from_scores as p; "
        "p([1.0, 2.0], k=1); print('pandas' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr
