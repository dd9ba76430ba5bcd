"""Reading a probabilities file: every way it can be wrong is one sentence."""

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

from lisa_analysis.contract.errors import ProbabilitiesError
from lisa_analysis.contract.json_file import read_object
from lisa_analysis.contract.schema import SCHEMA_VERSION, parse_version

# What was read last, with the state of the file then.
_READ: dict[Path, tuple[tuple[int, ...], dict[str, Any]]] = {}


def read_record(path: Path) -> dict[str, Any]:
    """Parse the file and check its version and the types of what the trainer needs.

    A file that is as it was when it was read last is not read again: a run asks several times.
    """
    state = _state(path)
    if state is not None and _READ.get(path, (None,))[0] == state:
        return deepcopy(_READ[path][1])
    record = _parsed(path)
    _READ.clear()
    if state is not None:
        _READ[path] = state, deepcopy(record)
    return record


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _parsed(path: Path) -> dict[str, Any]:
    record = read_object(path, ProbabilitiesError, "lisa-analyze --probabilities")
    version = record.get("schema_version")
    try:
        major = parse_version(str(version))[0]
    except ValueError:
        major = -1
    if major != parse_version(SCHEMA_VERSION)[0]:
        raise ProbabilitiesError(
            f"{path} has schema version {version!r}, this lisa_analysis reads {SCHEMA_VERSION}."
        )
    for name in ("layer_names", "inclusion_probabilities"):
        if not isinstance(record.get(name), list):
            raise ProbabilitiesError(f"{path} has no list {name}: it is no probabilities file.")
    if not isinstance(record.get("activated_layers"), int):
        raise ProbabilitiesError(
            f"{path} has activated_layers = {record.get('activated_layers')!r}: expected a whole "
            "number."
        )
    return record


def check_vector(path: Path, names: list[Any], pi: list[Any], k: int) -> None:
    """Σπ = k and 0 ≤ π ≤ 1, one per layer; a layer of π = 0 is never drawn."""
    if len(names) != len(pi):
        raise ProbabilitiesError(
            f"{path} has {len(names)} layer names and {len(pi)} inclusion probabilities: expected "
            "one per layer."
        )
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise ProbabilitiesError(f"{path} has layer names that are not distinct texts.")
    for layer, value in enumerate(pi):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and 0 <= value <= 1):
            raise ProbabilitiesError(
                f"{path} has inclusion probability {value!r} for layer {layer}: expected a number "
                "from 0 (never drawn) to 1."
            )
    total = math.fsum(pi)
    if abs(total - k) > 1e-9:
        raise ProbabilitiesError(
            f"{path} has inclusion probabilities that sum to {total:.12g}: expected "
            f"activated_layers = {k}."
        )
