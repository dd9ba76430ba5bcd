"""Layer importance from run directories: profiles, verdicts, probabilities, diagnostics, reports.

>>> import lisa_analysis as la
>>> run = la.load("runs/pilot")                            # doctest: +SKIP
>>> la.importance(run).to_frame()                          # doctest: +SKIP

Everything is loaded when it is first used: importing this package costs next to nothing.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lisa_analysis import plots as plots
    from lisa_analysis.compare import Comparison as Comparison
    from lisa_analysis.compare import compare as compare
    from lisa_analysis.diagnostics import Diagnostics as Diagnostics
    from lisa_analysis.diagnostics import Finding as Finding
    from lisa_analysis.diagnostics import diagnose as diagnose
    from lisa_analysis.importance import ImportanceProfile as ImportanceProfile
    from lisa_analysis.importance import importance as importance
    from lisa_analysis.probabilities import SamplingProbabilities as SamplingProbabilities
    from lisa_analysis.probabilities import sampling_probabilities as sampling_probabilities
    from lisa_analysis.report import Report as Report
    from lisa_analysis.report import report as report
    from lisa_analysis.rundir import Run as Run
    from lisa_analysis.rundir import load as load

_HOME = {
    "Comparison": "compare",
    "compare": "compare",
    "Diagnostics": "diagnostics",
    "Finding": "diagnostics",
    "diagnose": "diagnostics",
    "ImportanceProfile": "importance",
    "importance": "importance",
    "SamplingProbabilities": "probabilities",
    "sampling_probabilities": "probabilities",
    "Report": "report",
    "report": "report",
    "Run": "rundir",
    "load": "rundir",
    "LisaError": "errors",
}
__all__ = ["plots", *sorted(_HOME)]  # noqa: PLE0604


class _Package(ModuleType):
    """Keeps `la.importance` the function after the module of that name has been imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "plots":
        return importlib.import_module("lisa_analysis.plots")
    if name in _HOME:
        return getattr(importlib.import_module(f"lisa_analysis.{_HOME[name]}"), name)
    raise AttributeError(f"module 'lisa_analysis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
