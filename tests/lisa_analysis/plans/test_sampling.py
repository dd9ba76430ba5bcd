"""Scores to probabilities: exact sums, feasible bounds, safe scores, controls, the file."""

import contextlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as hs

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError, ProbabilitiesError
from lisa_analysis.plans.sampling import inclusion_probabilities, safe_scores, strengths

X = np.linspace(-1, 1, 12)
KEPT = Path(__file__).parents[3] / "reports" / "2026-11-23-skew" / "runs"
weights = hs.lists(hs.floats(1e-6, 1e6), min_size=1, max_size=60).map(np.array)


@pytest.fixture
def strong(make_run):
    return la.importance(make_run(profile=np.exp(X), steps=200))


class TestInclusionProbabilities:
    @given(weights, hs.data())
    @settings(max_examples=300, deadline=None)
    def test_any_k_is_met_exactly_within_bounds(self, w, data):
        n = len(w)
        k = data.draw(hs.integers(1, n))
        floor = data.draw(hs.floats(0, 1))
        cap = data.draw(hs.floats(1, 50))
        pi = inclusion_probabilities(w, k, floor=floor, cap=cap)
        assert abs(math.fsum(pi) - k) < 1e-12 * max(k, 1)
        assert (pi >= min(1, floor * k / n) - 1e-15).all()
        assert (pi <= min(1, cap * k / n) + 1e-15).all()
        assert (pi > 0).all()

    @given(weights, hs.data())
    @settings(max_examples=100, deadline=None)
    def test_between_the_bounds_pi_is_proportional(self, w, data):
        k = data.draw(hs.integers(1, len(w)))
        pi = inclusion_probabilities(w, k, floor=0.1, cap=3.0)
        lower, upper = min(1, 0.1 * k / len(w)), min(1, 3.0 * k / len(w))
        free = (pi > lower * (1 + 1e-9)) & (pi < upper * (1 - 1e-9))
        assume(free.sum() > 1)
        assert np.ptp(np.log(pi[free] / w[free])) < 1e-9
        # More weight never means a smaller probability.
        order = np.argsort(w)
        assert (np.diff(pi[order]) >= -1e-12).all()

    def test_optimal_client_sampling_closed_form(self):
        """π_i = min(1, c·u_i): the top takes 1, the rest share in proportion."""
        pi = inclusion_probabilities(np.array([10.0, 2, 1, 1]), 2)
        np.testing.assert_allclose(pi, [1, 0.5, 0.25, 0.25], rtol=1e-14)

    def test_the_peaked_example_of_the_reference(self):
        """16 layers, p = .45, .25, …: k·p = 1.8 is infeasible; the target is (1, 1, .143)."""
        p = np.array([0.45, 0.25, *[0.3 / 14] * 14])
        pi = inclusion_probabilities(p, 4)
        np.testing.assert_allclose(pi[:3], [1, 1, 1 / 7], rtol=1e-12)

    def test_bounds_meet_at_uniform(self):
        np.testing.assert_allclose(inclusion_probabilities(X + 2, 3, floor=1, cap=1), 0.25)
        assert inclusion_probabilities(X + 2, 12).tolist() == [1.0] * 12

    @pytest.mark.parametrize(
        ("k", "floor", "cap"), [(0, 0, 4), (13, 0, 4), (2, 1.5, 4), (2, 0, 0.5)]
    )
    def test_infeasible_is_refused(self, k, floor, cap):
        with pytest.raises(ProbabilitiesError, match="sum to"):
            inclusion_probabilities(X + 2, k, floor=floor, cap=cap)

    def test_a_layer_that_could_never_be_drawn_is_refused(self):
        with pytest.raises(ProbabilitiesError, match="layer 1 would never be drawn"):
            inclusion_probabilities(np.array([1.0, 0, 1]), 1)
        with pytest.raises(ProbabilitiesError, match="finite"):
            inclusion_probabilities(np.array([1.0, np.nan]), 1)

    @given(
        hs.lists(
            hs.one_of(hs.just(0.0), hs.floats(0, 1e308), hs.sampled_from([5e-324, 1e-310, 1.0])),
            min_size=1, max_size=40,
        ).map(np.array),
        hs.data(),
    )  # fmt: skip
    @settings(max_examples=400, deadline=None)
    def test_any_weights_give_an_exact_sum_or_an_error(self, w, data):
        """Zeros, subnormal and huge weights: what comes out solves the equation that it states."""
        n = len(w)
        k = data.draw(hs.integers(1, n))
        floor = data.draw(hs.one_of(hs.just(0.0), hs.floats(0.01, 1)))
        cap = data.draw(hs.one_of(hs.just(math.inf), hs.floats(1, 50)))
        if floor * k / n < 1e-300:
            with contextlib.suppress(ProbabilitiesError):  # a layer that would never be drawn
                pi = inclusion_probabilities(w, k, floor=floor, cap=cap)
                assert (pi > 0).all()
                assert abs(math.fsum(pi) - k) < 1e-12 * k
            return
        pi = inclusion_probabilities(w, k, floor=floor, cap=cap)
        assert abs(math.fsum(pi) - k) < 1e-12 * k
        lower, upper = min(1, floor * k / n), min(1, cap * k / n)
        assert ((pi >= lower) & (pi <= upper) & (pi > 0)).all()
        order = np.argsort(w, kind="stable")
        assert (np.diff(pi[order]) >= -1e-12).all()
        free = (pi > lower * (1 + 1e-9)) & (pi < upper * (1 - 1e-9))
        if (w[free] > 0).any():
            assert not (w[free] == 0).any()
            slopes = np.log(pi[free]) - np.log(w[free])
            assert np.ptp(slopes) < 1e-9
            at = slopes.mean()
            with np.errstate(divide="ignore"):
                assert (np.log(w[pi <= lower]) + at < np.log(lower) + 1e-9).all()

    def test_layers_of_weight_zero_share_what_the_others_cannot_take(self):
        pi = inclusion_probabilities(np.array([1.0, 2, 0, 0]), 3, floor=0.25, cap=4)
        np.testing.assert_allclose(pi, [1, 1, 0.5, 0.5])
        pi = inclusion_probabilities(np.array([1.0, 3, 0, 0]), 1, floor=0.25, cap=4)
        np.testing.assert_allclose(pi, [0.875 / 4, 2.625 / 4, 0.0625, 0.0625])

    def test_the_size_of_the_weights_does_not_matter(self):
        for size in (5e-324, 1e-300, 1e300):
            pi = inclusion_probabilities(np.array([1, 2, 4]) * size, 1)
            np.testing.assert_allclose(pi, [1 / 7, 2 / 7, 4 / 7], rtol=1e-12)

    @pytest.mark.parametrize("bounds", [{"floor": math.nan}, {"cap": math.nan}, {"floor": -1.0}])
    def test_bounds_that_are_none_are_refused(self, bounds):
        with pytest.raises(ProbabilitiesError, match="floor is"):
            inclusion_probabilities(X + 2, 2, **bounds)

    def test_infinite_weights_are_refused(self):
        with pytest.raises(ProbabilitiesError, match="finite"):
            inclusion_probabilities(np.array([1.0, np.inf]), 1, floor=0.25)


class TestSafeScores:
    def test_a_bound_at_infinity_is_a_missing_one(self):
        low, score = np.array([1.0, 2.0, 1.0]), np.array([1.0, 2.0, np.inf])
        missing = np.array([1.0, 2.0, np.nan])
        np.testing.assert_array_equal(safe_scores(low, score), safe_scores(low, missing))

    def test_the_fixed_point(self):
        rng = np.random.default_rng(0)
        for _ in range(50):
            low = rng.random(8)
            high = low + rng.random(8)
            c = safe_scores(low, high)
            m = (c**2).sum() / c.sum()
            np.testing.assert_allclose(c, np.clip(m, low, high), rtol=1e-9)

    def test_never_worse_than_uniform_for_any_truth_inside(self):
        """Variance Σ w²/p against uniform n·Σ w², over all corners of the intervals."""
        rng = np.random.default_rng(1)
        for _ in range(30):
            low = rng.random(6) + 0.05
            high = low * (1 + 3 * rng.random(6))
            c = safe_scores(low, high)
            p = c / c.sum()
            for corner in range(2**6):
                w = np.where([corner >> i & 1 for i in range(6)], high, low)
                assert (w**2 / p).sum() <= 6 * (w**2).sum() * (1 + 1e-9)

    def test_against_brute_force(self):
        """P ∝ c minimises the worst variance relative to the best possible, on a fine grid."""
        low, high = np.array([1.0, 0.2]), np.array([1.5, 0.5])
        c = safe_scores(low, high)
        grid = np.linspace(0.01, 0.99, 9801)

        def worst_gap(p):
            corners = [(a, b) for a in (low[0], high[0]) for b in (low[1], high[1])]
            return max((a * a / p + b * b / (1 - p)) / (a * a + b * b) for a, b in corners)

        best = grid[np.argmin([worst_gap(p) for p in grid])]
        assert c[0] / c.sum() == pytest.approx(best, abs=0.02)

    def test_tight_intervals_are_the_scores_and_open_ones_uniform(self):
        w = np.array([1.0, 2, 3])
        np.testing.assert_allclose(safe_scores(w, w), w)
        nothing = np.full(3, np.nan)
        assert np.ptp(safe_scores(nothing, nothing)) == 0

    def test_a_layer_without_an_interval_is_neutral(self):
        c = safe_scores(np.array([1.0, 3, np.nan]), np.array([1.0, 3, np.nan]))
        assert c[0] < c[2] < c[1]
        assert c[2] == pytest.approx((c**2).sum() / c.sum(), rel=1e-9)


class TestPipeline:
    def test_every_stage_is_visible_and_is_what_it_says(self, strong):
        made = la.sampling_probabilities(strong, 3, gamma=2.0, mix=0.1)
        frame = made.to_frame()
        power = (frame["safe"] / frame["safe"].mean()) ** 2
        np.testing.assert_allclose(frame["power"], power)
        np.testing.assert_allclose(frame["mixed"], 0.9 * power / power.sum() + 0.1 / 12)
        expected = inclusion_probabilities(frame["mixed"].to_numpy(), 3, floor=0.25, cap=4.0)
        np.testing.assert_allclose(frame["inclusion_probability"], expected)
        assert frame["safe"].between(frame["low"], frame["high"]).all()

    @pytest.mark.parametrize("k", range(1, 13))
    def test_any_k(self, strong, k):
        made = la.sampling_probabilities(strong, k)
        assert abs(math.fsum(made.inclusion_probabilities) - k) < 1e-12

    def test_gamma_zero_and_full_mix_are_uniform(self, strong):
        for options in ({"gamma": 0.0}, {"mix": 1.0}):
            made = la.sampling_probabilities(strong, 3, **options)
            np.testing.assert_allclose(made.inclusion_probabilities, 0.25)

    def test_insufficient_data_give_uniform_and_say_so(self, make_run):
        profile = la.importance(make_run(profile=np.exp(X), steps=12, rho=0.95))
        made = la.sampling_probabilities(profile, 2)
        assert set(made.inclusion_probabilities) == {2 / 12}
        assert not made.justified
        assert "insufficient" in made.undecided
        assert f"the probabilities are uniform: {made.undecided}" in made.statement
        believed = la.sampling_probabilities(profile, 2, use_intervals=False)
        assert np.ptp(believed.inclusion_probabilities) > 0.1
        assert not believed.justified

    def test_a_flat_profile_is_no_reason_to_leave_uniform(self, make_run):
        made = la.sampling_probabilities(la.importance(make_run(profile=12, steps=300)))
        assert not made.justified
        assert made.statement.startswith("The evidence does not justify leaving uniform")

    def test_a_strong_profile_is(self, strong):
        made = la.sampling_probabilities(strong)
        assert made.justified
        assert made.inclusion_probabilities[-1] > 2 * made.inclusion_probabilities[0]
        assert "permuted control" in made.statement

    @pytest.mark.parametrize(
        "options",
        [{"gamma": 0.0}, {"mix": 1.0}, {"cap": 1.0}, {"floor": 1.0}, {"activated_layers": 12}],
    )
    def test_settings_that_make_any_profile_uniform_are_not_justified_by_it(self, strong, options):
        made = la.sampling_probabilities(strong, **options)
        assert np.ptp(made.inclusion_probabilities) < 1e-9
        assert not made.justified
        assert "make the probabilities uniform" in made.statement

    def test_unseen_layers_keep_a_chance(self, make_run):
        run = make_run(method="lisa", steps=20, interval=10, profile=5, draws=[[0, 1], [1, 2]])
        made = la.sampling_probabilities(la.importance(run), 2)
        assert min(made.inclusion_probabilities) > 0
        assert made.scores[3] is None
        assert "never seen" in made.statement

    def test_controls(self, strong):
        plain = la.sampling_probabilities(strong, 3)
        pi = np.array(plain.inclusion_probabilities)
        permuted, reverse, uniform = (
            la.sampling_probabilities(strong, 3, control=control)
            for control in ("permuted", "reversed", "uniform")
        )
        assert sorted(permuted.inclusion_probabilities) == sorted(pi)
        assert permuted.inclusion_probabilities != plain.inclusion_probabilities
        again = la.sampling_probabilities(strong, 3, control="permuted")
        assert again.inclusion_probabilities == permuted.inclusion_probabilities
        other = la.sampling_probabilities(strong, 3, control="permuted", seed=1)
        assert other.inclusion_probabilities != permuted.inclusion_probabilities
        backward = np.array(reverse.inclusion_probabilities)
        assert np.argmax(backward) == np.argmin(pi)
        assert sorted(backward) == sorted(pi)
        np.testing.assert_allclose(uniform.inclusion_probabilities, 0.25)
        assert not permuted.justified
        assert permuted.control == "permuted"

    def test_a_seed_of_no_control_is_refused(self, strong):
        with pytest.raises(LisaError, match=r"seed is 7, but .* needs control='permuted'\."):
            la.sampling_probabilities(strong, 3, seed=7)
        with pytest.raises(LisaError, match="seed is 7"):
            la.sampling_probabilities(strong, 3, control="none", seed=7)
        for wrong in (1.5, -1, True, "1"):
            with pytest.raises(LisaError, match=r"seed is .*: expected a whole number from 0"):
                la.sampling_probabilities(strong, 3, control="permuted", seed=wrong)
        # In a loop over controls one of them is None, said outright.
        assert la.sampling_probabilities(strong, 3, control=None, seed=7).seed == 7

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"activated_layers": 0}, "activated_layers is 0"),
            ({"activated_layers": 13}, "from 1 to 12"),
            ({"activated_layers": True}, "activated_layers is True"),
            ({"gamma": -1}, "gamma is -1"),
            ({"mix": 1.5}, "mix is 1.5"),
            ({"floor": math.nan}, "floor is nan"),
            ({"cap": 0.5}, "cap is 0.5"),
            ({"control": "shuffled"}, "control is 'shuffled'"),
        ],
    )
    def test_bad_settings(self, strong, options, message):
        with pytest.raises(ProbabilitiesError, match=message):
            la.sampling_probabilities(strong, **options)

    def test_other_levels_are_refused(self, make_run):
        with pytest.raises(ProbabilitiesError, match="by layer"):
            la.sampling_probabilities(la.importance(make_run(steps=9), by="kind"))


class TestLayersThatCountAsZero:
    """Below zero, or no gradient at all: the sum is kept, and the file says what happened."""

    def scores(self, *values, **bounds):
        return la.ImportanceProfile.from_scores(values, **bounds)

    def test_scores_below_zero_without_mix_keep_the_sum(self):
        """Sum 2.375 for k = 3 before: the file was written, and refused when it was read."""
        profile = self.scores(1.0, 2.0, -1.0, -2.0)
        made = la.sampling_probabilities(profile, 3, mix=0, use_intervals=False)
        np.testing.assert_allclose(made.inclusion_probabilities, [1, 1, 0.5, 0.5])

    def test_a_layer_that_moved_against_the_loss_is_named(self, make_run):
        def flip(frame):
            frame.loc[frame["param_id"].isin([1, 2, 5, 6]), "descent"] *= -1
            return frame

        run = make_run(profile=8, steps=300, edit=flip, common=0.0)
        profile = la.importance(run, "descent")
        assert profile.layers["high"][0] < 0
        said = "Layers 0, 2 moved against the loss"
        assert said in profile.statement
        made = la.sampling_probabilities(profile, 3)
        assert said in made.statement
        assert "no more than mix and floor give" in made.statement
        least = min(made.inclusion_probabilities)
        assert [made.inclusion_probabilities[i] for i in (0, 2)] == [least, least]

    def test_none_of_them_is_in_a_pool(self):
        profile = self.scores(
            5.0, 4.5, -0.1, 0.0, -3.0, 4.0,
            low=[4, 3.5, -2, 0, -4, 3], high=[6, 5.5, 2, 0, -2, 5],
            names=[f"model.layers.{i}" for i in range(6)],
        )  # fmt: skip
        made = la.sampling_probabilities(profile, 2, strength="pool=4")
        # Layer 2 may be worth something, layer 3 is known to be worth nothing.
        np.testing.assert_allclose(made.inclusion_probabilities, [0.5, 0.5, 0.5, 0, 0, 0.5])
        assert "Never drawn: layers 3, 4." in made.statement
        assert "no more than mix and floor" not in made.statement
        trains = la.export(profile, "freeze", layers=4).statement
        assert "4 of 6 layers train: model.layers.0, model.layers.1, model.layers.2 and" in trains
        for ask in (
            lambda: la.sampling_probabilities(profile, 2, strength="pool=5"),
            lambda: la.export(profile, "peft-layers", layers=5, target_modules="q_proj"),
        ):
            with pytest.raises(
                ProbabilitiesError, match="4 of 6 layers are known to be worth some"
            ):
                ask()

    def test_scores_that_are_all_below_zero_are_ranked(self):
        """A scale of somebody's own, the loss without each layer with a minus for one."""
        profile = self.scores(-3.0, -1.0, -2.0)
        made = la.sampling_probabilities(profile, 1, strength="pool=2", use_intervals=False)
        np.testing.assert_allclose(made.inclusion_probabilities, [0, 0.5, 0.5])

    def test_a_layer_without_gradient_gets_the_least(self, make_run):
        def cut(frame):
            frame.loc[frame["param_id"].isin([3, 4]), "grad_norm"] = 0.0
            return frame

        profile = la.importance(make_run(profile=8, steps=300, edit=cut))
        for believed in (True, False):
            made = la.sampling_probabilities(profile, 2, use_intervals=believed)
            assert np.argmin(made.inclusion_probabilities) == 1
            assert "No gradient reaches layer 1" in made.statement
            assert made.scores[1] == 0
        with pytest.raises(ProbabilitiesError, match="layer 1 would never be drawn"):
            la.sampling_probabilities(profile, 2, mix=0, floor=0)

    def test_infinite_scores_are_refused(self):
        with pytest.raises(LisaError, match=r"scores\[1\] is infinite"):
            self.scores(1.0, math.inf)

    @pytest.mark.parametrize("given", [[1.0, 2.0], np.ones(3), "profile.json", None])
    def test_what_is_no_profile_is_refused_in_words(self, given):
        with pytest.raises(ProbabilitiesError, match="from_scores"):
            la.sampling_probabilities(given)


class TestFile:
    def test_every_file_is_json(self, strong, tmp_path):
        """Python writes and reads Infinity; nobody else does."""
        path = la.sampling_probabilities(strong, cap=math.inf).save(tmp_path / "p.json")

        def no_constant(name):
            raise AssertionError(f"{name} is no JSON")

        record = json.loads(path.read_text("utf-8"), parse_constant=no_constant)
        assert record["cap"] is None
        assert la.SamplingProbabilities.load(path).cap == math.inf

    @pytest.fixture
    def saved(self, strong, tmp_path):
        made = la.sampling_probabilities(strong, 2)
        return made, made.save(tmp_path / "probabilities.json")

    def test_round_trip(self, saved):
        made, path = saved
        assert la.SamplingProbabilities.load(path) == made

    def test_provenance_is_in_the_file(self, saved):
        _, path = saved
        record = json.loads(path.read_text())
        for name in ("schema_version", "model", "layer_names", "activated_layers", "scores",
                     "inclusion_probabilities", "metric", "gamma", "mix", "floor", "cap", "n_eff",
                     "source_runs", "verdict", "created", "statement", "justified"):  # fmt: skip
            assert name in record, name
        assert record["source_runs"] == ["run1"]
        assert record["verdict"] == "ramp"

    def test_unjustified_files_are_written_too(self, make_run, tmp_path):
        profile = la.importance(make_run(steps=5))
        path = la.sampling_probabilities(profile).save(tmp_path / "p.json")
        assert not la.SamplingProbabilities.load(path).justified

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"inclusion_probabilities": [0.5] * 12}, "sum to 6"),
            ({"inclusion_probabilities": [1.0] * 11}, "12 layer names and 11"),
            ({"inclusion_probabilities": [float("nan")] * 12}, "nan for layer 0"),
            ({"inclusion_probabilities": [1.5, *[0.5 / 11] * 11]}, "1.5 for layer 0"),
            ({"inclusion_probabilities": [-0.1, *[2.1 / 11] * 11]}, "-0.1 for layer 0"),
            ({"inclusion_probabilities": ["a"] * 12}, "'a' for layer 0"),
            ({"inclusion_probabilities": [True, *[1 / 11] * 11]}, "True for layer 0"),
            ({"inclusion_probabilities": 3}, "no list inclusion_probabilities"),
            ({"layer_names": None}, "no list layer_names"),
            ({"layer_names": ["x"] * 12}, "not distinct"),
            ({"activated_layers": "2"}, "activated_layers = '2'"),
            ({"scores": [1.0]}, "scores of another length"),
            ({"schema_version": "2.0"}, "schema version '2.0'"),
            ({"schema_version": None}, "schema version None"),
        ],
    )
    def test_broken_files_are_refused_in_one_sentence(self, saved, change, message):
        _, path = saved
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ProbabilitiesError, match=message) as error:
            la.SamplingProbabilities.load(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)

    def test_torn_missing_and_foreign_files(self, saved, tmp_path):
        _, path = saved
        text = path.read_text()
        for content, message in (
            (text[: len(text) // 2], "not complete JSON"),
            ("[1, 2]", "expected an object"),
            ("\x00\xff", "not complete JSON"),
        ):
            path.write_text(content)
            with pytest.raises(ProbabilitiesError, match=message):
                la.SamplingProbabilities.load(path)
        with pytest.raises(ProbabilitiesError, match="does not exist"):
            la.SamplingProbabilities.load(tmp_path / "nowhere.json")
        with pytest.raises(ProbabilitiesError, match="cannot be read"):
            la.SamplingProbabilities.load(tmp_path)

    def test_loading_needs_neither_pandas_nor_torch(self, saved):
        import subprocess
        import sys

        _, path = saved
        code = (
            "import sys; from lisa_analysis.probabilities import SamplingProbabilities as P; "
            f"P.load({str(path)!r}); print('pandas' in sys.modules, 'torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.split() == ["False", "False"], done.stderr

    def test_repr_and_html(self, saved):
        made, _ = saved
        assert len(repr(made)) < 120
        assert "<table" in made._repr_html_()


class TestEvidence:
    """What is known moves, what is unknown stays at its uniform share, and the words agree."""

    NAN = math.nan

    def profile(self, score, low=None, high=None, **options):
        return la.ImportanceProfile.from_scores(score, None, low, high, **options)

    def test_one_unknown_layer_never_silences_the_rest(self):
        score = np.exp(X)
        low, high = score * 0.95, score * 1.05
        low[4] = high[4] = self.NAN
        made = la.sampling_probabilities(self.profile(score, low, high), 3)
        assert made.justified
        assert made.unknown == (4,)
        assert made.undecided == ""
        pi = np.array(made.inclusion_probabilities)
        assert pi[4] == 0.25
        assert (np.diff(np.delete(pi, 4)) > 0).all()
        assert "Unknown, and at its uniform share 0.25: layer 4." in made.statement
        assert made.stages["safe"][4] is made.stages["mixed"][4] is None
        assert made.stages["score"][4] is not None

    def test_no_layer_apart_from_the_others_is_uniform(self):
        score = np.linspace(1, 2, 12)
        made = la.sampling_probabilities(self.profile(score, score - 0.6, score + 0.6), 3)
        assert set(made.inclusion_probabilities) == {0.25}
        assert made.undecided == "no layer is known to stand above or below the others"
        assert not made.justified

    def test_the_joint_band_counts_where_a_profile_has_one(self):
        score = np.array([1.0, 1.3, 1.0, 1.0])
        profile = self.profile(score, score - 0.1, score + 0.1)
        alone = la.sampling_probabilities(profile, 1)
        assert alone.inclusion_probabilities[1] > 0.25
        profile.layers["joint_low"], profile.layers["joint_high"] = score - 0.35, score + 0.35
        together = la.sampling_probabilities(profile, 1)
        assert set(together.inclusion_probabilities) == {0.25}

    def test_a_profile_that_says_that_none_stands_apart_is_believed(self):
        score = np.array([1.0, 1.3, 1.0, 1.0])
        profile = self.profile(score, score - 0.01, score + 0.01)
        assert not la.sampling_probabilities(profile, 1).undecided
        profile.layers["standing"] = ["within", "within", "unknown", "within"]
        made = la.sampling_probabilities(profile, 1)
        assert made.undecided == "no layer is known to stand above or below the others"
        assert set(made.inclusion_probabilities) == {0.25}
        profile.layers["standing"] = ["within", "above", "within", "within"]
        assert la.sampling_probabilities(profile, 1).inclusion_probabilities[1] > 0.25

    def test_a_layer_above_the_middle_gets_more_though_its_band_reaches_into_another(self):
        """Layers 0 and 29 stood above, and "no layer is known to stand above" made π uniform."""
        score = np.array([0.8, 1.0, 1.0, 1.0, 1.5])
        profile = self.profile(score, score - 0.35, score + 0.4)
        assert profile.layers["high"].min() > profile.layers["low"].max()
        made = la.sampling_probabilities(profile, 1)
        assert made.undecided == ""
        assert made.inclusion_probabilities[4] > 0.2
        # A middle below zero counts as zero: a band that reaches zero is not above it.
        away = self.profile(score - 2, score - 2.35, score - 1.6)
        assert la.sampling_probabilities(away, 1).undecided

    @pytest.mark.parametrize("name", ["full-1", "full-2", "lora-1", "lisa-1"])
    def test_what_a_kept_run_names_is_what_is_drawn_more_and_less(self, name):
        profile = la.importance(KEPT / name)
        made = la.sampling_probabilities(profile, 2)
        pi, share = np.array(made.inclusion_probabilities), 2 / 30
        assert profile.above
        assert (pi[list(profile.above)] > share).all()
        assert (pi[list(profile.below)] < share).all()
        assert "no layer is known" not in made.statement

    def test_scores_alone_are_undecided_until_they_are_taken_as_certain(self):
        profile = self.profile([1.0, 2, 3, 4])
        assert la.sampling_probabilities(profile, 1).undecided
        made = la.sampling_probabilities(profile, 1, use_intervals=False)
        assert not made.undecided
        assert not made.justified
        assert "taken as certain, although the data are insufficient" in made.statement

    def test_bare_layers_taken_as_certain_are_said(self):
        score = np.exp(X)
        low, high = score * 0.9, score * 1.1
        low[:2] = high[:2] = self.NAN
        made = la.sampling_probabilities(self.profile(score, low, high), 3, use_intervals=False)
        assert made.unknown == ()
        assert not made.justified
        assert "although 2 of 12 layers have no interval" in made.statement

    def test_a_small_spread_is_followed_and_called_small(self):
        score = np.array([1.0] * 29 + [2.0])
        made = la.sampling_probabilities(self.profile(score, score * 0.98, score * 1.02), 2)
        assert made.inclusion_probabilities[29] > 1.5 * made.inclusion_probabilities[0]
        assert not made.justified
        assert "little is to be had" in made.statement

    def test_all_sources_are_in_the_file(self, tmp_path):
        score = np.exp(X)
        profile = self.profile(score, score * 0.9, score * 1.1, sources=("a", "b", "c"))
        path = la.sampling_probabilities(profile).save(tmp_path / "p.json")
        assert json.loads(path.read_text())["source_runs"] == ["a", "b", "c"]


class TestStrengthOfAProfile:
    @pytest.fixture
    def known(self):
        score = np.exp(X)
        return la.ImportanceProfile.from_scores(score, None, score * 0.97, score * 1.03)

    def test_the_file_holds_what_was_in_force(self, known, tmp_path):
        made = la.sampling_probabilities(known, 2, strength=4)
        assert (made.strength, made.gamma, made.mix, made.floor, made.cap) == (
            4.0, 4.0, 0.0625, 0.0625, 16.0,
        )  # fmt: skip
        assert la.SamplingProbabilities.load(made.save(tmp_path / "p.json")) == made

    def test_zero_is_uniform_and_more_collects_more(self, known):
        gains = [la.sampling_probabilities(known, 2, strength=s).gain for s in (0, 0.5, 1, 2, 4)]
        assert gains[0] == pytest.approx(1.0)
        assert (np.diff(gains) > 0).all()

    def test_gain_and_spread_are_what_they_say(self, known):
        made = la.sampling_probabilities(known, 2)
        score, pi = np.exp(X), np.array(made.inclusion_probabilities)
        assert made.gain == pytest.approx((pi @ score) / (2 * score.mean()))
        assert made.spread == pytest.approx(1 + (score.std() / score.mean()) ** 2)
        alone = la.sampling_probabilities(known, 1, mix=0, floor=0, cap=math.inf,
                                          use_intervals=False)  # fmt: skip
        assert alone.gain == pytest.approx(alone.spread)

    def test_a_pool_round_trip(self, known, tmp_path):
        made = la.sampling_probabilities(known, 2, strength="pool")
        above = np.exp(X) * 0.97 > np.exp(X).mean()
        assert made.never_drawn == tuple(np.flatnonzero(~above).tolist())
        assert made.strength == "pool"
        assert "Never drawn: layers 0, 1" in made.statement
        assert f"{above.sum()} layers share the draws equally" in made.statement
        path = made.save(tmp_path / "p.json")
        assert la.SamplingProbabilities.load(path) == made
        assert json.loads(path.read_text())["cap"] is None

    def test_an_undecided_profile_has_no_pool(self):
        profile = la.ImportanceProfile.from_scores([1.0, 2, 9])
        with pytest.raises(ProbabilitiesError, match=r"undecided .*--ignore-intervals"):
            la.sampling_probabilities(profile, 1, strength="pool=1")
        made = la.sampling_probabilities(profile, 1, strength="pool=1", use_intervals=False)
        assert made.inclusion_probabilities == (0.0, 0.0, 1.0)

    def test_the_table_of_strengths_agrees_with_each(self, known):
        table = strengths(known, 3)
        assert table["strength"].tolist() == ["0", "0.5", "1", "2", "4", "pool"]
        for _, row in table.iterrows():
            made = la.sampling_probabilities(known, 3, strength=row["strength"])
            np.testing.assert_array_equal(row["pi"], made.inclusion_probabilities)
            assert row["gain"] == pytest.approx(made.gain)
            assert row["never_drawn"] == len(made.never_drawn)
            assert row["most"] == max(made.inclusion_probabilities)

    def test_the_table_says_why_there_is_no_pool(self, known):
        table = strengths(la.ImportanceProfile.from_scores([1.0, 2, 9]), 1).set_index("strength")
        assert "undecided" in table["why_not"]["pool"]
        assert table["why_not"]["4"] == ""
        assert "a pool of" in strengths(known, 10)["why_not"].iloc[-1]

    @pytest.mark.parametrize("control", ["none", None])
    def test_no_control_has_two_spellings_and_one_entry(self, known, control, tmp_path):
        made = la.sampling_probabilities(known, 2, control=control)
        assert made.control is None
        assert json.loads(made.save(tmp_path / "p.json").read_text())["control"] is None

    def test_a_control_of_a_pool_is_a_pool(self, known):
        plain, reverse = (
            la.sampling_probabilities(known, 1, strength="pool=3", control=control)
            for control in ("none", "reversed")
        )
        assert plain.never_drawn == tuple(range(9))
        assert reverse.never_drawn == tuple(range(3, 12))
        assert "A reversed control" in reverse.statement
