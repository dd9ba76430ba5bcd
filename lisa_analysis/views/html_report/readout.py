"""What a figure says when the pointer or the keyboard rests on one of its marks: places, values."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from lisa_analysis.metrics.layer_grid import LayerGrid
from lisa_analysis.metrics.thinning import Series
from lisa_analysis.views.html_report.format import clean, count, number
from lisa_analysis.views.html_report.tables import Table
from lisa_analysis.views.plots import style

# Millimetres and printers count differently: the view box of an SVG has 72 units an inch.
_UNITS = 72


def places(ax: Any, x: Any, y: Any) -> list[tuple[float, float]]:
    """Where data lie in the view box of the figure's SVG."""
    figure = style.whole(ax)
    shown = ax.transData.transform(np.column_stack([x, y])) / figure.dpi * _UNITS
    height = figure.get_size_inches()[1] * _UNITS
    return [(round(float(a), 1), round(float(height - b), 1)) for a, b in shown]


def points(at: Sequence[tuple[float, float]], texts: Sequence[str]) -> Markup:
    """Marks with a sentence each; the one next to the pointer speaks."""
    return _attribute({"p": [[x, y, clean(t)] for (x, y), t in zip(at, texts, strict=True)]})


def along(ax: Axes, x: Any, texts: Sequence[str]) -> Markup:
    """A sentence for every place on the horizontal axis, whatever the height of the pointer."""
    low, high = ax.get_ylim()
    middle = (low * high) ** 0.5 if ax.get_yscale() == "log" else (low + high) / 2
    return points(places(ax, x, np.full(len(texts), middle)), texts)


def of_layers(ax: Axes, table: Table) -> Markup:
    """Every layer of a table with all that the table knows of it."""
    rows = [(layer, row) for layer, row in zip(table.layers, table.rows, strict=True)
            if layer is not None]  # fmt: skip
    return along(ax, [layer for layer, _ in rows], [_row_words(table, row) for _, row in rows])


def _row_words(table: Table, row: Sequence[Any]) -> str:
    known = [(column.title, cell.text) for column, cell in zip(table.columns, row, strict=True)
             if cell.text]  # fmt: skip
    return ", ".join(text if title == "name" else f"{title} {text}" for title, text in known)


def of_series(ax: Axes, named: Sequence[tuple[str, Series]]) -> Markup:
    """Every drawn step with the values of all lines there."""
    said: dict[float, list[str]] = {}
    for name, series in named:
        for x, low, middle, high in zip(
            series.x, series.low, series.middle, series.high, strict=True
        ):
            band = f" ({number(low)} to {number(high)})" if high > low else ""
            said.setdefault(float(x), []).append(f"{name} {number(middle)}{band}")
    steps = sorted(said)
    return along(ax, steps, [f"step {count(step)}: {', '.join(said[step])}" for step in steps])


def of_grid(ax: Axes, grid: LayerGrid, *, what: str = "step") -> Markup:
    """Every cell of a layer × step picture."""
    return cells(
        ax,
        [f"layer {layer}" for layer in range(len(grid.values))],
        [f"{what} {count(step)}" for step in grid.steps],
        grid.values,
        grid.non_finite,
    )


def cells(
    ax: Axes, rows: Sequence[str], columns: Sequence[str], values: Any, bad: Any = None
) -> Markup:
    """Every cell of a picture whose columns and rows count from 0; unknown ones are null."""
    shape = np.shape(values)
    (x0, y0), (x1, y1) = places(ax, [0, shape[1] - 1], [0, shape[0] - 1])
    bad = np.zeros(shape, dtype=bool) if bad is None else bad
    shown = [
        ["non-finite" if b else _short(v) for v, b in zip(line, wrong, strict=True)]
        for line, wrong in zip(np.asarray(values, dtype=np.float64), bad, strict=True)
    ]
    return _attribute({
        "x": [x0, x1], "y": [y0, y1], "r": [clean(r) for r in rows],
        "c": [clean(c) for c in columns], "v": shown,
    })  # fmt: skip


def _short(value: float) -> float | None:
    return float(f"{value:.3g}") if np.isfinite(value) else None


def _attribute(data: dict[str, Any]) -> Markup:
    """JSON for an attribute in single quotes."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "&amp;").replace("<", "&lt;").replace("'", "&#39;"))
