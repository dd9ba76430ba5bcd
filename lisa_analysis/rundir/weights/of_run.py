"""The weights behind a run: what it saved, and the base model that it names."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.layers import plain_name
from lisa_analysis.contract.schema import ADAPTER_DIR, CHECKPOINTS_DIR
from lisa_analysis.rundir.weights.adapter import CONFIG, open_adapter
from lisa_analysis.rundir.weights.changes import (
    Changed,
    of_adapter,
    of_checkpoints,
    of_model,
)
from lisa_analysis.rundir.weights.checkpoint import holds_weights, open_checkpoint
from lisa_analysis.rundir.weights.plain import PlainWeights

if TYPE_CHECKING:
    from lisa_analysis.rundir.run import Run

# The folder below a run in which `lisa-train` saves a model that was trained whole.
FINAL = f"{CHECKPOINTS_DIR}/final"


def weights_of(run: "Run") -> dict[int, Changed]:
    """Weights of a run by param_id: before, and the change where the run saved what it made.

    Raises
    ------
    LisaError
        When neither what the run saved nor its base model can be found or read.
    """
    if isinstance(run, PlainWeights):
        return dict(enumerate(run.changed))
    found = _found(run)
    frame = run.parameters
    own = frame[(frame["role"] == "base") & frame["tied_to"].isna()]
    at: dict[str, list[int]] = {}
    for number, name in zip(own["param_id"], own["name"], strict=True):
        at.setdefault(plain_name(str(name)), []).append(int(number))
    ids = [(at.get(plain_name(change.name), []), change) for change in found]
    return {numbers[0]: change for numbers, change in ids if len(numbers) == 1}


def _found(run: "Run") -> list[Changed]:
    base, why = _base(run)
    before = None if base is None else open_checkpoint(base)
    if (run.path / ADAPTER_DIR / CONFIG).exists():
        try:
            return of_adapter(open_adapter(run.path / ADAPTER_DIR), before)[0]
        except LisaError:
            # PiSSA and others leave no change to be read; the base is there all the same.
            if before is None:
                raise
    elif before is not None and (run.path / FINAL).is_dir() and holds_weights(run.path / FINAL):
        return of_checkpoints(open_checkpoint(run.path / FINAL), before)[0]
    if before is None:
        raise LisaError(why)
    return of_model(before)


def _base(run: "Run") -> tuple[Path | None, str]:
    """Folder of the base model, or why it is not known."""
    if run.base is not None:
        return run.base, ""
    model = run.manifest.get("model")
    name = str(model.get("name") or "") if isinstance(model, dict) else ""
    for folder in (Path(name), _hub_folder(name)) if name else ():
        if folder is not None and folder.is_dir() and holds_weights(folder):
            return folder, ""
    return None, (
        f"the base model {name or 'of the run'} is no folder with safetensors here: say where it "
        'is, lisa_analysis.load(run, base="…") or lisa-analyze --base'
    )


def _hub_folder(name: str) -> Path | None:
    """Where the hub's cache has a model of this name; nothing is fetched."""
    home = os.environ.get("HF_HUB_CACHE") or os.path.join(
        os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface"), "hub"
    )
    folder = Path(home) / f"models--{name.replace('/', '--')}"
    try:
        return folder / "snapshots" / (folder / "refs" / "main").read_text().strip()
    except OSError:
        return None
