"""Files that the settings of a run name: what they hold tells arms apart, and not their path."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.multipliers_file import read_multipliers
from lisa_analysis.contract.probabilities_file import read_record
from lisa_analysis.rundir.run import Run

# Files of numbers, one a layer, are far smaller.
_LARGEST = 1 << 24


def candidates(folder: Path, given: str) -> list[Path]:
    """Files that a setting may mean: the copy in the run's folder, then the one at the path."""
    text = " ".join(given.split())
    try:
        text = json.loads(text)
    except ValueError:
        text = text.strip("'\"")
    name = Path(str(text))
    found = []
    for path in (folder / name.name, folder / name):
        try:
            if path.is_file() and path.stat().st_size <= _LARGEST:
                found.append(path)
        except (OSError, ValueError):  # numbers and other text that is no path
            continue
    return found


def by_content(run: Run, values: Mapping[str, str]) -> dict[str, str]:
    """Return settings with what a file holds in the place of its path, where that is known."""
    found = dict(values)
    chosen = (run.manifest.get("select") or {}).get("chosen_layers")
    if "select/profile" in found and isinstance(chosen, list):
        found["select/profile"] = json.dumps(chosen)  # all that the scores were for
    for key, read in _READERS.items():
        for path in candidates(run.path, found[key]) if key in found else ():
            try:
                found[key] = json.dumps(read(path))
            except (LisaError, OSError, ValueError):
                continue
            break
    return found


def _multipliers(path: Path) -> Any:
    held = read_multipliers(path)
    groups = {name: factor for name, factor in sorted(held.groups.items()) if factor != 1.0}
    return [*held.layers, *([groups] if groups else [])]


def _prior(path: Path) -> Any:
    return [float(p) for p in read_record(path)["inclusion_probabilities"]]


_READERS: dict[str, Callable[[Path], Any]] = {
    "lr_multipliers": _multipliers,
    "lisa/learn/prior": _prior,
}
