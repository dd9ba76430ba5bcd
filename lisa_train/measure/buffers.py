"""Measured values on their way to the disk: on the device until one copy brings them over."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lisa_train.measure.quantities import REGISTRY
from lisa_train.model.norms import common_device


@dataclass
class Piece:
    """Sums of one column for some tensors at one step; `merged` when all processes are in.

    Where `missing`, of the shape of `values`, is above zero (on any process), nothing was measured.
    """

    column: str
    ids: np.ndarray
    values: torch.Tensor
    missing: torch.Tensor | None = None
    merged: bool = False


class MetricBuffer:
    """Collects per-tensor sums by step and turns them into the rows of the metrics table.

    Values arrive as float64 vectors on the device of the tensors, sums of squares for norms;
    nothing is read by the host before `take`.
    """

    def __init__(self) -> None:
        self._pieces: dict[int, list[Piece]] = {}
        self._skipped: dict[int, torch.Tensor] = {}

    @property
    def rows(self) -> int:
        """Number of rows that wait, roughly: rows of a step hold one weight norm each."""
        pieces = (piece for step in self._pieces.values() for piece in step)
        return sum(len(piece.ids) for piece in pieces if piece.column == "weight_norm")

    def add(
        self,
        step: int,
        column: str,
        ids: np.ndarray,
        values: torch.Tensor,
        missing: torch.Tensor | None = None,
    ) -> None:
        """Add one column's sums of some tensors at one step, all of shape (n,)."""
        if len(ids):
            self._pieces.setdefault(step, []).append(Piece(column, ids, values, missing))

    def leave_out_update(self, step: int, skipped: torch.Tensor) -> None:
        """Leave out what is measured of a step's update if `skipped` turns out to be true."""
        self._skipped[step] = skipped

    def unmerged(self) -> list[Piece]:
        """Pieces that hold this process's part only."""
        return [piece for step in self._pieces.values() for piece in step if not piece.merged]

    def measured(self, step: int, column: str) -> set[int]:
        """Numbers of the tensors that have a value of `column` at `step` in here."""
        return {int(i) for p in self._pieces.get(step, ()) if p.column == column for i in p.ids}

    def values(self, step: int, column: str) -> torch.Tensor | None:
        """All sums of one column at one step, or None."""
        found = [p.values for p in self._pieces.get(step, ()) if p.column == column]
        if not found:
            return None
        home = common_device(found)
        return torch.cat([values.to(home) for values in found])

    def take(self, before: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """Yield and forget the rows of every step (below `before`), one copy to the host."""
        steps = sorted(s for s in self._pieces if before is None or s < before)
        pieces = [piece for step in steps for piece in self._pieces[step]]
        if not pieces:
            return
        flags = to_host([{str(step): self._skipped.pop(step, False) for step in steps}])[0]
        home = common_device([piece.values for piece in pieces])
        parts = [x for p in pieces for x in (p.values, p.missing) if x is not None]
        joined = torch.cat([part.to(home) for part in parts]).cpu().numpy()
        start = 0
        for step in steps:
            columns: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
            for piece in self._pieces.pop(step):
                ids, values = piece.ids, joined[start : start + len(piece.ids)]
                start += len(ids)
                if piece.missing is not None:
                    known = joined[start : start + len(ids)] == 0
                    start += len(ids)
                    ids, values = ids[known], values[known]
                columns.setdefault(piece.column, []).append((ids, values))
            rows = _rows(step, columns)
            for name in _of_updates(rows) if flags[str(step)] else ():
                rows[name] = np.ma.array(rows[name].data, mask=True)
            yield rows


def _rows(
    step: int, columns: Mapping[str, list[tuple[np.ndarray, np.ndarray]]]
) -> dict[str, np.ndarray]:
    """One row per tensor that has any value; what a tensor lacks is masked (null)."""
    ids = np.unique(np.concatenate([i for parts in columns.values() for i, _ in parts]))
    rows: dict[str, Any] = {"step": np.full(len(ids), step), "param_id": ids}
    for name, parts in columns.items():
        values = np.zeros(len(ids))
        missing = np.ones(len(ids), dtype=bool)
        for part_ids, part_values in parts:
            where = np.searchsorted(ids, part_ids)
            values[where] = part_values
            missing[where] = False
        rows[name] = np.ma.array(_recorded(name, values), mask=missing)
    return rows


def _of_updates(rows: Mapping[str, np.ndarray]) -> list[str]:
    """Columns of what the optimizer did; a count of its steps stays true where it did nothing."""
    found = [REGISTRY[name] for name in rows if name in REGISTRY]
    return [q.name for q in found if q.when == "update" and q.column.adds != "copies"]


def _recorded(name: str, sums: np.ndarray) -> np.ndarray:
    """Return the numbers that are recorded of a quantity's sums, in the column's type."""
    column = REGISTRY[name].column
    if column.adds == "squares":
        sums = np.sqrt(sums)
    elif not column.signed:  # rounding may leave a difference of sums (a variance) below zero
        sums = np.maximum(sums, 0)
    # Beyond the range of fp32 a norm is recorded as infinite; that is meant, not an accident.
    with np.errstate(over="ignore", invalid="ignore"):
        return sums.astype(column.type)


def to_host(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Replace the tensors in the lines by numbers, with one copy per device."""
    where: dict[torch.device, list[tuple[int, str]]] = {}
    for number, line in enumerate(lines):
        for name, value in line.items():
            if torch.is_tensor(value):
                where.setdefault(value.device, []).append((number, name))
    result = [dict(line) for line in lines]
    for device, places in where.items():
        kind = torch.float32 if device.type == "mps" else torch.float64
        stacked = torch.stack([lines[n][name].detach().reshape(()).to(kind) for n, name in places])
        for (number, name), value in zip(places, stacked.tolist(), strict=True):
            flag = lines[number][name].dtype == torch.bool
            result[number][name] = bool(value) if flag else value
    return result
