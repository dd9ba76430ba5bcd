"""Profiles over seeds: of runs, of given scores, and what the kept runs of the studies show."""

import json
from pathlib import Path

import numpy as np
import pytest

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.schema import CONFIG
from lisa_analysis.profiles.across_seeds import over_seeds
from lisa_analysis.statistics import kendall_tau

REPORTS = Path(__file__).parents[3] / "reports"
SKEW = REPORTS / "2026-11-23-skew" / "runs"
SAMPLING = REPORTS / "2026-11-24-learned-sampling" / "runs"
X = np.linspace(-1, 1, 12)


def seeds(method):
    return [SKEW / f"{method}-{seed}" for seed in (1, 2, 3)]


@pytest.fixture
def arm(make_run):
    def make(count=3, **options):
        options = {"profile": np.exp(0.5 * X), "steps": 100} | options
        return [make_run(seed=seed, **options) for seed in range(count)]

    return make


class TestRuns:
    def test_scores_are_geometric_means_over_seeds(self, arm):
        runs = arm()
        profile = la.importance(runs)
        each = np.log([la.importance(run).scores for run in runs])
        np.testing.assert_allclose(np.log(profile.scores), each.mean(axis=0))
        assert profile.sources == tuple(run.run_id for run in runs)
        assert profile.to_frame()["n_eff"].tolist() == [3.0] * 12
        assert profile.sufficient
        assert "Over 3 seeds" in profile.statement
        assert "mean over seeds" in profile.statement

    def test_paths_and_any_metric(self, arm):
        runs = arm()
        profile = la.importance([str(run.path) for run in runs], "delta_rel", by="kind")
        assert profile.by == "kind"
        # The state at the end is one observation of a run, and three over seeds.
        assert np.isnan(la.importance(runs[0], "delta_rel").to_frame()["low"]).all()
        assert profile.to_frame()["low"].notna().all()

    def test_one_run_in_a_list_is_that_run(self, arm):
        [run] = arm(1)
        assert la.importance([run]) == la.importance(run)

    def test_layers_that_stand_out_are_named(self, make_run):
        truth = np.ones(12)
        truth[[3, 11]] = 2.0, 0.4
        runs = [make_run(profile=truth, steps=60, seed=seed) for seed in range(3)]
        text = la.importance(runs).statement
        assert "Layer 3 stands above" in text
        assert "layer 11 below" in text

    def test_equal_layers_do_not_stand_out(self, make_run):
        false = 0
        for study in range(10):
            runs = [make_run(profile=12, steps=30, seed=10 * study + s) for s in range(3)]
            false += "is known to stand apart" not in la.importance(runs).statement
        assert false <= 2

    def test_spread_within_runs_and_between_seeds_is_told_apart(self, make_run):
        """Seeds that differ in truth by 20 %, each measured to about 2 %."""
        rng = np.random.default_rng(5)
        x = np.linspace(-1, 1, 18)  # fewer layers allow for courses that are not there
        runs = [
            make_run(profile=np.exp(0.5 * x + 0.2 * rng.standard_normal(18)), steps=150, seed=s)
            for s in range(4)
        ]
        found = la.importance(runs).seeds
        spread = found.spread
        assert list(spread) == ["layer", "name", "seeds", "within", "between", "total"]
        assert np.sqrt((spread["between"] ** 2).mean()) == pytest.approx(0.2, rel=0.3)
        assert np.sqrt((spread["within"] ** 2).mean()) == pytest.approx(0.2 / np.sqrt(150), rel=0.7)
        assert found.ratio > 4
        assert "speaks of its own seed only" in found.statement
        same = la.importance([make_run(profile=np.exp(x), steps=150, seed=s) for s in range(4)])
        assert 0.6 < same.seeds.ratio < 1.4
        assert "speaks of its own seed only" not in same.statement

    def test_agreement_of_seeds(self, arm):
        runs = arm(noise=1.0, steps=40)
        scores = [la.importance(run).scores for run in runs]
        taus = [kendall_tau(scores[i], scores[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
        found = la.importance(runs).seeds
        assert found.kendall == pytest.approx(np.mean(taus))
        assert (found.kendall_low, found.kendall_high) == pytest.approx((min(taus), max(taus)))
        # Least and largest of the pairs, not bounds: those are written with dots.
        pairs = f"({min(taus):.2f} to {max(taus):.2f} over 3 pairs)."
        assert found.statement.endswith(f"τ = {np.mean(taus):.2f} on average {pairs}")

    def test_it_gives_probabilities_that_name_all_runs(self, arm, tmp_path):
        runs = arm()
        made = la.sampling_probabilities(la.importance(runs), 2)
        saved = json.loads(made.save(tmp_path / "p.json").read_text("utf-8"))
        assert saved["source_runs"] == [run.run_id for run in runs]
        assert made.justified

    def test_it_is_saved_and_read_again(self, arm, tmp_path):
        profile = la.importance(arm())
        again = la.ImportanceProfile.load(profile.save(tmp_path / "p.json"))
        assert again == profile
        assert again.seeds.spread.equals(profile.seeds.spread)
        assert again.seeds.scores.equals(profile.seeds.scores)

    def test_a_seed_that_ended_early_is_named(self, make_run):
        runs = [make_run(steps=steps, seed=seed) for seed, steps in enumerate((60, 25, 60))]
        profile = la.importance(runs, "grad_rms")
        said = f"Of other lengths: {runs[1].path.name} has 25 of the 60 steps that the longest has."
        assert profile.remarks[0] == said
        assert said in profile.statement

    def test_seeds_of_one_length_are_not_remarked_on(self, arm):
        assert "Of other lengths" not in la.importance(arm(), "grad_rms").statement

    def test_a_layer_of_one_seed_has_a_score_and_no_interval(self, make_run):
        runs = [
            make_run(method="lisa", steps=80, seed=seed, draws=draws * 2)
            for seed, draws in enumerate(
                [[[0, 1], [1, 2], [2, 3], [0, 3]], [[0, 1], [1, 2], [0, 2], [0, 1]],
                 [[0, 1], [1, 2], [0, 2], [0, 2]]]
            )
        ]  # fmt: skip
        profile = la.importance(runs)
        assert np.isfinite(profile.scores[3])
        assert np.isnan(profile[3].low)
        assert profile.unseen == (4, 5, 6, 7)
        assert "Known from one seed only, and so without an interval: layer 3." in profile.remarks
        assert "Unknown in every seed: layers 4, 5, 6, 7." in profile.statement


class TestRefusals:
    def test_runs_that_are_no_seeds_of_one_arm(self, arm, make_run):
        [run] = arm(1)

        def other(**options):
            return make_run(**({"profile": np.exp(0.5 * X), "steps": 60, "seed": 7} | options))

        for wrong, words in (
            (other(manifest={"model": {"name": "large"}}), r"differ in the model \(tiny, large\)"),
            (other(manifest={"dataset": {"name": "b"}}), "differ in the data"),
            (other(method="lora"), r"differ in the method \(full, lora\)"),
            (other(profile=5), "differ in the model"),
            (other(manifest={"recording": {"every": 7}}), "recording/every"),
        ):
            with pytest.raises(LisaError, match=words) as caught:
                la.importance([run, wrong])
            assert "not seeds of one arm" in str(caught.value)
            assert "compare" in str(caught.value)

    def test_settings_are_named(self, arm):
        runs = arm(2)
        for run, rate in zip(runs, (0.1, 0.2), strict=True):
            (run.path / CONFIG).write_text(f"seed: 1\nlearning_rate: {rate}\n", "utf-8")
        with pytest.raises(LisaError, match="differ in learning_rate"):
            la.importance(runs)

    def test_other_probabilities_are_another_arm(self):
        with pytest.raises(LisaError, match="differ in what they sampled"):
            la.importance([SAMPLING / "learned-1", SAMPLING / "uniform-2"])

    def test_one_seed_twice(self, arm, make_run):
        [run] = arm(1)
        with pytest.raises(LisaError, match="same seed"):
            la.importance([run, run])
        with pytest.raises(LisaError, match="empty list"):
            la.importance([])
        with pytest.raises(LisaError, match="importance takes a run directory"):
            la.importance([run, 3])


class TestGivenScores:
    def test_scores_of_several_seeds(self):
        rng = np.random.default_rng(1)
        table = np.exp(0.5 * X + 0.05 * rng.standard_normal((3, 12)))
        profile = la.ImportanceProfile.from_scores(table.tolist(), sources=["a", "b", "c"])
        np.testing.assert_allclose(profile.scores, np.exp(np.log(table).mean(axis=0)))
        assert profile.sources == ("a", "b", "c")
        assert profile.seeds.runs == ("a", "b", "c")
        assert profile.sufficient
        assert np.isnan(profile.seeds.ratio)
        same = la.ImportanceProfile.from_scores(table)
        assert same.seeds.runs == ("seed 1", "seed 2", "seed 3")
        assert same.sources == ()

    def test_a_seed_without_a_score_is_counted_nowhere(self):
        rng = np.random.default_rng(1)
        table = np.exp(0.5 * X + 0.05 * rng.standard_normal((4, 12)))
        table[3] = np.nan
        profile = la.ImportanceProfile.from_scores(table, sources=["a", "b", "c", "d"])
        assert profile.statement.startswith("Over 3 seeds (d has no score): ")
        assert " over 3 pairs)" in profile.seeds.statement

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"scores": [[1.0, 2.0], [1.0]]}, r"scores\[1\] has 1 layers and scores\[0\] 2"),
            ({"scores": [[1.0], [2.0]], "low": [0.0]}, "bounds come from the spread"),
            ({"scores": [[1.0], [2.0]], "sources": ["a"]}, "give one of each"),
            ({"scores": [[1.0, np.inf], [2.0, 1.0]]}, "infinite"),
        ],
    )
    def test_bad_numbers(self, arguments, message):
        with pytest.raises(LisaError, match=message):
            la.ImportanceProfile.from_scores(**arguments)

    def test_zero_in_every_seed_is_zero(self):
        profile = la.ImportanceProfile.from_scores([[1.0, 0.0, 2.0, 3.0], [1.1, 0.0, 2.1, 2.9]])
        assert profile.scores[1] == 0
        assert "Exactly 0 in every seed: layer 1." in profile.remarks


@pytest.fixture(scope="module")
def profiles():
    """Profiles of the kept runs of the study of the skew, by metric and method."""
    return {
        (metric, method): [la.importance(run, metric) for run in seeds(method)]
        for metric in ("grad_rms", "l1_descent", "delta_rel")
        for method in ("full", "lora", "lisa")
    }


class TestTheKeptRuns:
    """S2, on real seeds: what is stated over seeds holds the seed that was left out."""

    def test_a_seed_left_out_lies_where_the_others_say(self, profiles):
        """Bounds of the mean of n seeds, widened by √(n + 1), hold another seed in 95 %."""
        rates = {}
        for key, group in profiles.items():
            held = known = 0
            for out in range(3):
                rest = [p for i, p in enumerate(group) if i != out]
                found = over_seeds(rest, ["a", "b"])
                mean, high, other = np.log(
                    [found.scores, found.to_frame()["high"], group[out].scores]
                )
                both = np.isfinite(mean + high + other)
                apart = (other - mean)[both]
                apart -= apart.mean()
                held += int((np.abs(apart) <= (high - mean)[both] * np.sqrt(3)).sum())
                known += int(both.sum())
            rates[key] = held / known
        assert 0.92 <= np.mean(list(rates.values())) <= 0.98, rates
        assert min(rates.values()) >= 0.88, rates

    @pytest.mark.parametrize("metric", ["grad_rms", "l1_descent"])
    @pytest.mark.parametrize("method", ["full", "lora"])
    def test_one_seed_holds_the_others_or_says_that_it_does_not(self, profiles, metric, method):
        group = profiles[metric, method]
        frames = [np.log(p.to_frame()[["score", "low", "high"]].to_numpy(float).T) for p in group]
        held = []
        for (mean, low, high), (other, _, _) in (
            (a, b) for a in frames for b in frames if a is not b
        ):
            both = np.isfinite(mean + low + high + other)
            apart = (other - mean) - np.nanmean(other - mean)
            inside = (apart >= np.sqrt(2) * (low - mean)) & (apart <= np.sqrt(2) * (high - mean))
            held += inside[both].tolist()
        seeds_say = over_seeds(group, ["1", "2", "3"]).seeds
        if np.mean(held) < 0.9:
            assert seeds_say.ratio > 1.5
            assert "speaks of its own seed only" in seeds_say.statement
        else:
            assert seeds_say.ratio < 2

    def test_layers_of_the_study_stand_out(self):
        text = la.importance(seeds("full")).statement
        assert "Layers 0, 1, 2, 3, 4, 8, 9, 11, 28 and 29 stand above" in text
        assert "a U, the first and last layers above the middle, with a spike at layer 11" in text
