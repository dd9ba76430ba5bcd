"""Layer importance from run directories: profiles, verdicts, probabilities, diagnostics, reports.

>>> import lisa_analysis as la
>>> run = la.load("runs/pilot")                            # doctest: +SKIP
>>> la.importance(run).to_frame()                          # doctest: +SKIP

Everything is loaded when it is first used: importing this package costs next to nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.moved import redirect

if TYPE_CHECKING:
    from lisa_analysis.metrics import METRICS as METRICS
    from lisa_analysis.metrics import metric as metric
    from lisa_analysis.metrics.norm_frames import norms as norms
    from lisa_analysis.plans.exports import EXPORTS as EXPORTS
    from lisa_analysis.plans.exports import export as export
    from lisa_analysis.plans.sampling import SamplingProbabilities as SamplingProbabilities
    from lisa_analysis.plans.sampling import sampling_probabilities as sampling_probabilities
    from lisa_analysis.profiles.from_run import importance as importance
    from lisa_analysis.profiles.probe_changes import ProbeChange as ProbeChange
    from lisa_analysis.profiles.probe_changes import probe_change as probe_change
    from lisa_analysis.profiles.profile import ImportanceProfile as ImportanceProfile
    from lisa_analysis.rundir.run import Run as Run
    from lisa_analysis.runs.comparing import compare as compare
    from lisa_analysis.runs.comparison import Comparison as Comparison
    from lisa_analysis.runs.diagnostics import Diagnostics as Diagnostics
    from lisa_analysis.runs.diagnostics import Finding as Finding
    from lisa_analysis.runs.diagnostics import diagnose as diagnose
    from lisa_analysis.runs.metric_validity import Validity as Validity
    from lisa_analysis.runs.metric_validity import validity as validity
    from lisa_analysis.views import plots as plots
    from lisa_analysis.views.html_report import Report as Report
    from lisa_analysis.views.html_report import report as report
    from lisa_analysis.views.opening import load as load

_HOME = {
    "Comparison": "runs.comparison",
    "compare": "runs.comparing",
    "Diagnostics": "runs.diagnostics",
    "Finding": "runs.diagnostics",
    "diagnose": "runs.diagnostics",
    "Validity": "runs.metric_validity",
    "validity": "runs.metric_validity",
    "ImportanceProfile": "profiles.profile",
    "importance": "profiles.from_run",
    "ProbeChange": "profiles.probe_changes",
    "probe_change": "profiles.probe_changes",
    "EXPORTS": "plans.exports",
    "export": "plans.exports",
    "SamplingProbabilities": "plans.sampling",
    "sampling_probabilities": "plans.sampling",
    "METRICS": "metrics",
    "metric": "metrics",
    "norms": "metrics.norm_frames",
    "Report": "views.html_report",
    "report": "views.html_report",
    "Run": "rundir.run",
    "load": "views.opening",
    "LisaError": "contract.errors",
}
__all__ = ["plots", *sorted(_HOME)]  # noqa: PLE0604

# Where modules were before they moved into rooms.
redirect(
    __name__,
    {
        "accumulate": "metrics.layer_sums",
        "aggregate": "metrics.step_tables",
        "allocation": "plans.budget",
        "cli": "views.cli",
        "compare": "runs.comparing",
        "diagnostics": "runs.diagnostics",
        "draws": "rundir.events",
        "errors": "contract.errors",
        "fitting": "statistics.estimate",
        "importance": "profiles.from_run",
        "initialisation": "profiles.initialisation",
        "judgement": "profiles.verdict",
        "layers": "contract.layers",
        "measurements": "metrics.log",
        "metrics.norms": "metrics.norm_frames",
        "metrics.spectra": "statistics.spectra",
        "metrics.step_table": "metrics.step_tables",
        "notebook": "contract.reprs",
        "outcomes": "runs.losses",
        "plots": "views.plots",
        "probabilities": "plans.sampling",
        "probabilities_file": "contract.probabilities_file",
        "profile": "profiles.profile",
        "profiles.over_seeds": "profiles.across_seeds",
        "profiles.probe_change": "profiles.probe_changes",
        "report": "views.html_report",
        "runs.agreement": "profiles.agreement",
        "runs.compare": "runs.comparing",
        "runs.configurations": "rundir.configurations",
        "runs.sampled": "rundir.sampled",
        "runs.validity": "runs.metric_validity",
        "schema": "contract.schema",
        "series": "metrics.series",
        "shard_keys": "rundir.shard_keys",
        "shards": "rundir.shards",
        "streams": "rundir.jsonl",
        "terminal": "views.terminal",
        "views.headline": "views.headlines",
        "views.next_step": "views.next_steps",
        "views.report": "views.html_report",
    },
)


def __getattr__(name: str) -> Any:
    if name == "plots":
        return importlib.import_module("lisa_analysis.views.plots")
    if name in _HOME:
        return getattr(importlib.import_module(f"lisa_analysis.{_HOME[name]}"), name)
    raise AttributeError(f"module 'lisa_analysis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
