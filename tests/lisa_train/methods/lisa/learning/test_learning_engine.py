"""What the engine measures at the optimizer step, against float64; resume; refusals."""

import json
import random
from functools import partial

import bitsandbytes
import numpy as np
import pytest
import torch

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError, ProbabilitiesError
from lisa_train.methods.lisa.engine import Lisa
from lisa_train.model.layer_map import find_layers
from lisa_train.optim.step_in_backward import StepInBackward

LAYERS, K, INTERVAL, RATE = 5, 2, 3, 1e-2


def config(metric="grad_rms", *, learner="ema", control="none", **changes):
    passes = {"probe_every": 2} if metric == "probe" else {}
    learn = lt.LearnConfig(metric=metric, learner=learner, start_after=1, **passes)
    settings = {
        "activated_layers": K,
        "interval_steps": INTERVAL,
        "sampling": "balanced",
        "seed": 3,
    }
    return lt.LisaConfig(learn=learn, control=control, **(settings | changes))


def batch(step, micro=0):
    generator = torch.Generator().manual_seed(100 * step + micro)
    return torch.randint(3, 64, (2, 8), generator=generator)


def backward(model, step, micro=0, of=1):
    ids = batch(step, micro)
    loss = model(input_ids=ids, labels=ids).loss / of
    loss.backward()


class Loop:
    """A plain loop that keeps what an engine should have seen."""

    def __init__(self, model, settings, *, micro=2, clip=None, inside=False, optimizer=None):
        self.model, self.micro, self.clip, self.inside = model, micro, clip, inside
        self.optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=RATE)
        self.settings, self.draws, self.said, self.learned = settings, [], [], []
        self.step = 0
        self.expected = []  # one dict layer -> number per step
        self.layers = find_layers(model)

    def engine(self):
        learns = self.settings.learn
        passes = learns is not None and learns.metric == "probe"
        engine = Lisa(
            self.model, self.optimizer, self.settings, layer_map=self.layers,
            on_draw=self.draws.append, on_notice=self.said.append,
            probe=(lambda: backward(self.model, self.step)) if passes else None,
        )  # fmt: skip
        learn = engine._schedule.learn
        engine._schedule.learn = lambda step, values: (
            self.learned.append((step, np.array(values))), learn(step, values))[1]  # fmt: skip
        return engine

    def tensors(self, layer):
        return [p for _, p in self.layers.parameters(self.model, layer)]

    def run(self, engine, steps, after=None):
        for step in steps:
            self.step = step
            engine.begin_step(step)
            parts = {}
            before = {i: [p.detach().double().clone() for p in self.tensors(i)]
                      for i in engine.active_layers}  # fmt: skip
            watch = []
            for i in engine.active_layers if self.inside else ():
                watch += [p.register_hook(partial(parts.__setitem__, p)) for p in self.tensors(i)]
            for micro in range(self.micro):
                backward(self.model, step, micro, self.micro)
            for handle in watch:
                handle.remove()
            if self.clip:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            gradients = {
                i: [parts[p].double() if self.inside else p.grad.double() for p in self.tensors(i)]
                for i in engine.active_layers
            }
            self.optimizer.step()
            self.expected.append({
                i: (gradients[i], [p.detach().double() - old for p, old in
                                   zip(self.tensors(i), before[i], strict=True)])
                for i in engine.active_layers
            })  # fmt: skip
            self.optimizer.zero_grad()
            if after is not None:
                after(step)


def by_hand(metric, gradients, moves):
    size = sum(g.numel() for g in gradients)
    square = sum(float(g.square().sum()) for g in gradients)
    if metric == "grad_rms":
        return (square / size) ** 0.5
    if metric == "l1_descent":
        return RATE * sum(float(g.abs().sum()) for g in gradients)
    return -sum(float((g * m).sum()) for g, m in zip(gradients, moves, strict=True))


def visits_by_hand(loop, metric, *, fresh_skip):
    """What every draw's visits show: means over steps, the first fifth after a reset left out."""
    found = []
    for n, draw in enumerate(d for d in loop.draws if d.step < len(loop.expected)):
        steps = loop.expected[draw.step : draw.step + loop.settings.interval_steps]
        before = loop.draws[n - 1].layers if n else ()
        values = np.full(LAYERS, np.nan)
        for i in draw.layers:
            numbers = [by_hand(metric, *step[i]) for step in steps]
            skip = int(0.2 * len(numbers)) if fresh_skip and i not in before else 0
            numbers = np.array(numbers[skip:])
            values[i] = numbers.mean() if metric == "descent" else np.exp(np.log(numbers).mean())
        found.append(values)
    return found


@pytest.mark.parametrize("metric", ["grad_rms", "l1_descent", "descent"])
@pytest.mark.parametrize(
    "how", ["plain", "clipped", "inside backward", "keeps state", "two", "in 8 bits"]
)
def test_visits_are_means_of_what_the_optimizer_got(make_llama, metric, how):
    model = make_llama(layers=LAYERS)
    settings = config(
        metric, interval_steps=5, optimizer_state="keep" if how == "keeps state" else "reset"
    )
    optimizer = None
    if how == "two":
        odd = [p for n, p in model.named_parameters() if p.ndim < 2]
        even = [p for n, p in model.named_parameters() if p.ndim == 2]
        optimizer = Several(torch.optim.AdamW(odd, lr=RATE), torch.optim.SGD(even, lr=RATE))
    if how == "in 8 bits":
        optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=RATE, min_8bit_size=64)
    inside = how == "inside backward"
    loop = Loop(model, settings, micro=1 if inside else 2, inside=inside,
                clip=0.05 if how == "clipped" else None, optimizer=optimizer)  # fmt: skip
    with loop.engine() as engine:
        if inside:
            with StepInBackward(loop.optimizer):
                loop.run(engine, range(15))
        else:
            loop.run(engine, range(15))
        engine.begin_step(15)
    expected = visits_by_hand(loop, metric, fresh_skip=how != "keeps state")
    assert [step for step, _ in loop.learned] == [5, 10, 15]
    for (_, values), mine in zip(loop.learned, expected, strict=False):
        if metric == "descent":
            mine = np.where(mine > 0, mine, np.nan)
            values = np.where(np.isnan(mine), np.nan, values)
        np.testing.assert_allclose(values, mine, rtol=1e-5)


class Several:
    """Two optimizers that a loop steps one after the other."""

    def __init__(self, *optimizers):
        self.optimizers = list(optimizers)

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def test_signal_is_what_micro_batches_agree_on(make_llama):
    """2n/(n−1)·Σ_{i<j}⟨Gᵢ, Gⱼ⟩ from gradients of micro-batches taken one by one."""
    model = make_llama(layers=LAYERS)
    loop = Loop(model, config("signal", interval_steps=1), micro=3, clip=0.01)
    expected = []

    with loop.engine() as engine:
        for step in range(6):
            engine.begin_step(step)
            each = []
            for micro in range(3):
                backward(model, step, micro, 3)
                now = {i: torch.cat([p.grad.double().flatten() for p in loop.tensors(i)])
                       for i in engine.active_layers}  # fmt: skip
                each.append(now)
            values = np.full(LAYERS, np.nan)
            for i in engine.active_layers:
                g = [each[0][i], each[1][i] - each[0][i], each[2][i] - each[1][i]]
                cross = sum(float(g[a] @ g[b]) for a in range(3) for b in range(a)) * 2 * 3 / 2
                floor = 0.01 * abs(cross)
                values[i] = (max(cross, floor) / g[0].numel()) ** 0.5
            expected.append(values)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        engine.begin_step(6)
    for (_, values), mine in zip(loop.learned, expected, strict=True):
        np.testing.assert_allclose(values, mine, rtol=1e-3)
    assert not any(p._backward_hooks for p in model.parameters())


def test_signal_of_one_micro_batch_is_refused(make_llama):
    loop = Loop(make_llama(layers=LAYERS), config("signal"), micro=1)
    with loop.engine() as engine, pytest.raises(ConfigError, match="made 1 backward pass"):
        loop.run(engine, range(1))


def test_signal_of_halves_is_their_product_and_leaves_no_trace(make_llama):
    """⟨G₁, G₂⟩ of the halves of the step's batch, once in every period, before the draw."""
    model = make_llama(layers=LAYERS)
    loop = Loop(model, config("signal"), micro=1)
    layers = loop.layers

    def half(which):
        ids = batch(loop.step)[which : which + 1]
        model(input_ids=ids, labels=ids).loss.backward()

    plain = Loop(make_llama(layers=LAYERS), lt.LisaConfig(K, INTERVAL, "balanced", seed=3), micro=1)
    learned = []
    engine = Lisa(
        model, loop.optimizer, loop.settings, layer_map=layers, on_draw=loop.draws.append,
        probe=(lambda: half(0), lambda: half(1)),
    )  # fmt: skip
    with engine, plain.engine() as other:
        learn = engine._schedule.learn
        engine._schedule.learn = lambda step, values: (
            learned.append((step, values)), learn(step, values))[1]  # fmt: skip
        loop.run(engine, range(INTERVAL))
        plain.run(other, range(INTERVAL))
        for mine, theirs in zip(model.parameters(), plain.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)
        drawn = engine.active_layers
        expected = np.full(LAYERS, np.nan)
        each = []
        for which in (0, 1):
            half(which)
            each.append({i: torch.cat([p.grad.double().flatten() for p in loop.tensors(i)])
                         for i in drawn})  # fmt: skip
            model.zero_grad()
        for i in drawn:
            product = float(each[0][i] @ each[1][i])
            expected[i] = (max(product, 0.01 * abs(product)) / each[0][i].numel()) ** 0.5
        assert engine.probes_at(INTERVAL)
        state = torch.get_rng_state()
        engine.finish_step(INTERVAL)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(p.grad is None for p in model.parameters())
    assert [step for step, _ in learned] == [INTERVAL]
    np.testing.assert_allclose(learned[0][1], expected, rtol=1e-5)
    with pytest.raises(ConfigError, match="give two, of the halves of a batch"):
        Lisa(model, loop.optimizer, config("grad_rms"), probe=(lambda: half(0), lambda: half(1)))


def test_probe_sees_all_layers_and_leaves_no_trace(make_llama):
    model = make_llama(layers=LAYERS)
    loop = Loop(model, config("probe"), micro=1)
    plain = make_llama(layers=LAYERS)
    other = Loop(plain, lt.LisaConfig(K, INTERVAL, "balanced", seed=3), micro=1)
    torch.manual_seed(0)
    streams = torch.get_rng_state(), random.getstate()
    with loop.engine() as engine:
        loop.run(engine, range(6))
        weights = [p.detach().clone() for p in model.parameters()]
        loop.step = 6
        engine.begin_step(6)
        assert all(p.grad is None for p in model.parameters())
        assert {i for i in range(LAYERS) if loop.tensors(i)[0].requires_grad} == set(
            engine.active_layers
        )
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert random.getstate() == streams[1]
    with other.engine() as engine:
        other.run(engine, range(6))
    for mine, theirs in zip(weights, plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert [step for step, _ in loop.learned] == [6]  # before draw 2, of every second
    copy = make_llama(layers=LAYERS).double()
    copy.load_state_dict({n: p.double() for n, p in zip(
        dict(model.named_parameters()), weights, strict=True)}, strict=False)  # fmt: skip
    backward(copy, 6)
    for i, value in enumerate(loop.learned[0][1]):
        tensors = [p for _, p in loop.layers.parameters(copy, i)]
        square = sum(float(p.grad.square().sum()) for p in tensors)
        size = sum(p.numel() for p in tensors)
        assert value == pytest.approx((square / size) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("stop", [23, 24, 25], ids=["last step", "at a draw", "inside an interval"])
@pytest.mark.parametrize("metric", ["grad_rms", "descent", "signal", "probe"])
def test_a_resumed_run_learns_draws_and_trains_as_the_uninterrupted_one(make_llama, metric, stop):
    settings = config(metric, optimizer_state="keep")
    whole = Loop(make_llama(layers=LAYERS), settings)
    with whole.engine() as engine:
        whole.run(engine, range(33))
        end = engine.state_dict()
    first = Loop(make_llama(layers=LAYERS), settings)
    with first.engine() as engine:
        first.run(engine, range(stop))
        first.step = stop  # whose batch the pass of an uninterrupted run takes
        engine.finish_step(stop)
        saved = json.loads(json.dumps(engine.state_dict(), allow_nan=False))
        weights, state = first.model.state_dict(), first.optimizer.state_dict()
    again = Loop(make_llama(layers=LAYERS), settings)
    again.model.load_state_dict(weights)
    again.optimizer.load_state_dict(state)
    with again.engine() as engine:
        engine.load_state_dict(saved)
        again.run(engine, range(stop, 33))
        assert engine.state_dict() == end
    draws = [(d.step, d.layers, d.inclusion_probabilities, d.scores) for d in whole.draws]
    split = first.draws + again.draws
    assert [(d.step, d.layers, d.inclusion_probabilities, d.scores) for d in split] == draws
    assert len({d.inclusion_probabilities for d in whole.draws}) > 1
    for mine, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("precision", ["model", "fp32_active"])
@pytest.mark.parametrize("metric", ["grad_rms", "descent", "signal"])
def test_bf16(make_llama, metric, precision):
    model = make_llama(layers=LAYERS).bfloat16()
    loop = Loop(model, config(metric, precision=precision))
    with loop.engine() as engine:
        loop.run(engine, range(9))
        engine.begin_step(9)
    assert len(loop.learned) == 3
    if metric == "grad_rms":
        for (_, values), mine in zip(
            loop.learned, visits_by_hand(loop, metric, fresh_skip=True), strict=False
        ):
            np.testing.assert_allclose(values, mine, rtol=1e-4)
    for draw, (_, values) in zip(loop.draws, loop.learned, strict=False):
        assert set(np.flatnonzero(np.isfinite(values))) == set(draw.layers)


def test_training_is_that_of_the_same_draws_without_learning(make_llama):
    """Measuring changes nothing: until π moves, weights are those of `balanced`, bit for bit."""
    learned = Loop(make_llama(layers=LAYERS), config("descent"))
    plain = Loop(make_llama(layers=LAYERS), lt.LisaConfig(K, INTERVAL, "balanced", seed=3))
    for loop in (learned, plain):
        with loop.engine() as engine:
            loop.run(engine, range(INTERVAL))
    for mine, theirs in zip(learned.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_gradient_that_is_not_finite_freezes_and_says_so_once(make_llama):
    loop = Loop(make_llama(layers=LAYERS), config())
    with loop.engine() as engine:
        loop.run(engine, range(9))
        for step in range(9, 18):
            engine.begin_step(step)
            backward(loop.model, step)
            if step == 10:
                loop.tensors(engine.active_layers[0])[0].grad[0] = float("nan")
                layer = engine.active_layers[0]
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        saved = json.dumps(engine.state_dict(), allow_nan=False)
    assert [text for text in loop.said if "not finite" in text] == [
        f"lisa.learn measured a number that is not finite in layer {layer} before step 12: π stays "
        "what it is"
    ]
    assert "not finite" in saved
    held = {d.inclusion_probabilities for d in loop.draws[3:]}
    assert len(held) == 1


def test_a_step_that_a_scaler_skips_is_not_learned_from(make_llama):
    """A fused optimizer steps with infinite gradients and undoes it on the device."""
    loop = Loop(make_llama(layers=LAYERS), config())
    loop.optimizer = torch.optim.SGD(loop.model.parameters(), lr=RATE, fused=True)
    with loop.engine() as engine:
        for step in range(6):
            engine.begin_step(step)
            backward(loop.model, step)
            scale = torch.tensor(64.0)
            for p in loop.model.parameters():
                if p.grad is not None:
                    p.grad *= scale
            size = sum(float(p.grad.double().square().sum()) for p in
                       loop.tensors(engine.active_layers[0])) / 64**2  # fmt: skip
            overflows = step == 1
            if overflows:
                loop.tensors(engine.active_layers[0])[0].grad[0] = float("inf")
            else:
                loop.expected.append((engine.active_layers[0], size))
            loop.optimizer.grad_scale = scale
            loop.optimizer.found_inf = torch.tensor(float(overflows))
            loop.optimizer.step()
            del loop.optimizer.grad_scale, loop.optimizer.found_inf
            loop.optimizer.zero_grad()
        engine.begin_step(6)
    assert not [text for text in loop.said if "not finite" in text]
    for visit, (_, values) in enumerate(loop.learned):
        steps = loop.expected[:2] if visit == 0 else loop.expected[2:]
        layer = steps[0][0]
        numel = sum(p.numel() for p in loop.tensors(layer))
        mine = np.exp(np.mean([0.5 * np.log(square / numel) for _, square in steps]))
        assert values[layer] == pytest.approx(mine, rel=1e-5)


def test_control_is_in_force_and_in_the_manifest(make_llama):
    loop = Loop(make_llama(layers=LAYERS), config(control="permuted"))
    with loop.engine() as engine:
        loop.run(engine, range(30))
        entries = json.loads(json.dumps(engine.run_entries()))["lisa"]
        in_force, scores = engine.inclusion_probabilities, loop.draws[-1].scores
    assert entries["control"] == "permuted"
    assert entries["control_seed"] == 3
    order = entries["control_permutation"]
    assert sorted(order) == list(range(LAYERS))
    assert order != list(range(LAYERS))
    assert entries["learn"]["metric"] == "grad_rms"
    known = np.array(scores, dtype=float)
    assert np.corrcoef(in_force, known[order])[0, 1] > 0.9


def test_a_file_has_its_control_too(make_llama, tmp_path):
    from lisa_analysis.contract.errors import LisaError
    from lisa_analysis.plans.sampling import sampling_probabilities
    from lisa_analysis.profiles.profile import ImportanceProfile

    model = make_llama(layers=LAYERS)
    names = list(find_layers(model).names)
    profile = ImportanceProfile.from_scores(np.arange(1.0, LAYERS + 1), names=names)
    made = sampling_probabilities(profile, K, use_intervals=False)
    path = made.save(tmp_path / "probabilities.json")
    pi = np.array(made.inclusion_probabilities)
    for control, expected in (
        ("permuted", np.random.default_rng(9).permutation(pi)),
        ("reversed", pi[::-1]),
        ("uniform", np.full(LAYERS, K / LAYERS)),
    ):
        settings = lt.LisaConfig(
            K, sampling="systematic", probabilities=str(path), control=control, control_seed=9
        )
        with Lisa(model, torch.optim.SGD(model.parameters(), lr=0.1), settings) as engine:
            engine.begin_step(0)
            np.testing.assert_allclose(engine.inclusion_probabilities, expected, atol=1e-9)
    placebo = sampling_probabilities(profile, K, use_intervals=False, control="reversed")
    twice = placebo.save(tmp_path / "twice.json")
    settings = lt.LisaConfig(K, probabilities=str(twice), control="permuted")
    with pytest.raises(LisaError, match="holds a reversed control already"):
        Lisa(model, torch.optim.SGD(model.parameters(), lr=0.1), settings)
    prior = config(control="none")
    prior = lt.LisaConfig(K, 3, "balanced", learn=lt.LearnConfig(prior=str(path)))
    with Lisa(model, torch.optim.SGD(model.parameters(), lr=0.1), prior) as engine:
        engine.begin_step(0)
        np.testing.assert_allclose(engine.inclusion_probabilities, pi, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: lt.LisaConfig(learn=lt.LearnConfig()), "'uniform', which does not follow"),
        (lambda: config(sampling="bernoulli"), "sampling='bernoulli', which does not follow"),
        (lambda: lt.LisaConfig(control="permuted"), "no probabilities to give to other layers"),
        (lambda: lt.LisaConfig(control="shuffled"), "must be one of none, permuted"),
        (lambda: lt.LisaConfig(2, sampling="balanced", learn=lt.LearnConfig(),
                               probabilities=(1.0, 1.0)), "give the file as lisa.learn.prior"),
        (lambda: lt.LisaConfig(learn={"metric": "probe"}), "must be a LearnConfig"),
        (lambda: lt.LearnConfig(metric="norm"), "must be one of grad_rms"),
        (lambda: lt.LearnConfig(strength="pool"), "a pool never draws the others again"),
        (lambda: lt.LearnConfig(strength="pool", metric="probe", floor=0.5),
         r"learn\.floor is 0\.5 with strength='pool': a pool has no floor"),
        (lambda: lt.LearnConfig(strength="pool=4", metric="probe", cap=2), "a pool has no cap"),
        (lambda: lt.LearnConfig(strength=-1), "must be a number from 0 to 16"),
        (lambda: lt.LearnConfig(memory=0), "a number above 0 and at most 1"),
        (lambda: lt.LearnConfig(floor=0), "a number above 0 and at most 1"),
        (lambda: lt.LearnConfig(cap=0.5), "a number of at least 1"),
        (lambda: lt.LearnConfig(start_after=-1), "of draws of at least 0"),
        (lambda: lt.LearnConfig(probe_every=0), "of draws of at least 1"),
        (lambda: lt.LearnConfig(probe_every=8), "'grad_rms', which makes no measuring passes"),
        (lambda: lt.LearnConfig(prior=(1.0, -1.0)), r"prior\[1\] is -1"),
        (lambda: lt.LearnConfig(prior=3), "or one number per layer"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(make, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make()


def test_what_leaves_nothing_to_learn_or_no_data_is_refused(make_llama):
    model = make_llama(layers=LAYERS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="activated_layers is 5 and the model has 5 layers"):
        Lisa(model, optimizer, config(activated_layers=5))
    with pytest.raises(ConfigError, match="measuring passes need data"):
        Lisa(model, optimizer, config("probe"))
    for metric in ("grad_rms", "signal"):
        with pytest.raises(ConfigError, match=f"is {metric!r}, which would never call it"):
            Lisa(model, optimizer, config(metric), probe=lambda: None)
    for probe in (lambda: None, (lambda: None, lambda: None)):
        with pytest.raises(ConfigError, match=r"lisa\.learn is None, so that nothing is learned"):
            Lisa(model, optimizer, lt.LisaConfig(2, 3), probe=probe)
    wrong = lt.LisaConfig(2, sampling="balanced", learn=lt.LearnConfig(prior=(1.0, 2.0)))
    with pytest.raises(ProbabilitiesError, match="has 2 numbers for a model of 5 layers"):
        Lisa(model, optimizer, wrong)
    depth = lt.LisaConfig(2, 3, "balanced", learn=lt.LearnConfig(prior="depth"))
    with Lisa(model, optimizer, depth) as engine:
        pi = engine.inclusion_probabilities
        assert pi[0] / pi[-1] == pytest.approx(2)
    plain = lt.LisaConfig(2, 3, "balanced", seed=3)
    with Lisa(model, optimizer, config()) as engine:
        engine.begin_step(0)
        saved = engine.state_dict()
    with (
        Lisa(model, optimizer, plain) as engine,
        pytest.raises(ConfigError, match="learn = 'grad_rms', this run None"),
    ):
        engine.load_state_dict(saved)
