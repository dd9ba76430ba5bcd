"""A file of numbers by layer as an object: everything that keeps it from being read, in words."""

import json
from pathlib import Path
from typing import Any

from lisa_analysis.contract.errors import LisaError


def read_object(path: Path, error: type[LisaError], written_by: str) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Parameters
    ----------
    path
        The file.
    error
        What is raised, with one sentence, when it is missing, cannot be read, is torn, or holds
        something else.
    written_by
        The command that writes such files.
    """
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise error(f"{path} does not exist: give a file written by {written_by}.") from None
    except OSError as problem:
        raise error(f"{path} cannot be read ({problem.strerror or problem}).") from None
    except ValueError as problem:
        raise error(
            f"{path} is not complete JSON ({problem}): write it again with {written_by}."
        ) from None
    if not isinstance(record, dict):
        raise error(f"{path} holds {type(record).__name__}, expected an object.")
    return record
