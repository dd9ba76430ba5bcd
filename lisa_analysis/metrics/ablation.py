"""Metrics of an ablation: what a unit's learned change was worth, in loss on unseen examples."""

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.metrics.log import Measurements
from lisa_analysis.metrics.registry import metric
from lisa_analysis.metrics.step_tables import Grouping
from lisa_analysis.rundir.ablation import WHOLE

if TYPE_CHECKING:
    from lisa_analysis.rundir.run import Run

Array = NDArray[np.float64]


@metric(
    "linear",
    "Held-out loss per token with this layer's learned change taken out of the trained model, less "
    "that of the trained model: what the others cannot make up for.",
    needs=("ablation",),
    rows="examples",
    below_zero="hurt the trained model",
)
def ablation_reset(data: Measurements) -> NDArray[Any]:
    """Loss that comes back when one layer is put back."""
    return per_example(data, "reset", "held_out")


@metric(
    "linear",
    "Held-out loss per token of the base model, less that with only this layer's learned change "
    "put in: what the change does alone.",
    needs=("ablation",),
    rows="examples",
    below_zero="hurt the base model",
)
def ablation_keep(data: Measurements) -> NDArray[Any]:
    """Loss that goes when one layer's change is put into the base."""
    return per_example(data, "keep", "held_out")


@metric(
    "linear",
    "Loss per token on general text of the trained model, less that with this layer's learned "
    "change taken out: what its change costs elsewhere.",
    needs=("ablation",),
    rows="examples",
    below_zero="made general text easier",
)
def forgetting(data: Measurements) -> NDArray[Any]:
    """Loss on general text, after less before, of the trained model's layers."""
    return -per_example(data, "reset", "general")


@metric(
    "linear",
    "Loss per token on general text with only this layer's learned change put into the base model, "
    "less that of the base model.",
    needs=("ablation",),
    rows="examples",
    below_zero="made general text easier",
)
def forgetting_keep(data: Measurements) -> NDArray[Any]:
    """Loss on general text, after less before, of one layer's change alone."""
    return -per_example(data, "keep", "general")


@dataclass(frozen=True)
class Totals:
    """What the whole training did, per example of one text.

    Attributes
    ----------
    gain
        Shape (examples,): contributions whose mean is the base's loss per token less the trained
        model's; see `contributions`.
    before, after
        Loss per token of the base and of the trained model.
    examples, tokens
        How much text that was.
    """

    gain: Array
    before: float
    after: float
    examples: int
    tokens: int


def totals(run: "Run", data: str = "held_out") -> Totals | None:
    """Return what the whole training did on one text; None where it was not measured."""
    losses, tokens = _whole(run, data)
    if "base" not in losses or "trained" not in losses:
        return None
    before, after = losses["base"], losses["trained"]
    return Totals(
        contributions((before - after)[:, None], tokens)[:, 0],
        float(before.sum() / tokens.sum()),
        float(after.sum() / tokens.sum()),
        len(tokens),
        int(tokens.sum()),
    )


def contributions(differences: Array, tokens: Array) -> Array:
    """Rows whose mean is the difference of the losses per token, and as variable as that.

    The difference per token is a ratio of two sums over examples, r = Σd/Σt. Its linearised
    contributions r + (d_i − r·t_i)/t̄ (Cochran 1977, §6.3) are as good as independent repetitions
    of it: long examples weigh more, and no example counts as a loss per token of its own.

    Parameters
    ----------
    differences
        Shape (examples, groups): summed loss of an example with something less that without.
    tokens
        Shape (examples,): labels that count.
    """
    known = np.isfinite(differences)
    count = known.sum(axis=0)
    weight = np.where(known, tokens[:, None], 0.0)
    total = weight.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(known, differences, 0.0).sum(axis=0) / total
        rows = ratio + (differences - ratio * tokens[:, None]) * count / total
    # A change that did nothing to any example is exactly nothing.
    rows[known & (differences == 0) & (ratio == 0)] = 0.0
    return np.where(known, rows, np.nan)


_CACHE: weakref.WeakKeyDictionary[Any, dict[tuple[str, str, str], Array]] = (
    weakref.WeakKeyDictionary()
)


def per_example(data: Measurements, mode: str, text: str) -> Array:
    """Contributions of every example and group, shape (examples, groups); positive: worth it.

    Parameters
    ----------
    data
        What the run measured; its groups are the columns.
    mode, text
        ``reset`` or ``keep``, ``held_out`` or ``general``.

    Raises
    ------
    KeyError
        When that was not ablated, in words.
    """
    remembered = _CACHE.setdefault(data.run, {})
    key = (data.table.groups.level, mode, text)
    if key not in remembered:
        remembered[key] = _per_example(data, mode, text)
    return remembered[key].copy()


def _per_example(data: Measurements, mode: str, text: str) -> Array:
    run, groups = data.run, data.table.groups
    losses, tokens = _whole(run, text)
    against = "trained" if mode == "reset" else "base"
    rows = run.ablation
    rows = rows[(rows["data"] == text) & (rows["mode"] == mode)]
    rows = rows[rows["kind"].isna() if groups.level == "layer" else rows["kind"].notna()]
    if groups.level == "tensor":
        raise LisaError("an ablation is by layer, module or kind, not by tensor: choose another.")
    if rows.empty or against not in losses:
        raise KeyError(_lacking(mode, text, groups.level))
    table = np.full((len(tokens), len(groups.names)), np.nan)
    position = {int(example): row for row, example in enumerate(_examples(run, text))}
    # Kept apart from what was not measured, which a sum passes over.
    lost = rows["loss"].where(np.isfinite(rows["loss"].to_numpy()), np.inf)
    summed = rows.assign(group=_groups(rows, run, groups), loss=lost)
    summed = summed[(summed["group"] >= 0) & summed["example"].isin(position)]
    # A kind is that of all layers: each was taken out alone, and what that did is added up.
    cells = summed.groupby(["example", "group"], as_index=False).agg(
        loss=("loss", "sum"), units=("unit", "nunique")
    )
    whole = cells.groupby("group")["units"].transform("max")
    cells = cells[cells["units"] == whole]
    at = [position[int(example)] for example in cells["example"]]
    table[at, cells["group"].to_numpy()] = (
        cells["loss"].to_numpy() - losses[against][at] * cells["units"].to_numpy()
    )
    # A model that gave no number is measured and lost: no average says anything of it.
    table[:, np.isinf(table).any(axis=0)] = np.nan
    return contributions(table if mode == "reset" else -table, tokens)


def _groups(rows: Any, run: "Run", groups: Grouping) -> NDArray[np.int64]:
    """Group of every row; −1 for a range of layers or a unit that the run does not know."""
    at = {name: index for index, name in enumerate(groups.names)}

    def group(unit: str, kind: str | None) -> int:
        layer = int(unit) if unit.isdigit() else None
        if groups.level == "layer":
            return at.get(unit, -1) if layer is None else layer
        if layer is None:
            return -1
        return at.get(
            str(kind) if groups.level == "kind" else f"{run.layer_names[layer]} {kind}", -1
        )

    found = [group(unit, kind) for unit, kind in zip(rows["unit"], rows["kind"], strict=True)]
    return np.array(found, dtype=np.int64)


def _examples(run: "Run", text: str) -> list[int]:
    """Examples of one text of which the whole models' losses are known, in order."""
    frame = run.ablation
    frame = frame[(frame["data"] == text) & frame["mode"].isin(WHOLE)]
    modes = frame.groupby("example")["mode"].nunique()
    return sorted(int(example) for example in modes.index[modes == frame["mode"].nunique()])


def _whole(run: "Run", text: str) -> tuple[dict[str, Array], Array]:
    """Losses of the whole models by mode, and the tokens, of the usable examples in order."""
    frame = run.ablation
    frame = frame[(frame["data"] == text) & frame["mode"].isin(WHOLE)]
    examples = _examples(run, text)
    losses, tokens = {}, np.zeros(0)
    for mode in frame["mode"].unique():
        rows = frame[frame["mode"] == mode].set_index("example").loc[examples]
        losses[mode] = rows["loss"].to_numpy(dtype=np.float64)
        tokens = rows["tokens"].to_numpy(dtype=np.float64)
        if lost := int((~np.isfinite(losses[mode])).sum()):
            raise KeyError(
                f"the loss of the {mode} model is not a finite number on {lost} of "
                f"{len(examples)} {text.replace('_', '-')} examples"
            )
    return losses, tokens


def _lacking(mode: str, text: str, level: str) -> str:
    """Say what was not ablated, and how to."""
    how = "lisa-ablate RUN_DIR"
    how += " --general FILE" if text == "general" else ""
    how += "" if level == "layer" else " --by kind"
    on = "general text" if text == "general" else "held-out examples"
    return f"no {mode} of single {level}s on {on} was measured ({how})"
