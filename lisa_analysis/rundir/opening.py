"""A run that is there already, or the one at a path: what every function takes for a run."""

import os
from pathlib import Path
from typing import Any

from lisa_analysis.contract.errors import LisaError, RunDirectoryError
from lisa_analysis.contract.schema import MANIFEST
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


def runs_at(path: str | Path) -> list[Path]:
    """Return the path itself, or of a folder that is no run the run directories directly in it.

    These are sorted by name. Weights, and what is no folder, are for `load` to judge.

    Raises
    ------
    RunDirectoryError
        For a folder that is no run, holds no weights, and has no run directly in it.
    """
    from lisa_analysis.rundir.logs.sources import is_log
    from lisa_analysis.rundir.weights.plain import is_weights

    path = Path(path)
    try:
        if not path.is_dir() or (path / MANIFEST).exists():
            return [path]
        found = sorted(child for child in path.iterdir() if (child / MANIFEST).is_file())
    except OSError:
        return [path]
    if found or is_weights(path) or is_log(path):
        return found or [path]
    raise RunDirectoryError(
        f"{path} holds no {MANIFEST}, and no folder directly in it does: give a run directory "
        "(the output_dir of lisa-train), a folder of them, an adapter, a model, or the log of "
        "another trainer."
    )
