"""Everything that `lisa-analyze` found, as JSON: the machine-readable twin of the report."""

import dataclasses
import json
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lisa_analysis.schema import SCHEMA_VERSION

if TYPE_CHECKING:
    import pandas as pd

    from lisa_analysis.compare import Comparison


def to_json(results: Iterable[Any], comparison: "Comparison | None") -> str:
    """Write the results of `lisa-analyze` as JSON.

    Parameters
    ----------
    results
        One object per run with `run`, `diagnostics`, `profile` and `probabilities` (or None).
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
        "comparison": None if comparison is None else _records(comparison.to_frame()),
    }
    return json.dumps(_strict(content), indent=1, ensure_ascii=False) + "\n"


def _run(result: Any) -> dict[str, Any]:
    run, profile, probabilities = result.run, result.profile, result.probabilities
    return {
        "run": run.run_id,
        "path": str(run.path),
        "status": run.status,
        "method": run.method,
        "warnings": list(run.warnings),
        "findings": [dataclasses.asdict(finding) for finding in result.diagnostics.findings],
        "profile": {
            "metric": profile.metric,
            "definition": profile.definition,
            "verdict": profile.verdict,
            "statement": profile.statement,
            "concentration": dataclasses.asdict(profile.concentration),
            "layers": _records(profile.to_frame()),
            "outside": _records(profile.outside),
        },
        "probabilities": None
        if probabilities is None
        else {
            "activated_layers": probabilities.activated_layers,
            "inclusion_probabilities": list(probabilities.inclusion_probabilities),
            "justified": probabilities.justified,
            "statement": probabilities.statement,
        },
    }


def _records(frame: "pd.DataFrame") -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def _strict(value: Any) -> Any:
    """Replace what JSON has no word for: numpy scalars become numbers, NaN and infinity null."""
    if isinstance(value, dict):
        return {str(key): _strict(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(entry) for entry in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)
