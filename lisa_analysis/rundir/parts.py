"""Runs whose draws take halves or single matrices of layers (``lisa.by``): what was drawn when."""

from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.rundir.events import chosen
from lisa_analysis.rundir.run import Run

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Parts:
    """Parts of layers that take turns, as a run's manifest names them.

    Attributes
    ----------
    by
        ``half`` or ``module``.
    names, layers, sizes
        Name, layer and number of elements of every part.
    tensors
        Names of the tensors of every part.
    """

    by: str
    names: tuple[str, ...]
    layers: NDArray[np.int64]
    sizes: Array
    tensors: tuple[tuple[str, ...], ...]


def parts_of(run: Run) -> Parts | None:
    """Parts of layers that a run draws; None where whole layers take turns, or nothing does."""
    lisa = run.manifest.get("lisa")
    if not isinstance(lisa, dict) or lisa.get("by", "layer") == "layer":
        return None
    try:
        found = Parts(
            str(lisa["by"]),
            tuple(map(str, lisa["unit_names"])),
            np.array(lisa["unit_layers"], dtype=np.int64),
            np.array(lisa["unit_sizes"], dtype=np.float64),
            tuple(tuple(map(str, names)) for names in lisa["unit_tensors"]),
        )
    except (KeyError, TypeError, ValueError):
        return None
    counts = {len(found.names), found.layers.size, found.sizes.size, len(found.tensors)}
    inside = len(counts) == 1 and ((found.layers >= 0) & (found.layers < run.n_layers)).all()
    return found if inside and bool((found.sizes > 0).all()) else None


def part_draws(run: Run, parts: Parts) -> list[tuple[int, tuple[int, ...], Array | None]]:
    """Draws in order: step, indices of the parts drawn, and π of every part, None if not logged."""
    events, count = run.events, len(parts.names)
    if not len(events) or "units" not in events:
        return []
    found: dict[int, tuple[tuple[int, ...], Array | None]] = {}
    for line in events[events["event"] == "lisa_draw"].to_dict("records"):
        units, pi = line.get("units"), line.get("unit_probabilities")
        if not _whole(units, count):
            continue
        usable = isinstance(pi, list) and len(pi) == count
        found[int(line["step"])] = (
            tuple(units),
            np.asarray(pi, dtype=np.float64) if usable else None,
        )
    return [(step, *found[step]) for step in sorted(found)]


def _whole(units: Any, count: int) -> TypeGuard[list[int]]:
    return isinstance(units, list) and all(
        isinstance(unit, int) and 0 <= unit < count for unit in units
    )


def drawn_share(run: Run, layer: NDArray[np.int64], of: NDArray[np.int64]) -> Array:
    """Share of a group's trained elements that every draw took, shape (draws, groups).

    0 or 1 where whole layers take turns.

    Parameters
    ----------
    run
        The run.
    layer
        Layer of every group, shape (groups,), all within the stack.
    of
        Group of every param_id, −1 for those of other groups.
    """
    parts = parts_of(run)
    whole = chosen(run)
    if parts is None:
        return whole[:, layer].astype(np.float64)
    frame = run.parameters
    place = dict(zip(frame["name"].astype(str), frame["param_id"].astype(int), strict=True))
    numel = dict(zip(frame["name"].astype(str), frame["numel"].astype(float), strict=True))
    size = np.zeros((len(parts.names), layer.size))
    for index, names in enumerate(parts.tensors):
        for name in names:
            group = int(of[place[name]]) if name in place else -1
            if 0 <= group < layer.size:
                size[index, group] += numel[name]
    drawn = np.zeros((len(whole), len(parts.names)))
    for index, (_, units, _) in enumerate(part_draws(run, parts)):
        if index < len(drawn):
            drawn[index, list(units)] = 1.0
    total = size.sum(axis=0)
    return np.asarray(drawn @ size / np.where(total > 0, total, np.nan))
