"""Report: one self-contained HTML file about one run or several."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.paths import to_write, whole_file
from lisa_analysis.views.analysis import Analysis, RunLike
from lisa_analysis.views.html_report.document import assemble
from lisa_analysis.views.html_report.page import render

if TYPE_CHECKING:
    from lisa_analysis.plans.sampling import SamplingProbabilities


@dataclass(frozen=True)
class Report:
    """A rendered report; shows itself in a notebook.

    Attributes
    ----------
    html
        The whole document: styles, script and figures are in it, nothing is fetched.
    """

    html: str

    def save(self, path: str | Path) -> Path:
        """Write the document as UTF-8 and return its path; the same runs give the same bytes."""
        path = to_write(path, "save")
        with whole_file(path) as file:
            file.write_bytes(self.html.encode("utf-8", "replace"))
        return path

    def __repr__(self) -> str:
        return f"<Report, {len(self.html) / 1e6:.1f} MB of HTML; .save(path) writes it>"

    def _repr_html_(self) -> str:
        # The frame may run the report's script but is of an origin of its own: it reads nothing
        # of the notebook.
        return (
            '<iframe title="lisa-toolkit report" sandbox="allow-scripts allow-downloads" '
            'style="width:100%;height:80vh;border:1px solid #8884;border-radius:6px" '
            f'srcdoc="{html.escape(self.html, quote=True)}"></iframe>'
        )


def report(
    run_or_runs: RunLike | Sequence[RunLike],
    *,
    metric: Any = None,
    probabilities: "SamplingProbabilities | None" = None,
    title: str | None = None,
) -> Report:
    """Analyse runs and write down what was found.

    Parameters
    ----------
    run_or_runs
        An opened run directory (`lisa_analysis.load`) or a sequence of them; paths are opened.
    metric
        Importance metric of the profiles, an id or a callable, see `lisa_analysis.importance`;
        None for the default.
    probabilities
        `SamplingProbabilities` to show beside the profile.
    title
        Heading of the page; None makes one from the runs.

    Returns
    -------
    Report

    Raises
    ------
    LisaError
        When a path is no run directory, or no run was given. A run that is empty, unfinished or
        broken off gives a report that says so.
    """
    runs: Sequence[Any] = run_or_runs if isinstance(run_or_runs, list | tuple) else [run_or_runs]
    if not runs:
        raise LisaError("report needs at least one run, got none: give a run directory.")
    return report_of(Analysis.of(runs, metric), probabilities=probabilities, title=title)


def report_of(
    analysis: Analysis,
    *,
    probabilities: "SamplingProbabilities | None" = None,
    title: str | None = None,
) -> Report:
    """Write down an analysis, which others may have looked at before."""
    return Report(render("report.html", assemble(analysis, probabilities, title)))
