"""A profile as a file: what `ImportanceProfile.save` writes, and how `load` reads it back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.paths import whole_file
from lisa_analysis.profiles.parts import NUMBERS, Initialisation, Reliability, StackShape
from lisa_analysis.profiles.profile import ImportanceProfile
from lisa_analysis.profiles.seeds import Seeds
from lisa_analysis.profiles.thresholds import Thresholds
from lisa_analysis.statistics import Concentration, Interval, Shape

_WHOLE = ("layer", "visits", "steps", "zeros")
# What may be None in a profile; any other number is NaN where it is unknown.
_NONE = ("steps_needed", "drift", "drift_step")


# Key of the whole profile, as JSON, in the metadata of a Parquet file.
_KEY = b"lisa_profile"


def write_profile(profile: ImportanceProfile, path: Path) -> Path:
    """Write a profile, see `ImportanceProfile.save`."""
    writers = {
        ".json": _write_json, ".csv": _write_csv, ".parquet": _write_parquet,
        ".png": _write_picture, ".svg": _write_picture,
    }  # fmt: skip
    if path.suffix not in writers:
        raise LisaError(
            f"cannot save a profile as {path.name!r}: use {', '.join([*writers][:-1])} or .svg."
        )
    with whole_file(path) as file:
        writers[path.suffix](profile, file)
    return path


def _text(profile: ImportanceProfile, indent: int | None = None) -> str:
    return json.dumps(profile.to_dict(), indent=indent, ensure_ascii=False, allow_nan=False)


def _write_json(profile: ImportanceProfile, path: Path) -> None:
    path.write_text(_text(profile, 2) + "\n", encoding="utf-8")


def _rows(profile: ImportanceProfile) -> pd.DataFrame:
    """Layers, then what is outside the stack."""
    return pd.concat([profile.layers, profile.outside], ignore_index=True)


def _write_csv(profile: ImportanceProfile, path: Path) -> None:
    _rows(profile).to_csv(path, index=False, encoding="utf-8")


def _write_parquet(profile: ImportanceProfile, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pandas(_rows(profile), preserve_index=False)
    whole = {_KEY: _text(profile).encode()}
    pq.write_table(table.replace_schema_metadata((table.schema.metadata or {}) | whole), path)


def _write_picture(profile: ImportanceProfile, path: Path) -> None:
    """Draw on a figure of its own, which no notebook shows a second time."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    profile.plot(ax=figure.add_subplot())
    # The same profile is the same file: ids of one salt, and no date.
    with rc_context({"svg.hashsalt": "lisa"}):
        figure.savefig(path, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)


def _read_text(path: Path) -> str:
    """Return the JSON of a profile, of a `.json` file or out of a `.parquet` file."""
    if path.suffix in (".csv", ".png", ".svg"):
        holds = "numbers alone, without what they are" if path.suffix == ".csv" else "a picture"
        raise LisaError(
            f"{path} holds {holds}: load a profile that was saved as .json or .parquet."
        )
    if path.suffix != ".parquet":
        return path.read_text(encoding="utf-8")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(path).metadata or {}
    except pa.ArrowInvalid as error:
        raise LisaError(f"{path} is not a complete Parquet file ({error}).") from None
    if _KEY not in metadata:
        raise LisaError(
            f"{path} holds no profile: give a file that ImportanceProfile.save wrote as .parquet."
        )
    return metadata[_KEY].decode()


def read_profile(path: Path) -> ImportanceProfile:
    """Read a profile, see `ImportanceProfile.load`."""
    try:
        record = json.loads(_read_text(path))
    except LisaError:
        raise
    except OSError as error:
        raise LisaError(f"{path} cannot be read ({error.strerror or error}).") from None
    except ValueError as error:
        raise LisaError(f"{path} is not complete JSON ({error}): save the profile again.") from None
    try:
        return _profile(record)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise LisaError(
            f"{path} holds no profile ({type(error).__name__}: {error}): give a file that "
            "ImportanceProfile.save wrote as .json or .parquet."
        ) from None


def _profile(record: dict[str, Any]) -> ImportanceProfile:
    start = record["initialisation"]
    if start is not None:
        start = Initialisation(
            **_nan_for_none(start) | {"expected": np.array(start["expected"], dtype=np.float64)}
        )
    texts = ("metric", "definition", "method", "model", "by", "confidence", "verdict", "statement")
    return ImportanceProfile(
        **{name: record[name] for name in texts},
        sources=tuple(record["sources"]),
        layers=_frame(record["layers"]),
        outside=_frame(record["outside"]),
        concentration=Concentration(
            **{name: _interval(value) for name, value in record["concentration"].items()}
        ),
        shape=_shape(record["shape"]),
        initialisation=start,
        reliability=Reliability(**_nan_for_none(record["reliability"])),
        samples=None,
        remarks=tuple(record["remarks"]),
        # What an older version did not judge by has its present value.
        thresholds=Thresholds(**record["thresholds"]),
        seeds=Seeds.from_dict(record["seeds"]) if record.get("seeds") else None,
        agrees_with_ablation=record.get("agrees_with_ablation"),
        estimand=record.get("estimand", ""),
        stacks=tuple(
            StackShape(**stack | {"shape": _shape(stack["shape"])})
            for stack in record.get("stacks", ())
        ),
    )


def _shape(record: dict[str, Any]) -> Shape:
    found: dict[str, Any] = {
        name: _interval(value) if isinstance(value, dict) else _tuple(value)
        for name, value in record.items()
    }
    return Shape(**found)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _interval(value: dict[str, Any]) -> Interval:
    number = value["value"]
    return Interval(float("nan") if number is None else number, value["low"], value["high"])


def _nan_for_none(values: dict[str, Any]) -> dict[str, Any]:
    nan = float("nan")
    return {n: nan if v is None and n not in _NONE else v for n, v in values.items()}


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    names = ("layer", "name", "score", "low", "high", "joint_low", "joint_high", "n_eff", "visits",
             "initial", "rho", "steps", "zeros", "standing")  # fmt: skip
    frame = pd.DataFrame(rows, columns=list(names))
    frame["standing"] = frame["standing"].astype(object).where(frame["standing"].notna(), "unknown")
    return frame.astype(dict.fromkeys(NUMBERS, "float64") | dict.fromkeys(_WHOLE, "Int64"))
