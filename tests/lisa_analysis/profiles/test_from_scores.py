"""Profiles of scores that no run measured."""

import json

import numpy as np
import pandas as pd
import pytest

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError
from lisa_analysis.profiles.agreement import agree, concordance, shares

X = np.linspace(-1, 1, 12)


class TestFromScores:
    """Profiles of numbers that no run measured."""

    def test_a_profile_of_given_scores(self):
        profile = la.ImportanceProfile.from_scores(
            [3.0, 1.0, np.nan, 2.0], low=[2.5, 0.5, np.nan, np.nan],
            high=[3.5, 1.5, np.nan, np.nan], metric="ablation", sources=["a", "b"],
        )  # fmt: skip
        assert profile.scores.tolist()[:2] == [3.0, 1.0]
        assert profile.unseen == (2,)
        assert profile.sources == ("a", "b")
        assert profile.run_id == "a, b"
        assert profile.concentration.headroom.value == pytest.approx(1 + 1 / 6)
        assert "Unknown: 1 of 4 layers" in profile.statement
        assert "cannot be said" in profile.statement
        assert np.isnan(profile[3].low)
        assert profile[0].n_eff is not None
        made = la.sampling_probabilities(profile, 2, use_intervals=False)
        assert sum(made.inclusion_probabilities) == pytest.approx(2)
        assert made.source_runs == ("a", "b")
        assert not made.justified
        json.dumps(profile.to_dict(), allow_nan=False)

    def test_it_can_be_drawn_and_compared(self, make_run):
        from matplotlib import pyplot

        run = la.importance(make_run(profile=np.exp(X), steps=100))
        given = la.ImportanceProfile.from_scores(np.exp(-X), names=list(run.layers["name"]))
        assert agree(run, given).kendall == pytest.approx(-1)
        # A folder of weights without a head has shorter names for the same layers.
        bare = [name.removeprefix("model.") for name in run.layers["name"]]
        shorter = la.ImportanceProfile.from_scores(np.exp(-X), names=bare)
        assert agree(run, shorter).kendall == pytest.approx(-1)
        assert concordance([run, given, shorter]) == concordance([run, given, given])
        table = shares({"run": run, "weights": shorter})
        assert list(table["name"]) == list(run.layers["name"])
        assert table["weights"].notna().all()
        _, ax = pyplot.subplots()
        la.plots.profile(given, ax=ax)
        pyplot.close()
        assert repr(given).startswith("<ImportanceProfile score of given scores: 12 layers")
        assert "given scores" in given._repr_html_()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"scores": []}, "one number per layer"),
            ({"scores": "abc"}, "expected a list of numbers"),
            ({"scores": "123"}, "scores are str: expected a list of numbers"),
            ({"scores": {1.0, 2.0}}, "scores are set: expected a list of numbers"),
            ({"scores": pd.DataFrame([[5.0, 6.0]])}, "scores are DataFrame: expected a list"),
            ({"scores": [1.0, 2.0], "names": "ab"}, "names are a str: expected a list"),
            ({"scores": [1.0, 2.0], "names": {"a": 0, "b": 1}}, "names are a dict"),
            ({"scores": 3}, "expected a list of numbers"),
            ({"scores": [[1.0]]}, r"shape \(1, 1\)"),
            ({"scores": [1.0, 2.0], "low": [1.0]}, "low have the shape"),
            ({"scores": [1.0, 2.0], "low": [0.5, 2.5]}, r"low\[1\] is on the wrong side"),
            ({"scores": [1.0, 2.0], "names": ["a", "a"]}, "expected one of each, distinct"),
            ({"scores": [1.0, 2.0], "names": ["a"]}, "names are 1 for 2 scores"),
            ({"scores": [1.0], "confidence": 95}, "confidence is 95"),
        ],
    )
    def test_bad_numbers(self, arguments, message):
        with pytest.raises(LisaError, match=message):
            la.ImportanceProfile.from_scores(**arguments)


class TestScoresWithNames:
    """A mapping, or a Series with an index of its own, says which layer a score is of."""

    def test_names_come_with_the_scores(self):
        scores = {"model.layers.0": 5.0, "model.layers.1": None, "model.layers.2": 3.0}
        for given in (scores, pd.Series(scores)):
            profile = la.ImportanceProfile.from_scores(given)
            assert list(profile.layers["name"]) == list(scores)
            np.testing.assert_array_equal(profile.scores, [5.0, np.nan, 3.0])

    def test_indices_are_put_in_order_as_json_has_them_too(self):
        scores = {2: 3.0, 0: 5.0, 1: 1.0}
        as_json = json.loads(json.dumps(scores))
        for given in (
            scores,
            as_json,
            pd.Series(scores),
            {np.int64(k): v for k, v in scores.items()},
        ):
            profile = la.ImportanceProfile.from_scores(given)
            assert profile.scores.tolist() == [5.0, 1.0, 3.0]
            assert list(profile.layers["name"]) == ["layer 0", "layer 1", "layer 2"]

    def test_a_series_that_counts_its_rows_is_a_list(self):
        profile = la.ImportanceProfile.from_scores(pd.Series([2.0, 1.0]), ["a", "b"])
        assert list(profile.layers["name"]) == ["a", "b"]
        assert profile.scores.tolist() == [2.0, 1.0]

    def test_columns_of_one_table_are_rows_of_it(self):
        table = pd.DataFrame({"name": list("abcd"), "score": [1.0, 2, 3, 4]})
        table = table.assign(low=table["score"] - 0.5)[::-2]
        profile = la.ImportanceProfile.from_scores(table["score"], table["name"], table["low"])
        assert list(profile.layers["name"]) == ["d", "b"]
        assert profile.scores.tolist() == [4.0, 2.0]
        assert profile.layers["low"].tolist() == [3.5, 1.5]

    def test_bounds_are_put_in_the_order_of_the_scores(self):
        expected = la.ImportanceProfile.from_scores([5.0, 1.0], ["a", "b"], [4.0, 0.5], [6.0, 2.0])
        low, high = {"b": 0.5, "a": 4.0}, pd.Series({"b": 2.0, "a": 6.0})
        for scores, names in (({"a": 5.0, "b": 1.0}, None), ([5.0, 1.0], ["a", "b"])):
            found = la.ImportanceProfile.from_scores(scores, names, low, high)
            pd.testing.assert_frame_equal(found.layers, expected.layers)
        plain = la.ImportanceProfile.from_scores({"a": 5.0, "b": 1.0}, None, [4.0, 0.5], [6.0, 2.0])
        pd.testing.assert_frame_equal(plain.layers, expected.layers)
        counted = la.ImportanceProfile.from_scores([5.0, 1.0], None, {1: 0.5, 0: 4.0})
        assert counted.layers["low"].tolist() == [4.0, 0.5]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"scores": {"a": 1.0}, "names": ["b"]}, "names were given as well: leave names out"),
            ({"scores": {1: 1.0, 2: 3.0}}, "of the layers 1, 2: expected every index from 0 to 2"),
            ({"scores": {0: 1.0, "0": 3.0}}, "expected every index from 0 to 1 once"),
            ({"scores": {0: 1.0, "embed": 3.0}}, "name the layers 0 and 'embed': expected names"),
            ({"scores": {("a", 0): 1.0}}, r"name the layers \('a', 0\): expected names"),
            ({"scores": {"one": [1.0, 2.0], "two": [1.1, 2.1]}}, "scores map names to lists"),
            ({"scores": {"a": 1.0}, "low": {"b": 0.5}}, r"low name 1 layers \(b …\)"),
            ({"scores": [1.0, 2.0], "low": {"b": 0.5, "a": 0.5}}, r"and the scores 2 \(0, 1 …"),
            ({"scores": pd.Series([1.0, 2.0], index=["a", "a"])}, "the same layers, each once"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_told_is_refused(self, arguments, message):
        with pytest.raises(LisaError, match=message) as error:
            la.ImportanceProfile.from_scores(**arguments)
        assert "\n" not in str(error.value)
