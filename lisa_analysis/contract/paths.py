"""A path that somebody gave, or one sentence (stdlib only)."""

import os
from pathlib import Path
from typing import Any

from lisa_analysis.contract.errors import LisaError


def as_path(value: Any, asked_by: str) -> Path:
    """Return `value` as a path.

    Raises
    ------
    LisaError
        For anything but a string or a path.
    """
    if isinstance(value, str | os.PathLike):
        return Path(os.fspath(value))
    raise LisaError(f"{asked_by} takes a path, got a {type(value).__name__}.")
