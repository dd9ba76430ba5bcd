"""Agreement of rankings: published critical values, brute force, false alarms, coverage."""

import itertools

import numpy as np
import pytest
from scipy import stats

from lisa_analysis.statistics.association import (
    Cells,
    critical,
    interval,
    reliability,
    signal_share,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize(("n", "published"), [(5, 1.0), (6, 0.886), (7, 0.786), (4, float("nan"))])
def test_critical_values_are_the_published_ones(rng, n, published):
    """Two-sided 5 % points of Spearman's ρ (Zar 1984, table B.20); with four none is so rare."""
    cells, x = Cells(n), rng.standard_normal(n)
    found = critical(cells.null(x, rng.standard_normal(n), cells.orders(rng)))
    assert found == pytest.approx(published, abs=5e-4, nan_ok=True)


def test_agreement_is_spearmans(rng):
    x, y = rng.standard_normal((2, 21))
    x[3] = np.nan
    known = np.isfinite(x)
    expected = stats.spearmanr(x[known], y[known]).statistic
    assert Cells(21).agreement(x, y) == pytest.approx(expected)
    within = [stats.spearmanr(x[k::3], y[k::3], nan_policy="omit").statistic for k in range(3)]
    assert Cells(7, 3, within=True).agreement(x, y) == pytest.approx(np.mean(within))
    assert np.isnan(Cells(7, 3, within=True).agreement(np.full(21, np.nan), y))


@pytest.mark.parametrize("cells", [Cells(21), Cells(7, 3), Cells(7, 3, within=True)])
def test_rows_agree_as_one_at_a_time(rng, cells):
    x, y = rng.standard_normal((2, 50, 21))
    tied, gaps = np.round(x), np.where(rng.random(x.shape) < 0.1, np.nan, x)
    for values in (x, tied, gaps):
        expected = [cells.agreement(a, b) for a, b in zip(values, y, strict=True)]
        np.testing.assert_allclose(cells.agreements(values, y), expected, atol=1e-12)


@pytest.mark.parametrize("within", [True, False])
def test_every_order_moves_whole_layers_and_whole_kinds(rng, within):
    cells = Cells(4, 2, within=within)
    orders = cells.orders(rng)
    assert len({tuple(order) for order in orders}) == (24 if within else 48)
    assert orders[0].tolist() == list(range(8))
    for order in orders.reshape(-1, 4, 2):
        assert (order // 2 == order[:, :1] // 2).all()
        assert (order % 2 == order[:1] % 2).all()


@pytest.mark.parametrize("within", [True, False])
def test_the_null_is_that_of_brute_force(rng, within):
    cells = Cells(4, 3, within=within)
    x, y = rng.standard_normal((2, 12))
    orders = cells.orders(rng)
    found = cells.null(x, y, orders)
    by_hand = []
    kinds = [range(3)] if within else itertools.permutations(range(3))
    for layers, order in itertools.product(itertools.permutations(range(4)), list(kinds)):
        moved = y.reshape(4, 3)[list(layers)][:, list(order)].ravel()
        by_hand.append(cells.agreement(x, moved))
    np.testing.assert_allclose(np.sort(found), np.sort(by_hand), atol=1e-12)
    # A metric that does not know every cell goes another way to the same numbers.
    gap = np.where(np.arange(12) == 5, np.nan, x)
    expected = [cells.agreement(gap, y[order]) for order in orders]
    np.testing.assert_allclose(cells.null(gap, y, orders), expected)


@pytest.mark.parametrize("within", [True, False])
def test_what_layers_share_over_their_kinds_is_no_false_alarm(rng, within):
    """Both sides vary mostly by layer, independently: at 5 % about 5 % are called agreement."""
    cells, wrong = Cells(6, 5, within=within), 0
    orders = cells.orders(rng)
    for _ in range(300):
        x, y = (
            np.repeat(rng.standard_normal(6), 5) + np.tile(rng.standard_normal(5), 6)
            + 0.2 * rng.standard_normal(30)
            for _ in range(2)
        )  # fmt: skip
        null = cells.null(x, y, orders)
        wrong += (np.abs(null) >= abs(cells.agreement(x, y)) - 1e-9).mean() <= 0.05
    assert wrong <= 25
    shuffled = sum(stats.spearmanr(*np.repeat(rng.standard_normal((2, 6)), 5, axis=1)).pvalue < 0.05
                   for _ in range(100))  # fmt: skip
    assert shuffled > 25  # what treating every module as a case of its own would do


@pytest.mark.parametrize("noise", [0.1, 0.5, 1.0])
def test_intervals_hold_the_agreement_of_the_true_scores(noise):
    inside, n, rng = [], 12, np.random.default_rng(int(noise * 10))
    cells = Cells(n)
    for _ in range(120):
        truth = rng.standard_normal(n)
        other = 0.7 * truth + 0.7 * rng.standard_normal(n)
        true = cells.agreement(truth, other)
        a, b = truth + noise * rng.standard_normal(n), other + noise * rng.standard_normal(n)
        first = a + noise * rng.standard_normal((200, n))
        second = b + noise * rng.standard_normal((200, n))
        share = signal_share(cells, a, first) * signal_share(cells, b, second)
        drawn = cells.agreements(first, second)
        low, high = interval(cells.agreement(a, b), drawn, share, 0.95)
        inside.append(low - 1e-9 <= true <= high + 1e-9)
    assert np.mean(inside) >= 0.93


def test_signal_share_is_the_share_that_is_not_noise(rng):
    cells, found = Cells(30, 2, within=True), []
    for _ in range(40):
        truth = 5 * np.tile([0.0, 1.0], 30) + rng.standard_normal(60)
        score = truth + 0.5 * rng.standard_normal(60)
        samples = score + 0.5 * rng.standard_normal((300, 60))
        found.append(signal_share(cells, score, samples))
    assert np.mean(found) == pytest.approx(1 / 1.25, abs=0.03)
    assert signal_share(cells, score, None) == 1


def test_reliability_is_what_a_second_ablation_would_agree(rng):
    """Against the correlation of two independent sets of examples."""
    truth, again = rng.standard_normal(40), []
    cells, found = Cells(40), []
    for _ in range(15):
        first, second = (truth + 6 * rng.standard_normal((64, 40)) for _ in range(2))
        again.append(cells.agreement(first.mean(axis=0), second.mean(axis=0)))
        found.append(reliability(cells, first))
    assert np.mean(found) == pytest.approx(np.mean(again), abs=0.06)
    assert np.isnan(reliability(cells, first[:3]))


@pytest.mark.parametrize("cells", [Cells(9), Cells(5, 3), Cells(6, 4, within=True)])
def test_the_null_of_a_metric_that_is_unknown_somewhere_is_that_of_every_order(cells):
    rng, n = np.random.default_rng(2), cells.layers * cells.kinds
    x, y = rng.standard_normal(n), rng.standard_normal(n).round(1)
    x[rng.random(n) < 0.3] = np.nan
    if cells.kinds > 1:
        x[:: cells.kinds] = np.nan  # one kind at all
    orders = cells.orders(rng)[:300]
    one_by_one = np.nan_to_num([cells.agreement(x, y[order]) for order in orders])
    np.testing.assert_allclose(cells.null(x, y, orders), one_by_one, atol=1e-12)
