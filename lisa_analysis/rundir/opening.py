"""A run that is there already, or the one at a path: what every function takes for a run."""

import os
from typing import Any

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.rundir.run import Run, load


def opened(run: Any, asked_by: str) -> Run:
    """Return `run` itself, or the run directory at that path.

    Raises
    ------
    LisaError
        For anything else, and what `load` raises.
    """
    if isinstance(run, Run):
        return run
    if isinstance(run, str | os.PathLike):
        return load(os.fspath(run))
    raise LisaError(
        f"{asked_by} takes a run directory, opened with lisa_analysis.load or as a path, got a "
        f"{type(run).__name__}."
    )
