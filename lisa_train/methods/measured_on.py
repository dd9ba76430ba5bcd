"""Files that were measured on one model and are used on another: the layers' names do not tell."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def of_another_model(path: Any, model: "nn.Module") -> str:
    """Say that a file's profile is of a model of another name; empty where it is not, or unknown.

    No error: a base model and what was tuned from it have different names, and one profile.
    """
    if not isinstance(path, str):  # numbers, or none
        return ""
    measured = json.loads(Path(path).read_text(encoding="utf-8")).get("model")
    trained = getattr(getattr(model, "config", None), "name_or_path", None)
    names = [_short(name) for name in (measured, trained)]
    if not all(names) or names[0] == names[1]:
        return ""
    return f"{path} was measured on {names[0]}, and this model is {names[1]}"


def _short(name: Any) -> str:
    """Name of a model without the way to it; empty where there is none."""
    if not isinstance(name, str) or name == "unknown":
        return ""
    for part in Path(name).parts:  # of the hub's cache: …/models--ORG--NAME/snapshots/REVISION
        if part.startswith("models--"):
            return part.rpartition("--")[2]
    return "" if Path(name).name == ".." else Path(name).name
