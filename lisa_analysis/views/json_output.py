"""Everything that `lisa-analyze` found, as JSON: the machine-readable twin of the report."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.schema import SCHEMA_VERSION
from lisa_analysis.profiles.profile import to_plain

if TYPE_CHECKING:
    from lisa_analysis.runs.compare import Comparison


def to_json(results: Iterable[Any], comparison: "Comparison | None") -> str:
    """Write the results of `lisa-analyze` as JSON.

    Parameters
    ----------
    results
        One object per run with `run`, `diagnostics`, `profile` and `probabilities` (or None), and
        `why_not`, the reason for what is missing.
    comparison
        The runs side by side, or None for a single run.

    Returns
    -------
    str
        Strict JSON: unknown and non-finite numbers are null.
    """
    content = {
        "schema_version": SCHEMA_VERSION,
        "runs": [_run(result) for result in results],
        "comparison": None if comparison is None else comparison.to_dict(),
    }
    return json.dumps(to_plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _run(result: Any) -> dict[str, Any]:
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
        "why_not": None if result.why_not is None else str(result.why_not),
        "probabilities": None if probabilities is None else asdict(probabilities),
    }
