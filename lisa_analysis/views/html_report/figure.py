"""One figure of the report: its canvas, how finely it is drawn, and the words that all share."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lisa_analysis.views.html_report.format import count, number
from lisa_analysis.views.html_report.tables import Table

WIDE, HALF, NARROW = 9.4, 4.9, 3.7
_NOTHING = Markup()


@dataclass(frozen=True)
class Budget:
    """How finely figures are drawn: a report of many runs may not weigh more than it is worth."""

    points: int
    columns: int

    @classmethod
    def for_runs(cls, n_runs: int) -> "Budget":
        """Full detail for one run, less for several."""
        if n_runs == 1:
            return cls(400, 400)
        return cls(240, 240) if n_runs <= 3 else cls(120, 160)


@dataclass(frozen=True)
class ReportFigure:
    """One figure of the page; without an `image` the caption says why there is none.

    `readout` is what the module of that name makes of its marks, `narrow` the same
    picture for a screen that is too narrow for `image`.
    """

    slug: str
    title: str
    caption: str
    image: Markup | None
    table: Table | None
    wide: bool = True
    readout: Markup = _NOTHING
    narrow: Markup | None = None
    narrow_readout: Markup = _NOTHING


def canvas(
    width: float, height: float, *, left: float = 0.85, right: float = 0.15, top: float = 0.38
) -> Axes:
    """Axes of a new figure with margins in inches.

    Fixed margins keep the axes of all figures in line down the page, and cost a fraction of the
    time that matplotlib needs to find them.
    """
    figure = Figure(figsize=(width, height))
    bottom = 0.52
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
    return figure.add_subplot()


def short_label(ax: Axes) -> None:
    """The caption tells of thinning; below a half-width figure the sentence would not fit."""
    ax.set_xlabel("optimizer step")


def thinned(group: int, what: str) -> str:
    """Sentence for a caption when points or columns were merged."""
    if group <= 1:
        return ""
    band = ", the band their range" if what == "point" else ""
    return f" Thinned: each {what} is the mean of {count(group)} records{band}."


def extremes(lead: str, values: Any) -> str:
    """Say the range of the data for those who cannot see it."""
    values = np.asarray(values, dtype=np.float64).ravel()
    values = values[np.isfinite(values)]
    if not len(values):
        return lead
    return f"{lead} Values from {number(values.min())} to {number(values.max())}."
