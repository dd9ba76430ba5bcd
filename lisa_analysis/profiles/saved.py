"""Reading a profile back from the JSON file that `ImportanceProfile.save` writes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.profiles.parts import NUMBERS, Initialisation, Reliability
from lisa_analysis.profiles.profile import ImportanceProfile
from lisa_analysis.profiles.seeds import Seeds
from lisa_analysis.profiles.thresholds import Thresholds
from lisa_analysis.statistics import Concentration, Interval, Shape

_WHOLE = ("layer", "visits", "steps", "zeros")
# What may be None in a profile; any other number is NaN where it is unknown.
_NONE = ("steps_needed", "drift", "drift_step")


def read_profile(path: Path) -> ImportanceProfile:
    """Read a profile, see `ImportanceProfile.load`."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LisaError(f"{path} cannot be read ({error.strerror or error}).") from None
    except ValueError as error:
        raise LisaError(f"{path} is not complete JSON ({error}): save the profile again.") from None
    try:
        return _profile(record)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise LisaError(
            f"{path} holds no profile ({type(error).__name__}: {error}): give a file that "
            "ImportanceProfile.save wrote as .json."
        ) from None


def _profile(record: dict[str, Any]) -> ImportanceProfile:
    start = record["initialisation"]
    if start is not None:
        start = Initialisation(
            **_numbers(start) | {"expected": np.array(start["expected"], dtype=np.float64)}
        )
    shape: dict[str, Any] = {
        name: _interval(value) if isinstance(value, dict) else _tuple(value)
        for name, value in record["shape"].items()
    }
    texts = ("metric", "definition", "method", "model", "by", "confidence", "verdict", "statement")
    return ImportanceProfile(
        **{name: record[name] for name in texts},
        sources=tuple(record["sources"]),
        layers=_frame(record["layers"]),
        outside=_frame(record["outside"]),
        concentration=Concentration(
            **{name: _interval(value) for name, value in record["concentration"].items()}
        ),
        shape=Shape(**shape),
        initialisation=start,
        reliability=Reliability(**_numbers(record["reliability"])),
        samples=None,
        remarks=tuple(record["remarks"]),
        # What an older version did not judge by has its present value.
        thresholds=Thresholds(**record["thresholds"]),
        seeds=Seeds.from_dict(record["seeds"]) if record.get("seeds") else None,
        agrees_with_ablation=record.get("agrees_with_ablation"),
        estimand=record.get("estimand", ""),
    )


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _interval(value: dict[str, Any]) -> Interval:
    number = value["value"]
    return Interval(float("nan") if number is None else number, value["low"], value["high"])


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    nan = float("nan")
    return {n: nan if v is None and n not in _NONE else v for n, v in values.items()}


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    names = ("layer", "name", "score", "low", "high", "joint_low", "joint_high", "n_eff", "visits",
             "initial", "rho", "steps", "zeros", "standing")  # fmt: skip
    frame = pd.DataFrame(rows, columns=list(names))
    frame["standing"] = frame["standing"].astype(object).where(frame["standing"].notna(), "unknown")
    return frame.astype(dict.fromkeys(NUMBERS, "float64") | dict.fromkeys(_WHOLE, "Int64"))
