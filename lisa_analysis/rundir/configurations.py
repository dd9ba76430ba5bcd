"""Which runs are repetitions of one another, on what model and data, and what runs are called."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from lisa_analysis.contract.schema import CONFIG
from lisa_analysis.rundir.input_files import by_content
from lisa_analysis.rundir.jsonl import read_bytes
from lisa_analysis.rundir.run import Run
from lisa_analysis.rundir.sampled import Sampled, read_sampled

# What may differ between repetitions of one configuration.
_REPEATED = re.compile(r"[\w.]*(seed|output_dir|run_dir|run_name|run_id)")
_SETTING = re.compile(r"(\s*)([\w.]+)\s*:(.*)")
# A setting that is off. An older version that did not know it wrote no line of it.
_OFF = ("false", "null", "[]", "{}")
# What such a setting stands for, where its default is not "off".
_BEFORE = {
    "lisa/recompute": "all", "lisa/correct_lr": "0.0", "lisa/by": "layer",
    "record/probe_batches": "1", "record/watch": "true", "lisa/stacks": "together",
}  # fmt: skip
# Sections of one method. All are written; what a run did not use tells no arms apart.
_OF_METHODS = ("lisa", "lora", "peft", "select", "probe")

MODEL_KEYS = ("model_name_or_path", "model/name")
_DATA = ("dataset_name", "dataset/name")
# The text of its path says nothing: what was sampled is compared by content.
_PROBABILITIES = ("lisa/probabilities", "lisa.probabilities")
_CONTROL = ("lisa/control", "lisa.control")
LEARNING = "lisa/learn"

# Settings that tell arms apart, in this order, then in that of the file.
_FIRST = (
    "learning_rate", "r", "lora_alpha", "activated_layers", "interval_steps", "sampling",
    "optimizer_state", "optim", "max_steps", "per_device_train_batch_size",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What makes runs repetitions of each other.

    Attributes
    ----------
    values
        Everything but seeds, folders and probabilities, by key with its sections, as written; of
        a file what it holds.
    sampled
        Which layers were drawn how often.
    """

    values: dict[str, str]
    sampled: Sampled

    def agrees(self, other: "Settings") -> bool:
        """Whether all settings have one value in both, and both sampled alike."""
        keys = self.values.keys() | other.values.keys()
        return self.sampled.agrees(other.sampled) and all(self.agrees_on(other, k) for k in keys)

    def agrees_on(self, other: "Settings", key: str) -> bool:
        """Whether a setting has one value in both; one that is missing is what it was before."""
        a, b = self.values, other.values
        if key in a and key in b:
            return a[key] == b[key]
        said = a.get(key, b.get(key))
        before = _BEFORE.get(key)  # as YAML or as JSON writes it
        return said in (*_OFF, None, before, f'"{before}"')


def settings(run: Run) -> Settings:
    """Read what makes `run` a repetition of others."""
    path = run.path / CONFIG
    found = dict(_written(path) if path.exists() else _declared(run))
    used = {str(run.method), *run.manifest}
    unused = tuple(f"{section}/" for section in _OF_METHODS if section not in used)
    found = {key: value for key, value in found.items() if not key.startswith(unused)}
    named = [found.pop(key, None) for key in _PROBABILITIES]
    asked = [found.pop(key, None) for key in _CONTROL]
    values = {
        key: value
        for key, value in found.items()
        if key and not _REPEATED.fullmatch(key.rsplit("/", 1)[-1])
    }
    if len({str(layer.get("stack")) for layer in run.manifest.get("layers") or ()}) < 2:
        values.pop("lisa/stacks", None)  # one stack is drawn alike either way
    for name in [name for name in values if name.startswith("lisa/activated_of_stack")]:
        del values[name]  # follows from the others
    resting = (run.manifest.get("lisa") or {}).get("resting_towers")
    if resting:  # before there were such, towers trained in every period
        values["lisa/resting_towers"] = json.dumps(resting)
    # Settings that were written by hand may lack what the manifest knows.
    for keys, name in ((MODEL_KEYS, model_of(run)), (_DATA, data_of(run))):
        if name and not values.keys() & {*keys}:
            values[keys[0]] = name
    given = next((text for text in named if text is not None), "null")
    control = next((text for text in asked if text is not None), "none")
    learns = any(key.startswith(f"{LEARNING}/") for key in values)
    sampled = read_sampled(run, given, control, learns=learns)
    return Settings({"method": str(run.method)} | by_content(run, values), sampled)


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


def _declared(run: Run) -> Iterator[tuple[str, str]]:
    """Settings that the manifest of a run without `config.yaml` has."""
    for key in ("model", "lisa", "lora", "peft", "select", "dataset", "recording"):
        yield from _flat(key, run.manifest.get(key))


def _flat(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _flat(f"{key}/{name}", part)
    else:
        yield key, json.dumps(value, sort_keys=True, default=str)


def grouped(runs: Sequence[Settings]) -> list[list[int]]:
    """Positions of the runs of every arm, in the order of first appearance.

    A run joins the first arm with all of whose runs it agrees.
    """
    arms: list[list[int]] = []
    for position, run in enumerate(runs):
        for arm in arms:
            if all(run.agrees(runs[other]) for other in arm):
                arm.append(position)
                break
        else:
            arms.append([position])
    return arms


def differing(members: Sequence[Settings]) -> list[str]:
    """Settings but the model that are not the same in all, the telling ones first."""
    keys = dict.fromkeys(key for member in members for key in member.values if key != "method")
    found = [
        key
        for key in keys
        if not all(a.agrees_on(b, key) for a, b in combinations(members, 2))
        and key not in MODEL_KEYS
    ]
    order = {name: i for i, name in enumerate(_FIRST)}
    return sorted(found, key=lambda key: order.get(short_name(key), len(order)))


def short_name(key: str) -> str:
    """Name of a setting without the sections that it stands in."""
    return key.rsplit("/", 1)[-1].rsplit(".", 1)[-1]


def model_of(run: Run) -> str:
    """Name of the model that a run trained, without the way to its folder; empty when unknown."""
    return _last_part(run.manifest.get("model"))


def data_of(run: Run) -> str:
    """Name of the data that a run trained on; empty when unknown."""
    return _last_part(run.manifest.get("dataset"))


def held_out_of(run: Run) -> str:
    """What is held out of a run's data, as far as run.json says; empty where it does not."""
    entry = run.manifest.get("dataset")
    count = entry.get("held_out_examples") if isinstance(entry, dict) else None
    return f"{count} held-out examples" if isinstance(count, int) and count else ""


def head_of(run: Run) -> str:
    """Class of the model that a run trained; empty when unknown."""
    entry = run.manifest.get("model")
    return str(entry.get("architecture") or "") if isinstance(entry, dict) else ""


def places_of(runs: Sequence[Run], what: str) -> list[str]:
    """Folders of one name at different places, as run.json has them, of ``model`` or ``dataset``.

    Empty where the names say already that they are different, or the same.
    """
    entries = [run.manifest.get(what) for run in runs]
    names = [str(e["name"]) for e in entries if isinstance(e, dict) and e.get("name")]
    absolute = dict.fromkeys(name for name in names if Path(name).is_absolute())
    return [*absolute] if len({Path(name).name for name in absolute}) < len(absolute) else []


def seeds_of(run: Run) -> dict[str, Any]:
    """Seeds of a run by what they are of; those that are not known are left out."""
    found = run.manifest.get("seeds")
    entries = found.items() if isinstance(found, dict) else ()
    return {str(name): seed for name, seed in entries if seed is not None}


def _last_part(entry: Any) -> str:
    name = entry.get("name") if isinstance(entry, dict) else None
    return Path(str(name)).name if name else ""


def labels(runs: Sequence[Run]) -> list[str]:
    """Name every run by its directory, which its owner chose.

    Where directories are of one name, as in ``lora/s1`` and ``full/s1``, by as much of the way to
    them as tells them apart; a run that is given twice by its id.
    """
    paths = [Path(run.path).resolve() for run in runs]
    if len(set(paths)) < len(paths):
        names = [path.name for path in paths]
        return distinct(names if len(set(names)) == len(names) else [str(r.run_id) for r in runs])
    for length in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return []


def distinct(names: list[str]) -> list[str]:
    """Labels made distinct: a repeated run id gets a number."""
    seen: dict[str, int] = {}
    labels = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        labels.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return labels
