"""What is learned from numbers alone: flat without signal, right with it, exact in its draws."""

import copy
import gc
import json
import pickle
import tracemalloc

import numpy as np
import pytest
from helpers_learning import LAYERS, effective, planted, sampler, shown, simulate

from lisa_analysis.contract.errors import ConfigError
from lisa_analysis.plans.sampling import sampling_probabilities
from lisa_analysis.plans.stages import probabilities_from_scores
from lisa_analysis.profiles.profile import ImportanceProfile
from lisa_train.methods.lisa.control import Control
from lisa_train.methods.lisa.learning import learners
from lisa_train.methods.lisa.learning.config import LearnConfig, LearnMetric
from lisa_train.methods.lisa.learning.learners import LEARNERS, Learner, Scores, register
from lisa_train.methods.lisa.learning.sampler import LearnedSampler
from lisa_train.methods.lisa.samplers import make_sampler

METRICS = LearnMetric.__args__
EQUAL = np.ones(LAYERS)


def flatness(learner, metric, k, seed):
    learned = sampler(k, seed, learner=learner, metric=metric)
    course = simulate(learned, lambda t: EQUAL, 1000, metric=metric, seed=100 + seed)
    assert course.discrepancy < 2
    number = [effective(pi) / LAYERS for pi in (course.pi[-1], course.pi.mean(axis=0))]
    return *number, min(effective(pi) for pi in course.pi) / LAYERS


@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize("learner", ["ema", "kl"])
def test_equal_layers_stay_equal(learner, k):
    """Steps of `signal` are noisier than what they measure: the worst case."""
    assert min(flatness(learner, "signal", k, seed=0)) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("learner", ["ema", "kl"])
def test_equal_layers_stay_equal_with_every_metric_and_seed(learner, metric, k):
    """After 1,000 draws and in the mean over them; in no single one far below that."""
    found = np.array([flatness(learner, metric, k, seed) for seed in range(20)])
    print(
        f"{learner} {metric} k={k}: least N_eff/L of 20 seeds: after 1,000 draws "
        f"{found[:, 0].min():.4f}, of any draw {found[:, 2].min():.4f}"
    )
    assert found[:, :2].min() > 0.95
    assert found[:, 2].min() > 0.9


@pytest.mark.parametrize("learner", ["ema", "kl"])
def test_what_is_kept_does_not_grow_with_the_draws(learner):
    learned = sampler(2, learner=learner)
    truth = planted(5)
    simulate(learned, lambda t: truth, 40)
    sizes, held = [], []
    package = [tracemalloc.Filter(True, f"*/{name}/*") for name in ("lisa_train", "lisa_analysis")]
    tracemalloc.start()
    for start, rounds in ((40, 20), (60, 40), (100, 80)):
        simulate(learned, lambda t: truth, rounds, start=start)
        gc.collect()
        # What other threads of the tests and libraries' caches hold is not the learner's.
        ours = tracemalloc.take_snapshot().filter_traces(package)
        held.append(sum(trace.size for trace in ours.traces))
        sizes.append(len(pickle.dumps(learned.state_dict())))
    tracemalloc.stop()
    assert max(sizes) - min(sizes) < 100
    assert held[2] - held[1] < 512


def test_plainly_standardised_scores_would_run_away(monkeypatch):
    """What the reliability is for: without it the same learner gives equal layers away."""
    monkeypatch.setattr(learners.KullbackLeibler, "_CAUTION", 0.0)
    learned = sampler(2, learner="kl", cap=16.0, mix=0.0, floor=0.01)
    course = simulate(learned, lambda t: EQUAL, 400)
    assert effective(course.pi[-1]) < 0.75 * LAYERS


@pytest.mark.parametrize(("k", "seeds"), [(1, 1), (2, 3), (8, 8)])
def test_a_layer_of_twice_the_gradient_reaches_its_probability(k, seeds):
    """Within eight covers; its π is that of scores known exactly."""
    truth, cover = planted(5), LAYERS // k
    goal, reached = probabilities_from_scores(truth, k=k).pi, []
    for seed in range(seeds):
        course = simulate(sampler(k, seed), lambda t: truth, 16 * cover, seed=seed)
        reached.append(course.pi[8 * cover :, 5].mean())
        assert course.pi[8 * cover - 1, 5] > 1.3 * k / LAYERS
        others = np.delete(course.pi[8 * cover :], 5, axis=1)
        assert others.mean() < 1.02 * np.delete(goal, 5).mean()
        assert course.discrepancy < 2
    assert abs(np.mean(reached) - goal[5]) < 0.15 * goal[5]


@pytest.mark.parametrize("learner", ["ema", "kl"])
def test_scores_become_probabilities_as_those_of_a_file_do(learner):
    """One engine: a profile of the scores and their errors gives the same π as the learner."""
    learned = sampler(2, learner=learner)
    truth = np.exp(0.4 * np.random.default_rng(7).standard_normal(LAYERS))
    simulate(learned, lambda t: truth, 320)
    found = copy.deepcopy(learned._learner).scores(learned._evidence.belief())
    bounds = {} if learner == "kl" else {"low": found.low, "high": found.high}
    profile = ImportanceProfile.from_scores(found.score, **bounds, confidence=0.6826894921370859)
    file = sampling_probabilities(profile, 2, use_intervals=bool(bounds))
    assert not file.undecided
    assert np.ptp(file.inclusion_probabilities) > 0.05
    np.testing.assert_allclose(learned.probabilities(320), file.inclusion_probabilities, rtol=1e-9)


def test_kl_gives_it_what_its_distribution_says():
    """At rest p is q·exp(z): a single layer among many stands √L standard deviations out."""
    course = simulate(sampler(2, learner="kl"), lambda t: planted(5), 24 * 16)
    assert course.pi[-1, 5] > 3 * 2 / LAYERS


@pytest.mark.parametrize("learner", ["ema", "kl"])
@pytest.mark.parametrize("k", [1, 2, 8])
def test_a_switch_of_the_planted_layer_is_followed_within_eight_covers(k, learner):
    cover = LAYERS // k
    turn = 12 * cover

    def truth(t):
        return planted(5) if t < turn else planted(20)

    course = simulate(sampler(k, learner=learner), truth, turn + 8 * cover)
    share = course.pi * LAYERS / k
    assert share[turn - cover : turn, 5].mean() > 1.3
    assert share[-1, 20] > 1.25
    assert share[-1, 20] == share[-1].max()
    assert share[-1, 5] < 1.1


@pytest.mark.parametrize("strength", ["pool=4", "pool"])
def test_a_pool_is_drawn_alone_and_lets_layers_come_back(strength):
    """With measuring passes, which see what is not drawn."""
    pools = [1, 5, 9, 20], [2, 6, 9, 21]

    def truth(t):
        values = np.ones(LAYERS)
        values[pools[t >= 120]] = 3.0
        return values

    learned = sampler(2, strength=strength, metric="probe")
    course = simulate(learned, truth, 300, metric="probe")
    for turn, best in ((119, pools[0]), (299, pools[1])):
        assert set(np.flatnonzero(course.pi[turn])) == set(best)
        np.testing.assert_allclose(course.pi[turn, best], 0.5, rtol=1e-9)
    np.testing.assert_allclose(course.pi.sum(axis=1), 2, atol=1e-9)
    assert course.drawn.sum(axis=1).tolist() == [2] * 300
    assert not course.drawn[course.pi == 0].any()
    assert course.discrepancy < 2
    change = np.diff(course.pi, axis=0)
    room = np.where(change > 0, course.pi[:-1], course.pi[:-1] / 2)
    # What leaves the pool at the end of its way is let go of at once, to those that enter.
    allowed = np.maximum(room, 2 / LAYERS / 16) + 2 / LAYERS
    assert (np.abs(change) <= allowed).all()


def test_a_pool_of_too_few_keeps_what_is_in_force():
    learned = sampler(4, strength="pool", metric="probe")
    for t in range(40):
        learned.draw(t)
        learned.learn(t + 1, planted(5, 3.0))
        np.testing.assert_allclose(learned.probabilities(t), 4 / LAYERS)
    assert learned.scores(39) is not None
    with pytest.raises(ConfigError, match="a pool of fewer layers than the 4"):
        sampler(4, strength="pool=3", metric="probe")


def test_a_prior_of_a_pool_is_refused_where_nothing_lifts_its_zeros():
    """Its layers outside have no logarithm, and so no way back; nothing was ever learned."""
    pool = np.repeat([0.0, 0.5], 4)
    with pytest.raises(ConfigError, match=r"probabilities of 0 \(layer 6\), as a pool has them"):
        LearnedSampler(
            pool, 2, 0, LearnConfig(metric="probe", strength="pool=4"), Control(), first=6
        )
    learned = LearnedSampler(pool, 2, 0, LearnConfig(metric="probe", strength=3.0), Control())
    assert learned.probabilities(0).min() > 0


def test_every_draw_keeps_sum_and_bounds():
    rng = np.random.default_rng(0)
    for strength, floor, cap in ((1.0, 0.25, 4.0), (4.0, 0.25, 4.0), (0.5, 0.5, 2.0), (0.0, 1, 1)):
        learned = sampler(3, strength=strength, floor=floor, cap=cap)
        truth = np.exp(rng.standard_normal(LAYERS))
        course = simulate(learned, lambda t, truth=truth: truth, 300)
        above, uniform = max(1.0, strength), 3 / LAYERS
        np.testing.assert_allclose(course.pi.sum(axis=1), 3, atol=1e-9)
        assert course.pi.min() >= floor / above * uniform - 1e-12
        assert course.pi.max() <= min(1.0, cap * above * uniform) + 1e-12
        assert course.drawn.sum(axis=1).tolist() == [3] * 300
        assert course.discrepancy < 2
        spread = np.ptp(course.pi[-1])
        assert spread > 0.02 if strength else spread < 1e-12


def test_visits_follow_any_moving_probabilities():
    """π that wander over their whole range, a layer that becomes certain and rests again."""
    balanced = make_sampler("balanced", np.full(LAYERS, 0.25), 8, 3)
    rng = np.random.default_rng(1)
    logs, missing = np.zeros(LAYERS), np.zeros(LAYERS)
    for t in range(1200):
        logs = 0.99 * logs + 0.2 * rng.standard_normal(LAYERS)
        pi = probabilities_from_scores(np.exp(logs), k=8, strength=3.0).pi
        assert np.isclose(pi.max(), 1.0) or t < 500 or pi.max() < 1
        drawn = balanced.follow(pi, t)
        missing += pi
        missing[drawn] -= 1
        assert np.abs(missing).max() < 2, t


def test_no_layer_changes_more_than_twofold_in_a_draw():
    rng = np.random.default_rng(2)
    truth = np.exp(2 * rng.standard_normal(LAYERS))
    course = simulate(sampler(2, strength=4.0, start_after=4), lambda t: truth, 200)
    ratios = course.pi[1:] / course.pi[:-1]
    assert ratios.max() <= 2 + 1e-9
    assert ratios.min() >= 0.5 - 1e-9
    assert ratios.max() > 1.5


def test_before_the_first_cover_the_draws_are_those_of_balanced_to_the_bit():
    plain = make_sampler("balanced", np.full(LAYERS, 3 / LAYERS), 3, 7)
    learned = sampler(3, seed=7)
    cover = -(-LAYERS // 3)
    course = simulate(learned, lambda t: planted(0, 9.0), cover + 40)
    for t in range(cover):
        assert tuple(np.flatnonzero(course.drawn[t])) == plain.draw(t)
        assert course.scores[t] is None
    later = [
        tuple(np.flatnonzero(course.drawn[t])) != plain.draw(t) for t in range(cover, cover + 40)
    ]
    assert any(later)
    assert course.scores[-1] is not None


def test_doubt_grows_while_a_layer_is_unseen():
    """By `memory`² of a visit's noise with every cover, beside what its visits have left."""
    learned = sampler(2, memory=0.3)
    simulate(learned, lambda t: planted(5), 200)
    evidence = learned._evidence
    before, age = evidence.belief().error, evidence._age.copy()
    for t in range(64):  # four covers
        learned.learn(200 + t, np.full(LAYERS, np.nan))
    after = evidence.belief().error
    left = (1 - 0.3) ** 2 / (1 - (1 - 0.3) ** 2) * 0.3**2 + 0.3**2  # Σ of the squared weights
    np.testing.assert_allclose(evidence._weights, left, rtol=0.02)
    doubt = [evidence._weights + 0.3**2 * (age + waited) / 16 for waited in (0, 64)]
    np.testing.assert_allclose((after / before) ** 2, doubt[1] / doubt[0], rtol=1e-9)
    assert (after > 1.5 * before).all()


def test_memory_is_the_weight_of_a_new_visit():
    """After many visits a jump of a layer is taken up by the geometric rule."""
    for memory in (0.2, 0.6):
        learned = sampler(LAYERS - 1, memory=memory)  # nearly all are seen: the course is known
        evidence = learned._evidence
        for _ in range(40):
            evidence.add(np.ones(LAYERS))
        jumped = planted(3, np.e)
        for visit in range(1, 6):
            evidence.add(jumped)
            expected = (1 - (1 - memory) ** visit) * (1 - 1 / LAYERS)
            assert evidence.belief().log_score[3] == pytest.approx(expected, rel=1e-9)


def test_a_course_that_all_layers_share_is_no_score():
    """Whoever was seen last, when gradients were smaller, is not worth less for it."""
    for k in (1, 2, 8):
        evidence = sampler(k)._evidence
        for t in range(20 * LAYERS // k):
            values = np.full(LAYERS, np.nan)
            chosen = [(t * k + j) % LAYERS for j in range(k)]
            values[chosen] = np.exp(-0.2 * t * k / LAYERS)  # a fifth less with every cover
            evidence.add(values)
        # Seen in a fixed order, the last differ from the first by a whole cover's course, 0.2.
        assert np.ptp(evidence.belief().log_score) < 0.06, k


def test_the_prior_rules_until_layers_are_seen():
    prior = probabilities_from_scores(np.linspace(1, 2, LAYERS), k=2).pi
    learned = sampler(2, prior=prior, start_after=0)
    np.testing.assert_allclose(learned.probabilities(0), prior, atol=1e-12)
    np.testing.assert_allclose(learned.inclusion_probabilities, prior, atol=1e-12)
    learned.draw(0)
    np.testing.assert_allclose(learned.probabilities(0), prior, atol=1e-12)
    assert np.isnan(learned.scores(0)).all()
    # Evidence goes against it.
    course = simulate(learned, lambda t: np.linspace(2, 1, LAYERS), 400, start=1)
    rank = np.corrcoef(course.pi[-1], np.linspace(2, 1, LAYERS))[0, 1]
    assert rank > 0.8


def test_a_number_that_is_not_finite_freezes_what_was_learned():
    learned = sampler(2)
    simulate(learned, lambda t: planted(5), 100)
    # What is in force may still be on its way, one factor of two at a time.
    draw = learned.draw(100)
    held = learned.probabilities(100)
    values = np.full(LAYERS, np.nan)
    values[draw[0]] = np.inf
    learned.learn(2020, values)
    assert f"not finite in layer {draw[0]} before step 2020" in learned.frozen
    course = simulate(learned, lambda t: planted(9, 50.0), 100, start=101)
    np.testing.assert_array_equal(course.pi, np.tile(held, (100, 1)))
    assert course.discrepancy < 3


@pytest.mark.parametrize("learner", ["ema", "kl"])
def test_saved_and_loaded_it_goes_on_to_the_bit(learner):
    whole = sampler(2, learner=learner)
    course = simulate(whole, lambda t: planted(5), 150, seed=4)
    first = sampler(2, learner=learner)
    rng_values = []
    rng = np.random.default_rng(4)
    for t in range(150):
        values = np.full(LAYERS, np.nan)
        for i in whole_draw(course, t):
            values[i] = shown("grad_rms", planted(5)[i], (1 + t / 50) ** -0.5, rng)
        rng_values.append(values)
    for t in range(70):
        first.draw(t)
        first.learn(t + 1, rng_values[t])
    saved = json.loads(json.dumps(first.state_dict(), allow_nan=False))
    again = sampler(2, learner=learner)
    again.load_state_dict(saved)
    np.testing.assert_array_equal(again.probabilities(69), course.pi[69])
    for t in range(70, 150):
        assert again.draw(t) == whole_draw(course, t)
        np.testing.assert_array_equal(again.probabilities(t), course.pi[t])
        again.learn(t + 1, rng_values[t])
    assert again.state_dict() == whole.state_dict()


def whole_draw(course, t):
    return tuple(np.flatnonzero(course.drawn[t]).tolist())


def test_asking_changes_nothing():
    learned = sampler(2, learner="kl")
    simulate(learned, lambda t: planted(5), 60)
    before = copy.deepcopy(learned.state_dict())
    promised = learned.probabilities(60)
    assert learned.state_dict() == before
    learned.draw(60)
    np.testing.assert_array_equal(learned.probabilities(60), promised)


def test_other_settings_and_earlier_draws_are_not_continued():
    learned = sampler(2, memory=0.5)
    simulate(learned, lambda t: EQUAL, 10)
    with pytest.raises(ConfigError, match="draw 3 of a schedule that learns is gone"):
        learned.draw(3)
    with pytest.raises(ConfigError, match=r"other settings of lisa\.learn"):
        sampler(2, memory=0.4).load_state_dict(learned.state_dict())
    plain = make_sampler("balanced", np.full(LAYERS, 2 / LAYERS), 2, 0)
    with pytest.raises(ConfigError, match=r"other settings of lisa\.learn, or none"):
        sampler(2).load_state_dict(plain.state_dict())


def test_no_random_stream_of_a_program_is_touched():
    import random

    import torch

    state = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()  # noqa: NPY002
    simulate(sampler(2), lambda t: planted(5), 60)
    assert (np.random.get_state()[1] == state[0]).all()  # noqa: NPY002
    assert random.getstate() == state[1]
    assert torch.equal(torch.get_rng_state(), state[2])


# ---------------------------------------------------------------------- controls, own learners


def test_controls_give_the_same_probabilities_to_other_layers():
    truth = np.linspace(1, 2, LAYERS)
    settled = {
        kind: simulate(sampler(2, control=Control(kind, seed=11)), lambda t: truth, 320)
        .pi[-100:]
        .mean(axis=0)
        for kind in ("none", "permuted", "reversed", "uniform")
    }
    assert np.corrcoef(settled["none"], truth)[0, 1] > 0.95
    order = Control("permuted", 11).entries(LAYERS)["control_permutation"]
    assert sorted(order) == list(range(LAYERS))
    assert np.corrcoef(settled["permuted"], truth[order])[0, 1] > 0.95
    assert abs(np.corrcoef(settled["permuted"], truth)[0, 1]) < 0.5
    assert np.corrcoef(settled["reversed"], truth)[0, 1] < -0.95
    np.testing.assert_allclose(settled["uniform"], 2 / LAYERS)
    np.testing.assert_allclose(np.sort(settled["permuted"]), np.sort(settled["none"]), rtol=0.1)


def test_a_learner_from_outside_is_one_class():
    @register
    class Rank(Learner):
        name = "rank"

        def scores(self, belief):
            score = 1.0 + np.argsort(np.argsort(belief.log_score)) / self.layers
            return Scores(score, score, score)

    try:
        assert LearnConfig(learner="rank").learner == "rank"
        course = simulate(sampler(2, learner="rank"), lambda t: planted(5, 3.0), 200)
        assert course.pi[-1].argmax() == 5
        register(Rank)  # the cell of a notebook, run again
    finally:
        del LEARNERS["rank"]
    with pytest.raises(ConfigError, match="'rank', but must be one of ema, kl"):
        LearnConfig(learner="rank")
    with pytest.raises(ConfigError, match="learner 'ema' is built in"):
        register(type("Mine", (Rank,), {"name": "ema"}))
