"""What an ablation says of a run, in sentences: the gain, which layers it needs, interaction."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lisa_analysis import statistics as st
from lisa_analysis.contract.errors import LisaError
from lisa_analysis.metrics.ablation import per_example, totals
from lisa_analysis.metrics.log import Measurements
from lisa_analysis.profiles.sentences import name_rows
from lisa_analysis.profiles.thresholds import Thresholds
from lisa_analysis.profiles.verdict import Judgement
from lisa_analysis.statistics import Interval, association
from lisa_analysis.statistics.association import Cells
from lisa_analysis.statistics.estimate import MIN_INDEPENDENT
from lisa_analysis.statistics.fit import Fit

if TYPE_CHECKING:
    from lisa_analysis.rundir.run import Run

Array = NDArray[np.float64]

TEXTS = {"held_out": "held-out examples", "general": "examples of general text"}


def of_examples(rows: Array, confidence: float) -> Interval:
    """Mean of independent contributions, with Student's t; without bounds below six."""
    n = len(rows)
    mean = float(rows.mean()) if n else float("nan")
    if n < MIN_INDEPENDENT:
        return Interval(mean)
    reach = float(st.t_quantile(0.5 + confidence / 2, n - 1)) * float(rows.std(ddof=1)) / n**0.5
    return Interval(mean, mean - reach, mean + reach)


def split_half(values: Array, *, splits: int = 200, seed: int = 0) -> float:
    """Reliability of the order over examples: two random halves, mean over many splits.

    Pearson's correlation of the halves over columns, stepped up to all examples (Spearman–Brown).
    One split into odd and even would be a lottery with few layers.

    Parameters
    ----------
    values
        Shape (examples, columns); columns that are the same throughout take no part.
    splits, seed
        How many halvings, and of the generator that draws them.

    Returns
    -------
    float
        NaN with fewer than three columns or four examples.
    """
    varies = np.array([len(np.unique(c[np.isfinite(c)])) > 1 for c in values.T], dtype=bool)
    values = values[:, varies]
    n = len(values)
    if n < 4 or values.shape[1] < 3:
        return float("nan")
    rng = np.random.default_rng(seed)
    first = np.argsort(rng.random((splits, n)), axis=1) < n // 2
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0)
    means = []
    for half in (first, ~first):
        chosen = half.astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            means.append((chosen @ filled) / (chosen @ known.astype(np.float64)))
    found = [st.pearson(a, b) for a, b in zip(*means, strict=True) if np.isfinite(a + b).all()]
    found = [r for r in found if np.isfinite(r)]
    return st.spearman_brown(float(np.mean(found))) if found else float("nan")


def statement(
    metric: str,
    by: str,
    names: Sequence[str],
    fit: Fit,
    judged: Judgement,
    limits: Thresholds,
    special: Sequence[str],
    data: Measurements,
    confidence: float,
) -> str:
    """What a person should take away from one metric of an ablation."""
    text = "general" if metric.startswith("forgetting") else "held_out"
    found = totals(data.run, text)
    said = [] if found is None else [whole(data.run, text, confidence)]
    seen, unknown = fit.seen, ~(fit.seen | fit.zero)
    if unknown.all():
        return " ".join([*said, f"No {by} was ablated: nothing is known about {metric}."])
    if unknown.any():
        said.append(f"Not ablated, and so unknown: {int(unknown.sum())} of {len(unknown)} {by}s.")
    if special and metric == "forgetting_keep":
        said.append("Of every change that is put into the base alone:")
    said += special
    if not seen.any():
        return " ".join(said)
    if fit.samples is None:
        said.append(
            f"The examples are too few for intervals ({int(fit.n_eff[seen].min())}, "
            f"{MIN_INDEPENDENT:.0f} needed): differences between {by}s may be noise."
        )
        return " ".join(said)
    said.append(_standing(metric, by, names, fit, confidence))
    split = judged.reliability.split_half
    if np.isfinite(split):
        enough = split >= limits.reliable
        said.append(
            f"Two halves of the examples agree on the order with a reliability of {split:.2f}"
            + (": it would come out the same again." if enough else _more(split, fit, limits))
        )
    if text == "held_out" and by == "layer":
        said += [words] if (words := interaction_words(data, confidence)) else []
    return " ".join(said)


def whole(run: "Run", text: str, confidence: float) -> str:
    """Say what the whole training gained or cost on one text."""
    found = totals(run, text)
    if found is None:
        return ""
    gain = of_examples(found.gain, confidence)
    if text == "general":
        gain = Interval(
            -gain.value,
            None if gain.high is None else -gain.high,
            None if gain.low is None else -gain.low,
        )
    change = "a gain of" if text == "held_out" else "forgetting of"
    return (
        f"Over {found.examples:,} {TEXTS[text]} ({found.tokens:,} tokens) the loss went from "
        f"{found.before:.4g} to {found.after:.4g} nats per token, {change} {bounds(gain)}."
    )


def bounds(interval: Interval) -> str:
    """Write a value with its interval."""
    if interval.low is None or interval.high is None:
        return f"{interval.value:.3g} (too few examples for an interval)"
    value, low, high = (
        f"{x:.3g}".replace("-", "−", x < 0) for x in (interval.value, interval.low, interval.high)
    )
    return f"{value} [{low}, {high}]"


def _standing(metric: str, by: str, names: Sequence[str], fit: Fit, confidence: float) -> str:
    """Which rows are known to differ from nothing, all of them at once."""
    low, high = together(fit)
    above, below = low > 0, high < 0
    open_rows = fit.seen & ~above & ~below
    costs = metric.startswith("forgetting")
    parts = []
    for rows, words in (
        (above, "cost loss there" if costs else "were worth something"),
        (below, "saved loss there" if costs else "did harm"),
        (open_rows, "cannot be told from nothing"),
    ):
        if rows.all():
            parts.append(f"all {len(rows)} {by}s {words}")
        elif rows.any():
            parts.append(f"{name_rows(by, names, rows)} {words}")
    text = "; ".join(parts)
    return f"With all {by}s judged together at {confidence:.0%}: {text}."


def together(fit: Fit) -> tuple[Array, Array]:
    """Bounds that hold for all rows at once (max-t over the bootstrap); NaN where unknown."""
    return fit.joint_low, fit.joint_high


def _more(split: float, fit: Fit, limits: Thresholds) -> str:
    """Say how many examples would make the order reliable."""
    if split <= 0.05:
        return ": these examples do not tell the order at all."
    factor = limits.reliable / (1 - limits.reliable) * (1 - split) / split
    needed = float(np.nanmin(fit.n_eff[fit.seen])) * factor
    return f": about {needed:,.0f} examples would make it reliable ({limits.reliable:g})."


def interaction_words(data: Measurements, confidence: float) -> str:
    """Say whether the changes work alone or together: kept alone, and taken out alone, in sum."""
    found = totals(data.run)
    try:
        keep, reset = (per_example(data, mode, "held_out") for mode in ("keep", "reset"))
    except KeyError:
        return ""
    if found is None:
        return ""
    both = np.isfinite(keep).all(axis=0) & np.isfinite(reset).all(axis=0)
    if not both.any():
        return ""
    gain = of_examples(found.gain, confidence)
    alone, out = (of_examples(part[:, both].sum(axis=1), confidence) for part in (keep, reset))
    gap = of_examples((keep - reset)[:, both].sum(axis=1), confidence)
    text = (
        f"Each change put into the base alone (keep) gives {bounds(alone)} in sum, each taken out "
        f"of the trained model alone (reset) costs {bounds(out)}, of {bounds(gain)} in all: "
    )
    if gap.low is None or gap.high is None:
        return text + "too few examples to say whether they interact."
    if gap.low > 0:
        return text + (
            "what one unit learned, others have learned too or make up for, so that reset is small "
            "where keep is not."
        )
    if gap.high < 0:
        return text + "the changes need each other, so that one alone gives less than it is missed."
    return text + "no interaction of the changes can be told."


def confirmed(data: Measurements, scores: Array) -> tuple[bool | None, str]:
    """Whether a run's own ablation ranks its layers as a metric does, beyond chance.

    Parameters
    ----------
    data
        What the metric looked at; its groups are what is ranked.
    scores
        The metric's score of every row inside the stack.

    Returns
    -------
    tuple
        None and no words where the run was not ablated by these rows, or too few examples tell
        their order; else whether, and a sentence if not.
    """
    level = data.table.groups.level
    if level not in ("layer", "module"):
        return None, ""
    found: dict[str, float] = {}
    need = float("nan")
    for mode in ("keep", "reset"):
        try:
            if not data.has("ablation"):
                return None, ""
            rows = per_example(data, mode, "held_out")[:, : len(scores)]
        except (KeyError, LisaError):  # not ablated so, or a file that its own reader refuses
            continue
        known = np.isfinite(rows).all(axis=0) & np.isfinite(scores)
        cells = Cells(int(known.sum()))
        if cells.layers < 4 or association.reliability(cells, rows[:, known]) < 0.5:
            continue
        worth = rows[:, known].mean(axis=0)
        null = cells.null(scores[known], worth, cells.orders(np.random.default_rng(0)))
        found[mode], need = cells.agreement(scores[known], worth), association.critical(null)
    found = {mode: value for mode, value in found.items() if np.isfinite(value)}
    if not found:
        return None, ""
    if max(found.values()) >= (need if np.isfinite(need) else 1.0):
        return True, ""
    ranks = " and ".join(f"{value:.2f} with {mode}" for mode, value in found.items())
    least = f"{need:.2f} is more than chance" if np.isfinite(need) else f"too few {level}s to tell"
    return False, (
        f"Read it as a score, not as importance: this run's own ablation does not rank the "
        f"{level}s so (rank correlation {ranks}; {least})."
    ).replace("-0.", "−0.")
