"""Several runs side by side: outcome at equal cost, agreement of profiles, seeds together."""

import html
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lisa_analysis import statistics as st
from lisa_analysis.contract.errors import LisaError
from lisa_analysis.metrics.registry import METRICS, find_metric
from lisa_analysis.profiles.agreement import Agreement, agree, concordance, shares
from lisa_analysis.profiles.from_run import DEFAULT_METRIC, importance
from lisa_analysis.profiles.profile import ImportanceProfile, to_plain
from lisa_analysis.rundir.configurations import labels
from lisa_analysis.rundir.opening import opened
from lisa_analysis.rundir.run import Run
from lisa_analysis.runs.losses import RunSummary
from lisa_analysis.runs.losses import table as table_of

MIN_SEEDS = 3

# Columns of the table of runs that a notebook shows, and what it calls them.
_SHOWN = {
    "run": "run", "method": "method", "seed": "seed", "steps": "steps", "tokens": "tokens",
    "seconds": "seconds", "peak_memory_bytes": "peak memory, GB", "held_out_loss": "held-out loss",
    "loss_at_equal_steps": "at equal steps", "loss_at_equal_seconds": "at equal time",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Comparison:
    """Runs side by side. Made by `compare`.

    Attributes
    ----------
    table
        One row per run: run, method, status, configuration, seed, steps, tokens, seconds,
        peak_memory_bytes, held_out_loss (the last), and held-out loss at the largest number of
        steps, tokens and seconds that all runs reached.
    profiles
        One row per layer, one column per run: share of the total score; NaN is unknown.
    rank_agreement
        One row per pair of runs: Kendall's τ with interval, Spearman, overlap of the top
        quarters, Jensen–Shannon divergence and its noise floor, whether it is beyond noise.
    concordance
        Kendall's W over all runs with the same layers; NaN for fewer than three.
    seeds
        One row per configuration: runs, held-out loss with a t interval over seeds (three or
        more), and Kendall's τ between its runs.
    curves
        Every evaluation: run, step, tokens, seconds, held_out_loss.
    """

    metric: str
    table: pd.DataFrame = field(repr=False)
    profiles: pd.DataFrame = field(repr=False)
    rank_agreement: pd.DataFrame = field(repr=False)
    concordance: float
    seeds: pd.DataFrame = field(repr=False)
    curves: pd.DataFrame = field(repr=False)
    statement: str = ""

    def to_frame(self) -> pd.DataFrame:
        """One row per run."""
        return self.table.copy()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        record = {
            "metric": self.metric,
            "statement": self.statement,
            "concordance": self.concordance,
            "runs": self.table.to_dict("records"),
            "profiles": self.profiles.to_dict("records"),
            "rank_agreement": self.rank_agreement.to_dict("records"),
            "seeds": self.seeds.to_dict("records"),
        }
        plain: dict[str, Any] = to_plain(record)
        return plain

    def save(self, path: str | Path) -> Path:
        """Write the table of runs as `.csv`, or everything as `.json`."""
        path = Path(path)
        if path.suffix == ".json":
            text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
            path.write_text(text + "\n", encoding="utf-8")
        elif path.suffix == ".csv":
            self.table.to_csv(path, index=False, encoding="utf-8")
        else:
            raise LisaError(f"cannot save a comparison as {path.name!r}: use .csv or .json.")
        return path

    def __repr__(self) -> str:
        return f"<Comparison of {len(self.table)} runs by {self.metric}>"

    def _repr_html_(self) -> str:
        peak = pd.to_numeric(self.table["peak_memory_bytes"]) / 1e9  # None where unknown
        shown = self.table.assign(peak_memory_bytes=peak)
        table = _to_html(shown[list(_SHOWN)].rename(columns=_SHOWN))
        pairs = _to_html(self.rank_agreement)
        return (
            f"<section><p>{html.escape(self.statement)}</p>{table}"
            f"<details><summary>Agreement of profiles</summary>{pairs}</details></section>"
        )


def compare(
    runs: Sequence[Any],
    metric: Any = DEFAULT_METRIC,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    profiles: Sequence[ImportanceProfile | None] | None = None,
) -> Comparison:
    """Put runs side by side.

    Parameters
    ----------
    runs
        Run directories, opened with `load` or as paths, any number; layers are aligned by name.
    metric
        Importance metric whose profiles are compared: an id or a callable, see `importance`.
    confidence, seed
        Of the intervals and their bootstrap.
    profiles
        The profiles of the runs where they are known already, in their order; None for a run
        without one.

    Returns
    -------
    Comparison
        Repetitions of one configuration stand together: runs whose settings differ in seeds and
        folders alone, and that sampled by the same probabilities (compared by content; the seeds
        of a permuted control are one arm). Runs that did not record the metric, or have other
        layers, take no part in the agreement of profiles and keep their row in the table.

    Raises
    ------
    LisaError
        Without any run.
    """
    if isinstance(runs, str | os.PathLike | Mapping | Run) or not isinstance(runs, Iterable):
        raise LisaError(f"compare takes a list of runs, got a {type(runs).__name__}.")
    runs = [opened(run, "compare") for run in runs]
    chosen = METRICS[metric] if isinstance(metric, str) else find_metric(metric)
    if not runs:
        raise LisaError("compare needs at least one run, got none.")
    names = labels(runs)
    summaries = [RunSummary.of(run, label) for run, label in zip(runs, names, strict=True)]
    table = table_of(summaries)
    if profiles is None:
        profiles = [_profile(run, chosen, confidence, seed) for run in runs]
    known = {label: p for label, p in zip(names, profiles, strict=True) if p is not None}
    pairs = pd.DataFrame(
        [
            {"run_a": a, "run_b": b}
            | asdict(agree(known[a], known[b], confidence=confidence, seed=seed))
            for a, b in combinations(known, 2)
        ],
        columns=["run_a", "run_b", *(f.name for f in fields(Agreement))],
    )
    seeds = _seeds(table, pairs, confidence)
    return Comparison(
        metric=chosen.id,
        table=table,
        profiles=shares(known),
        rank_agreement=pairs,
        concordance=concordance(list(known.values())),
        seeds=seeds,
        curves=pd.concat([s.curve for s in summaries], ignore_index=True),
        statement=_statement(table, pairs, seeds),
    )


def _profile(run: Any, metric: Any, confidence: float, seed: int) -> ImportanceProfile | None:
    try:
        return importance(run, metric, confidence=confidence, seed=seed)
    except LisaError:
        # The run keeps its row; its profile under this metric is unknown.
        return None


def _seeds(table: pd.DataFrame, pairs: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Runs of one configuration together: mean held-out loss, its t interval, agreement."""
    rows = []
    for configuration, group in table.groupby("configuration", sort=False):
        names = set(group["run"])
        losses = group["loss_at_equal_steps"].fillna(group["held_out_loss"]).dropna()
        low = high = float("nan")
        if len(losses) >= MIN_SEEDS:
            t = float(st.t_quantile(0.5 + confidence / 2, len(losses) - 1))
            half = t * float(losses.std(ddof=1)) / np.sqrt(len(losses))
            low, high = float(losses.mean()) - half, float(losses.mean()) + half
        inside = pairs[pairs["run_a"].isin(names) & pairs["run_b"].isin(names)]
        rows.append(
            {
                "configuration": configuration,
                "method": group["method"].iloc[0],
                "runs": len(group),
                "held_out_loss": float(losses.mean()) if len(losses) else float("nan"),
                "low": low,
                "high": high,
                "kendall": float(inside["kendall"].mean()) if len(inside) else float("nan"),
            }
        )
    return pd.DataFrame(rows)


def _statement(table: pd.DataFrame, pairs: pd.DataFrame, seeds: pd.DataFrame) -> str:
    parts = []
    losses = table.dropna(subset=["loss_at_equal_steps"])
    if seeds["low"].notna().any():
        parts.append(_configurations_words(seeds))
    elif len(losses) > 1:
        best = losses.iloc[int(losses["loss_at_equal_steps"].argmin())]
        parts.append(
            f"At equal steps {best['run']} has the lowest held-out loss "
            f"({best['loss_at_equal_steps']:.4f})."
        )
        parts.append("One run is one sample of the seed: repeat with three seeds or more.")
    known = pairs.dropna(subset=["kendall"])
    if len(known) == 1:
        row = known.iloc[0]
        bounds = (
            "insufficient data for an interval"
            if np.isnan(row["kendall_low"])
            else f"{row['kendall_low']:.2f} … {row['kendall_high']:.2f}"
        )
        parts.append(f"Their rankings of layers agree with τ = {row['kendall']:.2f} ({bounds}).")
    elif len(known):
        parts.append(
            f"Rankings of the layers agree with τ from {known['kendall'].min():.2f} to "
            f"{known['kendall'].max():.2f}."
        )
    return " ".join(parts)


def _configurations_words(seeds: pd.DataFrame) -> str:
    """Mean held-out losses of the configurations with their intervals, the lowest first."""
    known = seeds.dropna(subset=["low"]).sort_values("held_out_loss", ignore_index=True)
    listed = ", ".join(
        f"{row['configuration']} {row['held_out_loss']:.4f} "
        f"({row['low']:.4f} … {row['high']:.4f}, {row['runs']} runs)"
        for _, row in known.iterrows()
    )
    text = f"Mean held-out loss at equal steps over seeds, with its interval: {listed}."
    if len(known) > 1:
        best = known["configuration"][0]
        clear = bool((known["low"][1:] > known["high"][0]).all())
        text += (
            f" The interval of {best} lies below all others."
            if clear
            else f" The interval of {best}, the lowest, overlaps with others: seeds may explain "
            "the difference."
        )
    single = len(seeds) - len(known)
    if single:
        text += (
            f" {single} more configuration{'s' * (single > 1)} without an interval: repeat with "
            "three seeds or more."
        )
    return text


def _to_html(frame: pd.DataFrame) -> str:
    """Escaped HTML table."""
    return frame.to_html(index=False, border=0, float_format=lambda value: f"{value:.4g}")
