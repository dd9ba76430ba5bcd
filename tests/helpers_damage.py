"""What hands, disks and other programs do to files: absurd JSON values, and bytes gone wrong."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

VALUES = [None, True, 0, -1, 3, 2**63, 1.5, "", "x", "\ud800", "<script>", [], {}, [1], {"a": 1},
          [None], {"name": "\udfff"}, "9" * 400, "\u202e\x1b[31m", "delete"]  # fmt: skip


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the way to every value in a JSON document (of long lists the first three)."""
    found = [above] if above else []
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value[:3])
        for key, inner in items:
            found += places(inner, (*above, key))
    return found


def edit_json(path: Path, rng: random.Random) -> None:
    """Put an absurd value at a random place of a JSON file, or of a line of JSONL; or delete it."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    at = rng.randrange(len(lines))
    content = json.loads(lines[at])
    *way, last = rng.choice(places(content))
    inner = content
    for key in way:
        inner = inner[key]
    value = rng.choice(VALUES)
    if value == "delete":
        del inner[last]
    else:
        inner[last] = value
    lines[at] = json.dumps(content)
    path.write_text("\n".join(lines) + "\n")


def mutate(rng: np.random.Generator, raw: bytes) -> bytes:
    """Return the bytes with one of: a cut, flipped bytes, a lost piece, a doubled piece, noise."""
    changed = bytearray(raw)
    kind = rng.integers(5)
    a, b = sorted(rng.integers(0, len(changed) + 1, 2))
    if kind == 0:
        return bytes(changed[:a])
    if kind == 1:
        for index in rng.integers(0, max(len(changed), 1), rng.integers(1, 8)):
            changed[index] = rng.integers(256)
        return bytes(changed)
    if kind == 2:
        return bytes(changed[:a] + changed[b:])
    if kind == 3:
        return bytes(changed[:b] + changed[a:])
    return bytes(changed[:a]) + rng.bytes(int(rng.integers(1, 40))) + bytes(changed[a:])
