"""What a profile of weights on disk says: one look, no interval, and the words for that."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lisa_analysis.metrics.registry import Metric
from lisa_analysis.metrics.weights import run_weights
from lisa_analysis.profiles.sentences import name_rows, shape_words
from lisa_analysis.profiles.verdict import Judgement
from lisa_analysis.statistics.fit import Fit

if TYPE_CHECKING:
    from lisa_analysis.rundir.run import Run


def statement(
    run: "Run", chosen: Metric, by: str, names: Sequence[str], fit: Fit, judged: Judgement
) -> str:
    """What a person should take away, in sentences."""
    said = []
    metric = chosen.id
    of_change = any("weights.change" in need for need in chosen.needs)
    before = not of_change and chosen.rows == "weights" and "weights.adapter" not in chosen.needs
    unknown = ~(fit.seen | fit.zero)
    if metric in ("delta_norm", "delta_rel") and _did_nothing(run):
        said.append(
            "This adapter did nothing: B is zero in every module, as it was made."
            if run.method == "adapter"
            else "Nothing changed: both sides hold the same numbers."
        )
    elif fit.zero.any() and of_change:
        rows = name_rows(by, names, fit.zero)
        said.append(f"{rows[0].upper()}{rows[1:]}: exactly as before.")
    if unknown.all():
        return " ".join([*said, f"No {by} has a score: nothing is known about {metric}."])
    if unknown.any():
        why = "Without an adapter, or not known" if run.method == "adapter" else "Not known"
        said.append(f"{why}: {name_rows(by, names, unknown)}.")
    if fit.seen.any():
        said.append(
            "This was so before any training, and is so for every seed: there is no interval, and "
            "whether layers of high scores matter is not in the number."
            if before
            else "One set of weights is one observation: no interval, and nothing says how sure "
            "the order is; importance([a, b, c]) over seeds of the same training would."
        )
        said.append(shape_words(judged, by))
    return " ".join(said)


def _did_nothing(run: "Run") -> bool:
    """Whether every change that is known is exactly zero."""
    squares = [s for s in run_weights(run).sum_of_squares("change").values() if not np.isnan(s)]
    return bool(squares) and not any(squares)
