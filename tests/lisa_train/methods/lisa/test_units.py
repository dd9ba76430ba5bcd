"""Parts of layers that take turns: what they are, exact draws within a budget, training by them."""

import copy
import itertools
import json
import re

import helpers_architectures as known
import numpy as np
import pytest
import torch
from helpers_learning import simulate
from helpers_recording import arguments, examples, llama
from transformers import Trainer

import lisa_analysis as la
import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError, ProbabilitiesError
from lisa_analysis.plans.budget import allocate
from lisa_analysis.plans.sampling import SamplingProbabilities
from lisa_analysis.plans.stages import probabilities_from_scores
from lisa_analysis.rundir.parts import part_draws, parts_of
from lisa_analysis.runs.schedule import probability_grid
from lisa_train.methods.lisa.control import Control
from lisa_train.methods.lisa.engine import Lisa
from lisa_train.methods.lisa.learning.config import LearnConfig
from lisa_train.methods.lisa.learning.sampler import LearnedSampler
from lisa_train.methods.lisa.samplers import SAMPLERS, PureSampler, make_sampler, register
from lisa_train.methods.lisa.samplers.within_budget import exchange
from lisa_train.methods.lisa.units import Units
from lisa_train.model.layer_map import find_layers
from lisa_train.model.master_copies import exact

SIZES = np.array([4, 1, 1, 4, 6, 6, 6] * 4, dtype=np.float64)
WEIGHTS = SIZES / SIZES.mean()
SHARE = 0.2
K = SHARE * SIZES.size


def unequal():
    return allocate(np.exp(np.random.default_rng(0).standard_normal(28)), K, 0.02, 1.0, WEIGHTS)


# ---------------------------------------------------------------------- what the parts are


@pytest.mark.parametrize("by", ["half", "module"])
@pytest.mark.parametrize("family", sorted(known.ARCHITECTURES))
def test_every_tensor_of_the_layers_is_in_exactly_one_part(family, by):
    model = known.build(family)
    layers = find_layers(model)
    units = Units.of(model, layers, by)
    inside = [name for names in layers.layers for name in names]
    assert sorted(name for names in units.tensors for name in names) == sorted(inside)
    assert len(set(units.names)) == len(units)
    assert list(units.layers) == sorted(units.layers)
    assert set(units.layers) == set(range(len(layers)))
    for layer, names in zip(units.layers, units.tensors, strict=True):
        assert set(names) <= set(layers.layers[layer])
    assert units.sizes == tuple(sum(layers.sizes[n] for n in t) for t in units.tensors)
    assert units.weights.mean() == pytest.approx(1.0)
    if by == "half":
        assert all(n <= 2 for n in np.bincount(units.layers))
    else:  # a matrix, or the matrices of nobody else
        parameters = dict(model.named_parameters())
        for names in units.tensors:
            assert sum(parameters[n].dim() > 1 for n in names) == 1


def test_llama_is_parted_as_one_would(make_llama):
    model = make_llama(layers=1)
    layers = find_layers(model)
    modules = Units.of(model, layers, "module")
    inside = [name.removeprefix("model.layers.0.") for name in modules.names]
    assert inside == [
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    ]  # fmt: skip
    halves = Units.of(model, layers, "half")
    assert halves.names == ("model.layers.0.attention", "model.layers.0.mlp")
    assert all("self_attn" in name for name in halves.tensors[0])
    assert {n.split(".")[3] for n in halves.tensors[1]} == {
        "mlp", "input_layernorm", "post_attention_layernorm",
    }  # fmt: skip
    measured = halves.measured(halves.parameters(model, layers))
    assert all(p.dim() == 2 for i in range(2) for p in measured[i])
    assert len(measured[1]) == 3
    model.model.layers[0].mlp.requires_grad_(False)
    assert len(Units.of(model, layers, "module")) == 4


# ---------------------------------------------------------------------- draws within a budget


def by_enumeration(pi, sizes):
    """Probability of every set, over all orders, ends of each exchange and the last coin."""
    found = {}

    def go(order, at, held, left, taken, chance):
        if at == len(order):
            for value, p in ((1, left), (0, 1 - left)):
                if p > 1e-15:
                    whole = frozenset(taken | ({held} if value else set()))
                    found[whole] = found.get(whole, 0.0) + chance * p
            return
        other = order[at]
        rise, up, down = exchange(left, sizes[held], pi[other], sizes[other])
        for (mine, its), p in ((up, rise), (down, 1 - rise)):
            if p <= 0:
                continue
            if mine in (0.0, 1.0):
                more = {held} if mine == 1.0 else set()
                go(order, at + 1, other, its, taken | more, chance * p)
            else:
                go(
                    order,
                    at + 1,
                    held,
                    mine,
                    taken | ({other} if its == 1.0 else set()),
                    chance * p,
                )

    orders = list(itertools.permutations(range(len(pi))))
    for order in orders:
        go(order, 1, order[0], pi[order[0]], set(), 1 / len(orders))
    return found


@pytest.mark.parametrize(
    ("pi", "sizes"),
    [
        ([0.5, 0.5, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0]),
        ([0.2, 0.4, 0.3, 0.7], [4.0, 1.0, 2.5, 3.0]),
        ([0.05, 0.9, 0.5, 0.35, 0.6], [1.0, 7.0, 2.0, 2.0, 5.0]),
    ],
)
def test_inclusion_and_budget_are_exact_by_brute_force(pi, sizes):
    sets = by_enumeration(pi, sizes)
    assert sum(sets.values()) == pytest.approx(1.0, abs=1e-12)
    inclusion = [sum(p for s, p in sets.items() if i in s) for i in range(len(pi))]
    np.testing.assert_allclose(inclusion, pi, atol=1e-12)
    budget = float(np.dot(pi, sizes))
    for chosen in sets:
        assert abs(sum(sizes[i] for i in chosen) - budget) < max(sizes)
    if len(set(sizes)) == 1:  # the pivotal method: of one number
        assert {len(chosen) for chosen in sets} == {2}
    # The sampler makes these draws and no others, as often.
    weights = np.array(sizes) / np.mean(sizes)
    sampler = make_sampler("uniform", pi, float(weights @ pi), 5, weights)
    draws = 4000
    counts = {}
    for t in range(draws):
        drawn = frozenset(sampler.draw(t))
        counts[drawn] = counts.get(drawn, 0) + 1
    assert set(counts) <= set(sets)
    for chosen, p in sets.items():
        assert abs(counts.get(chosen, 0) / draws - p) < 4.5 * (p * (1 - p) / draws) ** 0.5 + 1e-9


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("sampling", ["uniform", "bernoulli", "balanced"])
def test_draws_meet_their_probabilities_and_their_budget(sampling, equal):
    pi = np.full(28, SHARE) if equal else unequal()
    sampler = make_sampler(sampling, pi, K, 3, WEIGHTS)
    draws, largest = 3000, WEIGHTS.max()
    taken = np.zeros((draws, 28))
    for t in range(draws):
        taken[t, list(sampler.draw(t))] = 1
    error = np.sqrt(pi * (1 - pi) / draws)
    assert (np.abs(taken.mean(axis=0) - pi) < 4 * error).all()
    missed = taken @ WEIGHTS - K
    if sampling == "bernoulli":
        assert np.abs(missed).max() > largest
    else:
        assert np.abs(missed).max() < largest
    assert abs(missed.mean()) < 4 * missed.std() / draws**0.5 + 1e-12
    if sampling == "balanced":
        assert np.abs(np.cumsum(taken - pi, axis=0)).max() < 2
    assert sampler.draw(7) == make_sampler(sampling, pi, K, 3, WEIGHTS).draw(7)


def test_every_single_balanced_draw_meets_unequal_probabilities():
    """Over schedules, not over the draws of one."""
    sizes = np.array([1.0, 3.0, 2.0, 5.0, 2.0])
    weights = sizes / sizes.mean()
    pi = np.array([0.7, 0.2, 0.4, 0.3, 0.55])
    taken = np.zeros((2, 5))
    seeds = 300
    for seed in range(seeds):
        sampler = make_sampler("balanced", pi, float(weights @ pi), seed, weights)
        for row, index in enumerate((0, 3)):
            taken[row, list(sampler.draw(index))] += 1
    error = np.sqrt(pi * (1 - pi) / seeds)
    assert (np.abs(taken / seeds - pi) < 4 * error).all()


def test_shares_of_a_budget_are_in_proportion_and_cost_it():
    rng = np.random.default_rng(1)
    for _ in range(40):
        n = int(rng.integers(2, 12))
        weights, costs = np.exp(rng.standard_normal(n)), np.exp(rng.standard_normal(n))
        lower, upper = 0.05, 0.8
        total = float(rng.uniform(1.2 * lower, 0.9 * upper) * costs.sum())
        shares = allocate(weights, total, lower, upper, costs)
        low, high = 0.0, 1e6  # by bisection
        for _ in range(200):
            middle = (low + high) / 2
            if costs @ np.clip(middle * weights, lower, upper) < total:
                low = middle
            else:
                high = middle
        np.testing.assert_allclose(shares, np.clip(high * weights, lower, upper), rtol=1e-9)


def test_stages_keep_budget_order_bounds_and_prior():
    scores = np.exp(np.random.default_rng(2).standard_normal(28))
    for strength in (0.0, 1.0, 4.0):
        pi = probabilities_from_scores(scores, k=K, strength=strength, costs=WEIGHTS).pi
        assert float(WEIGHTS @ pi) == pytest.approx(K, rel=1e-12)
        assert (np.diff(pi[np.argsort(scores)]) >= -1e-12).all()
        above = max(1.0, strength)
        assert pi.min() >= 0.25 / above * SHARE - 1e-12
        assert pi.max() <= min(1.0, 4 * above * SHARE) + 1e-12
    scores[3] = np.nan
    pi = probabilities_from_scores(scores, k=K, costs=WEIGHTS).pi
    assert pi[3] == pytest.approx(SHARE)
    assert float(WEIGHTS @ pi) == pytest.approx(K, rel=1e-12)


@pytest.mark.parametrize("kind", ["permuted", "reversed", "uniform"])
def test_controls_change_places_among_parts_of_one_size(kind):
    pi = unequal()
    placed = Control(kind, 5).of(pi, None, WEIGHTS)
    assert float(WEIGHTS @ placed) == pytest.approx(K, rel=1e-12)
    if kind == "uniform":
        np.testing.assert_allclose(placed, SHARE)
        return
    assert not np.allclose(placed, pi)
    for size in np.unique(SIZES):
        alike = size == SIZES
        np.testing.assert_array_equal(np.sort(placed[alike]), np.sort(pi[alike]))
    if kind == "permuted":
        order = Control(kind, 5).entries(28, WEIGHTS)["control_permutation"]
        np.testing.assert_array_equal(placed, pi[order])


def learned(**settings):
    prior = np.full(28, SHARE)
    return LearnedSampler(prior, K, 0, LearnConfig(**settings), Control(), WEIGHTS)


@pytest.mark.parametrize("learner", ["ema", "kl"])
def test_learned_probabilities_keep_the_budget_and_find_the_part(learner):
    truth = np.ones(28)
    course = simulate(learned(learner=learner), lambda t: truth, 300)
    np.testing.assert_allclose(course.pi @ WEIGHTS, K, rtol=1e-9)
    share = course.pi[-1] / course.pi[-1].sum()
    assert 1 / (share**2).sum() > 0.95 * 28
    assert course.discrepancy < 2
    truth = np.ones(28)
    truth[9] = 3.0
    course = simulate(learned(learner=learner), lambda t: truth, 120)
    assert course.pi[-1].argmax() == 9
    assert course.pi[-1, 9] > 1.8 * SHARE
    assert course.discrepancy < 2
    np.testing.assert_allclose(course.pi @ WEIGHTS, K, rtol=1e-9)


# ---------------------------------------------------------------------- training


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(3, 64, (2, 8), generator=generator)


class Loop:
    def __init__(self, model, settings):
        self.model, self.settings, self.draws = model, settings, []
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def engine(self):
        return Lisa(self.model, self.optimizer, self.settings, on_draw=self.draws.append)

    def run(self, engine, steps, each=lambda: None):
        for step in steps:
            engine.begin_step(step)
            ids = batch(step)
            self.model(input_ids=ids, labels=ids).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            each()


def settings(by="module", **changes):
    given = {
        "activated_layers": 1,
        "interval_steps": 3,
        "sampling": "balanced",
        "seed": 1,
        "by": by,
    }
    return lt.LisaConfig(**(given | changes))


@pytest.mark.parametrize("policy", ["reset", "keep", "offload"])
@pytest.mark.parametrize("by", ["half", "module"])
def test_exactly_the_drawn_parts_train(make_llama, by, policy):
    loop = Loop(make_llama(layers=4), settings(by, optimizer_state=policy))
    layers = find_layers(loop.model)
    units = Units.of(loop.model, layers, by)
    rests = {n for names in layers.layers for n in names}
    before = {}

    with loop.engine() as engine:

        def each():
            trains = {n for unit in loop.draws[-1].units for n in units.tensors[unit]}
            moved = {n for n, p in loop.model.named_parameters() if not torch.equal(p, before[n])}
            assert moved & rests == trains
            assert moved - rests
            before.update({n: p.detach().clone() for n, p in loop.model.named_parameters()})
            state = {n for n, p in loop.model.named_parameters() if loop.optimizer.state.get(p)}
            assert state & rests == trains if policy == "reset" else trains <= state

        before.update({n: p.detach().clone() for n, p in loop.model.named_parameters()})
        loop.run(engine, range(24), each)
        assert engine.coverage["unit_visits"] == list(loop.draws[-1].visits)
        assert engine.coverage["units_never_drawn"] == []
    assert len(loop.draws) == 8
    for draw in loop.draws:
        assert draw.layers == units.layers_of(draw.units)
        size = sum(units.sizes[i] for i in draw.units)
        assert abs(size - sum(units.sizes) / 4) < max(units.sizes)
        groups = sum(p.numel() for n, p in loop.model.named_parameters() if n not in rests)
        share = (size + groups) / sum(p.numel() for p in loop.model.parameters())
        assert draw.trainable_share == pytest.approx(share)
    assert all(p.requires_grad for p in loop.model.parameters())


@pytest.mark.parametrize("stop", [6, 7])
def test_a_resumed_run_goes_on_to_the_bit_inside_a_period_too(make_llama, stop):
    chosen = settings(learn=LearnConfig(start_after=1), optimizer_state="keep", control="permuted",
                      correct_lr=0.5)  # fmt: skip
    whole = Loop(make_llama(layers=3), chosen)
    with whole.engine() as engine:
        whole.run(engine, range(21))
        end = engine.state_dict()
    first = Loop(make_llama(layers=3), chosen)
    with first.engine() as engine:
        first.run(engine, range(stop))
        engine.finish_step(stop)
        saved = json.loads(json.dumps(engine.state_dict(), allow_nan=False))
        weights, state = first.model.state_dict(), first.optimizer.state_dict()
    again = Loop(make_llama(layers=3), chosen)
    again.model.load_state_dict(weights)
    again.optimizer.load_state_dict(state)
    with again.engine() as engine:
        engine.load_state_dict(saved)
        again.run(engine, range(stop, 21))
        assert engine.state_dict() == end
    mine = [(d.step, d.units, d.inclusion_probabilities, d.scores, d.update_factors)
            for d in (*first.draws, *again.draws)]  # fmt: skip
    assert mine == [
        (d.step, d.units, d.inclusion_probabilities, d.scores, d.update_factors)
        for d in whole.draws
    ]
    assert len({d.inclusion_probabilities for d in whole.draws}) > 1
    for one, other in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)
    with (
        Loop(make_llama(layers=3), settings("half")).engine() as other,
        pytest.raises(ConfigError, match="by = 'module', this run 'half'"),
    ):
        other.load_state_dict(saved)


def test_what_learns_is_what_the_matrices_show(make_llama):
    loop = Loop(make_llama(layers=3), settings(learn=LearnConfig(start_after=0)))
    units = Units.of(loop.model, find_layers(loop.model), "module")
    shown, expected = [], []
    with loop.engine() as engine:
        learn = engine._schedule.learn
        engine._schedule.learn = lambda step, values: (shown.append(values), learn(step, values))[1]
        for step in range(4):
            engine.begin_step(step)
            ids = batch(step)
            loop.model(input_ids=ids, labels=ids).loss.backward()
            parameters = dict(loop.model.named_parameters())
            expected.append({
                i: next(parameters[n].grad.double().square().mean().sqrt().item()
                        for n in units.tensors[i] if parameters[n].dim() > 1)
                for i in loop.draws[-1].units
            })  # fmt: skip
            loop.optimizer.step()
            loop.optimizer.zero_grad()
    for i in loop.draws[0].units:
        steps = [found[i] for found in expected[:3]]
        assert shown[0][i] == pytest.approx(np.exp(np.mean(np.log(steps))), rel=1e-6)
    assert np.isnan(np.delete(shown[0], loop.draws[0].units)).all()


def test_a_measuring_pass_shows_every_module(make_llama):
    """What `lisa.learn` with the metric `probe` hands to the learner, drawn or not."""
    model = make_llama(layers=3)
    learn = LearnConfig(metric="probe", probe_every=1, start_after=0)
    units = Units.of(model, find_layers(model), "module")
    shown, expected, ids = [], [], batch(99)

    def probe():
        model(input_ids=ids, labels=ids).loss.backward()

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with Lisa(model, optimizer, settings(learn=learn), probe=probe) as engine:
        told = engine._schedule.learn
        engine._schedule.learn = lambda step, values: (shown.append(values), told(step, values))[1]
        for step in range(7):
            if engine.probes_at(step):
                expected.append(shares(copy.deepcopy(model).double(), ids, units))
            engine.begin_step(step)
            model(input_ids=batch(step), labels=batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())
    assert len(shown) == len(expected) >= 2
    for values, wanted in zip(shown, expected, strict=True):
        values = np.array(values)
        assert values.shape == (21,)
        np.testing.assert_allclose(values / values.mean(), wanted / wanted.mean(), rtol=1e-4)


def shares(model, ids, units):
    """Root mean square of every part's gradient, in float64; of its matrix alone."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    parameters = dict(model.named_parameters())
    return np.array([
        next(parameters[n].grad.square().mean().sqrt().item()
             for n in names if parameters[n].dim() > 1)
        for names in units.tensors
    ])  # fmt: skip


@pytest.mark.parametrize("by", ["half", "module"])
def test_a_layer_is_spared_the_second_pass_where_any_part_of_it_trains(make_llama, by):
    found = {}
    for recompute in ("all", "frozen"):
        model = make_llama(layers=6, hidden_size=32)
        model.activation_checkpointing_enable({"use_reentrant": False})
        loop, runs = Loop(model, settings(by, recompute=recompute)), []
        for i, layer in enumerate(model.model.layers):
            layer.mlp.register_forward_pre_hook(lambda *_, i=i, runs=runs: runs.append(i))
        again = []
        with loop.engine() as engine:

            def each(engine=engine, runs=runs, again=again):
                again.append((engine.active_layers, sorted(runs[6:])))
                runs.clear()

            loop.run(engine, range(9), each)
        found[recompute] = loop.model, again
    for layers, again in found["frozen"][1]:
        assert again == [i for i in range(6) if i not in layers]
    assert all(again == list(range(6)) for _, again in found["all"][1])
    assert {layers for layers, _ in found["all"][1]} == {layers for layers, _ in found["frozen"][1]}
    both = (model.parameters() for model, _ in found.values())
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


@pytest.mark.parametrize("by", ["half", "module"])
def test_parts_that_train_have_fp32_copies_and_no_others(make_llama, by):
    model = make_llama(layers=3).to(torch.bfloat16)
    loop = Loop(model, settings(by, precision="fp32_active"))
    layers = find_layers(model)
    units = Units.of(model, layers, by)
    inside = {n for names in layers.layers for n in names}
    with loop.engine() as engine:

        def each():
            wide = {n for n, p in model.named_parameters() if exact(p).dtype == torch.float32}
            assert wide & inside == {
                n for unit in loop.draws[-1].units for n in units.tensors[unit]
            }

        loop.run(engine, range(9), each)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert len({draw.units for draw in loop.draws}) > 1


def test_a_trainer_is_recorded_and_read_by_module(tmp_path):
    trainer = Trainer(
        llama(layers=3), arguments(tmp_path / "out", max_steps=40), train_dataset=examples(16)
    )
    lt.attach(
        trainer,
        lisa=settings(interval_steps=2, learn=LearnConfig(start_after=1)),
        record=lt.RecordConfig(str(tmp_path / "run"), every=1),
    )
    trainer.train()
    run = la.load(tmp_path / "run")
    assert not [w for w in run.warnings if "lisa_draw" in w]
    parts = parts_of(run)
    drawn = part_draws(run, parts)
    assert len(drawn) == 20
    visits = np.zeros(len(parts.names))
    for _, units, pi in drawn:
        visits[list(units)] += 1
        assert float(pi @ parts.sizes) == pytest.approx(parts.sizes.sum() / 3)
    result = run.manifest["result"]
    assert result["unit_visits"] == visits.astype(int).tolist()
    # What was drawn is what has gradients, tensor by tensor.
    rows = run.metrics(["step", "param_id", "grad_norm"])
    names = run.parameters.set_index("param_id")["name"]
    for step, units, _ in drawn[:5]:
        wanted = {n for i in units for n in parts.tensors[i]}
        seen = rows[(rows["step"] == step + 1) & rows["grad_norm"].notna()]["param_id"]
        assert {names[i] for i in seen if ".layers." in names[i]} == wanted
    profile = la.importance(run, by="module")
    frame = profile.layers.set_index("name")
    for i, (name, layer) in enumerate(zip(parts.names, parts.layers, strict=True)):
        if name.endswith("q_proj"):
            row = frame.loc[f"model.layers.{layer} attn.q"]
            assert row["visits"] == visits[i]
            own = rows[rows["param_id"] == names[names == parts.tensors[i][0]].index[0]]
            norms = own["grad_norm"].dropna().to_numpy() / parts.sizes[i] ** 0.5
            assert np.isfinite(norms).sum() == 2 * visits[i]
    with pytest.raises(ProbabilitiesError, match="by module; make it by layer, whose π every part"):
        la.sampling_probabilities(profile, activated_layers=1)
    with pytest.raises(ProbabilitiesError, match="exports need a profile by layer, got one by mod"):
        la.export(profile, "probabilities", activated_layers=1)
    # Of a layer, steps count at which all of it trained.
    by_layer = la.importance(run)
    assert "trained layers in parts" in by_layer.statement
    la.report(run).save(tmp_path / "report.html")
    assert "What was learned" in (tmp_path / "report.html").read_text()
    grid = probability_grid(run)
    share = np.array([pi @ parts.sizes / parts.sizes.sum() for _, _, pi in drawn])
    for layer in range(3):
        mine = parts.layers == layer
        own = [pi[mine] @ parts.sizes[mine] / parts.sizes[mine].sum() for _, _, pi in drawn]
        np.testing.assert_allclose(grid.values[layer], own / share, rtol=1e-12)
    found = la.diagnose(run)
    assert found["schedule_mismatch"].state == "ok"
    assert found["visits"].state == "ok"
    assert "model.layers." in found["visits"].evidence


def test_the_estimate_looks_for_the_dearest_draw(make_llama):
    from lisa_train.estimate.patterns import some_draws
    from lisa_train.estimate.setting import Setting
    from lisa_train.estimate.stage import Stage

    model = make_llama(layers=3)
    chosen = settings("half")
    worst = lt.estimate_memory(model, "lisa", batch_size=2, sequence_length=16, lisa=chosen)
    assert worst.mean < worst.total
    units = Units.of(model, find_layers(model), "half")
    rest = sum(p.numel() for n, p in model.named_parameters() if ".layers." not in n)
    most = sum(units.sizes) / 3 + max(units.sizes) + rest
    assert most - max(units.sizes) < worst.trainable <= most
    # No draw of a real step has more gradients and state.
    setting = Setting(method="lisa", batch_size=2, sequence_length=16, lisa=chosen)
    stage = Stage(model, setting)
    for draw in some_draws(stage, setting)[:20]:
        size = sum(units.sizes[i] for i in draw.layers)
        assert size + rest <= worst.trainable + max(units.sizes)
    whole = lt.estimate_memory(model, "full", batch_size=2, sequence_length=16)
    assert worst.total < whole.total


class Coins(PureSampler):
    """Parts by a coin each, of a module that only this file knows."""

    scheme = "coins"
    may_draw_nothing = True
    keeps_budget = True

    def _choose(self, index):
        return np.flatnonzero(self._rng(index).random(self._open.size) < 0.5)


def test_a_sampler_of_ones_own_draws_parts_and_is_estimated_by_what_it_says(make_llama):
    class Fixed(Coins):
        scheme = "fixed"
        keeps_budget = False

    register(Coins), register(Fixed)
    try:
        model = make_llama(layers=4)
        loop = Loop(model, settings("half", sampling="coins"))
        with loop.engine() as engine:
            loop.run(engine, range(60))
        sizes = {len(draw.layers) for draw in loop.draws}
        assert len(sizes) > 2, sizes
        for by in ("half", "layer"):
            mine, theirs = (
                lt.estimate_memory(
                    model, "lisa", batch_size=2, sequence_length=16,
                    lisa=lt.LisaConfig(1, 3, by=by, sampling=sampling),
                ).total
                for sampling in ("coins", "bernoulli")
            )  # fmt: skip
            assert mine == theirs
        with pytest.raises(ConfigError, match=r"lisa\.sampling is 'fixed'"):
            settings("half", sampling="fixed")
    finally:
        del SAMPLERS["coins"], SAMPLERS["fixed"]


# ---------------------------------------------------------------------- probabilities, refusals


def test_a_profile_becomes_a_file_and_the_file_draws_parts(tmp_path):
    """Probe, profile, export, training by halves: π of a half is that of its layer."""
    run = tmp_path / "probe"
    model = llama(layers=4)
    ids = [row["input_ids"][None] for row in examples(4)]
    lt.probe(model, [{"input_ids": x, "labels": x} for x in ids], str(run))
    path = tmp_path / "probabilities.json"
    profile = la.importance(la.load(run))
    la.export(profile, "probabilities", activated_layers=2, use_intervals=False).save(path)
    made = SamplingProbabilities.load(path)
    assert len(set(made.inclusion_probabilities)) == 4
    trainer = Trainer(
        model, arguments(tmp_path / "out", max_steps=6), train_dataset=examples(16)
    )  # fmt: skip
    chosen = settings("half", activated_layers=2, probabilities=str(path))
    lt.attach(trainer, lisa=chosen, record=lt.RecordConfig(str(tmp_path / "run"), every=1))
    trainer.train()
    trained = la.load(tmp_path / "run")
    parts = parts_of(trained)
    for _, _, pi in part_draws(trained, parts):
        np.testing.assert_allclose(pi, np.repeat(made.inclusion_probabilities, 2), rtol=1e-9)
        assert float(pi @ parts.sizes) == pytest.approx(parts.sizes.sum() / 2)


def test_a_file_of_whole_layers_gives_parts_the_probability_of_their_layer(tmp_path, make_llama):
    model = make_llama(layers=4)
    path = tmp_path / "p.json"
    names = find_layers(model).names
    SamplingProbabilities(
        model="m", layer_names=names, activated_layers=1,
        inclusion_probabilities=(0.4, 0.3, 0.2, 0.1), scores=(None,) * 4, metric="m", gamma=1.0,
        mix=0.0, floor=0.0, cap=4.0, n_eff=None, source_runs=(), verdict="", created="",
    ).save(path)  # fmt: skip
    loop = Loop(model, settings("half", probabilities=str(path)))
    with loop.engine() as engine:
        np.testing.assert_allclose(
            engine.inclusion_probabilities, np.repeat([0.4, 0.3, 0.2, 0.1], 2)
        )
    loop = Loop(
        model, settings("half", probabilities=str(path), budget=0.125 * 4, activated_layers=2)
    )
    with loop.engine() as engine:
        np.testing.assert_allclose(
            engine.inclusion_probabilities, np.repeat([0.8, 0.6, 0.4, 0.2], 2)
        )
    with pytest.raises(ProbabilitiesError, match=r"scaled to the budget, draws layer 0"):
        Loop(
            model, settings("half", probabilities=str(path), budget=0.75, activated_layers=2)
        ).engine()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"by": "matrix"}, "lisa.by is 'matrix', but must be one of layer, half, module"),
        ({"by": "layer", "budget": 0.1}, "whole layers are drawn, of which activated_layers says"),
        ({"budget": 0.1}, "lisa.activated_layers is 1, but lisa.budget is 0.1 and alone says how"),
        ({"budget": 1.5}, "lisa.budget is 1.5, but must be a number between 0 and 1"),
        ({"sampling": "systematic"}, "choose one of uniform, bernoulli, balanced"),
    ],
)
def test_settings_that_make_no_sense(changes, said):
    with pytest.raises(ConfigError, match=said):
        settings(**changes)


def test_budgets_and_models_that_make_no_sense(make_llama):
    model = make_llama(layers=4)
    with pytest.raises(ConfigError, match=r"less than model\.layers\.0\.mlp\.gate_proj alone"):
        Loop(model, settings(budget=0.01, activated_layers=2)).engine()
    for by, finer in (("module", False), ("half", True)):
        with pytest.raises(ConfigError) as caught:
            Loop(model, settings(by, budget=0.01, activated_layers=2)).engine()
        assert ("lisa.by to 'module'" in str(caught.value)) == finer
        least = float(re.search(r"set it to (\S+) or", str(caught.value))[1])
        Loop(model, settings(by, budget=least, activated_layers=2)).engine()  # taken
    with pytest.raises(ConfigError, match="nothing would ever rest"):
        Loop(model, settings(activated_layers=4)).engine()
    with pytest.raises(
        ProbabilitiesError, match=r"train 0\.5 of the layers' parameters on average"
    ):
        Loop(model, settings("half", probabilities=(0.5,) * 8)).engine()
    with pytest.raises(ProbabilitiesError, match="3 inclusion probabilities were given"):
        Loop(model, settings("half", probabilities=(0.25,) * 3)).engine()
    with pytest.raises(ConfigError, match="active_layers names whole layers"):
        lt.estimate_memory(model, "lisa", lisa=settings(), active_layers=(0,), sequence_length=8)
