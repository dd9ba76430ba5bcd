"""Every number that a verdict rests on comes from one object."""

import numpy as np

import lisa_analysis as la
from lisa_analysis.profiles.thresholds import Thresholds

X = np.linspace(-1, 1, 12)


class TestThresholds:
    def test_every_limit_is_printed_with_its_meaning(self):
        text = str(Thresholds())
        assert len(text.splitlines()) == len(Thresholds.__dataclass_fields__)
        assert "headroom        1.05  1 + CV²" in text

    def test_other_limits_judge_otherwise(self, make_run):
        run = make_run(profile=np.exp(0.4 * X), steps=30)
        usual, lenient = (
            la.importance(run, thresholds=limits)
            for limits in (Thresholds(), Thresholds(min_effective=5))
        )
        strict = la.importance(run, thresholds=Thresholds(min_effective=50))
        assert strict.to_frame()["low"].isna().all()
        assert "50 needed" in strict.statement
        assert lenient.sufficient >= usual.sufficient
        long = make_run(profile=np.exp(0.7 * X), steps=200)
        demanding = la.importance(long, thresholds=Thresholds(headroom=9.0))
        assert la.importance(long).verdict == "ramp"
        assert la.sampling_probabilities(la.importance(long)).justified
        assert not la.sampling_probabilities(demanding).justified
        assert la.importance(long, thresholds=Thresholds(material=5.0)).verdict != "ramp"
