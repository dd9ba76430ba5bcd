"""Which runs are repetitions of one configuration, and what runs are called."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lisa_analysis.contract.schema import CONFIG
from lisa_analysis.rundir.streams import read_bytes

# What may differ between repetitions of one configuration.
_REPEATED = re.compile(r"[\w.]*(seed|output_dir|run_dir|run_name|run_id)")
_SETTING = re.compile(r"(\s*)([\w.]+)\s*:(.*)")
# A setting that is off. An older version that did not know it wrote no line of it.
_OFF = ("false", "null", "[]", "{}")


def settings(run: Any) -> dict[str, str]:
    """Everything but seeds and folders, by key with its sections, as written."""
    found = {"method": str(run.method)}
    path = run.path / CONFIG
    if not path.exists():
        keys = ("model", "lisa", "lora", "dataset", "recording")
        return found | {
            key: json.dumps(run.manifest.get(key), sort_keys=True, default=str) for key in keys
        }
    sections: list[tuple[int, str]] = []
    key = ""
    for line in read_bytes(path).decode("utf-8", "replace").splitlines():
        setting = _SETTING.fullmatch(line)
        if setting is None:  # an item of a list, a text over several lines
            found[key] = found.get(key, "") + "\n" + line.strip()
            continue
        depth = len(setting[1])
        sections = [*((d, name) for d, name in sections if d < depth), (depth, setting[2])]
        key = "/".join(name for _, name in sections)
        found[key] = setting[3].strip()
    return {
        key: value
        for key, value in found.items()
        if key and not _REPEATED.fullmatch(key.rsplit("/", 1)[-1])
    }


def configurations(runs: list[dict[str, str]]) -> list[str]:
    """Short name of the configuration of every run; equal for repetitions of one setting.

    A run joins the first configuration with all of whose runs it agrees: a key in both files has
    one value, and a key that one file lacks is off in the other. The name is that of the first
    run's settings.
    """
    members: dict[str, list[dict[str, str]]] = {}
    names = []
    for run in runs:
        name = next(
            (n for n, group in members.items() if all(_agree(run, other) for other in group)), None
        )
        if name is None:
            text = json.dumps(run, sort_keys=True)
            name = f"{run['method']}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        members.setdefault(name, []).append(run)
        names.append(name)
    return names


def _agree(a: dict[str, str], b: dict[str, str]) -> bool:
    return all(
        a[key] == b[key] if key in a and key in b else a.get(key, b.get(key)) in _OFF
        for key in a.keys() | b.keys()
    )


def labels(runs: Sequence[Any]) -> list[str]:
    """Name every run by its directory, which its owner chose; by its id where that is no name."""
    names = [Path(run.path).resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.run_id) for run in runs]
    return distinct(names)


def distinct(names: list[str]) -> list[str]:
    """Labels made distinct: a repeated run id gets a number."""
    seen: dict[str, int] = {}
    labels = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        labels.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return labels
