"""Profiles of scores that no run measured."""

import json

import numpy as np
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
