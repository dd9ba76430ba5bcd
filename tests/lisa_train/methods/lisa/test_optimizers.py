"""LISA with several optimizers at once, and with those whose steps it cannot follow."""

import numpy as np
import pytest
import torch
from helpers_recording import arguments, examples, llama
from torch.optim import Optimizer
from transformers import Trainer
from transformers.optimization import Adafactor

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_analysis.rundir.opening import load
from lisa_train.methods.lisa.engine import Lisa
from lisa_train.model.layer_map import find_layers
from lisa_train.model.master_copies import exact
from lisa_train.optim.eight_bit import set_eight_bit_states


def matrices_and_rest(model):
    inside = dict(model.model.layers.named_parameters())
    matrices = [p for p in inside.values() if p.ndim == 2]
    members = set(matrices)
    return matrices, [p for p in model.parameters() if p not in members]


def muon_and_adamw(model):
    matrices, rest = matrices_and_rest(model)
    return [
        torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1),
        torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.1),
    ]


class Together(Optimizer):
    """Several optimizers behind one face, as people write it for Trainer."""

    def __init__(self, optimizers):
        self.optimizers = list(optimizers)
        groups = [group for inner in self.optimizers for group in inner.param_groups]
        super().__init__([p for group in groups for p in group["params"]], {})
        self.param_groups = groups  # the inner ones, so that a scheduler reaches them

    def step(self, closure=None):
        for inner in self.optimizers:
            inner.step()

    def zero_grad(self, set_to_none=True):
        for inner in self.optimizers:
            inner.zero_grad(set_to_none)

    def state_dict(self):
        return {"optimizers": [inner.state_dict() for inner in self.optimizers]}

    def load_state_dict(self, state_dict):
        for inner, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            inner.load_state_dict(state)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 48, (2, 8), generator=generator)
    return {"input_ids": ids, "labels": ids}


def train(model, optimizers, engine, steps):
    for step in steps:
        if engine is not None:
            engine.begin_step(step)
        model(**batch(step)).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def state_of(optimizers):
    return {p: s for optimizer in optimizers for p, s in optimizer.state.items() if s}


def bytes_of(optimizers):
    return sum(
        value.numel() * value.element_size()
        for state in state_of(optimizers).values()
        for value in state.values()
        if torch.is_tensor(value)
    )


def as_list(optimizers):
    return optimizers


def as_dict(optimizers):
    return {"muon": optimizers[0], "adamw": optimizers[1]}


@pytest.mark.parametrize("given", [as_list, as_dict, Together])
def test_all_layers_active_and_state_kept_is_full_fine_tuning_bit_for_bit(given):
    full, rotated = llama(), llama()
    train(full, muon_and_adamw(full), None, range(5))
    optimizers = muon_and_adamw(rotated)
    config = lt.LisaConfig(3, 2, optimizer_state="keep")
    with Lisa(rotated, given(optimizers), config) as engine:
        train(rotated, optimizers, engine, range(5))
    assert same(full, rotated)


@pytest.mark.parametrize("policy", ["reset", "keep", "offload"])
def test_exactly_the_active_tensors_move_and_have_state(policy):
    model = llama(layers=4)
    optimizers = muon_and_adamw(model)
    config = lt.LisaConfig(1, 2, "cyclic", optimizer_state=policy, always_active=("norm",))
    counts: dict[int, int] = {}
    names = dict(model.named_parameters())
    with Lisa(model, optimizers, config) as engine:
        for step in range(8):
            before = {n: p.detach().clone() for n, p in names.items()}
            train(model, optimizers, engine, [step])
            (layer,) = engine.active_layers
            counts[layer] = counts.get(layer, 0) + 1
            active = {*engine.layer_map.layers[layer], *engine.layer_map.groups["norm"]}
            assert {n for n in names if not torch.equal(names[n], before[n])} == active
            assert set(state_of(optimizers)) == {names[n] for n in active}
            held = [optimizer.state_dict()["state"] for optimizer in optimizers]
            expected = active if policy == "reset" else {
                *engine.layer_map.groups["norm"],
                *(n for i in counts for n in engine.layer_map.layers[i]),
            }  # fmt: skip
            assert sum(map(len, held)) == len(expected)  # a checkpoint has all that is kept
    assert sorted(counts.values()) == [2, 2, 2, 2]


@pytest.mark.parametrize("policy", ["reset", "keep"])
def test_a_run_resumed_inside_a_period_is_bit_identical(policy):
    config = lt.LisaConfig(1, 3, "balanced", optimizer_state=policy, warmup_steps=2)
    whole = llama(layers=4)
    optimizers = muon_and_adamw(whole)
    with Lisa(whole, optimizers, config) as engine:
        train(whole, optimizers, engine, range(5))
        saved = (
            {n: p.clone() for n, p in whole.state_dict().items()},
            [optimizer.state_dict() for optimizer in optimizers],
            engine.state_dict(),
        )
        saved[1][:] = [torch.load(_through_a_file(s), weights_only=True) for s in saved[1]]
        train(whole, optimizers, engine, range(5, 10))
    again = llama(layers=4)
    resumed = muon_and_adamw(again)
    with Lisa(again, resumed, config) as engine:
        again.load_state_dict(saved[0])
        for optimizer, state in zip(resumed, saved[1], strict=True):
            optimizer.load_state_dict(state)
        engine.load_state_dict(saved[2])
        train(again, resumed, engine, range(5, 10))
    assert same(whole, again)


def _through_a_file(state):
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_fp32_tensors_of_several_optimizers_come_back_to_the_bit():
    model = llama(layers=3).bfloat16()
    optimizers = muon_and_adamw(model)
    config = lt.LisaConfig(1, 3, precision="fp32_active")
    with Lisa(model, optimizers, config) as engine:
        train(model, optimizers, engine, range(2))
        saved, state = torch.load(_through_a_file(engine.tensors())), engine.state_dict()
        held = {n: (p.clone(), exact(p).clone()) for n, p in model.named_parameters()}
        train(model, optimizers, engine, [2])
        after = {n: (p.clone(), exact(p).clone()) for n, p in model.named_parameters()}
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(held[name][0])
        engine.load_state_dict(state)
        engine.load_tensors(saved)
        assert all(torch.equal(exact(p), held[n][1]) for n, p in model.named_parameters())
        train(model, optimizers, engine, [2])
        assert all(torch.equal(exact(p), after[n][1]) for n, p in model.named_parameters())
        assert all(torch.equal(p, after[n][0]) for n, p in model.named_parameters())


def test_a_draw_tells_the_share_that_trains_and_the_bytes_that_are_held():
    model = llama(layers=4)
    optimizers = muon_and_adamw(model)
    draws = []
    with Lisa(model, optimizers, lt.LisaConfig(1, 2), on_draw=draws.append) as engine:
        for step in range(6):
            engine.begin_step(step)
            if step % 2 == 0:
                active = [p for p in model.parameters() if p.requires_grad]
                share = sum(p.numel() for p in active) / sum(p.numel() for p in model.parameters())
                assert draws[-1].trainable_share == share
                assert draws[-1].state_bytes == bytes_of(optimizers)
            train(model, optimizers, engine, [step])
        assert draws[0].state_bytes == 0 < draws[1].state_bytes
        visits = np.bincount([i for d in draws for i in d.layers], minlength=4).tolist()
        assert engine.coverage == {
            "layer_visits": visits,
            "layers_never_drawn": [i for i in range(4) if not visits[i]],
        }


@pytest.mark.parametrize("policy", ["keep", "offload"])
def test_bytes_of_kept_state_are_those_of_every_tensor_that_has_any(policy):
    model = llama(layers=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    draws = []
    config = lt.LisaConfig(1, 1, "cyclic", optimizer_state=policy, always_active=())
    with Lisa(model, optimizer, config, on_draw=draws.append) as engine:
        train(model, [optimizer], engine, range(4))
        numbers = [[model.get_parameter(n).numel() for n in names]
                   for names in engine.layer_map.layers]  # fmt: skip
    # A momentum of four bytes an element; on this machine host and device are one.
    seen = [4 * sum(numbers[d.layers[0]]) for d in draws[:3]]
    assert [d.state_bytes for d in draws] == [0, seen[0], sum(seen[:2]), sum(seen)]


def test_trainer_holds_a_wrapper_of_two_and_resumes_from_it(tmp_path):
    config = lt.LisaConfig(1, 3, "balanced", optimizer_state="keep")

    def make(model, folder, **changes):
        optimizer = Together(muon_and_adamw(model))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8} | changes
        trainer = Trainer(
            model, arguments(folder, **settings), train_dataset=examples(),
            optimizers=(optimizer, scheduler),
        )  # fmt: skip
        record = lt.RecordConfig(str(folder / f"run-{model.seed}"), every=1)
        return trainer, lt.attach(trainer, lisa=config, record=record)

    whole, again = llama(layers=4), llama(layers=4)
    whole.seed, again.seed = 0, 1
    trainer, attached = make(whole, tmp_path)
    trainer.train()
    engine = attached.engine_callback.engine
    assert (engine.visits > 0).sum() == 3
    resumed, _ = make(again, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(whole, again)
    run = load(tmp_path / "run-0")
    metrics = run.metrics()
    table = run.parameters.set_index("param_id")
    last = metrics[(metrics["step"] == 8) & metrics["opt_steps"].notna()]
    counted = dict(zip(table.loc[last["param_id"], "name"], last["opt_steps"], strict=True))
    # Muon keeps no count of its steps; AdamW, the second of the two, does.
    assert counted["lm_head.weight"] == 8
    assert not any("proj" in name for name in counted)


def test_a_recorder_reads_a_list_of_optimizers(tmp_path):
    model = llama()
    optimizers = muon_and_adamw(model)
    config = lt.RecordConfig(str(tmp_path / "run"), every=1)
    with lt.NormRecorder(model, optimizers, config) as recorder:
        for step in range(1, 4):
            model(**batch(step)).loss.backward()
            recorder.before_step(step)
            for optimizer in optimizers:
                optimizer.step()
            recorder.after_step(step)
            model.zero_grad()
    run = load(tmp_path / "run")
    table, metrics = run.parameters, run.metrics()
    norm = table.loc[table["name"] == "model.norm.weight", "param_id"].item()
    rows = metrics[metrics["param_id"] == norm]
    assert rows["opt_steps"].dropna().tolist() == [1, 2, 3]
    assert run.scalars["learning_rate"].tolist() == [1e-2] * 3


# ---------------------------------------------------------------------- refusals


def test_every_tensor_is_in_exactly_one_optimizer_or_named():
    model = llama()
    matrices, rest = matrices_and_rest(model)
    muon = torch.optim.Muon(matrices, lr=1e-2)
    with pytest.raises(ConfigError, match=r"the optimizer lacks 9 .*embed_tokens.*a list of opt"):
        Lisa(model, muon, lt.LisaConfig(1))
    partly = torch.optim.AdamW(rest[1:], lr=1e-2)
    with pytest.raises(ConfigError, match=r"the optimizers lack 1 of .* \(first: model.embed_tok"):
        Lisa(model, [muon, partly], lt.LisaConfig(1))
    doubly = torch.optim.AdamW([*rest, matrices[0]], lr=1e-2)
    with pytest.raises(ConfigError, match=r"1 tensors are in more than one .* of the optimizers "):
        Lisa(model, [muon, doubly], lt.LisaConfig(1))
    with pytest.raises(ConfigError, match="empty list of optimizers"):
        Lisa(model, [], lt.LisaConfig(1))
    with pytest.raises(ConfigError, match="got str"):
        Lisa(model, [muon, "adamw"], lt.LisaConfig(1))
    assert all(p.requires_grad for p in model.parameters())


def test_an_optimizer_that_moves_all_its_tensors_together_is_refused():
    model = llama()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"LBFGS moves all its tensors together .* AdamW or Muon"):
        Lisa(model, optimizer, lt.LisaConfig(1))


class Prodigy(torch.optim.SGD):
    """Has the groups of prodigyopt's, which estimates one step size `d` for all tensors."""

    def __init__(self, params):
        super().__init__(params, lr=1.0)
        for group in self.param_groups:
            group.update(d=1e-6, d0=1e-6, k=0, growth_rate=float("inf"))


class Sharpness(torch.optim.SGD):
    """Steps through another optimizer, as sharpness-aware minimisation does."""

    def __init__(self, params):
        super().__init__(params, lr=1.0)
        self.base_optimizer = torch.optim.AdamW(self.param_groups)


class Layerwise(torch.optim.SGD):
    """Steps inside the backward pass, as GaLore's layerwise form in transformers."""

    def __init__(self, params):
        super().__init__(params, lr=1.0)
        self.optimizer_dict = {}


class Eager(torch.optim.SGD):
    """Decays every tensor, whether it has a gradient or not."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                with torch.no_grad():
                    p.mul_(0.99)


ODD = [
    (Prodigy, "estimates one step size"),
    (Sharpness, "another optimizer \\(its 'base_optimizer'\\)"),
    (Layerwise, "steps inside the backward pass by itself"),
    (torch.optim.ASGD, "averaged weights in its state"),
    (lambda p: Adafactor(p, warmup_init=True), "warmup_init starts every tensor"),
]


@pytest.mark.parametrize(("make", "words"), ODD)
def test_others_whose_steps_cannot_be_followed_are_refused(make, words):
    model = llama()
    with pytest.raises(ConfigError, match=words):
        Lisa(model, make(model.parameters()), lt.LisaConfig(1))


@pytest.mark.parametrize("make", [torch.optim.ASGD, lambda p: Adafactor(p, warmup_init=True)])
def test_what_resetting_would_spoil_can_be_kept(make):
    model = llama()
    optimizer = make(list(model.parameters()))
    with Lisa(model, optimizer, lt.LisaConfig(1, 1, optimizer_state="keep")) as engine:
        train(model, [optimizer], engine, range(2))


@pytest.mark.parametrize("make", [torch.optim.Adafactor, torch.optim.Rprop, torch.optim.NAdam])
def test_the_rest_of_torchs_is_not(make):
    model = llama()
    optimizer = make(model.parameters(), lr=1e-3)
    with Lisa(model, optimizer, lt.LisaConfig(1, 1)) as engine:
        train(model, [optimizer], engine, range(2))


def test_an_optimizer_that_moves_resting_tensors_stops_at_its_first_step():
    model = llama()
    optimizer = Eager(model.parameters(), lr=0.1)
    with Lisa(model, optimizer, lt.LisaConfig(1, 1, always_active=())) as engine:
        engine.begin_step(0)
        model(**batch(0)).loss.backward()
        with pytest.raises(ConfigError, match=r"Eager wrote to \d+ tensors that rest"):
            optimizer.step()


def test_what_takes_one_optimizer_says_so():
    model = llama()
    optimizers = muon_and_adamw(model)
    with pytest.raises(ConfigError, match=r"takes one optimizer, got 2 \(of Muon, AdamW\)"):
        lt.StepInBackward(optimizers)
    with pytest.raises(ConfigError, match=r"there are 2 optimizers \(of Muon, AdamW\)"):
        set_eight_bit_states(Together(optimizers), model, find_layers(model), ["layers"])
