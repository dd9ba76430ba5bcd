"""A profile of scores that were given, not measured by a run."""

from collections.abc import Hashable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from numbers import Integral
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.layers import stacks_of
from lisa_analysis.metrics.registry import Metric
from lisa_analysis.profiles.across_seeds import over_seeds
from lisa_analysis.profiles.from_run import check_confidence
from lisa_analysis.profiles.profile import ImportanceProfile
from lisa_analysis.profiles.sentences import remarks, shape_words, standing_words
from lisa_analysis.profiles.thresholds import THRESHOLDS
from lisa_analysis.profiles.verdict import Judgement, judge
from lisa_analysis.statistics.fit import Fit

Array = NDArray[np.float64]


def profile_of(
    scores: Any,
    names: Sequence[str] | None,
    low: Any,
    high: Any,
    *,
    metric: str,
    definition: str,
    sources: Sequence[str],
    model: str,
    by: str,
    confidence: float,
) -> ImportanceProfile:
    """Build the profile, see `ImportanceProfile.from_scores`."""
    check_confidence(confidence)
    if isinstance(sources, str):
        sources = (sources,)
    scores, names, low, high = _unlabelled(scores, names, low, high)
    if _several(scores):
        return _of_seeds(
            scores, names, low, high, metric=metric, definition=definition, sources=sources,
            model=model, by=by, confidence=confidence,
        )  # fmt: skip
    score = _finite(scores)
    n = len(score)
    labels = _labels(names, n)
    fit = _fit(score, *_bounds(score, low, high), confidence)
    judged = judge(
        fit, confidence, THRESHOLDS, steps=np.zeros(0, np.int64), period=None,
        rng=np.random.default_rng(0), stacks=stacks_of(labels) if by == "layer" else (),
    )  # fmt: skip
    special = remarks(Metric(metric, definition, "linear", np.asarray), by, labels, fit)
    return ImportanceProfile(
        metric=metric,
        definition=definition,
        sources=tuple(map(str, sources)),
        method="unknown",
        model=model,
        by=by,
        confidence=confidence,
        layers=_frame(fit, labels, by).assign(standing=judged.standing.words),
        outside=_frame(fit.only(np.zeros(n, dtype=bool)), [], by),
        verdict=judged.shape.verdict,
        statement=_statement(metric, by, labels, fit, judged, special, confidence),
        concentration=judged.concentration,
        shape=judged.shape,
        stacks=judged.stacks,
        initialisation=None,
        reliability=judged.reliability,
        samples=None,
        remarks=special,
        estimand="what the given scores are of",
    )


def _unlabelled(scores: Any, names: Any, low: Any, high: Any) -> tuple[Any, Any, Any, Any]:
    """Scores and bounds as plain rows, with the names that a mapping or a Series gives them."""
    if isinstance(names, str | Mapping | AbstractSet):
        raise LisaError(f"names are a {type(names).__name__}: expected a list of one name each.")
    labels = _labels_of(scores)
    if labels is not None and names is not None:
        if not _same_index(scores, names):
            raise LisaError(
                "scores name their layers, and names were given as well: leave names out, or give "
                "the scores as a list (of a Series, .to_numpy())."
            )
        # Columns of one table: its index counts rows, and may do so with gaps.
        low, high = (b.to_numpy() if _same_index(scores, b) else b for b in (low, high))
        scores, labels = scores.to_numpy(), None
    if labels is not None:
        if _several(list(_by_label(scores).values())):
            raise LisaError(
                "scores map names to lists: expected one number for each layer; of several seeds "
                "give a list of lists, and their names as sources=."
            )
        labels, names = _in_order(labels)
        scores = _rows_of("scores", scores, labels)
    keys = names if labels is None else labels
    low, high = (_rows_of(what, b, keys) for what, b in (("low", low), ("high", high)))
    return scores, names, low, high


def _same_index(one: Any, other: Any) -> bool:
    series = isinstance(one, pd.Series) and isinstance(other, pd.Series)
    return series and bool(one.index.equals(other.index))


def _labels_of(given: Any) -> list[Hashable] | None:
    """Keys of a mapping, or the index of a Series; None where nothing or rows are counted alone."""
    if isinstance(given, Mapping):
        return list(given)
    if isinstance(given, pd.Series) and not given.index.equals(pd.RangeIndex(len(given))):
        return list(given.index)
    return None


def _by_label(given: Any) -> dict[str, Any]:
    labels = _labels_of(given) or []
    values = given.values() if isinstance(given, Mapping) else given.to_numpy()
    return dict(zip(map(str, labels), values, strict=True))


def _in_order(labels: Sequence[Any]) -> tuple[list[Any], list[str] | None]:
    """Labels in the order of the layers, and the names that they are: None for mere indices."""
    indices = [label for label in labels if _is_index(label)]
    if indices and len(indices) == len(labels):
        ordered = sorted(labels, key=int)
        if [int(label) for label in ordered] != list(range(len(ordered))):
            raise LisaError(
                f"scores are of the layers {', '.join(map(str, ordered))}: expected every index "
                f"from 0 to {max(int(ordered[-1]), len(ordered) - 1)} once, with NaN where a score "
                "is unknown."
            )
        return ordered, None
    other = next((label for label in labels if not _is_index(label)), None)
    if indices or not all(isinstance(label, str) for label in labels):
        beside = f"{indices[0]!r} and " if indices else ""
        raise LisaError(
            f"scores name the layers {beside}{other!r}: expected names as the model has them, or "
            "the index of every layer."
        )
    return list(labels), list(labels)


def _is_index(label: Any) -> bool:
    if isinstance(label, str):
        return label.isascii() and label.isdigit()
    return isinstance(label, Integral) and not isinstance(label, bool)


def _rows_of(what: str, given: Any, keys: Sequence[Any] | None) -> Any:
    """Numbers in the order of `keys`, where they are labelled; as they are otherwise."""
    labels = _labels_of(given)
    if labels is None:
        return given
    by_label = _by_label(given)
    wanted = list(map(str, range(len(labels)) if keys is None else keys))
    if len(by_label) != len(labels) or by_label.keys() != set(wanted):
        raise LisaError(
            f"{what} name {len(labels)} layers ({', '.join(map(str, labels[:3]))} …) and the "
            f"scores {len(wanted)} ({', '.join(wanted[:3])} …): expected the same layers, each "
            "once."
        )
    return [by_label[key] for key in wanted]


def _finite(scores: Any) -> Array:
    """Scores as a vector; refuse those that are infinite."""
    score = _vector("scores", scores, None)
    if np.isinf(score).any():
        raise LisaError(
            f"scores[{int(np.flatnonzero(np.isinf(score))[0])}] is infinite: expected finite "
            "numbers, NaN where a score is unknown."
        )
    return score


def _labels(names: Sequence[str] | None, n: int) -> list[str]:
    """Names of `n` rows, as given or counted."""
    labels = [f"layer {i}" for i in range(n)] if names is None else [str(name) for name in names]
    if len(labels) != n or len(set(labels)) != n:
        raise LisaError(f"names are {len(labels)} for {n} scores: expected one of each, distinct.")
    return labels


def _bounds(
    score: Array, low: Sequence[float] | None, high: Sequence[float] | None
) -> tuple[Array, Array]:
    """Bounds as given, NaN where none were; refuse those on the wrong side of their score."""
    lower, upper = (
        np.full(len(score), np.nan) if given is None else _vector(name, given, len(score))
        for name, given in (("low", low), ("high", high))
    )
    for name, wrong in (("low", lower > score), ("high", upper < score)):
        if wrong.any():
            raise LisaError(
                f"{name}[{int(np.argmax(wrong))}] is on the wrong side of its score: expected low "
                "≤ score ≤ high."
            )
    return lower, upper


def _several(scores: Any) -> bool:
    """Whether scores of several seeds were given: a list of two lists or more."""
    if isinstance(scores, str) or not isinstance(scores, Sequence | np.ndarray):
        return False
    return len(scores) > 1 and all(
        isinstance(row, Sequence | np.ndarray) and not isinstance(row, str) and np.ndim(row) == 1
        for row in scores
    )


def _of_seeds(
    scores: Any, names: Any, low: Any, high: Any, *, sources: Sequence[str], **options: Any
) -> ImportanceProfile:
    """One profile of the scores of several seeds."""
    if low is not None or high is not None:
        raise LisaError(
            "low and high were given beside the scores of several seeds: leave them out, bounds "
            "come from the spread between seeds."
        )
    count, layers = len(scores), len(scores[0])
    if sources and len(sources) != count:
        raise LisaError(
            f"sources are {len(sources)} for the scores of {count} seeds: give one of each."
        )
    for i, row in enumerate(scores):
        if len(row) != layers:
            raise LisaError(
                f"scores[{i}] has {len(row)} layers and scores[0] {layers}: expected the same "
                "layers of every seed."
            )
    profiles = [
        profile_of(row, names, None, None, sources=sources[i : i + 1], **options)
        for i, row in enumerate(scores)
    ]
    return over_seeds(profiles, [*sources] or [f"seed {i + 1}" for i in range(count)])


def _vector(name: str, given: Any, length: int | None) -> Array:
    try:
        # Iterated, a text gives digits, a table its columns, and a set any order.
        if isinstance(given, str | bytes | pd.DataFrame | AbstractSet):
            raise TypeError
        values = np.array([np.nan if v is None else v for v in given], dtype=np.float64)
    except (TypeError, ValueError):
        raise LisaError(f"{name} are {type(given).__name__}: expected a list of numbers.") from None
    if values.ndim != 1 or not len(values) or len(values) != (length or len(values)):
        raise LisaError(
            f"{name} have the shape {values.shape}: expected one number per layer"
            f"{f', {length} of them' if length else ''}."
        )
    return values


def _fit(score: Array, low: Array, high: Array, confidence: float) -> Fit:
    """Given numbers as a fit without any resampling behind it.

    Bounds of single layers are widened to hold for all at once as those of independent normal
    errors would be (Šidák 1967).
    """
    n = len(score)
    zero = score == 0
    known = score[np.isfinite(score) & ~zero]
    log = len(known) > 0 and bool((known > 0).all())
    effect = np.where(zero, np.nan, score)
    nothing = np.full(n, np.nan)
    low, high = (np.where(zero, np.nan, bound) for bound in (low, high))
    with np.errstate(invalid="ignore", divide="ignore"):
        ends = [np.log(end) if log else end for end in (effect, low, high)]
    layers = int((np.isfinite(low) & np.isfinite(high)).sum())
    all_of_them = 0.5 + confidence ** (1 / max(layers, 1)) / 2
    normal = NormalDist()
    factor = normal.inv_cdf(all_of_them) / normal.inv_cdf(0.5 + confidence / 2)
    back = np.exp if log else np.asarray
    with np.errstate(invalid="ignore"):
        joint_low, joint_high = (back(ends[0] + factor * (end - ends[0])) for end in ends[1:])
    return Fit(
        score, low, high, ends[0], None, None, nothing, nothing,
        np.zeros(n, np.int64), float("nan"), np.zeros((0, n)), 1, None, log, "none", zero,
        zero.astype(np.int64), joint_low, joint_high, nothing, nothing, zero & False, nothing,
    )  # fmt: skip


def _frame(fit: Fit, names: Sequence[str], by: str) -> pd.DataFrame:
    n = len(names)
    unknown = pd.array([pd.NA] * n, dtype="Int64")
    index = pd.array(range(n), dtype="Int64") if by == "layer" else unknown
    return pd.DataFrame(
        {
            "layer": index, "name": list(names), "score": fit.score, "low": fit.low,
            "high": fit.high, "joint_low": fit.joint_low, "joint_high": fit.joint_high,
            "n_eff": fit.n_eff, "visits": unknown, "initial": fit.n_eff, "rho": fit.rho,
            "steps": unknown, "zeros": unknown, "standing": "unknown",
        }
    )  # fmt: skip


def _statement(
    metric: str, by: str, names: Sequence[str], fit: Fit, judged: Judgement,
    special: Sequence[str], confidence: float,
) -> str:  # fmt: skip
    unknown = ~(fit.seen | fit.zero)
    if unknown.all():
        return f"No {by} has a score: nothing is known about {metric}."
    sentences = []
    if unknown.any():
        sentences.append(f"Unknown: {int(unknown.sum())} of {len(unknown)} {by}s.")
    sentences += special
    if not fit.seen.any():
        return " ".join(sentences)
    sentences.append(
        "The scores were given, and nothing that could be resampled: how sure their order and "
        "their shape are cannot be said."
    )
    if fit.known.any():
        sentences.append(standing_words(by, names, judged.standing, confidence))
    return " ".join([*sentences, shape_words(judged, by)])
