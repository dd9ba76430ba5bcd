"""Everything that `lisa-analyze` found, as JSON: the machine-readable twin of the report."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.schema import SCHEMA_VERSION
from lisa_analysis.profiles.plain_values import to_plain

if TYPE_CHECKING:
    from lisa_analysis.views.analysis import Analysis, RunAnalysis


def to_json(analysis: "Analysis") -> str:
    """Write the results of `lisa-analyze` as JSON.

    Parameters
    ----------
    analysis
        Of one run or several.

    Returns
    -------
    str
        Strict JSON: unknown and non-finite numbers are null. `runs` holds one entry per run
        (findings, profile, probabilities), `over_seeds` the profile and the probabilities of runs
        that are seeds of one arm, `comparison` what `Comparison.to_dict` gives (runs, arms,
        differences, rank_agreement, …).
    """
    content = {
        "schema_version": SCHEMA_VERSION,
        "runs": [_run(result) for result in analysis.runs],
        "over_seeds": _over_seeds(analysis),
        "validity": None if analysis.validity is None else analysis.validity.to_dict(),
        "comparison": None if analysis.comparison is None else analysis.comparison.to_dict(),
    }
    return json.dumps(to_plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _over_seeds(analysis: "Analysis") -> dict[str, Any] | None:
    """Profile and probabilities of all runs together; null for a run alone, or several arms."""
    if analysis.alone or analysis.profile is None:
        return None
    plan = analysis.probabilities
    return {
        "profile": analysis.profile.to_dict(),
        "probabilities": None if plan is None else asdict(plan),
    }


def _run(result: "RunAnalysis") -> dict[str, Any]:
    run, probabilities = result.run, result.probabilities
    return {
        "run": run.run_id,
        "path": str(run.path),
        "status": run.status,
        "method": run.method,
        "warnings": list(run.warnings),
        "result": run.manifest.get("result"),
        "findings": [asdict(finding) for finding in result.diagnostics.findings],
        "profile": None if result.profile is None else result.profile.to_dict(),
        "worth": {metric: found.to_dict() for metric, found in result.worth.items()},
        "why_not": None if result.why_not is None else str(result.why_not),
        "probabilities": None if probabilities is None else asdict(probabilities),
    }
