"""Which runs are repetitions of one configuration, and what runs are called."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lisa_analysis.contract.schema import CONFIG
from lisa_analysis.rundir.jsonl import read_bytes
from lisa_analysis.rundir.sampled import Sampled, read_sampled

# What may differ between repetitions of one configuration.
_REPEATED = re.compile(r"[\w.]*(seed|output_dir|run_dir|run_name|run_id)")
_SETTING = re.compile(r"(\s*)([\w.]+)\s*:(.*)")
# A setting that is off. An older version that did not know it wrote no line of it.
_OFF = ("false", "null", "[]", "{}")


# The text of its path says nothing: what was sampled is compared by content.
_PROBABILITIES = ("lisa/probabilities", "lisa.probabilities")


@dataclass(frozen=True)
class Settings:
    """What makes runs repetitions of each other.

    Attributes
    ----------
    values
        Everything but seeds, folders and probabilities, by key with its sections, as written.
    sampled
        Which layers were drawn how often.
    """

    values: dict[str, str]
    sampled: Sampled

    def agrees(self, other: "Settings") -> bool:
        """Whether a key in both has one value, one that is missing is off, and the sampling."""
        a, b = self.values, other.values
        return self.sampled.agrees(other.sampled) and all(
            a[key] == b[key] if key in a and key in b else a.get(key, b.get(key)) in _OFF
            for key in a.keys() | b.keys()
        )

    @property
    def name(self) -> str:
        """Method, kind of sampling and a fingerprint."""
        text = json.dumps([self.values, self.sampled.fingerprint], sort_keys=True)
        words = [self.values["method"], self.sampled.word]
        return "-".join([*filter(None, words), hashlib.sha256(text.encode()).hexdigest()[:8]])


def settings(run: Any) -> Settings:
    """Read what makes `run` a repetition of others."""
    path = run.path / CONFIG
    found = dict(_written(path) if path.exists() else _declared(run))
    named = [found.pop(key, None) for key in _PROBABILITIES]
    values = {
        key: value
        for key, value in found.items()
        if key and not _REPEATED.fullmatch(key.rsplit("/", 1)[-1])
    }
    given = next((text for text in named if text is not None), "null")
    return Settings({"method": str(run.method)} | values, read_sampled(run, given))


def _written(path: Path) -> dict[str, str]:
    """Settings of `config.yaml`."""
    found: dict[str, str] = {}
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
    return found


def _declared(run: Any) -> Iterator[tuple[str, str]]:
    """Settings that the manifest of a run without `config.yaml` has."""
    for key in ("model", "lisa", "lora", "dataset", "recording"):
        yield from _flat(key, run.manifest.get(key))


def _flat(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _flat(f"{key}/{name}", part)
    else:
        yield key, json.dumps(value, sort_keys=True, default=str)


def name_configurations(runs: list[Settings]) -> list[str]:
    """Short name of the configuration of every run; equal for repetitions of one setting.

    A run joins the first configuration with all of whose runs it agrees. The name is that of the
    first run's settings.
    """
    members: dict[str, list[Settings]] = {}
    names = []
    for run in runs:
        name = next(
            (n for n, group in members.items() if all(run.agrees(other) for other in group)), None
        )
        if name is None:
            name = run.name
            # What no fingerprint tells apart is told apart by a number.
            while name in members:
                name = f"{run.name} ({len(members) + 1})"
        members.setdefault(name, []).append(run)
        names.append(name)
    return names


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
