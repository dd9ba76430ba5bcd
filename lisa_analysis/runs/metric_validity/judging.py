"""Agreement of every metric with the ablation: interval, ceiling, and what chance reaches."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis import statistics as st
from lisa_analysis.runs.metric_validity.sides import Part, Side
from lisa_analysis.statistics import association
from lisa_analysis.statistics.association import Cells

Array = NDArray[np.float64]

PAIRS = 400


def judge(parts: Sequence[Part], confidence: float, seed: int) -> list[dict[str, Any]]:
    """Rows of one level: every metric and target over the runs that have both."""
    rng = np.random.default_rng(seed)
    stacks = list(dict.fromkeys(part.stack for part in parts))
    orders = {
        stack: Cells(*stack[1:], parts[0].cells.within).orders(rng, draw=len(stacks) > 1)
        for stack in stacks
    }
    keys = list(dict.fromkeys((part.target, key) for part in parts for key in part.metrics))
    rows, nulls = [], []
    for target, key in keys:
        own = [part for part in parts if part.target == target and key in part.metrics]
        found = [part.cells.agreement(p.score, part.truth.score)
                 for part in own if (p := part.metrics[key])]  # fmt: skip
        if not np.isfinite(found).any():
            continue
        drawn = [
            part.cells.null(part.metrics[key].score, part.truth.score, orders[part.stack])
            for part, r in zip(own, found, strict=True)
            if np.isfinite(r)
        ]
        null = np.mean(drawn, axis=0)
        nulls.append(null)
        rows.append(_row(target, key, own, np.array(found), null, confidence, rng))
    if rows:
        best = np.max(np.abs(nulls), axis=0)
        for row in rows:
            row["p_of_all"] = float((best >= abs(row["spearman"]) - 1e-9).mean())
            row["evidence"] = row["p_of_all"] <= 1 - confidence + 1e-12
    return rows


def _row(
    target: str, key: tuple[str, str], own: Sequence[Part], found: Array, null: Array,
    confidence: float, rng: np.random.Generator,
) -> dict[str, Any]:  # fmt: skip
    """One metric beside one target, over all runs that have both."""
    known = np.isfinite(found)
    mean = float(found[known].mean())
    own = [part for part, k in zip(own, known, strict=True) if k]
    low, high = _bounds(own, key, found[known], confidence, rng)
    shares = [_share(part, part.metrics[key]) for part in own]
    ceilings = np.sqrt(np.clip([part.reliability for part in own], 0, 1) * shares)
    source, metric = key
    return {
        "level": own[0].level, "target": target, "metric": metric, "source": source,
        "spearman": mean, "low": low, "high": high, "ceiling": float(ceilings.mean()),
        "chance": association.critical(null, 1 - confidence),
        "p": float((np.abs(null) >= abs(mean) - 1e-9).mean()), "p_of_all": float("nan"),
        "evidence": False, "layers": min(part.cells.layers for part in own),
        "kinds": min(part.cells.kinds for part in own), "runs": len(own),
        "layers_at_most": max(part.cells.layers for part in own),
        "kinds_at_most": max(part.cells.kinds for part in own),
        "metric_noise": all(part.metrics[key].samples is not None for part in own),
    }  # fmt: skip


def _bounds(
    own: Sequence[Part], key: tuple[str, str], found: Array, confidence: float,
    rng: np.random.Generator,
) -> tuple[float, float]:  # fmt: skip
    """Interval over runs from three on, else of the noise within them."""
    n = len(found)
    if n >= 3:
        reach = float(st.t_quantile(0.5 + confidence / 2, n - 1)) * found.std(ddof=1) / np.sqrt(n)
        mean = float(found.mean())
        return max(mean - reach, -1.0), min(mean + reach, 1.0)
    truths = [part.truth.samples for part in own if part.truth.samples is not None]
    if len(truths) < n:
        return float("nan"), float("nan")
    drawn = []
    for part, truth in zip(own, truths, strict=True):
        side = part.metrics[key]
        # Without samples of its own a metric is taken as it is.
        scores = side.score[None] if side.samples is None else side.samples
        # The same draws of examples for every run; those of the metrics are independent.
        rows = np.arange(PAIRS) % len(truth), rng.integers(0, len(scores), PAIRS)
        drawn.append(part.cells.agreements(scores[rows[1]], truth[rows[0]]))
    noise = min(_share(part, part.truth) * _share(part, part.metrics[key]) for part in own)
    return association.interval(float(found.mean()), np.mean(drawn, axis=0), noise, confidence)


def _share(part: Part, side: Side) -> float:
    return association.signal_share(part.cells, side.score, side.samples)
