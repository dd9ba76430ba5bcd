"""Plain values as YAML, in the part of YAML that needs no library (stdlib only)."""

import json
import re
from typing import Any

_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def to_yaml(values: Any, indent: int = 0) -> str:
    """Write dictionaries, lists and scalars as YAML; texts are quoted as in JSON.

    >>> print(to_yaml({"t": [{"filter": "mlp", "value": [0.5, 1]}], "name": "a: b"}), end="")
    t:
      - filter: "mlp"
        value: [0.5, 1]
    name: "a: b"
    """
    pad = " " * indent
    if isinstance(values, dict):
        lines = []
        for key, value in values.items():
            name = key if _PLAIN_KEY.fullmatch(key) else json.dumps(key)
            if _nested(value):
                lines.append(f"{pad}{name}:\n{to_yaml(value, indent + 2)}")
            else:
                lines.append(f"{pad}{name}: {_scalar(value)}\n")
        return "".join(lines)
    lines = []
    for value in values:
        if isinstance(value, dict):
            first, _, rest = to_yaml(value, indent + 2).partition("\n")
            lines.append(f"{pad}- {first.lstrip()}\n{rest}")
        else:
            lines.append(f"{pad}- {_scalar(value)}\n")
    return "".join(lines)


def _nested(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value)
    # Lists of numbers stay in one line, others have one line for each.
    return isinstance(value, list) and any(isinstance(item, str | dict) for item in value)


def _scalar(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
