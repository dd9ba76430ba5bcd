"""Changes from one probe to another: bounds that hold, and what pairing by batch is worth."""

import numpy as np
import pytest

from lisa_analysis.statistics.paired import change

LAYERS, BATCHES = 12, 12


def worlds(repetitions, shared, moved=0.0, later=BATCHES):
    """Bounds of so many changes of `moved`, of batches that have `shared` in common."""
    truth = np.exp(np.linspace(-1, 1, LAYERS))  # layers of other sizes
    for repetition in range(repetitions):
        rng = np.random.default_rng(repetition)
        batch = rng.standard_normal((max(BATCHES, later), LAYERS))
        before, after = (
            truth * (1 + gain + 0.3 * (np.sqrt(shared) * batch[:n]
                                       + np.sqrt(1 - shared) * rng.standard_normal((n, LAYERS))))
            for n, gain in ((BATCHES, 0.0), (later, moved))
        )  # fmt: skip
        found = change(before, after, confidence=0.95, rng=rng, least=6, replicates=200)
        yield found, moved * truth


@pytest.mark.parametrize(
    ("shared", "later", "moved"),
    [(0.9, BATCHES, 0.0), (0.9, BATCHES, 0.5), (0.0, BATCHES, 0.0), (0.0, 20, 0.5)],
)
def test_bounds_hold_as_often_as_they_say(shared, later, moved):
    point, joint = [], []
    for found, truth in worlds(200, shared, moved, later):
        assert found.paired == (later == BATCHES)
        point.append((found.low <= truth) & (truth <= found.high))
        joint.append(((found.joint_low <= truth) & (truth <= found.joint_high)).all())
    assert 0.93 <= np.mean(point) <= 0.98
    assert np.mean(joint) >= 0.88  # .93 less three standard errors of 200 runs


def test_the_same_batches_tell_a_change_more_narrowly():
    width = [
        np.mean([found.high - found.low for found, _ in worlds(20, shared)])
        for shared in (0.9, 0.0)
    ]
    # Of a difference with nine tenths in common the variance is a tenth.
    assert width[0] / width[1] == pytest.approx(np.sqrt(0.1), rel=0.1)


def test_what_changed_by_nothing_or_is_of_few_batches():
    rng = np.random.default_rng(0)
    values = np.exp(rng.standard_normal((8, 3)))
    same = change(values, values, confidence=0.95, rng=rng, least=6)
    assert (same.joint_low == 0).all()
    assert (same.joint_high == 0).all()
    few = change(values[:5], 2 * values[:5], confidence=0.95, rng=rng, least=6)
    assert np.isnan(few.low).all()
    np.testing.assert_allclose(few.difference, values[:5].mean(axis=0))
