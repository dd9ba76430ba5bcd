"""What a comparison says, in sentences."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lisa_analysis.rundir.configurations import places_of
from lisa_analysis.rundir.run import Run
from lisa_analysis.runs.arms import COMPARED, Arm, comparable
from lisa_analysis.runs.losses import reached

if TYPE_CHECKING:
    from lisa_analysis.runs.comparison import Comparison

_MOST = 6


def comparison_words(
    runs: Sequence[Run],
    arms: Sequence[Arm],
    table: pd.DataFrame,
    means: pd.DataFrame,
    differences: pd.DataFrame,
    pairs: pd.DataFrame,
    curves: pd.DataFrame,
    last: str = "",
) -> str:
    """Say what a person should take away; what makes a comparison void comes first."""
    parts = [_others(runs)]
    parts += [
        f"The runs of arm {arm.name} differ in more than their seed ({', '.join(arm.mixes[:3])}"
        f"{' …' if len(arm.mixes) > 3 else ''}): its interval is over both."
        for arm in arms
        if arm.mixes
    ]
    if comparable(runs):
        parts.append(_losses(table, means, differences))
        parts += [_read_at(curves), _left_out(table, arms)] if parts[-1] else []
    parts += [_rankings(pairs), last]
    return " ".join(filter(None, parts))


def missing_words(metric: str, why: Mapping[str, Exception]) -> str:
    """Say which runs gave no profile of a metric, and why; nothing where all did."""
    if not why:
        return ""
    told = [f"{run} ({str(error).rstrip('.')})" for run, error in list(why.items())[:_MOST]]
    rest = len(why) - len(told)
    return (
        f"Without a profile of {metric}, and in no agreement of rankings: {'; '.join(told)}"
        f"{f'; and {rest} more' if rest else ''}."
    )


def headline(comparison: "Comparison") -> str:
    """What runs side by side show, in a sentence: who is lower, as far as seeds allow."""
    said = comparison.statement
    told = comparison.differences.dropna(subset=["low"])
    if reached(comparison.curves)[0] == 0 and len(told):
        return _read_at(comparison.curves) or "The runs have losses from before training alone."
    if "do not compare" in said or told.empty:
        first = said.split(". ")
        return (
            ". ".join(first[: 1 if "do not compare" in said else 2]).rstrip(".") + "."
            if said
            else ""
        )
    clear = told[(told["low"] > 0) | (told["high"] < 0)]
    if clear.empty:
        return "No arm has a lower held-out loss than another beyond what seeds may explain."
    parts = []
    for row in clear.head(3).to_dict("records"):
        lower, higher = (row["a"], row["b"]) if row["mean"] < 0 else (row["b"], row["a"])
        near, far = sorted((abs(row["low"]), abs(row["high"])))
        parts.append(
            f"{lower} is below {higher} by {abs(row['mean']):.3g} ({near:.2g} … {far:.2g})"
        )
    rest = len(clear) - len(parts)
    tail = f", and {rest} more" if rest else ""
    return f"In held-out loss at equal steps, {'; '.join(parts)}{tail}, over seeds."


def _others(runs: Sequence[Run]) -> str:
    """Say that runs are of different models, or of different data."""
    void = []
    for what, of in COMPARED:
        found = [name for name in dict.fromkeys(map(of, runs)) if name]
        if len(found) > 1:
            listed = ", ".join(found[:_MOST]) + (" …" if len(found) > _MOST else "")
            void.append(f"of different {what} ({listed})")
    if void:
        return f"The runs are {' and '.join(void)}: their losses do not compare."
    return " ".join(
        f"{what} of one name lie at different places ({', '.join(places[:_MOST])}): whether they "
        "are the same is not known here."
        for what, entry in (("Models", "model"), ("Data", "dataset"))
        if (places := places_of(runs, entry))
    )


def _read_at(curves: pd.DataFrame) -> str:
    """Say which step is compared where some runs went on from it."""
    step, ended = reached(curves)
    if not ended:
        return ""
    names = ", ".join(ended[:_MOST]) + (" …" if len(ended) > _MOST else "")
    ends = "ends" if len(ended) == 1 else "end"
    if step == 0:
        return (
            f"These are losses before the first step, the only ones of {names}: nothing trained is "
            f"compared. Leave {'it' if len(ended) == 1 else 'them'} out."
        )
    return f"They are read at step {step}, where {names} {ends}; others go on."


def _left_out(table: pd.DataFrame, arms: Sequence[Arm]) -> str:
    """Name the runs whose seeds are in no mean: of arms where others have a loss."""
    equal = table["loss_at_equal_steps"]
    finite = np.isfinite(equal.to_numpy(dtype=np.float64))
    runs = [
        str(table["run"].iloc[i])
        for arm in arms
        for i in arm.runs
        if not finite[i] and finite[list(arm.runs)].any()
    ]
    if not runs:
        return ""
    names = ", ".join(runs[:_MOST]) + (" …" if len(runs) > _MOST else "")
    return f"Without a finite loss there, and in no mean: {names}."


def _losses(table: pd.DataFrame, means: pd.DataFrame, differences: pd.DataFrame) -> str:
    equal = table["loss_at_equal_steps"].notna()
    if not equal.any() or (len(means) == 1 and len(table) == 1):
        return ""
    if not means["low"].notna().any():
        return _single(table[equal], means)
    known = means.dropna(subset=["low"]).sort_values("mean", ignore_index=True)
    listed = ", ".join(
        f"{row['arm']} {row['mean']:.4f} ({row['low']:.4f} … {row['high']:.4f}, "
        f"{row['seeds']} seeds)"
        for _, row in known.iterrows()
    )
    text = f"Mean held-out loss at equal steps, with its interval over seeds: {listed}."
    told = differences.dropna(subset=["low"])
    if len(told):
        text += " " + " ".join(_difference(row) for _, row in told.head(_MOST).iterrows())
    if len(told) > 1:
        text += " Each interval holds for itself: of twenty such, one is wrong on average."
    single = len(means) - len(known)
    if single:
        text += (
            f" {single} more arm{'s' * (single > 1)} without an interval: repeat with three seeds "
            "or more."
        )
    return text


def _difference(row: pd.Series) -> str:
    how = (
        f"in {row['pairs']} pairs of one seed"
        if row["pairs"]
        else "not paired, the arms share too few seeds"
    )
    bounds = f"{row['mean']:+.4f} ({row['low']:+.4f} … {row['high']:+.4f}, {how})"
    names = f"{row['a']} − {row['b']}"
    if row["low"] > 0 or row["high"] < 0:
        return f"{names}: {bounds}, {'lower' if row['high'] < 0 else 'higher'}."
    return f"{names}: {bounds}, no difference shown: seeds may explain it."


def _single(losses: pd.DataFrame, means: pd.DataFrame) -> str:
    """Without any interval: the lowest runs, and that one seed says little.

    Losses that print alike, to four decimals, are a tie.
    """
    if len(losses) < 2:
        return ""
    shown = losses["loss_at_equal_steps"].round(4)
    best = losses[shown == shown.min()]
    value = f"{shown.min():.4f}"
    names = [str(name) for name in best["run"]]
    if len(best) == 1:
        text = f"At equal steps {names[0]} has the lowest held-out loss ({value})."
    elif len(best) == len(losses):
        text = f"At equal steps the held-out losses are equal ({value})."
    else:
        first, rest = names[: _MOST - 1], len(names) - _MOST + 1
        last = f"{rest} more" if rest > 1 else names[-1]
        first = first if rest > 1 else names[:-1]
        text = (
            f"At equal steps {', '.join(first)} and {last} tie for the lowest held-out loss "
            f"({value})."
        )
    few = (
        "One run is one sample of the seed"
        if (means["seeds"] == 1).all()
        else "Two seeds give no interval"
    )
    return f"{text} {few}: repeat with three seeds or more."


def _rankings(pairs: pd.DataFrame) -> str:
    """How rankings agree as they were measured, and with the noise of both taken off."""
    known = pairs.dropna(subset=["kendall"])
    true = known.dropna(subset=["agreement"])
    if len(known) == 1:
        row = known.iloc[0]
        text = f"As measured, the two rankings of layers agree with τ = {row['kendall']:.2f}"
        if not len(true):
            return f"{text}; how far noise lowered it cannot be said."
        return (
            f"{text} ({row['kendall_low']:.2f} … {row['kendall_high']:.2f} were both measured "
            f"again); with the noise within the runs taken off, τ = {row['agreement']:.2f} "
            f"({row['agreement_low']:.2f} … {row['agreement_high']:.2f})."
        )
    if not len(known):
        return ""
    text = f"As measured, rankings of the layers agree with {_span(known['kendall'])}"
    if not len(true):
        return text + "."
    of = "" if len(true) == len(known) else f" in {len(true)} of {len(known)} pairs"
    return (
        f"{text}; with the noise within the runs taken off, with {_span(true['agreement'])}{of}, "
        f"where the intervals of pairs reach down to {true['agreement_low'].min():.2f}."
    )


def _span(values: "pd.Series[float]") -> str:
    """From the least to the largest τ of pairs, or the one that all of them print as."""
    low, high = f"{values.min():.2f}", f"{values.max():.2f}"
    return f"τ = {low}" if low == high else f"τ from {low} to {high}"
