"""Tables of the report: what is shown, what it sorts by, and which layer a row speaks of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lisa_analysis.metrics.layer_grid import LayerGrid
from lisa_analysis.metrics.thinning import Series
from lisa_analysis.views.html_report.format import as_datum

# A layer × step table for people; the figure itself shows more columns, the run directory all.
TABLE_COLUMNS = 24


@dataclass(frozen=True)
class Cell:
    """Shown text, and the value to sort and export by where the text is not that already."""

    text: str
    value: str | None = None


@dataclass(frozen=True)
class Column:
    """Heading of a column; numeric ones are right-aligned and sort as numbers."""

    title: str
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """Caption, columns, rows of cells, and the layer of every row (None = of no single layer)."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    layers: tuple[int | None, ...]

    def __len__(self) -> int:
        return len(self.rows)


def frame_table(
    caption: str,
    frame: pd.DataFrame,
    columns: Sequence[tuple[str, str] | tuple[str, str, Callable[[Any], str]]],
    *,
    layer: str | None = None,
) -> Table:
    """Build a table from a frame.

    Parameters
    ----------
    caption
        Heading of the table.
    frame
        The rows.
    columns
        (column, heading) or (column, heading, formatter); a column that the frame lacks is left
        out. Without a formatter values are shown as a program would write them.
    layer
        Column that holds the layer index of a row, for highlighting.
    """
    present = [(*entry, None)[:3] for entry in columns if entry[0] in frame]
    heads = tuple(Column(title, _is_numeric(frame[name])) for name, title, _ in present)
    rows = tuple(
        tuple(cell(value, formatter) for value, (_, _, formatter) in zip(row, present, strict=True))
        for row in zip(*(frame[name].tolist() for name, _, _ in present), strict=True)
    )
    marks = frame[layer].tolist() if layer in frame else [None] * len(frame)
    return Table(caption, heads, rows, tuple(_index(mark) for mark in marks))


def cell(value: Any, formatter: Callable[[Any], str] | None = None) -> Cell:
    """One cell; the raw value is kept beside the text when the two differ."""
    if value is pd.NA or (isinstance(value, float) and np.isnan(value) and formatter is None):
        return Cell("", None)
    raw = as_datum(value) if not isinstance(value, str) else value
    text = raw if formatter is None else formatter(value)
    return Cell(text, raw if raw != text else None)


def grid_table(caption: str, grid: LayerGrid) -> Table:
    """Layers as rows, at most `TABLE_COLUMNS` recorded steps as columns, picked evenly."""
    if len(grid) > TABLE_COLUMNS:
        caption += f", {TABLE_COLUMNS} of {len(grid):,} columns"
    picked = np.unique(np.linspace(0, len(grid) - 1, min(len(grid), TABLE_COLUMNS)).astype(int))
    heads = (Column("layer"), *(Column(f"step {grid.steps[i]:,}") for i in picked))
    rows = []
    for layer, values in enumerate(grid.values):
        cells = [Cell(str(layer))]
        for i in picked:
            known = f"{values[i]:.3g}" if np.isfinite(values[i]) else ""
            cells.append(Cell("non-finite" if grid.non_finite[layer, i] else known))
        rows.append(tuple(cells))
    return Table(caption, heads, tuple(rows), tuple(range(len(rows))))


def series_table(caption: str, named: Sequence[tuple[str, Series]]) -> Table:
    """One row per drawn point: series, step, mean, and the extremes where points were merged."""
    merged = any((series.high > series.low).any() for _, series in named)
    several = len(named) > 1
    heads = [Column("series", numeric=False)] if several else []
    heads += [Column("step"), Column("mean" if merged else "value")]
    heads += [Column("smallest"), Column("largest")] if merged else []
    rows = []
    for name, series in named:
        for x, low, middle, high in zip(
            series.x, series.low, series.middle, series.high, strict=True
        ):
            values = [x, middle, low, high] if merged else [x, middle]
            first = [Cell(name)] if several else []
            rows.append((*first, *(Cell(f"{value:.5g}") for value in values)))
    return Table(caption, tuple(heads), tuple(rows), (None,) * len(rows))


def _is_numeric(column: pd.Series) -> bool:
    """Whether a column holds numbers, or values with an interval."""
    return pd.api.types.is_numeric_dtype(column) or all(hasattr(v, "value") for v in column)


def _index(mark: Any) -> int | None:
    if mark is None or mark is pd.NA or mark != mark:
        return None
    return int(mark)
