"""What an ablation measured: losses per example with one unit's change taken out, or put in."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from lisa_analysis.contract.errors import RunDirectoryError
from lisa_analysis.contract.schema import ABLATION_TABLE
from lisa_analysis.rundir.small_table import no_rows, read_whole

if TYPE_CHECKING:
    import pandas as pd

# The whole models have no unit; the other two leave one unit's change out, or put it in alone.
WHOLE = ("trained", "base")
MODES = (*WHOLE, "reset", "keep")
DATA = ("held_out", "general")
_UNIT = re.compile(r"\d+|\d+-\d+|[a-z][a-z_]*")


def read_ablation(path: Path, n_layers: int, warnings: list[str]) -> "pd.DataFrame":
    """Read the ablation of a run.

    Parameters
    ----------
    path
        The file; none is a run without an ablation.
    n_layers
        Layers of the run, for the check of its units.
    warnings
        Takes what is not as it should be and does not matter.

    Returns
    -------
    DataFrame
        The columns of `ABLATION_TABLE`, as they were written; empty without a file.

    Raises
    ------
    RunDirectoryError
        When the file cannot be read, or what it says cannot be.
    """
    if not path.exists():
        return no_rows(ABLATION_TABLE)
    frame = read_whole(path, ABLATION_TABLE, warnings, "run lisa-ablate again")
    if fault := _fault(frame, n_layers):
        raise RunDirectoryError(f"{path} {fault}: run lisa-ablate again.")
    return frame


def _fault(frame: "pd.DataFrame", n_layers: int) -> str | None:
    """Say what cannot be."""
    if frame[["mode", "data", "example", "tokens"]].isna().any(axis=None):
        return "has rows without mode, data, example or tokens"
    for name, known in (("mode", MODES), ("data", DATA)):
        if strange := sorted({*frame[name].unique()} - {*known}):
            return f"has the {name} {strange[0]!r}, expected one of {', '.join(known)}"
    whole = frame["mode"].isin(WHOLE)
    if frame.loc[~whole, "unit"].isna().any():
        return "has rows of reset or keep without a unit"
    for unit in frame.loc[~whole, "unit"].unique():
        if not _UNIT.fullmatch(unit):
            return f"has the unit {unit!r}, expected a layer, a range or a group"
        if unit[0].isdigit() and max(map(int, unit.split("-"))) >= n_layers:
            return f"has the unit {unit}, and the run has {n_layers} layers"
    if (frame["tokens"] <= 0).any():
        return "has examples without a single label"
    keys = ["mode", "data", "example"]
    if frame[whole].duplicated(keys).any() or frame[~whole].duplicated(
        [*keys, "unit", "kind"]
    ).any():  # fmt: skip
        return "has two rows of one example, unit and mode"
    return None
