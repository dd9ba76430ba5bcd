"""The registry of metrics is open: from a test file, the package untouched."""

import dataclasses
import doctest

import numpy as np
import pytest

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError
from lisa_analysis.metrics import AtStart, GradSnr, metric, registry

X = np.linspace(-1, 1, 12)


class TestRegistry:
    """A metric from a test file, the package untouched."""

    def test_a_new_metric_goes_everywhere(self, make_run, tmp_path):
        def start(data, values):
            return np.full(values.shape[1], 0.5)

        @metric(
            "log", "Mean of the whole gradient, in logarithms.", needs=("grad_norm",),
            at_start=AtStart("gradients", start),
        )  # fmt: skip
        def whole_gradient(log):
            return log.table["grad_norm"]

        try:
            assert la.METRICS["whole_gradient"] is whole_gradient
            assert "whole_gradient" in repr(la.METRICS)
            run = make_run(profile=np.exp(X), steps=100)
            profile = la.importance(run, "whole_gradient")
            assert profile.to_frame()["initial"].tolist() == [0.5] * 12
            expected = la.importance(run, "grad_rms").scores * np.sqrt(20_000)
            np.testing.assert_allclose(profile.scores, expected, rtol=1e-5)
            assert (
                "Mean of the whole gradient, in logarithms."
                in la.report(run, metric="whole_gradient").html
            )
            with pytest.raises(LisaError, match="grad_noise was not recorded"):
                la.importance(run, dataclasses.replace(whole_gradient, needs=("grad_noise",)))
            with pytest.raises(LisaError, match="Did you mean 'whole_gradient'"):
                la.importance(run, "whole_gradiant")
        finally:
            la.METRICS.remove("whole_gradient")
        assert "whole_gradient" not in la.METRICS

    def test_a_metric_with_parameters(self, make_run):
        run = make_run(steps=100)
        default, slow = la.importance(run, GradSnr()), la.importance(run, GradSnr(decay=0.9))
        assert default == la.importance(run, "grad_snr")
        assert slow.scores[0] != default.scores[0]
        assert slow.metric == "grad_snr"

    def test_built_in_metrics_stay_what_they_are(self):
        with pytest.raises(LisaError, match="'grad_rms' is built in"):
            metric("log", "Mine.", id="grad_rms")(lambda log: log.table["grad_norm"])
        with pytest.raises(LisaError, match="scale 'cubic'"):
            metric("cubic", "Mine.")(len)
        assert la.METRICS.get("nothing") is None


def test_the_example_in_the_documentation_holds():
    result = doctest.testmod(registry)
    assert result.attempted > 2
    assert result.failed == 0
