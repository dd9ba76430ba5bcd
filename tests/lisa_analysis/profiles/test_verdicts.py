"""What a profile says in words: layers by name, spikes, drift, what more costs, and of what."""

from pathlib import Path

import numpy as np
import pytest

import lisa_analysis as la
from lisa_analysis.profiles.sentences import _course
from lisa_analysis.profiles.thresholds import THRESHOLDS
from lisa_analysis.profiles.verdict import judge
from lisa_analysis.statistics import Interval, Shape
from lisa_analysis.statistics.estimate import fit_series
from lisa_analysis.views.headlines import headline
from lisa_analysis.views.terminal import layer_table

SKEW = Path(__file__).parents[3] / "reports" / "2026-11-23-skew" / "runs"

X = np.linspace(-1, 1, 12)
DEEP = np.linspace(-1, 1, 32)


def probed(make_run, monkeypatch, profile, batches=32):
    """Give a run the rows of a probe: batches whose gradients agree on the profile."""
    rng = np.random.default_rng(0)
    values = profile * (1 + 0.2 * rng.standard_normal((batches, len(profile))))
    run = make_run(profile=len(profile), steps=5)

    @la.metrics.metric("linear", "Made up.", id="made_up", rows="batches")
    def made_up(log):
        return np.hstack([values, np.full((batches, 2), 1.0)])

    la.METRICS.remove("made_up")
    return la.importance(run, made_up)


class TestWords:
    @pytest.mark.parametrize("seed", range(4))
    def test_two_high_ends_are_spikes(self, make_run, seed):
        """S8: undecided in 30 of 30, where the data show it clearly."""
        truth = np.ones(32)
        truth[[0, 31]] = 2.0
        profile = la.importance(make_run(profile=truth, steps=200, rho=0.5, seed=seed))
        assert profile.verdict == "spikes"
        assert profile.above == (0, 31)
        assert "Layers 0 and 31 stand above the others" in profile.statement
        assert "not of a course over depth" in profile.statement

    def test_a_bowl_with_a_spike(self, make_run):
        truth = np.exp(0.6 * DEEP**2)
        truth[11] *= 2
        profile = la.importance(make_run(profile=truth, steps=400))
        assert (profile.verdict, profile.shape.spikes) == ("U with a spike", (11,))
        assert "with a spike at layer 11" in profile.statement

    def test_the_spread_is_no_promise(self, make_run):
        """S6: 1 + CV² was called the most that sampling in proportion can gain."""
        profile = la.importance(make_run(profile=np.exp(0.6 * X), steps=100))
        assert "the spread of the scores, 1 + CV², is" in profile.statement
        assert "could gain" not in profile.statement

    def test_an_unknown_layer_is_named(self, make_run):
        draws = [[i % 5, (i + 1) % 5] for i in range(40)] + [[0, 5]]
        run = make_run(method="lisa", steps=410, draws=draws, profile=7)
        profile = la.importance(run)
        assert profile.unknown == (5, 6)
        assert "layers 5 and 6 are unknown" in profile.statement
        assert "Layer 5 has no interval (seen in fewer than 2 periods between two draws)" in (
            profile.statement
        )
        assert profile.concentration.headroom.sufficient

    def test_a_profile_that_drifted_has_no_shape_but_parts(self, make_run):
        def swap(frame):
            late = (frame["step"] > 200) & frame["param_id"].isin([1, 2])
            frame.loc[late, "grad_norm"] *= 4.0
            return frame

        profile = la.importance(make_run(profile=np.exp(0.4 * X**2), steps=400, edit=swap))
        assert profile.verdict == "drifting"
        assert "No shape is named" in profile.statement
        assert "in the second half layer" in profile.statement

    def test_what_more_costs_says_steps_cadence_and_probe(self, make_run):
        truth = np.exp(0.05 * np.random.default_rng(5).standard_normal(24))
        run = make_run(profile=truth, steps=400, every=10, noise=0.3, seed=1)
        text = la.importance(run).statement
        assert "more steps at every=10" in text
        assert "at every=1, or no training but a probe (--config probe, 32 batches" in text
        update = la.importance(run, "update_norm").statement
        assert "--config probe" not in update

    def test_the_batches_are_those_of_the_recipe(self):
        from pathlib import Path

        from lisa_analysis.profiles.cost import PROBE_BATCHES

        recipe = Path(la.__file__).parents[1] / "lisa_train" / "command" / "recipes" / "probe.yaml"
        assert f"batches: {PROBE_BATCHES}\n" in recipe.read_text(encoding="utf-8")


class TestUndecided:
    """The word is kept for what nothing can be said of."""

    def test_a_kept_run_names_its_layers_first(self):
        """29 of 30 layers had tight intervals, and the word was "undecided"."""
        profile = la.importance(la.load(SKEW / "full-1"))
        assert profile.above
        assert profile.verdict != "undecided"
        for text in (profile.statement, headline(profile), layer_table(profile, None)):
            assert "Layers 0 and 29 stand above the others" in " ".join(text.split())
        assert profile.statement.startswith("Layers ")
        assert headline(profile).startswith("Layers ")
        assert profile.to_dict()["verdict"] == profile.verdict

    def test_no_run_of_the_studies_is_undecided_and_names_layers(self):
        for run in sorted(SKEW.parents[1].glob("2026-11-2[34]-*/runs/*")):
            profile = la.importance(la.load(run))
            named = bool(profile.above or profile.below)
            assert named == (profile.verdict not in ("undecided", "flat"))
            assert named == profile.statement.startswith("Layer")
            assert ("stand" in headline(profile)) == named

    def test_weak_evidence_for_layers_has_a_word_of_its_own(self):
        """The joint band names layer 5, the stricter one of shapes does not."""
        rng = np.random.default_rng(4)
        truth = np.zeros(12)
        truth[5] = 0.7
        logs = truth + 0.8 * rng.standard_normal((40, 12))
        fit = fit_series(np.exp(logs), log=True, clusters=None, confidence=0.95, rng=rng)
        found = judge(fit, 0.95, THRESHOLDS, steps=np.arange(40), period=None, rng=rng,
                      stacks=("h",) * 12)  # fmt: skip
        assert found.standing.above.nonzero()[0].tolist() == [5]
        assert found.shape.verdict == "apart"

    def test_nothing_known_is_undecided(self, make_run):
        profile = la.importance(make_run(steps=3, every=1))
        assert profile.verdict == "undecided"
        assert "undecided" in headline(profile)
        assert profile.statement.startswith("The data are insufficient")

    def test_tensors_that_stand_apart_are_named_without_depth(self, make_run):
        truth = np.ones(12)
        truth[3] = 3.0
        profile = la.importance(make_run(profile=truth, steps=200), by="module")
        assert profile.above
        assert profile.verdict == "apart"
        assert " stand" in headline(profile)


class TestEstimand:
    def test_it_is_said_wherever_there_are_intervals(self, make_run, monkeypatch):
        course = la.importance(make_run(steps=100))
        assert "process that this run is one course of" in course.statement
        assert "a change that outlasts the run is part of it" in course.statement
        assert course.to_frame().attrs["estimand"] == course.estimand
        batches = probed(make_run, monkeypatch, np.r_[np.ones(11), 2.0])
        assert "over batches at these weights" in batches.statement
        assert la.importance(make_run(steps=100), "delta_rel").estimand == ""

    def test_a_probe_with_tight_whiskers_is_not_called_undecided(self, make_run, monkeypatch):
        profile = probed(make_run, monkeypatch, np.r_[np.ones(11), 2.0])
        assert 11 in profile.above
        assert profile.verdict == "spikes"
        assert profile.reliability.drift is None


def test_one_steps_noise_is_no_change(make_run):
    """S7: a profile that never changed showed 74 % to 85 % of its spread at the first gradient."""
    shares = [
        la.importance(
            make_run(profile=np.exp(0.3 * DEEP), steps=200, rho=0.5, noise=0.15, seed=seed)
        ).initialisation.share
        for seed in range(8)
    ]
    assert np.mean(shares) > 0.88


def test_the_first_of_a_few_records_is_no_origin_of_their_mean(make_run):
    """Of two records the noise of one is all of their difference: the share was 100 % always."""
    rng = np.random.default_rng(0)
    for every, said in ((200, False), (20, True)):
        run = make_run(profile=np.exp(rng.standard_normal(12)), steps=200, every=every, noise=0.5)
        profile = la.importance(run)
        assert (profile.initialisation is not None) == said, every
        assert ("first gradient" in profile.statement) == said
        assert profile.layers["initial"].notna().all()  # which the report shows all the same


def test_no_single_layer_stands_out_where_others_do_too():
    """The profile over seeds of LoRA names ten layers, and said that "one layer stands out"."""
    shape = Shape(*[Interval(0.0)] * 4, "apart", rests_on=29)
    words = _course(shape, sufficient=True)
    assert words.endswith("the shape that there seems to be does not hold without layer 29")
    assert "stands out" not in words


def test_a_layer_that_is_below_zero_by_itself_alone_is_not_said_to_hurt():
    """Of many layers one is below 0 by chance: the paragraph goes by all of them at once."""
    runs = SKEW.parents[1] / "2026-11-27-sampling/runs/pos/source-ablation"
    profile = la.importance(runs / "s2", "ablation_reset")
    assert (profile.layers["high"] < 0).any()
    assert not (profile.layers["joint_high"] < 0).any()
    assert "all 6 layers cannot be told from nothing" in profile.statement
    assert "hurt the trained model" not in profile.statement
