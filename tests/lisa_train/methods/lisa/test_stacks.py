"""Encoder and decoder drawn apart: numbers, exact π, controls, learning, states, refusals."""

import itertools
import json

import helpers_architectures as known
import numpy as np
import pytest
import torch
import transformers as hf

import lisa_analysis as la
import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError, ProbabilitiesError
from lisa_analysis.plans.stacks import places_of, seed_of_stack, shared
from lisa_train.estimate.patterns import DrawCosts
from lisa_train.methods.lisa.engine import Lisa
from lisa_train.methods.lisa.samplers import SAMPLERS
from lisa_train.methods.lisa.schedule import Schedule

# Two layers of an encoder, three of a decoder.
NAMES = [f"encoder.block.{i}" for i in range(2)] + [f"decoder.block.{i}" for i in range(3)]
STACKS = ["encoder.block"] * 2 + ["decoder.block"] * 3
ENCODER, DECODER = (0, 1), (2, 3, 4)
UNEQUAL = (0.3, 0.7, 0.9, 0.6, 0.5)  # one of the encoder, two of the decoder
DRAWS = 4_000
BUILT_IN = ("uniform", "bernoulli", "cyclic", "systematic", "conditional_poisson", "balanced")


def schedule(seed=0, probabilities=None, **settings):
    given = {"activated_layers": 3, "interval_steps": 1, "probabilities": probabilities}
    config = lt.LisaConfig(**given | settings)
    return Schedule(config, NAMES, probabilities, seed, stacks=STACKS)


def drawn(made, draws=DRAWS):
    """Which layers each draw takes, shape (draws, L)."""
    taken = np.zeros((draws, len(NAMES)), dtype=bool)
    for step in range(draws):
        taken[step, list(made.advance(step).layers)] = True
    return taken


def of_stacks(values):
    return np.array([values[..., list(ENCODER)].sum(-1), values[..., list(DECODER)].sum(-1)])


@pytest.mark.parametrize(
    ("total", "sizes", "given"),
    [(2, [6, 6], (1, 1)), (3, [6, 6], (2, 1)), (4, [32, 2], (3, 1)), (3, [2, 3], (1, 2)),
     (5, [1, 4], (1, 4)), (4, [1, 4], (1, 3)), (6, [2, 2, 8], (1, 1, 4))],
)  # fmt: skip
def test_layers_are_shared_in_proportion_with_one_of_each_stack(total, sizes, given):
    assert shared(total, sizes) == given


def test_shares_are_the_nearest_whole_numbers_to_the_proportion():
    """Of all ways to give at least one and at most all, none is nearer in squares."""
    for sizes in itertools.product(range(1, 6), repeat=2):
        for total in range(2, sum(sizes) + 1):
            part = np.array(sizes) * total / sum(sizes)
            ways = [
                way for way in itertools.product(*(range(1, size + 1) for size in sizes))
                if sum(way) == total
            ]  # fmt: skip
            best = min(((np.array(way) - part) ** 2).sum() for way in ways)
            own = ((np.array(shared(total, sizes)) - part) ** 2).sum()
            assert own == pytest.approx(best)


@pytest.mark.parametrize("scheme", BUILT_IN)
def test_every_scheme_draws_so_many_of_each_stack_and_meets_its_probabilities(scheme):
    unequal = scheme not in ("cyclic",)
    made = schedule(probabilities=UNEQUAL if unequal else None, sampling=scheme)
    pi = np.array(UNEQUAL) if unequal else np.array([1 / 2, 1 / 2, 2 / 3, 2 / 3, 2 / 3])
    np.testing.assert_allclose(made.inclusion_probabilities, pi, atol=1e-12)
    np.testing.assert_allclose(of_stacks(made.inclusion_probabilities), [1, 2], atol=1e-12)
    taken = drawn(made)
    if scheme != "bernoulli":
        assert (of_stacks(taken) == [[1], [2]]).all()
    error = np.sqrt(pi * (1 - pi) / DRAWS)
    assert (np.abs(taken.mean(0) - pi) < 4 * error).all()


def test_draws_of_two_stacks_are_independent_of_each_other():
    """Every pair of a set of the encoder and one of the decoder comes as often as their product."""
    taken = drawn(schedule(activated_layers=2))
    pairs = {(e, d): (taken[:, e] & taken[:, d]).mean() for e in ENCODER for d in DECODER}
    error = np.sqrt(1 / 6 * 5 / 6 / DRAWS)
    assert max(abs(share - 1 / 6) for share in pairs.values()) < 4 * error


def test_the_law_of_a_uniform_draw_by_enumeration_of_its_orders_and_offsets():
    """The systematic scheme in each stack, over all orders and offsets: π to rounding."""
    sampler = schedule(probabilities=UNEQUAL)._sampler
    found = np.zeros(len(NAMES))
    for layers, one in sampler._stacks:
        orders = list(itertools.permutations(range(len(layers))))
        for order in orders:
            edges = np.cumsum(one.inclusion_probabilities[list(order)])
            cuts = np.unique(np.concatenate([[0.0, 1.0], edges % 1.0]))
            for low, high in itertools.pairwise(cuts):
                one._rng = lambda index, o=order, u=(low + high) / 2: _Fixed(o, u)
                inside = one.draw(0)
                assert len(inside) == one.k
                found[layers[list(inside)]] += (high - low) / len(orders)
    np.testing.assert_allclose(found, UNEQUAL, atol=1e-12)


class _Fixed:
    def __init__(self, order, uniform):
        self.order, self.uniform = np.array(order), uniform

    def permutation(self, n):
        return self.order[:n]

    def random(self):
        return self.uniform


def test_together_draws_as_before_and_one_stack_knows_no_difference():
    config = lt.LisaConfig(2, 1, stacks="together")
    plain = Schedule(config, NAMES, None, 3)
    together = Schedule(config, NAMES, None, 3, stacks=STACKS)
    single = Schedule(lt.LisaConfig(2, 1), NAMES, None, 3, stacks=["layers"] * 5)
    draws = [[made.advance(step).layers for step in range(50)] for made in (plain, together)]
    assert draws[0] == draws[1] == [single.advance(step).layers for step in range(50)]
    assert len(single.stacks) == len(together.stacks) == 1
    assert single.state_dict()["sampler"]["scheme"] == "uniform"


@pytest.mark.parametrize("control", ["permuted", "reversed", "uniform"])
def test_controls_change_places_within_a_stack(control):
    made = schedule(probabilities=UNEQUAL, control=control, control_seed=4)
    pi = made.inclusion_probabilities
    np.testing.assert_allclose(of_stacks(pi), [1, 2], atol=1e-12)
    if control == "uniform":
        np.testing.assert_allclose(pi, [0.5, 0.5, 2 / 3, 2 / 3, 2 / 3])
    elif control == "reversed":
        np.testing.assert_allclose(pi, [0.7, 0.3, 0.5, 0.6, 0.9])
    else:
        for stack in (ENCODER, DECODER):
            assert sorted(pi[list(stack)]) == pytest.approx(sorted(UNEQUAL[i] for i in stack))
        order = made.control.entries(len(NAMES))["control_permutation"]
        np.testing.assert_allclose(pi, np.array(UNEQUAL)[order], atol=1e-12)
        assert {i in ENCODER for i in order[:2]} == {True}


@pytest.mark.parametrize("sampling", ["uniform", "balanced", "cyclic"])
def test_a_schedule_goes_on_where_it_was_saved(sampling):
    whole, first = schedule(5, sampling=sampling), schedule(5, sampling=sampling)
    expected = [whole.advance(step) for step in range(40)]
    for step in range(17):
        first.advance(step)
    state = json.loads(json.dumps(first.state_dict()))
    later = schedule(5, sampling=sampling)
    later.load_state_dict(state)
    assert [later.advance(step) for step in range(17, 40)] == expected[17:]


def test_states_of_other_stacks_are_refused_in_words():
    together = schedule(stacks="together")
    together.advance(0)
    old = together.state_dict()
    with pytest.raises(ConfigError, match="draws its stacks of layers together, this run apart"):
        schedule().load_state_dict(old)
    with pytest.raises(ConfigError, match="set to 'apart'"):
        together.load_state_dict(schedule().state_dict())


def learning(seed=0, **learn):
    return schedule(
        seed, sampling="balanced", learn=lt.LearnConfig(metric="probe", start_after=0, **learn)
    )


def test_learning_moves_probabilities_within_a_stack_alone():
    """The decoder's gradients are a thousand times the encoder's: its number stays the same."""
    made = learning(memory=0.5)
    rng = np.random.default_rng(0)
    truth = np.array([1.0, 3.0, 1e3, 1e3, 4e3])
    for step in range(60):
        draw = made.advance(step)
        np.testing.assert_allclose(of_stacks(np.array(draw.inclusion_probabilities)), [1, 2])
        assert tuple(of_stacks(np.isin(range(5), draw.layers))) == (1, 2)
        made.learn(step + 1, truth * np.exp(0.02 * rng.standard_normal(5)))
    pi = made.inclusion_probabilities
    assert pi[1] > 1.3 * pi[0]
    assert pi[4] > 1.1 * max(pi[2], pi[3])
    assert len(draw.scores) == 5


def test_a_schedule_that_learns_resumes_to_the_bit():
    rng = np.random.default_rng(1)
    seen = rng.lognormal(size=(30, 5))
    whole, first, later = learning(2), learning(2), learning(2)
    expected = []
    for step in range(30):
        expected.append(whole.advance(step))
        whole.learn(step + 1, seen[step])
    for step in range(13):
        first.advance(step)
        first.learn(step + 1, seen[step])
    later.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in range(13, 30):
        assert later.advance(step) == expected[step]
        later.learn(step + 1, seen[step])


def test_a_stack_of_which_all_layers_train_learns_nothing_and_a_broken_layer_has_its_number():
    made = schedule(activated_layers=3, sampling="balanced",
                    learn=lt.LearnConfig(metric="probe", start_after=0),
                    stacks="apart")  # fmt: skip
    made.advance(0)
    made.learn(1, np.array([1.0, 1.0, 1.0, np.inf, 1.0]))
    assert "layer 3 before step 1" in made.frozen
    config = lt.LisaConfig(3, 1, sampling="balanced", learn=lt.LearnConfig(metric="probe"))
    names, stacks = ["e.0", "d.0", "d.1", "d.2"], ["e", "d", "d", "d"]
    some = Schedule(config, names, None, 0, stacks=stacks)
    assert all(0 in some.advance(step).layers for step in range(5))
    with pytest.raises(ConfigError, match="nothing to learn"):
        Schedule(lt.LisaConfig(4, 1, sampling="balanced", learn=config.learn), names, None, 0,
                 stacks=stacks)  # fmt: skip


def test_a_pool_and_a_prior_are_shared_between_the_stacks():
    made = learning(strength="pool=4", prior=(1.0, 2.0, 1.0, 2.0, 3.0))
    pi = made.inclusion_probabilities
    np.testing.assert_allclose(of_stacks(pi), [1, 2])
    assert pi[0] < pi[1]
    assert pi[2] < pi[3] <= pi[4]
    with pytest.raises(ConfigError, match="fewer layers than there are stacks"):
        learning(strength="pool=1")
    with pytest.raises(ProbabilitiesError, match="has 3 numbers for a model of 5 layers"):
        learning(prior=(1.0, 2.0, 3.0))


def test_what_does_not_fit_the_stacks_is_refused_in_words():
    with pytest.raises(ConfigError, match=r"activated_layers is 1, but the model has 2 stacks"):
        schedule(activated_layers=1)
    with pytest.raises(ConfigError, match="activated_layers is 6, but the model has 5 layers"):
        schedule(activated_layers=6)
    uneven = (0.4, 0.8, 0.6, 0.6, 0.6)
    with pytest.raises(ProbabilitiesError, match=r"1\.2 in encoder\.block, 1\.8 in decoder"):
        schedule(probabilities=uneven)
    np.testing.assert_allclose(
        schedule(probabilities=uneven, stacks="together").inclusion_probabilities, uneven
    )
    assert schedule(probabilities=uneven, sampling="bernoulli").advance(0) is not None
    with pytest.raises(ConfigError, match=r"lisa\.stacks is 'apartt'"):
        lt.LisaConfig(stacks="apartt")


def test_a_stack_may_be_left_out_by_probabilities():
    for scheme in ("uniform", "balanced", "cyclic", "conditional_poisson"):
        made = schedule(probabilities=(0, 0, 1 / 3, 1 / 3, 1 / 3), sampling=scheme,
                        activated_layers=1)  # fmt: skip
        assert made.excluded == ENCODER
        taken = drawn(made, 200)
        assert (of_stacks(taken) == [[0], [1]]).all()


def test_seeds_of_stacks_differ_and_the_first_is_that_of_the_schedule():
    assert seed_of_stack(7, 0) == 7
    assert len({seed_of_stack(s, n) for s in range(-20, 20) for n in range(4)}) == 160
    assert places_of(["a", "b", "a"]) == ((0, 2), (1,))


def test_the_dearest_draw_has_so_many_of_each_stack():
    """Against all draws that the schedule can make."""
    rng = np.random.default_rng(3)
    for _ in range(200):
        active, passing = rng.integers(0, 100, 5), rng.integers(0, 30, 5)
        costs = DrawCosts(tuple(active), tuple(passing), {}, bool(rng.integers(2)))
        for numbers in itertools.product((0, 1, 2), (1, 2, 3)):
            places = [(ENCODER, numbers[0]), (DECODER, numbers[1])]
            every = [
                (*a, *b) for a in itertools.combinations(ENCODER, numbers[0])
                for b in itertools.combinations(DECODER, numbers[1])
            ]  # fmt: skip
            worst = costs.worst(places, ())
            assert worst in every
            assert costs.of(worst, ()) == max(costs.of(draw, ()) for draw in every)


# ---------------------------------------------------------------- in the engine, on models


def t5():
    return hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=3,
                    num_heads=2, decoder_start_token_id=0, dropout_rate=0.0)
    )  # fmt: skip


def inputs(model):
    torch.manual_seed(1)
    tokens = torch.randint(3, 60, (2, 8))
    if model.config.model_type == "whisper":
        sound = torch.randn(2, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        return {"input_features": sound, "labels": tokens}
    return {"input_ids": tokens, "labels": tokens}


def fresh(build):
    torch.manual_seed(0)
    model = build()
    for name in ("dropout", "attention_dropout", "activation_dropout"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    return model.eval(), torch.optim.AdamW(model.parameters(), 1e-2)


def steps(model, optimizer, engine, numbers):
    for step in numbers:
        engine.begin_step(step)
        model(**inputs(model)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("build", [t5, known.whisper])
@pytest.mark.parametrize("by", ["layer", "module"])
def test_models_train_so_many_of_each_stack_and_resume_to_the_bit(build, by, caplog):
    config = lt.LisaConfig(activated_layers=2, interval_steps=2, by=by, optimizer_state="keep")
    draws = []
    model, optimizer = fresh(build)
    with Lisa(model, optimizer, config, on_draw=draws.append) as engine:
        steps(model, optimizer, engine, range(12))
        entry = engine.run_entries()["lisa"]
        names = engine.layer_map.stacks
    assert "2 stacks of layers are drawn apart" in caplog.text
    places = places_of(names)
    if by == "layer":
        assert entry["activated_of_stack"] == dict.fromkeys(dict.fromkeys(names), 1)
        assert all([sum(i in p for i in d.layers) for p in places] == [1, 1] for d in draws)
    else:
        sizes, layers = np.array(entry["unit_sizes"]), np.array(entry["unit_layers"])
        for place in places:
            inside = np.isin(layers, place)
            budget, largest = 0.4 * sizes[inside].sum(), sizes[inside].max()
            pi = np.array(draws[0].inclusion_probabilities)
            assert (pi * sizes)[inside].sum() == pytest.approx(budget)
            for draw in draws:
                size = sizes[[u for u in draw.units if inside[u]]].sum()
                assert abs(size - budget) < largest
    other, again = fresh(build)
    with Lisa(other, again, config) as engine:
        steps(other, again, engine, range(5))
        saved = [json.loads(json.dumps(engine.state_dict())), other.state_dict(),
                 again.state_dict()]  # fmt: skip
    last, third = fresh(build)
    last.load_state_dict(saved[1])
    third.load_state_dict(saved[2])
    with Lisa(last, third, config) as engine:
        engine.load_state_dict(saved[0])
        steps(last, third, engine, range(5, 12))
    for name, tensor in last.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("build", [t5, known.whisper])
def test_the_estimate_takes_the_dearest_draw_of_each_stack(build):
    found = lt.estimate_memory(build(), method="lisa", lisa=lt.LisaConfig(3), sequence_length=8,
                               batch_size=1)  # fmt: skip
    assert [sum(i in place for i in found.active_layers) for place in (ENCODER, DECODER)] == [1, 2]


def test_a_file_of_two_stacks_is_taken_and_one_that_does_not_fit_is_refused(tmp_path):
    scores = (1.0, 3.0, 100.0, 200.0, 500.0)
    names = [f"encoder.block.{i}" for i in range(2)] + [f"decoder.block.{i}" for i in range(3)]
    made = la.sampling_probabilities(
        la.ImportanceProfile.from_scores(scores, names), 3, use_intervals=False
    )
    path = made.save(tmp_path / "probabilities.json")
    model, optimizer = fresh(t5)
    with Lisa(model, optimizer, lt.LisaConfig(3, probabilities=str(path))) as engine:
        pi = engine.inclusion_probabilities
        np.testing.assert_allclose(pi, made.inclusion_probabilities)
        np.testing.assert_allclose(of_stacks(pi), [1, 2])
    record = json.loads(path.read_text())
    record["inclusion_probabilities"] = [0.1, 0.3, 0.8, 0.9, 0.9]  # as from one stack
    path.write_text(json.dumps(record))
    with pytest.raises(ProbabilitiesError, match=r"sum to 0\.4 in encoder\.block, 2\.6 in dec"):
        Lisa(model, optimizer, lt.LisaConfig(3, probabilities=str(path)))
    together = lt.LisaConfig(3, probabilities=str(path), stacks="together")
    with Lisa(model, optimizer, together) as engine:
        assert "activated_of_stack" not in engine.run_entries()["lisa"]


def test_all_built_in_schemes_were_tried():
    assert set(BUILT_IN) <= set(SAMPLERS)
