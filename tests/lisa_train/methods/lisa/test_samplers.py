"""Sampling schemes: exact inclusion probabilities, reproducible draws, refusal in words."""

import functools
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lisa_analysis.contract.errors import ConfigError, ProbabilitiesError
from lisa_train.methods.lisa.inclusion import check_probabilities, equal_probabilities, resolve
from lisa_train.methods.lisa.samplers import (
    SAMPLERS,
    BalancedSampler,
    SystematicSampler,
    make_sampler,
    never_drawn,
)

# importance.md's example: naive weighted choice gives the first layer .681 instead of .8.
SKEWED = np.array([0.8, 0.4, 0.3, 0.2, 0.2, 0.1])
WITH_CERTAIN = np.array([0.3, 1.0, 0.5, 0.2, 1.0, 0.6, 0.4])
WITH_NEVER = np.array([0.0, 0.6, 0.3, 0.0, 1.0, 0.5, 0.6, 0.0])
INDEPENDENT = ["bernoulli", "systematic", "conditional_poisson"]
FIXED_SIZE = ["systematic", "conditional_poisson", "balanced"]
DRAWS = 10_000


def frequencies(sampler, draws=DRAWS):
    counts = np.zeros(sampler.inclusion_probabilities.size)
    for index in range(draws):
        counts[list(sampler.draw(index))] += 1
    return counts / draws


def worst_z(observed, pi, draws=DRAWS):
    """Largest deviation in standard errors; a certain layer that is missed counts as infinite."""
    error = np.sqrt(pi * (1 - pi) / draws)
    deviation = np.abs(observed - pi)
    return float(np.max(np.where(error > 0, deviation / np.maximum(error, 1e-300), deviation)))


@pytest.mark.parametrize(
    "pi",
    [SKEWED, WITH_CERTAIN, WITH_NEVER],
    ids=["skewed", "with certain layers", "with layers that are never drawn"],
)
@pytest.mark.parametrize("scheme", INDEPENDENT)
def test_inclusion_probabilities_are_met_within_four_standard_errors(scheme, pi):
    sampler = make_sampler(scheme, pi, round(pi.sum()), seed=3)
    assert worst_z(frequencies(sampler), pi) < 4


def test_numpys_weighted_choice_without_replacement_fails_the_same_test():
    rng = np.random.default_rng(3)
    counts = np.zeros(SKEWED.size)
    for _ in range(DRAWS):
        counts[rng.choice(SKEWED.size, 2, replace=False, p=SKEWED / SKEWED.sum())] += 1
    assert worst_z(counts / DRAWS, SKEWED) > 20


@pytest.mark.parametrize("scheme", ["uniform", "cyclic"])
@pytest.mark.parametrize(("layers", "k"), [(5, 2), (7, 3), (4, 3), (6, 2)])
def test_every_single_draw_of_the_equal_schemes_is_uniform(scheme, layers, k):
    seeds = 1_000
    for index in (0, 1, 2, 5):
        counts = np.zeros(layers)
        for seed in range(seeds):
            chosen = make_sampler(scheme, np.full(layers, k / layers), k, seed).draw(index)
            assert len(set(chosen)) == k
            counts[list(chosen)] += 1
        assert worst_z(counts / seeds, np.full(layers, k / layers), seeds) < 4


RARE = np.array([0.001, 0.299, 0.7])


@pytest.mark.parametrize("index", [0, 1, 2, 7])
@pytest.mark.parametrize(
    "pi",
    [
        SKEWED, WITH_CERTAIN, RARE,
        pytest.param(np.array([0.9, 0.9, 0.1, 0.1]), marks=pytest.mark.slow),
    ],
    ids=str,
)  # fmt: skip
def test_every_single_balanced_draw_meets_unequal_probabilities(pi, index):
    seeds, counts = 2_000, np.zeros(pi.size)
    for seed in range(seeds):
        counts[list(_balanced(tuple(pi), seed).draw(index))] += 1
    assert worst_z(counts / seeds, pi, seeds) < 4


@functools.cache
def _balanced(pi, seed):
    return make_sampler("balanced", pi, round(sum(pi)), seed)


def test_balanced_draws_forget_where_the_credits_started():
    """Two starts that agree modulo 1 come together; the first draws of a start at 0 are biased."""
    one, other = (make_sampler("balanced", RARE, 1, seed=4) for _ in range(2))
    other.credit = one.credit + np.array([1.0, -1.0, 0.0])
    jitter = np.random.default_rng(0).random((BalancedSampler._BURN_IN, RARE.size))
    assert not np.allclose(one.credit, other.credit)
    for row in jitter:
        one._advance(row)
        other._advance(row)
    np.testing.assert_allclose(one.credit, other.credit, atol=1e-9)


@pytest.mark.parametrize("pi", [SKEWED, WITH_CERTAIN, np.full(32, 2 / 32)])
def test_balanced_shares_stay_within_two_visits_and_nobody_waits_long(pi):
    sampler = make_sampler("balanced", pi, round(pi.sum()), seed=1)
    visits, waiting = np.zeros(pi.size), np.zeros(pi.size)
    for index in range(3_000):
        chosen = list(sampler.draw(index))
        visits[chosen] += 1
        waiting += 1
        waiting[chosen] = 0
        assert np.abs(visits - (index + 1) * pi).max() < 2
        assert (waiting * pi).max() < 2


def test_systematic_is_exact_by_enumeration_of_orders_and_offsets():
    pi = np.array([0.75, 0.5, 0.45, 0.3])
    sampler = SystematicSampler(pi, 2, seed=0)
    inclusion = np.zeros(4)
    orders = list(itertools.permutations(range(4)))
    for order in orders:
        # The draw is constant in u between the fractional parts of the interval ends.
        edges = np.cumsum(pi[list(order)])
        cuts = np.unique(np.concatenate([[0.0, 1.0], edges % 1.0]))
        for low, high in itertools.pairwise(cuts):
            sampler._rng = lambda index, o=order, u=(low + high) / 2: _Fixed(o, u)
            chosen = sampler.draw(0)
            assert len(chosen) == 2
            inclusion[list(chosen)] += (high - low) / len(orders)
    np.testing.assert_allclose(inclusion, pi, atol=1e-12)


class _Fixed:
    """A generator that returns one given order and one given number."""

    def __init__(self, order, uniform):
        self.order, self.uniform = np.array(order), uniform

    def permutation(self, n):
        assert n == self.order.size
        return self.order

    def random(self):
        return self.uniform


@pytest.mark.parametrize(("pi", "k"), [(SKEWED, 2), (np.array([0.9, 0.7, 0.6, 0.5, 0.3]), 3)])
def test_conditional_poisson_by_enumeration_of_all_sets(pi, k):
    sampler = make_sampler("conditional_poisson", pi, k, seed=5)
    weights = np.exp(sampler._log_w)
    sets = list(itertools.combinations(range(pi.size), k))
    probability = np.array([math.prod(weights[list(s)]) for s in sets])
    probability /= probability.sum()
    inclusion = np.array([probability[[i in s for s in sets]].sum() for i in range(pi.size)])
    np.testing.assert_allclose(inclusion, pi, atol=1e-11)
    # … and the draws follow that law of sets, not only its margins.
    observed = np.zeros(len(sets))
    for index in range(DRAWS):
        observed[sets.index(sampler.draw(index))] += 1
    chi2 = float(((observed - DRAWS * probability) ** 2 / (DRAWS * probability)).sum())
    freedom = len(sets) - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("k", [2, 8, 40, 78])
def test_conditional_poisson_is_stable_for_eighty_layers(k):
    rng = np.random.default_rng(k)
    pi = check_probabilities(_capped(rng.lognormal(0, 1.5, 80), k), k)
    sampler = make_sampler("conditional_poisson", pi, k, seed=0)
    # An independent computation of the inclusion probabilities: numerical differentiation of
    # log e_k with respect to the log weights, polynomial coefficients by products of roots.
    log_w = sampler._log_w
    step = 1e-4
    derivative = [
        (_log_ek(log_w + step * unit, k) - _log_ek(log_w - step * unit, k)) / (2 * step)
        for unit in np.eye(80)
    ]
    np.testing.assert_allclose(derivative, pi, atol=1e-6)
    assert all(len(sampler.draw(i)) == k for i in range(50))


def _capped(weights, k):
    """Probabilities proportional to the weights, none above .98, sum k."""
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if np.clip(middle * weights, 1e-3, 0.98).sum() < k else (low, middle)
        )
    return np.clip(low * weights, 1e-3, 0.98)


def _log_ek(log_w, k):
    """Multiply out Π(1 + w x) in extended precision: log e_k without a sum of logarithms."""
    coefficients = np.zeros(k + 1, dtype=np.longdouble)
    coefficients[0] = 1
    for weight in np.exp(log_w.astype(np.longdouble)):
        coefficients[1:] += weight * coefficients[:-1].copy()
    return float(np.log(coefficients[k]))


@pytest.mark.parametrize("scheme", sorted(SAMPLERS))
def test_draws_depend_on_seed_and_index_alone(scheme):
    pi = np.full(12, 3 / 12)
    forward = make_sampler(scheme, pi, 3, seed=7)
    expected = [forward.draw(i) for i in range(40)]
    backward = make_sampler(scheme, pi, 3, seed=7)
    assert [backward.draw(i) for i in reversed(range(40))] == expected[::-1]
    resumed = make_sampler(scheme, pi, 3, seed=7)
    resumed.load_state_dict(forward.state_dict())
    assert resumed.draw(17) == expected[17]
    assert [make_sampler(scheme, pi, 3, seed=8).draw(i) for i in range(40)] != expected


@pytest.mark.parametrize("scheme", sorted(SAMPLERS))
def test_no_global_stream_is_read_or_advanced(scheme):
    np.random.seed(0)  # noqa: NPY002 - the global stream is the point here
    first = [make_sampler(scheme, np.full(8, 0.25), 2, 1).draw(i) for i in range(5)]
    after = np.random.random()  # noqa: NPY002
    np.random.seed(99)  # noqa: NPY002
    assert [make_sampler(scheme, np.full(8, 0.25), 2, 1).draw(i) for i in range(5)] == first
    np.random.seed(0)  # noqa: NPY002
    assert np.random.random() == after  # noqa: NPY002


def test_negative_seeds_have_schedules_of_their_own():
    pi = np.full(16, 2 / 16)
    schedules = {
        tuple(make_sampler("uniform", pi, 2, seed).draw(i) for i in range(20))
        for seed in range(-3, 4)
    }
    assert len(schedules) == 7


def test_uniform_equals_equal_weights_and_unequal_weights_become_systematic():
    equal = np.full(10, 3 / 10)
    uniform, weighted = (make_sampler(s, equal, 3, 4) for s in ("uniform", "systematic"))
    assert [uniform.draw(i) for i in range(50)] == [weighted.draw(i) for i in range(50)]
    assert make_sampler("uniform", SKEWED, 2, 4).scheme == "systematic"


def test_cyclic_visits_every_layer_once_before_any_layer_twice():
    for layers, k in [(32, 2), (7, 3), (5, 4)]:
        sampler = make_sampler("cyclic", np.full(layers, k / layers), k, seed=2)
        sequence = [layer for i in range(3 * layers) for layer in sampler.draw(i)]
        visits = np.zeros(layers, dtype=int)
        for i in range(3 * layers):
            visits[list(sampler.draw(i))] += 1
            assert visits.max() - visits.min() <= 1 + (layers % k != 0)
        assert len(sequence) == 3 * layers * k
        assert set(visits) == {3 * k}


def test_all_layers_active_is_every_layer_in_every_draw():
    for scheme in SAMPLERS:
        assert make_sampler(scheme, np.ones(5), 5, 0).draw(9) == (0, 1, 2, 3, 4)


def test_layers_that_a_schedule_never_visits_are_found():
    sampler = make_sampler("uniform", np.full(80, 2 / 80), 2, seed=0)
    missing = never_drawn(sampler, 40)
    drawn = {layer for i in range(40) for layer in sampler.draw(i)}
    assert set(missing) == set(range(80)) - drawn
    assert missing
    assert never_drawn(make_sampler("cyclic", np.full(80, 2 / 80), 2, 0), 40) == ()


@pytest.mark.parametrize("scheme", SAMPLERS)
def test_layers_with_probability_zero_are_never_drawn(scheme):
    pool = np.array([0.5, 0, 0.5, 0.5, 0, 0.5])
    sampler = make_sampler(scheme, pool, 2, seed=5)
    assert sampler.excluded() == (1, 4)
    drawn = {layer for index in range(500) for layer in sampler.draw(index)}
    assert drawn == {0, 2, 3, 5}
    assert never_drawn(sampler, 500) == ()
    np.testing.assert_array_equal(sampler.inclusion_probabilities, pool)
    # The others are drawn as they would be alone.
    alone = make_sampler(scheme, np.full(4, 0.5), 2, seed=5)
    kept = np.array([0, 2, 3, 5])
    for index in range(20):
        assert sampler.draw(index) == tuple(kept[list(alone.draw(index))])


def test_probabilities_of_one_and_zero_alone_are_a_fixed_choice():
    pi = check_probabilities([1.0, 0.0, 1.0, 0.0], 2)
    assert pi.tolist() == [1.0, 0.0, 1.0, 0.0]
    for scheme in SAMPLERS:
        sampler = make_sampler(scheme, pi, 2, 0)
        assert {sampler.draw(index) for index in range(20)} == {(0, 2)}
        assert sampler.excluded() == (1, 3)


@pytest.mark.parametrize(
    ("pi", "k", "numbers"),
    [
        ([0.5, 0.5, 0.5], 2, ("1.5", "2")),
        ([1.2, 0.4, 0.4], 2, ("layer 0", "1.2")),
        ([0.0, 1.0, 0.9], 2, ("1.9", "2")),
        ([float("nan"), 1.0, 1.0], 2, ("layer 0", "nan")),
        ([-0.5, 1.0, 0.5], 1, ("layer 0", "-0.5")),
        ([1.0, 1.0, 1e-9], 2, ("2 places", "1 layers")),
        ([[0.5, 0.5]], 1, ("(1, 2)",)),
        ([], 1, ("(0,)",)),
    ],
)
def test_infeasible_probabilities_are_refused_with_the_numbers(pi, k, numbers):
    with pytest.raises(ProbabilitiesError) as error:
        check_probabilities(pi, k)
    assert all(number in str(error.value) for number in numbers)


def test_counts_that_do_not_fit_are_refused_with_the_numbers():
    with pytest.raises(ConfigError, match="activated_layers is 9, but the model has 8 layers"):
        equal_probabilities(8, 9)
    with pytest.raises(ProbabilitiesError, match=r"3 inclusion probabilities .* 8 layers"):
        resolve([0.5, 0.5, 1.0], 8, 2)
    with pytest.raises(ProbabilitiesError, match=r"0\.1 to 0\.8.*balanced"):
        make_sampler("cyclic", SKEWED, 2, 0)


def test_a_schedule_of_other_settings_is_not_continued():
    state = make_sampler("uniform", np.full(8, 0.25), 2, seed=1).state_dict()
    with pytest.raises(ConfigError, match="seed = 1, this run has 2"):
        make_sampler("uniform", np.full(8, 0.25), 2, seed=2).load_state_dict(state)
    other = np.array([0.2, 0.3] + [0.25] * 6)
    with pytest.raises(ConfigError, match="scheme = 'uniform'"):
        make_sampler("systematic", other, 2, seed=1).load_state_dict(state)
    state["scheme"] = "systematic"
    with pytest.raises(ConfigError, match="other inclusion probabilities"):
        make_sampler("systematic", other, 2, seed=1).load_state_dict(state)


@st.composite
def feasible(draw):
    layers = draw(st.integers(1, 40))
    k = draw(st.integers(1, layers))
    weights = np.array(draw(st.lists(st.floats(0.05, 20), min_size=layers, max_size=layers)))
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(middle * weights, 1).sum() < k else (low, middle)
    return np.minimum(high * weights, 1.0), k


@settings(max_examples=60, deadline=None)
@given(feasible(), st.sampled_from(FIXED_SIZE), st.integers(0, 2**63), st.integers(0, 50))
def test_any_feasible_vector_gives_k_distinct_layers_with_the_certain_ones(case, scheme, seed, i):
    pi, k = case
    sampler = make_sampler(scheme, pi, k, seed)
    chosen = sampler.draw(i)
    assert len(chosen) == len(set(chosen)) == k
    assert set(np.flatnonzero(sampler.inclusion_probabilities == 1.0)) <= set(chosen)
    assert sampler.inclusion_probabilities.sum() == pytest.approx(k, abs=1e-9)
    np.testing.assert_allclose(sampler.inclusion_probabilities, pi, atol=1e-5)
