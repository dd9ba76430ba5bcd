"""What a held-out part is judged by beside its loss; numpy only.

Definitions are the usual ones: those of scikit-learn for classes, of NIST's sclite for words.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.fields import HELD_OUT_SCORES

IGNORED = -100


def with_meaning(scores: Mapping[str, float], task: str) -> dict[str, float]:
    """Return the scores that a task gives; `LisaError` for one of which nothing says what it is."""
    for name in scores.keys() - HELD_OUT_SCORES:
        raise LisaError(
            f"task {task} gives the score {name!r}, of which nothing says what it is; put it into "
            "the task's new_scores, with its meaning."
        )
    return dict(scores)


def accuracy(predicted: NDArray[Any], labels: NDArray[Any]) -> float:
    """Share of labels that are predicted."""
    return float(np.mean(predicted == labels)) if labels.size else float("nan")


def macro_f1(predicted: NDArray[Any], labels: NDArray[Any]) -> float:
    """Mean over classes of F1 = 2·tp / (2·tp + fp + fn); every class weighs the same.

    The classes are those that are labels or predictions at least once.
    """
    classes = np.union1d(predicted, labels)
    if not len(classes):
        return float("nan")
    scores = []
    for each in classes:
        hit = np.sum((predicted == each) & (labels == each))
        scores.append(2 * hit / (np.sum(predicted == each) + np.sum(labels == each)))
    return float(np.mean(scores))


def class_scores(predicted: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    """Accuracy and macro-F1 over the labels that count (those that are not -100)."""
    counts = labels != IGNORED
    predicted, labels = predicted[counts], labels[counts]
    return {"accuracy": accuracy(predicted, labels), "macro_f1": macro_f1(predicted, labels)}


def edits(said: Sequence[str], meant: Sequence[str]) -> int:
    """Fewest insertions, deletions and substitutions that turn `said` into `meant`."""
    row = list(range(len(meant) + 1))
    for i, word in enumerate(said, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(meant, 1):
            change = before + (word != other)
            before = row[j]
            row[j] = min(change, row[j] + 1, row[j - 1] + 1)
    return row[-1]


def word_error_rate(said: Sequence[str], meant: Sequence[str]) -> float:
    """Edits of all texts together over the words that were meant; above 1 when too much is said.

    Words are what white space parts, in lower case and without punctuation at their ends.
    """
    pairs = [(_words(a), _words(b)) for a, b in zip(said, meant, strict=True)]
    total = sum(len(b) for _, b in pairs)
    return sum(edits(a, b) for a, b in pairs) / total if total else float("nan")


def _words(text: str) -> list[str]:
    words = (word.strip(".,;:!?\"'()[]…-") for word in text.lower().split())
    return [word for word in words if word]
