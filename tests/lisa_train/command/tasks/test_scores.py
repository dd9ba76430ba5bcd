"""Scores of held-out examples against brute force and worked examples."""

import itertools
import random

import numpy as np
import pytest

from lisa_train.command.tasks.scores import (
    accuracy,
    class_scores,
    edits,
    macro_f1,
    word_error_rate,
)


def test_macro_f1_is_the_mean_over_precision_and_recall_of_each_class() -> None:
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 5, 200), rng.integers(0, 6, 200)
    scores = []
    for each in sorted({*labels, *predicted}):
        hit = sum(1 for a, b in zip(predicted, labels, strict=True) if a == b == each)
        precision = hit / max(1, sum(predicted == each))
        recall = hit / max(1, sum(labels == each))
        scores.append(2 * precision * recall / (precision + recall) if hit else 0.0)
    assert macro_f1(predicted, labels) == pytest.approx(np.mean(scores), rel=1e-12)
    assert accuracy(predicted, labels) == np.mean(predicted == labels)


def test_labels_that_do_not_count_are_left_out() -> None:
    labels = np.array([[0, 1, -100], [1, -100, -100]])
    predicted = np.array([[0, 0, 7], [1, 7, 7]])
    # class 0: one of two predictions right; class 1: one of two labels found
    assert class_scores(predicted, labels) == {"accuracy": 2 / 3, "macro_f1": pytest.approx(2 / 3)}


def shortest(said: tuple[str, ...], meant: tuple[str, ...]) -> int:
    """Fewest edits by trying: all ways to keep a common subsequence in order."""
    best = max(len(said), len(meant))
    for size in range(min(len(said), len(meant)) + 1):
        for a in itertools.combinations(range(len(said)), size):
            for b in itertools.combinations(range(len(meant)), size):
                # Between two kept pairs the shorter side is substituted, the rest put in or out.
                ends_a, ends_b = (-1, *a, len(said)), (-1, *b, len(meant))
                cost = sum(
                    max(x2 - x1, y2 - y1) - 1
                    for (x1, x2), (y1, y2) in zip(
                        itertools.pairwise(ends_a), itertools.pairwise(ends_b), strict=True
                    )
                )
                wrong = sum(said[i] != meant[j] for i, j in zip(a, b, strict=True))
                best = min(best, cost + wrong)
    return best


def test_edits_are_the_fewest() -> None:
    source = random.Random(3)
    for _ in range(60):
        a, b = (tuple(source.choices("abc", k=source.randint(0, 5))) for _ in range(2))
        assert edits(a, b) == shortest(a, b), (a, b)


def test_word_error_rate_is_over_all_words_that_were_meant() -> None:
    assert word_error_rate(["the cat sat", "yes"], ["The cat sat.", "yes, sir"]) == 1 / 5
    assert word_error_rate(["a b c d"], ["a"]) == 3
    assert np.isnan(word_error_rate(["a"], [""]))
