"""What a person hands over as a path, opened: what was saved, and runs to draw."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.paths import as_path
from lisa_analysis.rundir import opening
from lisa_analysis.rundir.run import Run

# What tells the files apart that `save` wrote as `.json`: a key that no other of them has.
_KEYS = {
    "findings": "Diagnostics",
    "concordance": "Comparison",
    "inclusion_probabilities": "SamplingProbabilities",
    "estimand": "ImportanceProfile",
}
_FOR_OTHERS = {
    ".csv": "numbers alone", ".png": "a picture", ".svg": "a picture", ".html": "a page",
}  # fmt: skip


def load(path: str | Path, *, base: str | Path | None = None) -> Any:
    """Open a run directory, weights alone, somebody else's log, or what was saved.

    A run is cheap to open: run.json is read, or the headers of the weights; the rest is read when
    it is asked for. A log, and what was saved, is read whole.

    Parameters
    ----------
    path
        Folder that `lisa-train` or a recorder wrote; or a PEFT adapter, or a model's safetensors;
        or a log of another trainer: `trainer_state.json`, TensorBoard's event files (or a folder
        with either), or a project of trackio (`.db`); or a file that `save` of a profile
        (`.json`, `.parquet`), of probabilities, findings or a comparison (`.json`) wrote.
    base
        The model before: with it a tuned model or an adapter is compared tensor by tensor. Of a
        run, where its base model is, when it is not where the run says.

    Returns
    -------
    Run, ImportanceProfile, SamplingProbabilities, Diagnostics or Comparison

    Raises
    ------
    RunDirectoryError
        One sentence, when the folder is missing, torn, foreign or of another major version.
    LisaError
        For what is no path; when weights cannot be read, or have nothing in common with their
        base; for a file that was saved for people or other tools.
    """
    path = as_path(path, "load")
    saved = _saved(path) if base is None and path.is_file() else None
    if saved is None:
        return opening.load(path, base=base)
    import lisa_analysis

    return getattr(lisa_analysis, saved).load(path)


def _saved(path: Path) -> str | None:
    """Return the class that reads the file, None where `save` did not write it."""
    if path.suffix == ".parquet":
        return "ImportanceProfile"
    if path.suffix in _FOR_OTHERS:
        raise LisaError(
            f"{path} holds {_FOR_OTHERS[path.suffix]}, not what was found: load what was saved as "
            ".json, a profile also as .parquet."
        )
    if path.suffix != ".json":
        return None
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    keys = record if isinstance(record, Mapping) else {}
    return next((name for key, name in _KEYS.items() if key in keys), None)


def a_run(value: Any, plot: str, attribute: str = "iter_metrics") -> Run:
    """Return the run that a plot is to draw, opened where it is a path.

    Parameters
    ----------
    value
        A run, or where it lies.
    plot
        Name of the plot, for the words.
    attribute
        What the plot needs of a run.

    Raises
    ------
    LisaError
        For anything else, and what opening a run raises.
    """
    if isinstance(value, str | os.PathLike):
        return opening.load(os.fspath(value))
    if not hasattr(value, attribute):
        raise LisaError(
            f"plots.{plot} draws a run directory, opened with lisa_analysis.load or as a path, "
            f"got a {type(value).__name__}."
        )
    run: Run = value
    return run


def some_runs(value: Any, plot: str) -> list[Run]:
    """Return the runs of a list, those opened that are paths.

    Raises
    ------
    LisaError
        For what is no list of runs (one path is not its letters), and what opening a run raises.
    """
    if isinstance(value, str | os.PathLike) or not hasattr(value, "__iter__"):
        raise LisaError(
            f"plots.{plot} draws a list of runs, or a mapping from a label to the runs of a "
            f"group, got a {type(value).__name__}."
        )
    return [a_run(run, plot, "scalars") for run in value]
