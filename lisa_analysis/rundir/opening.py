"""From a path to what lies there: a run, weights alone, or the log of another trainer."""

import os
from pathlib import Path

from lisa_analysis.contract.errors import LisaError, RunDirectoryError
from lisa_analysis.contract.paths import as_path
from lisa_analysis.contract.schema import MANIFEST
from lisa_analysis.rundir.run import Run

RunLike = Run | str | os.PathLike[str]
"""A run that was opened, or where it lies."""


def load(path: str | Path, *, base: str | Path | None = None) -> Run:
    """Open a run directory, weights alone, or somebody else's log.

    Cheap: reads run.json, or the headers of the weights; the rest is read when it is asked for. A
    log is read whole.

    Parameters
    ----------
    path
        Folder that `lisa-train` or a recorder wrote; or a PEFT adapter, or a model's safetensors;
        or a log of another trainer: `trainer_state.json`, TensorBoard's event files (or a folder
        with either), or a project of trackio (`.db`).
    base
        The model before: with it a tuned model or an adapter is compared tensor by tensor. Of a
        run, where its base model is, when it is not where the run says.

    Returns
    -------
    Run

    Raises
    ------
    RunDirectoryError
        One sentence, when the folder is missing, torn, foreign or of another major version.
    LisaError
        For what is no path; when weights cannot be read, or have nothing in common with their base.
    """
    path = as_path(path, "load")
    base = None if base is None else as_path(base, "base")
    if (path.is_dir() and not (path / MANIFEST).exists()) or path.suffix == ".safetensors":
        from lisa_analysis.rundir.weights.plain import PlainWeights, is_weights

        if is_weights(path):
            return PlainWeights(path, base)
    if not (path / MANIFEST).exists():
        from lisa_analysis.rundir.logs.sources import is_log

        if is_log(path):
            from lisa_analysis.rundir.logs.others_log import OthersLog

            return OthersLog(path)
    run = Run(path)
    run.base = base
    return run


def opened(run: object, asked_by: str) -> Run:
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
