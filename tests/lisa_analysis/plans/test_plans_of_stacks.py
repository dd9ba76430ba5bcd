"""Probabilities of an encoder-decoder: each stack's own scores, bounds, controls and sum."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

import lisa_analysis as la
from lisa_analysis.contract.errors import ProbabilitiesError
from lisa_analysis.plans.gains import gain
from lisa_analysis.plans.sampling import strengths
from lisa_analysis.plans.stacks import Division
from lisa_analysis.statistics.shares import even_shares

ENCODER, DECODER = [0, 1, 2, 3], [4, 5, 6, 7, 8, 9]
NAMES = [f"model.encoder.layers.{i}" for i in range(4)]
NAMES += [f"model.decoder.layers.{i}" for i in range(6)]
SCORES = np.array([1.0, 2.0, 3.0, 2.5, 900.0, 400.0, 500.0, 700.0, 800.0, 300.0])


def profile(scores=SCORES, width=0.02, names=NAMES):
    if width is None:
        return la.ImportanceProfile.from_scores(scores, names)
    return la.ImportanceProfile.from_scores(
        scores, names, scores * (1 - width), scores * (1 + width)
    )


@pytest.mark.parametrize(
    ("k", "strength"),
    [(2, 0.0), (2, 1.0), (2, "pool=4"), (5, 0.5), (5, 1.0), (8, 1.0), (8, 4.0)],
)
def test_every_stack_has_its_whole_number_and_the_pi_that_it_would_have_alone(k, strength):
    shares = {2: (1, 1), 5: (2, 3), 8: (3, 5)}[k]
    made = la.sampling_probabilities(profile(), k, strength=strength)
    pi = np.array(made.inclusion_probabilities)
    whole = strength if strength != "pool=4" else "pool=2"
    for layers, own in ((ENCODER, shares[0]), (DECODER, shares[1])):
        assert pi[layers].sum() == pytest.approx(own, abs=1e-12)
        alone = profile(SCORES[layers], names=[NAMES[i] for i in layers])
        expected = la.sampling_probabilities(alone, own, strength=whole)
        np.testing.assert_allclose(pi[layers], expected.inclusion_probabilities, atol=1e-9)
    assert f"a draw takes {shares[0]} of 4 of model.encoder.layers" in made.statement


@pytest.mark.parametrize("control", ["permuted", "reversed", "uniform"])
def test_controls_stay_within_a_stack(control):
    plain = np.array(la.sampling_probabilities(profile(), 5).inclusion_probabilities)
    made = la.sampling_probabilities(profile(), 5, control=control, seed=3)
    pi = np.array(made.inclusion_probabilities)
    for layers, own in ((ENCODER, 2), (DECODER, 3)):
        assert pi[layers].sum() == pytest.approx(own)
        if control == "uniform":
            np.testing.assert_allclose(pi[layers], own / len(layers))
        else:
            np.testing.assert_allclose(np.sort(pi[layers]), np.sort(plain[layers]))


def test_what_a_draw_collects_is_told_beside_a_uniform_draw_of_each_stack():
    """Against the sums over all layers, by hand."""
    made = la.sampling_probabilities(profile(), 5)
    pi = np.array(made.inclusion_probabilities)
    even = np.array([0.5] * 4 + [0.5] * 6)
    assert made.gain == pytest.approx((pi @ SCORES) / (even @ SCORES))
    uneven = np.array([1 / 4] * 4 + [3 / 6] * 6)
    division = Division(("e", "d"), (tuple(ENCODER), tuple(DECODER)), (1, 3))
    assert gain(uneven, SCORES, division) == pytest.approx(1.0)
    assert gain(np.full(10, 0.2), SCORES) == pytest.approx(1.0)


def test_fewer_layers_than_stacks_are_drawn_together_and_it_is_said():
    made = la.sampling_probabilities(profile(), 1)
    assert sum(made.inclusion_probabilities) == pytest.approx(1)
    assert "lisa.stacks='together'" in made.statement
    single = la.sampling_probabilities(profile(names=[f"layers.{i}" for i in range(10)]), 1)
    assert "stack" not in single.statement


def test_unknown_layers_have_the_share_of_their_stack():
    scores, width = SCORES.copy(), 0.02
    low, high = scores * (1 - width), scores * (1 + width)
    low[[1, 7]] = high[[1, 7]] = np.nan
    made = la.sampling_probabilities(la.ImportanceProfile.from_scores(scores, NAMES, low, high), 8)
    assert made.unknown == (1, 7)
    assert [made.inclusion_probabilities[i] for i in (1, 7)] == pytest.approx([3 / 4, 5 / 6])
    assert "uniform share 0.75 or 0.833" in made.statement


def test_what_one_stack_cannot_give_names_it():
    scores = SCORES.copy()
    scores[ENCODER] = 1.0  # none stands above
    with pytest.raises(ProbabilitiesError, match=r"in model\.encoder\.layers: .*pool of 0 of 4"):
        la.sampling_probabilities(profile(scores), 2, strength="pool")
    with pytest.raises(ProbabilitiesError, match="fewer layers than the 2 stacks"):
        la.sampling_probabilities(profile(), 2, strength="pool=1")
    rows = strengths(profile(scores), 2).set_index("strength")
    assert rows.loc["pool", "why_not"].startswith("in model.encoder.layers")
    assert rows.loc["1", "pi"][ENCODER].sum() == pytest.approx(1)


def test_the_picture_shows_the_uniform_share_of_each_stack():
    pi = np.array(la.sampling_probabilities(profile(), 8).inclusion_probabilities)
    stacks = ["e"] * 4 + ["d"] * 6
    np.testing.assert_allclose(even_shares(pi, stacks), [3 / 4] * 4 + [5 / 6] * 6)
    np.testing.assert_allclose(even_shares(np.full(10, 0.3), stacks), 0.3)
    figure, ax = plt.subplots()
    la.plots.probabilities(la.sampling_probabilities(profile(), 8), ax=ax)
    (line,) = [item for item in ax.get_lines() if str(item.get_label()).startswith("uniform")]
    assert set(np.round(line.get_ydata(), 6)) == {0.75, 0.833333}
    plt.close(figure)
