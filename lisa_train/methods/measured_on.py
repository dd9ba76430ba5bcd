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
    known = (name for name in (measured, trained) if isinstance(name, str) and name != "unknown")
    names = [Path(name).name for name in known if name]
    if len(names) < 2 or names[0] == names[1]:
        return ""
    return f"{path} was measured on {names[0]}, and this model is {names[1]}"
