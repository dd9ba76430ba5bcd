"""Arms: what they are called, their means over seeds, and paired differences by hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.schema import CONFIG, MANIFEST

DATA = Path(__file__).parents[2] / "data"
STUDY = Path(__file__).parents[3] / "reports" / "2026-11-24-learned-sampling" / "runs"
ARMS = ("uniform", "learned", "permuted")
SEEDS = (1, 2, 3, 4)


def study(arm):
    return [STUDY / f"{arm}-{seed}" for seed in SEEDS]


def last_losses(arm):
    files = [run / MANIFEST for run in study(arm)]
    return np.array(
        [json.loads(f.read_text("utf-8"))["result"]["last_held_out_loss"] for f in files]
    )


def ending(loss):
    """Edit: held-out loss of 4 before training and `loss` after 30 steps."""

    def edit(events):
        return [
            {"event": "evaluate", "step": step, "time": 0.0, "metrics": {"eval_loss": value}}
            for step, value in ((0, 4.0), (30, loss))
        ]

    return edit


@pytest.fixture
def arm(make_run):
    """Writes the runs of an arm: one loss per seed."""

    def make(losses, first=0, config="learning_rate: 0.1\n", **options):
        found = []
        for seed, loss in enumerate(losses, first):
            run = make_run(steps=30, seed=seed, edit_events=ending(loss), **options)
            (run.path / CONFIG).write_text(f"seed: {seed}\n{config}", "utf-8")
            found.append(run)
        return found

    return make


class TestTheStudyOfLearnedSampling:
    def test_it_has_three_arms_of_four_seeds(self):
        comparison = la.compare([run for arm in ARMS for run in study(arm)])
        arms = comparison.arms.set_index("arm")
        assert sorted(arms.index) == sorted(ARMS)
        assert arms["runs"].tolist() == arms["seeds"].tolist() == [4, 4, 4]
        for arm in ARMS:
            losses = last_losses(arm)
            interval = scipy.stats.t.interval(0.95, 3, losses.mean(), scipy.stats.sem(losses))
            assert arms.loc[arm, "mean"] == pytest.approx(losses.mean(), abs=1e-6)
            found = tuple(arms.loc[arm, ["low", "high"]])
            assert found == pytest.approx(tuple(interval), abs=3e-5)

    def test_the_paired_differences_are_those_of_its_page(self):
        comparison = la.compare([run for arm in ARMS for run in study(arm)])
        for a, b in (("learned", "uniform"), ("learned", "permuted"), ("permuted", "uniform")):
            apart = last_losses(a) - last_losses(b)
            low, high = scipy.stats.t.interval(0.95, 3, apart.mean(), scipy.stats.sem(apart))
            rows = comparison.differences
            [row] = rows[(rows["a"] == a) & (rows["b"] == b)].to_dict("records")
            found = [row[name] for name in ("mean", "low", "high")]
            assert found == pytest.approx([apart.mean(), low, high], abs=3e-5)
            assert row["pairs"] == 4
            assert row["lower"] == (apart < 0).sum()
        assert [round(x, 4) for x in (row["mean"], row["low"], row["high"])] == [
            0.0001, -0.0154, 0.0156,
        ]  # fmt: skip
        page = STUDY.parent / "README.md"
        row = comparison.difference("learned", "uniform")
        text = f"{row['mean']:+.4f} ({row['low']:+.4f} … {row['high']:+.4f})"
        assert text in page.read_text("utf-8")
        assert "learned − uniform: " + text[:-1] in comparison.statement

    def test_what_a_file_says_it_gains_is_no_choice_that_parts_arms(self, tmp_path):
        """Newer files hold figures beside the probabilities: they named arms, to 17 digits."""
        runs = [shutil.copytree(run, tmp_path / run.name) for run in study("learned")[:2]]
        path = runs[0] / "lisa_probabilities.json"
        record = json.loads(path.read_text("utf-8")) | {"gain": 1.0108132118426447, "spread": 1.5}
        path.write_text(json.dumps(record), "utf-8")
        assert la.compare(runs).arms["runs"].tolist() == [2]

    def test_named_arms_say_the_same(self):
        named = la.compare({arm: study(arm) for arm in ("learned", "uniform")})
        found = la.compare([*study("learned"), *study("uniform")])
        assert named.arms.equals(found.arms)
        assert named.differences.equals(found.differences)
        assert named.differences["a"].tolist() == ["learned"]


class TestNames:
    def test_by_method(self, arm):
        runs = [*arm([2.0]), *arm([2.0], method="lora"), *arm([2.0], method="lisa")]
        assert la.compare(runs).arms["arm"].tolist() == ["full", "lora", "lisa"]

    def test_by_settings_the_telling_ones_first(self, arm):
        runs = [
            run
            for r, rate in ((8, 0.1), (16, 0.1), (16, 0.2))
            for run in arm([2.0, 2.1], config=f"max_steps: {r}\nlora:\n  r: {r}\n"
                                              f"learning_rate: {rate}\n", method="lora")
        ]  # fmt: skip
        comparison = la.compare(runs)
        assert comparison.arms["arm"].tolist() == [
            "learning_rate=0.1, r=8, max_steps=8",
            "learning_rate=0.1, r=16, max_steps=16",
            "learning_rate=0.2, r=16, max_steps=16",
        ]
        assert comparison.table["arm"].tolist()[:2] == ["learning_rate=0.1, r=8, max_steps=8"] * 2

    def test_a_setting_that_one_lacks_is_off(self, arm):
        runs = [*arm([2.0]), *arm([2.0], config="learning_rate: 0.1\npacking: true\n")]
        assert la.compare(runs).arms["arm"].tolist() == ["packing=off", "packing=true"]

    def test_a_study_of_one_arm_has_the_name_of_its_method(self):
        assert la.compare(study("uniform")).arms["arm"].tolist() == ["lisa"]
        assert la.compare(study("learned")).arms["arm"].tolist() == ["lisa, learned"]


class TestMeans:
    def test_repeated_seeds_are_one(self, arm):
        runs = [*arm([2.1, 2.2, 2.3]), *arm([2.5])]
        [row] = la.compare(runs).arms.to_dict("records")
        assert (row["runs"], row["seeds"]) == (4, 3)
        assert row["mean"] == pytest.approx(np.mean([2.3, 2.2, 2.3]))

    def test_runs_of_unknown_seeds_are_repetitions(self, arm):
        runs = arm([2.1, 2.2, 2.3], manifest={"seeds": {}})
        [row] = la.compare(runs).arms.to_dict("records")
        assert row["seeds"] == 3
        assert row["low"] < row["mean"] < row["high"]


class TestDifferences:
    def test_unequal_seeds_are_not_paired(self, arm):
        a, b = [2.1, 2.2, 2.3], [2.5, 2.4, 2.8]
        comparison = la.compare({"a": arm(a), "b": arm(b, first=2)})
        [row] = comparison.differences.to_dict("records")
        interval = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval()
        assert row["pairs"] == 0
        assert row["mean"] == pytest.approx(np.mean(a) - np.mean(b))
        assert (row["low"], row["high"]) == pytest.approx(tuple(interval), rel=0.01)
        assert "not paired" in comparison.statement

    def test_three_seeds_in_common_are_paired(self, arm):
        a, b = [2.1, 2.2, 2.3, 9.0], [2.0, 2.2, 2.1]
        [row] = la.compare({"a": arm(a), "b": arm(b)}).differences.to_dict("records")
        assert row["pairs"] == 3
        assert row["mean"] == pytest.approx(0.1)
        assert row["lower"] == 0

    def test_two_pairs_have_a_mean_and_no_interval(self, arm):
        [row] = la.compare({"a": arm([2.0, 2.2]), "b": arm([2.1, 2.4])}).differences.to_dict(
            "records"
        )
        assert row["mean"] == pytest.approx(-0.15)
        assert np.isnan(row["low"])
        assert row["pairs"] == 2

    def test_either_way_round(self, arm):
        comparison = la.compare({"a": arm([2.0, 2.2, 2.3]), "b": arm([2.1, 2.4, 2.4])})
        one, other = comparison.difference("a", "b"), comparison.difference("b", "a")
        assert (other["mean"], other["low"]) == pytest.approx((-one["mean"], -one["high"]))
        assert (one["lower"], other["lower"]) == (3, 0)
        with pytest.raises(LisaError, match="no arm 'c'"):
            comparison.difference("a", "c")
        with pytest.raises(LisaError, match="from itself"):
            comparison.difference("a", "a")


class TestInput:
    def test_other_models_are_said_first_and_their_losses_not_compared(self, arm):
        runs = [
            *arm([2.0, 2.1, 2.2]),
            *arm([1.0, 1.1, 1.2], manifest={"model": {"name": "/some/where/else"}}),
        ]
        comparison = la.compare(runs)
        assert comparison.statement.startswith("The runs are of different models (tiny, else): ")
        assert "lowest" not in comparison.statement
        assert "Mean held-out loss" not in comparison.statement
        assert comparison.differences["mean"].isna().all()
        assert comparison.arms["arm"].tolist() == ["tiny", "else"]

    def test_equal_losses_are_a_tie(self, arm):
        """The first of equal runs was said to have "the lowest" loss."""
        assert "held-out losses are equal (2.0000)" in la.compare(arm([2.0, 2.0])).statement
        tie = la.compare([*arm([2.0]), *arm([2.0], config="learning_rate: 0.3\n"),
                          *arm([2.1], config="learning_rate: 0.5\n")]).statement  # fmt: skip
        assert "tie for the lowest held-out loss (2.0000)" in tie
        one = la.compare([*arm([2.0]), *arm([2.001], config="learning_rate: 0.3\n")]).statement
        assert "has the lowest held-out loss (2.0000)" in one

    def test_other_data_too(self, arm):
        runs = [arm([2.0], manifest={"dataset": {"name": name}})[0] for name in ("x/a", "y/a", "b")]
        text = la.compare(runs).statement
        assert text.startswith("The runs are of different data (a, b): their losses do not compare")

    def test_other_examples_or_another_head_are_other_data_and_models(self, arm):
        for entry, names in (
            ({"dataset": {"name": "a", "held_out_examples": 64}}, "parts of the data (64 held-out"),
            ({"model": {"name": "m", "architecture": "B"}}, "kinds of model (B, A)"),
        ):
            own = {"model": {"name": "m", "architecture": "A"}, "dataset": {"name": "a"}}
            other = (
                {"dataset": {"name": "a", "held_out_examples": 32}}
                | own
                | {"dataset": {"name": "a", "held_out_examples": 32}}
            )
            runs = [arm([2.0], manifest=m)[0] for m in (own | entry, other)]
            text = la.compare(runs).statement
            assert text.startswith("The runs are of different ")
            assert names in text
            assert "their losses do not compare" in text
            assert "lowest" not in text

    def test_folders_of_one_name_at_different_places_may_be_different(self, arm):
        names = ("/law/train.jsonl", "/chat/train.jsonl")
        runs = [arm([2.0], manifest={"dataset": {"name": name}})[0] for name in names]
        text = la.compare(runs).statement
        assert text.startswith("Data of one name lie at different places (/law/train.jsonl, /chat/")

    def test_a_seed_without_a_finite_loss_is_no_seed_of_the_mean(self, arm):
        runs = arm([2.0, 2.1, 2.2, float("inf")])
        comparison = la.compare({"all": runs})
        row = comparison.arms.iloc[0]
        assert (row["runs"], row["seeds"], row["mean"]) == (4, 3, pytest.approx(2.1))
        last = comparison.table["run"].iloc[3]
        assert "3 seeds)" in comparison.statement
        assert f"Without a finite loss there, and in no mean: {last}." in comparison.statement

    def test_ties_are_neither_lower_nor_higher(self, arm):
        comparison = la.compare({"a": arm([2.0, 2.1, 2.2]), "b": arm([2.0, 2.1, 2.3])})
        for names in (("a", "b"), ("b", "a")):
            row = comparison.difference(*names)
            assert row["lower"] + row["higher"] == 1
        assert comparison.difference("a", "b")["lower"] == 1
        assert comparison.difference("b", "a")["higher"] == 1

    def test_arms_that_mix_are_said_to(self, arm):
        runs = [*arm([2.0, 2.1]), *arm([2.2], config="learning_rate: 0.3\n")]
        text = la.compare({"all": runs}).statement
        assert text.startswith("The runs of arm all differ in more than their seed (learning_rate)")

    def test_bad_arms_are_refused_in_words(self, arm):
        runs = arm([2.0, 2.1])
        for wrong, words in (
            ({}, "at least one run"),
            ({"a": []}, "arm 'a' has no run"),
            ({"a": runs[0]}, "of other things"),
            ({"a": runs, "b": [runs[1].path]}, "stands twice in arms 'a' and 'b'"),
        ):
            with pytest.raises(LisaError, match=words):
                la.compare(wrong)

    def test_the_default_metric_is_that_of_the_runs(self, make_run):
        assert la.compare([make_run(steps=20)]).metric == "grad_rms"

    def test_everything_can_be_saved(self, tmp_path):
        comparison = la.compare([*study("learned"), *study("uniform")])
        saved = json.loads(comparison.save(tmp_path / "c.json").read_text("utf-8"))
        assert [arm["arm"] for arm in saved["arms"]] == ["learned", "uniform"]
        assert saved["differences"][0]["pairs"] == 4
        page = comparison._repr_html_()
        assert "learned" in page
