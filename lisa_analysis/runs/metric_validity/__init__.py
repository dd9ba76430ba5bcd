"""Whether a metric of a layer tells what the layer's change was worth: every metric tried."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.layers import same_layers
from lisa_analysis.profiles.from_run import check_confidence
from lisa_analysis.profiles.profile import ImportanceProfile
from lisa_analysis.rundir.configurations import labels
from lisa_analysis.rundir.opening import RunLike, opened
from lisa_analysis.runs.metric_validity.judging import judge
from lisa_analysis.runs.metric_validity.sides import GIVEN, LEVELS, TARGETS, Part, parts_of
from lisa_analysis.runs.metric_validity.words import sentences


@dataclass(frozen=True, eq=False)
class Validity:
    """How well every metric ranks the layers as the ablation does.

    Attributes
    ----------
    table
        One row per level, target and metric, best first, see `to_frame`.
    missing
        Metric -> why no run gives it.
    reliability
        (level, target) -> split-half reliability of the ablation's own order, mean over runs.
    runs
        Names of the runs with an ablation, of the others that lent their metrics.
    confidence
        Coverage of the intervals; evidence is a chance below 1 − confidence.
    sentence
        The answer in words.
    """

    table: pd.DataFrame = field(repr=False)
    missing: Mapping[str, str] = field(repr=False)
    reliability: Mapping[tuple[str, str], float] = field(repr=False)
    runs: tuple[str, ...]
    lent: tuple[str, ...]
    confidence: float
    sentence: str

    def to_frame(self) -> pd.DataFrame:
        """One row per level, target and metric.

        Returns
        -------
        DataFrame
            ``level`` (layer, module, within kind), ``target`` (the ablation), ``metric``,
            ``source`` (empty: the run itself; else the run that lent it, or ``a profile``),
            ``spearman`` with ``low``
            and ``high`` (noise of examples and of the metric where it is known; over runs from
            three on), ``ceiling`` (what noise would leave of a perfect agreement), ``chance`` (|ρ|
            that 5 % of all orders of the layers reach), ``p`` and ``p_of_all`` (share of the orders
            in which this metric, and the best of all of them, agrees as well), ``evidence``
            (``p_of_all`` below 1 − confidence), ``layers``, ``kinds``, ``runs``, and
            ``metric_noise``, whether the metric's own uncertainty is in the interval.
        """
        return self.table.copy()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "runs": list(self.runs),
            "lent": list(self.lent),
            "confidence": self.confidence,
            "sentence": self.sentence,
            "reliability": [
                {"level": level, "target": target, "reliability": value}
                for (level, target), value in self.reliability.items()
            ],
            "table": self.table.to_dict("records"),
            "missing": dict(self.missing),
        }

    def __str__(self) -> str:
        return self.sentence

    def __repr__(self) -> str:
        return f"<Validity of {len(self.table)} comparisons over {len(self.runs)} runs>"

    def _repr_html_(self) -> str:
        import html

        table = self.table.to_html(index=False, float_format=lambda v: f"{v:.2f}", border=0)
        return f"<section><p>{html.escape(self.sentence)}</p>{table}</section>"


def validity(
    run_or_runs: RunLike | Sequence[RunLike | ImportanceProfile],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Validity:
    """Compare every metric that runs can give with their own ablation.

    Parameters
    ----------
    run_or_runs
        A run with an ablation (`lisa-ablate RUN_DIR`), or several; runs and paths. A run without
        one, such as a probe or a pilot of the same model, lends its metrics to those that have; so
        does an `ImportanceProfile` by layer or module, of scores from anywhere, for layers or
        modules of the same names.
    confidence
        Coverage of the intervals.
    seed
        Of bootstrap and permutations.

    Returns
    -------
    Validity

    Raises
    ------
    LisaError
        When no run has an ablation, or none of layers or modules, or two profiles are of one
        metric.

    Notes
    -----
    Agreement is Spearman's ρ over layers, over modules (layer × kind), and over the layers within
    each kind. Whether it is more than chance is told by permutation: the layers change places, as
    wholes with all their kinds, and where kinds are ranked with them the kinds do too (Westfall &
    Young 1993 for the best of many metrics, all of them in the same orders). With six layers no |ρ|
    below 0.886 is rare among the orders, however sure both sides are; the interval says how far
    noise of the examples and of the metric could move ρ between these very layers.
    """
    check_confidence(confidence)
    given = run_or_runs if isinstance(run_or_runs, list | tuple) else [run_or_runs]
    profiles = [one for one in given if isinstance(one, ImportanceProfile)]
    _check_profiles(profiles)
    runs = [opened(run, "validity") for run in given if not isinstance(run, ImportanceProfile)]
    if not runs:
        raise LisaError("validity got profiles and no run: give a run with an ablation as well.")
    names = labels(runs)
    ablated = [i for i, run in enumerate(runs) if not run.ablation.empty]
    if not ablated:
        which = runs[0].path if len(runs) == 1 else f"none of the {len(runs)} runs"
        raise LisaError(
            f"{which} has {'no' if len(runs) == 1 else 'an'} ablation: run lisa-ablate RUN_DIR, "
            "which measures what each layer's change was worth."
        )
    lending = [i for i in range(len(runs)) if i not in ablated]
    missing: dict[str, str] = {}
    parts: list[Part] = []
    for i in ablated:
        lenders = [(names[j], runs[j]) for j in lending
                   if same_layers(runs[j].layer_names, runs[i].layer_names)]  # fmt: skip
        parts += parts_of(runs[i], lenders, profiles, missing, confidence, seed)
    if not parts:
        raise LisaError(
            "no run has an ablation of three layers, or of kinds within layers: run lisa-ablate "
            "RUN_DIR, without --range."
        )
    table, reliability = _judged(parts, confidence, seed)
    for metric in set(table["metric"]):
        missing.pop(metric, None)
    ours = [runs[i].layer_names for i in ablated]
    lent = [j for j in lending if any(same_layers(runs[j].layer_names, own) for own in ours)]
    strange = [names[j] for j in lending if j not in lent]
    used = {key for part in parts for key in part.metrics}
    strange += [f"the profile of {p.metric}" for p in profiles if (GIVEN, p.metric) not in used]
    return Validity(
        table, missing, reliability, tuple(names[i] for i in ablated),
        tuple(names[j] for j in lent), confidence,
        sentences(table, reliability, len(ablated), strange, confidence),
    )  # fmt: skip


def _judged(
    parts: Sequence[Part], confidence: float, seed: int
) -> tuple[pd.DataFrame, dict[tuple[str, str], float]]:
    """Every level judged, best first; and how reliable the ablation's own order is."""
    rows, reliability = [], {}
    for level in LEVELS:
        of_level = [part for part in parts if part.level == level]
        rows += judge(of_level, confidence, seed)
        for target in TARGETS:
            known = [part.reliability for part in of_level if part.target == target]
            if known:
                reliability[level, target] = float(np.mean(known))
    order = {name: index for index, name in enumerate(LEVELS)}
    table = pd.DataFrame(rows).sort_values(
        ["level", "target", "spearman"], ascending=[True, True, False], kind="stable",
        key=lambda column: column.map(order) if column.name == "level" else column,
        ignore_index=True,
    )  # fmt: skip
    return table, reliability


def _check_profiles(profiles: list[ImportanceProfile]) -> None:
    """`LisaError` for two profiles of one metric: a row of the table is one of them."""
    names = [(profile.metric, profile.by) for profile in profiles]
    for metric, by in names:
        if by not in ("layer", "module"):
            raise LisaError(
                f"validity compares layers and modules, and the profile of {metric} is by {by}."
            )
        if names.count((metric, by)) > 1:
            raise LisaError(
                f"validity got two profiles of {metric} by {by}: give each a metric of its own "
                "name (ImportanceProfile.from_scores(…, metric=…))."
            )
