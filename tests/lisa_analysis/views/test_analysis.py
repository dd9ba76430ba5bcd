"""One analysis for all views: everything is computed once, and is what the library says."""

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers_runs import write_run

import lisa_analysis as la
from lisa_analysis.profiles.from_run import importance
from lisa_analysis.runs.diagnostics import STATES as WORST_FIRST
from lisa_analysis.views.analysis import Analysis, RunAnalysis
from lisa_analysis.views.cli import main
from lisa_analysis.views.html_report import report_of
from lisa_analysis.views.states import STATES


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts the profiles by run and level, whoever asks for them."""
    counts: Counter = Counter()

    def counting(run, metric=None, **options):
        counts[run.path.name, metric or "grad_rms", options.get("by", "layer")] += 1
        return importance(run, metric, **options)

    for name, module in list(sys.modules.items()):
        if name.startswith("lisa_analysis") and getattr(module, "importance", None) is importance:
            monkeypatch.setattr(module, "importance", counting)
    return counts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate("ab"):
        write_run(tmp_path / name, steps=60, n_layers=4, seed=seed)
    return tmp_path


def test_the_command_fits_every_profile_once(folder, fitted):
    words = ["--json", str(folder / "all.json")]
    assert main([str(folder / "a"), str(folder / "b"), *words]) == 0
    assert fitted == {("a", "grad_rms", "layer"): 1, ("b", "grad_rms", "layer"): 1}
    fitted.clear()
    assert main([str(folder / "a"), *words]) == 0
    # The picture of the modules is a profile of its own.
    assert fitted == {("a", "grad_rms", "layer"): 1, ("a", "grad_rms", "module"): 1}


def test_a_report_fits_every_profile_once(folder, fitted):
    la.report([folder / "a", folder / "b"], metric="update_norm")
    assert fitted == {("a", "update_norm", "layer"): 1, ("b", "update_norm", "layer"): 1}


def test_a_comparison_uses_the_metric_that_was_asked_for(folder):
    path = folder / "all.json"
    words = [str(folder / "a"), str(folder / "b"), "--metric", "update_norm", "--json", str(path)]
    assert main(words) == 0
    found = json.loads(path.read_text(encoding="utf-8"))["comparison"]
    runs = [la.load(folder / name) for name in "ab"]
    assert found == json.loads(json.dumps(la.compare(runs, "update_norm").to_dict()))


def test_runs_of_other_defaults_are_compared_by_that_of_the_first(folder):
    """As of a run beside a probe: their profiles are of two metrics, and rank nothing together."""
    runs = [la.load(folder / name) for name in "ab"]
    one, other = (RunAnalysis(run, run.run_id) for run in runs)
    analysis = Analysis((one, dataclasses.replace(other, metric="update_norm")))
    assert analysis.comparison.metric == "grad_rms"
    assert analysis.comparison.rank_agreement.equals(la.compare(runs).rank_agreement)


def test_the_parts_are_those_of_the_library(folder):
    analysis = Analysis.of([folder / "a", folder / "b"])
    one = analysis.runs[0]
    run = la.load(folder / "a")
    profile = la.importance(run)
    assert one.profile is one.profile
    assert analysis.comparison is analysis.comparison
    assert one.profile.to_frame().equals(profile.to_frame())
    assert one.diagnostics.findings == la.diagnose(run).findings
    plan = la.sampling_probabilities(profile, activated_layers=2)
    assert one.probabilities.inclusion_probabilities == plan.inclusion_probabilities
    assert one.why_not is None
    assert report_of(analysis).html == la.report([folder / "a", folder / "b"]).html


def test_what_cannot_be_is_said_once_and_spoils_nothing(folder):
    analysis = Analysis.of([folder / "a", folder / "b"], "lisa_ratio")
    one = analysis.runs[0]
    assert one.profile is None
    assert one.probabilities is None
    assert one.why_not is one.why_no_profile
    assert "reference" in str(one.why_not)
    assert len(analysis.numbers) == 2
    assert "There is no profile" in report_of(analysis).html


def test_states_are_shown_in_one_order():
    assert tuple(STATES) == WORST_FIRST
