"""Active layers in fp32 inside a bf16 model: rounding, training, resume."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.optimization import Adafactor

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_analysis.rundir.opening import load
from lisa_train.estimate.trace import StorageLog
from lisa_train.methods.lisa.engine import Lisa
from lisa_train.model.master_copies import exact
from lisa_train.optim import rounding as module
from lisa_train.optim import step_copies
from lisa_train.optim.rounding import add_exactly, mixed, stochastic_round

CONFIG = lt.LisaConfig(1, 3, "cyclic", precision="fp32_active")


def batch(step):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 64, (4, 8), generator=generator)
    return {"input_ids": ids, "labels": ids}


def train(model, optimizer, engine, steps):
    losses = []
    for step in steps:
        engine.begin_step(step)
        loss = model(**batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adamw(model, lr=1e-3):
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_that_nothing_needs_are_said(make_llama, dtype):
    model, said = make_llama(layers=2).to(dtype), []
    with Lisa(model, adamw(model), CONFIG, on_notice=said.append):
        pass
    assert any("'fp32_active' and has no effect" in text for text in said) == (
        dtype == torch.float32
    )


def test_stochastic_rounding_takes_one_of_the_two_neighbours_and_is_exact_on_average():
    values = torch.cat([torch.randn(500), 1e-3 * torch.randn(500), torch.tensor([3.0e38, 1e-38])])
    below = (values.view(torch.int32) & -65536).view(torch.float32)  # towards zero
    above = ((values.view(torch.int32) & -65536) + 65536).view(torch.float32)
    draws = 4000
    total = torch.zeros_like(values, dtype=torch.float64)
    for draw in range(draws):
        rounded = stochastic_round(values, mixed([draw])).float()
        assert ((rounded == below) | (rounded == above)).all()
        total += rounded
    share = ((values - below) / (above - below)).double()
    error = (above - below).double().abs() * (share * (1 - share) / draws).sqrt()
    assert ((total / draws - values.double()).abs() <= 5 * error + 1e-30).all()


def test_stochastic_rounding_keeps_what_bf16_holds_and_what_is_not_finite():
    exact = torch.randn(100).bfloat16().float()
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf")])
    for values in (exact, special):
        assert torch.equal(stochastic_round(values, 7).float(), values)
    assert stochastic_round(torch.tensor([float("nan")]), 7).isnan().all()


def test_the_random_bits_are_uniform_and_those_of_an_element_follow_from_its_place(monkeypatch):
    n = 1 << 18
    bits = module._random_bits(torch.empty(n), mixed([1, 2]), 0)
    assert (bits.min(), bits.max()) == (0, 0xFFFF)
    counts = torch.bincount(bits >> 8, minlength=256).double()  # chi-squared of 255 degrees
    assert 180 < float(((counts - n / 256) ** 2 / (n / 256)).sum()) < 350
    centred = bits.double() - bits.double().mean()
    for lag in (1, 2, 64):  # uncorrelated with neighbours, and with another key's
        assert abs(float((centred[lag:] * centred[:-lag]).mean() / centred.var())) < 0.01
    other = module._random_bits(torch.empty(n), mixed([1, 3]), 0).double()
    assert abs(float((centred * (other - other.mean())).mean() / centred.var())) < 0.01
    values = torch.randn(5000)
    whole = stochastic_round(values, 5)
    assert torch.equal(stochastic_round(values[1234:], 5, 1234), whole[1234:])
    monkeypatch.setattr(module, "_CHUNK", 100)
    assert torch.equal(stochastic_round(values, 5), whole)
    far = module._random_bits(torch.empty(50), 5, 2**32 - 10)
    assert not torch.equal(far, module._random_bits(torch.empty(50), 5, -10))


def test_what_trains_has_an_fp32_copy_and_no_parameter_ever_changes(make_llama):
    model = make_llama(layers=4).to(torch.bfloat16)
    optimizer = adamw(model)
    known = [(p, p.data_ptr()) for p in model.parameters()]
    seen = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda *a: seen.append(a[-1].dtype))
    with Lisa(model, optimizer, CONFIG) as engine:
        for step in range(9):
            train(model, optimizer, engine, [step])
            for p, place in known:
                assert p.dtype == torch.bfloat16
                assert p.data_ptr() == place
                assert (exact(p) is p) != p.requires_grad
                if p.requires_grad:  # the copy, or one of its two neighbours
                    assert exact(p).dtype == torch.float32
                    error = (p.float() - exact(p)).abs()
                    assert (error <= exact(p).abs() * 2**-7).all()
            for p, state in optimizer.state.items():
                assert p.requires_grad
                assert state["exp_avg"].dtype == torch.float32
            assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [
                id(p) for p, _ in known
            ]
    assert all(exact(p) is p and p.requires_grad for p, _ in known)
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("policy", ["reset", "keep"])
def test_the_copies_are_those_of_plain_adamw_in_fp32_on_the_same_gradients(make_llama, policy):
    model = make_llama(layers=3).to(torch.bfloat16)
    config = lt.LisaConfig(1, 2, "cyclic", optimizer_state=policy, precision="fp32_active")
    optimizer = adamw(model)
    plain, theirs = {}, {}
    with Lisa(model, optimizer, config) as engine:
        for step in range(8):
            engine.begin_step(step)
            model(**batch(step)).loss.backward()
            active = [p for p in model.parameters() if p.requires_grad]
            for p in list(plain):
                if not p.requires_grad:
                    del plain[p]
                    if policy == "reset":
                        del theirs[p]
            for p in active:
                if p not in plain:
                    plain[p] = torch.nn.Parameter(p.detach().float().clone())
                    old = theirs.get(p)
                    theirs[p] = torch.optim.AdamW([plain[p]], lr=1e-3, weight_decay=0.1)
                    if old is not None:
                        theirs[p].load_state_dict(old.state_dict())
                plain[p].grad = p.grad.float()
                theirs[p].step()
            optimizer.step()
            optimizer.zero_grad()
            for p in active:
                torch.testing.assert_close(exact(p), plain[p].detach(), rtol=1e-6, atol=1e-8)


def test_a_step_that_failed_leaves_the_optimizer_as_it_was(make_llama):
    model = make_llama(layers=2).to(torch.bfloat16)
    optimizer = adamw(model)
    with Lisa(model, optimizer, CONFIG) as engine:
        engine.begin_step(0)
        model(**batch(0)).loss.backward()
        with pytest.raises(ConfigError, match="is given a closure, and lisa"):
            optimizer.step(lambda: 0.0)
        rate = optimizer.param_groups[0]["lr"]
        optimizer.param_groups[0]["lr"] = "a word"
        with pytest.raises((TypeError, ValueError)):
            optimizer.step()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        own = {id(p) for p in model.parameters()}
        assert {id(p) for g in optimizer.param_groups for p in g["params"]} == own
        assert {id(p) for p in optimizer.state} <= own
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_compiled_code_and_hooks_go_on_working(make_llama):
    model = make_llama(layers=2).to(torch.bfloat16)
    arrived = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: arrived.append(id(p)))
    optimizer = adamw(model)
    with Lisa(model, optimizer, lt.LisaConfig(2, 1, precision="fp32_active")) as engine:
        for step in range(3):
            arrived.clear()
            train(model, optimizer, engine, [step])
            assert set(arrived) == {id(p) for p in model.parameters()}


def test_small_updates_survive_that_pure_bf16_rounds_away(make_llama):
    kept = {}
    for precision in ("model", "fp32_active"):
        model = make_llama(layers=4).to(torch.bfloat16)
        with torch.no_grad():  # weights of the size of a trained model's
            for p in model.parameters():
                p.copy_(torch.sign(p) * p.abs().clamp(min=0.01))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        config = lt.LisaConfig(1, 20, always_active=(), precision=precision)
        with Lisa(model, optimizer, config) as engine:
            train(model, optimizer, engine, range(20))
            pairs = [
                (exact(p).detach().float(), before[n].float())
                for n, p in model.named_parameters()
                if p.requires_grad
            ]
            kept[precision] = sum((a - b).norm() ** 2 for a, b in pairs).sqrt().item()
        # the rounded weights still carry the mean of the movement
        if precision == "fp32_active":
            shift = torch.cat(
                [
                    (p.detach().float() - before[n].float()).flatten()
                    for n, p in model.named_parameters()
                ]
            )
            assert shift.abs().sum() > 0
    assert kept["model"] < 0.5 * kept["fp32_active"]


def test_fp32_models_are_left_alone_and_fp16_is_refused(make_llama):
    plain, mode = make_llama(layers=3), make_llama(layers=3)
    for model, config in (
        (plain, lt.LisaConfig(3, 2, optimizer_state="keep")),
        (mode, lt.LisaConfig(3, 2, optimizer_state="keep", precision="fp32_active")),
    ):
        optimizer = adamw(model)
        with Lisa(model, optimizer, config) as engine:
            engine.begin_step(0)
            assert all(p.dtype == torch.float32 for p in model.parameters())
    half = make_llama(layers=3).to(torch.float16)
    with pytest.raises(ConfigError, match=r"float16.*bfloat16"):
        Lisa(half, adamw(half), CONFIG)


@pytest.mark.parametrize("policy", ["reset", "keep", "offload"])
def test_a_resumed_run_is_bit_identical(make_llama, tmp_path, policy):
    config = lt.LisaConfig(1, 3, "cyclic", optimizer_state=policy, precision="fp32_active")
    model = make_llama(layers=4).to(torch.bfloat16)
    optimizer = adamw(model)
    with Lisa(model, optimizer, config) as engine:
        train(model, optimizer, engine, range(8))
        saved = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "engine": json.dumps(engine.state_dict()),
            "tensors": engine.tensors(),
        }
        torch.save(saved, tmp_path / "checkpoint.pt")
        losses = train(model, optimizer, engine, range(8, 20))
    saved = torch.load(tmp_path / "checkpoint.pt")
    again = make_llama(layers=4, seed=3).to(torch.bfloat16)
    again.load_state_dict(saved["model"])
    resumed = adamw(again)
    resumed.load_state_dict(saved["optimizer"])
    with Lisa(again, resumed, config) as engine:
        engine.load_state_dict(json.loads(saved["engine"]))
        engine.load_tensors(saved["tensors"])
        assert train(again, resumed, engine, range(8, 20)) == losses
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_trainer_run_resumed_inside_a_period_is_bit_identical(make_llama, tmp_path, elsewhere):
    rows = [{k: v[0].tolist() for k, v in batch(i).items()} for i in range(40)]

    def trainer(model):
        arguments = TrainingArguments(
            str(tmp_path / "out"),
            max_steps=10,
            save_steps=5,
            logging_steps=1,
            report_to=[],
            learning_rate=1e-3,
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            per_device_train_batch_size=4,
        )
        made = Trainer(model, arguments, train_dataset=rows)
        lt.attach(made, lisa=CONFIG)
        return made

    model = make_llama(layers=4).to(torch.bfloat16)
    whole = trainer(model)
    whole.train()
    checkpoint = tmp_path / "out" / "checkpoint-5"
    assert (checkpoint / "lisa.pt").is_file()
    if elsewhere:
        checkpoint = checkpoint.rename(tmp_path / "moved")
    again = make_llama(layers=4, seed=3).to(torch.bfloat16)
    resumed = trainer(again)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    tail = [
        [e["loss"] for e in t.state.log_history if "loss" in e and e["step"] > 5]
        for t in (whole, resumed)
    ]
    assert tail[0] == tail[1]
    resumed.save_model(tmp_path / "final")
    loaded = type(model).from_pretrained(tmp_path / "final", dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("save", ["no", "steps"])
def test_the_last_census_is_that_of_the_weights_that_stay(make_llama, tmp_path, save):
    """The weights of the model, which are roundings of what the optimizer moves."""
    make_llama(layers=4).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    start = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    rows = [{k: v[0].tolist() for k, v in batch(i).items()} for i in range(40)]
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=4, save_strategy=save, save_steps=4, report_to=[],
        learning_rate=1e-3, use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    record = lt.RecordConfig(str(tmp_path / "run"), every=1, base_delta=True)
    lt.attach(trainer, lisa=CONFIG, record=record)
    trainer.train()
    stay = {n: p.detach().double() for n, p in model.named_parameters()}
    if save == "steps":
        saved = load_file(tmp_path / "out" / "checkpoint-4" / "model.safetensors")
        assert {t.dtype for t in saved.values()} == {torch.bfloat16}
        stay = {n: saved.get(n, stay[n]).double() for n in stay}
    run = load(tmp_path / "run")
    last = run.metrics(["weight_norm", "delta_norm"], steps=[4])
    last = last.merge(run.parameters[["param_id", "name"]], on="param_id").set_index("name")
    assert len(last) == len(stay)
    for name, weight in stay.items():
        moved = float((weight - start[name]).norm())
        assert last.loc[name, "delta_norm"] == pytest.approx(moved, rel=1e-5, abs=1e-12), name
        assert last.loc[name, "weight_norm"] == pytest.approx(float(weight.norm()), rel=1e-5), name


@pytest.mark.parametrize("precision", ["model", "fp32_active"])
def test_the_recorded_update_is_that_of_the_copies(make_llama, tmp_path, precision):
    """Not the roundings, which are several times larger than a small update."""
    model = make_llama(layers=3).to(torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.sign(p) * p.abs().clamp(min=0.01))
    config = lt.LisaConfig(1, 2, precision=precision)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    record = lt.RecordConfig(str(tmp_path / "run"), every=1)
    rows = {}
    with (
        Lisa(model, optimizer, config) as engine,
        lt.NormRecorder(model, optimizer, record) as recorder,
    ):
        for step in range(1, 5):
            engine.begin_step(step - 1)
            model(**batch(step)).loss.backward()
            rows[step] = {
                n: 1e-2 * float(p.grad.double().norm())
                for n, p in model.named_parameters()
                if p.grad is not None
            }
            recorder.before_step(step)
            optimizer.step()
            recorder.after_step(step)
            optimizer.zero_grad()
    run = load(tmp_path / "run")
    found = run.metrics(["update_norm", "descent", "grad_norm"])
    found = found.merge(run.parameters[["param_id", "name"]], on="param_id")
    found = found[found["update_norm"].notna()].set_index(["step", "name"])
    assert len(found) == sum(map(len, rows.values()))
    ratio = [found.loc[(s, n), "update_norm"] / rows[s][n] for s in rows for n in rows[s]]
    if precision == "fp32_active":
        assert ratio == pytest.approx([1.0] * len(ratio), rel=0.02)  # fp32 of weights of 0.01
        square = found["grad_norm"].to_numpy() ** 2 * 1e-2
        assert found["descent"].to_numpy() == pytest.approx(square, rel=0.02)
    else:
        assert min(ratio) < 0.5


def test_a_model_with_layer_norms_trains_as_in_fp32():
    """GPT-2's norms: the CPU mixes neither fp32 with bf16 weights nor casts them."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=64, n_embd=16, n_layer=4, n_head=2, n_positions=16, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).to(torch.bfloat16).to(dtype)
        optimizer = adamw(model, 1e-2)
        settings = CONFIG if dtype == torch.bfloat16 else lt.LisaConfig(1, 3, "cyclic")
        with Lisa(model, optimizer, settings) as engine:
            losses[dtype] = train(model, optimizer, engine, range(6))
        hooks = [m for m in model.modules() if m._forward_pre_hooks]
        assert hooks == []
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.01)
    assert losses[torch.float32][-1] < losses[torch.float32][0]


def in_groups(model, make, steps=4):
    """Train with copies; return every exact weight, the optimizer's state and hooks that fired."""
    optimizer, fired = make(model.parameters()), []
    optimizer.register_step_pre_hook(lambda *_: fired.append("before"))
    optimizer.register_step_post_hook(lambda *_: fired.append("after"))
    config = lt.LisaConfig(2, 2, "cyclic", optimizer_state="keep", precision="fp32_active")
    with Lisa(model, optimizer, config) as engine:
        train(model, optimizer, engine, range(steps))
        weights = [exact(p).detach().clone() for p in model.parameters()]
        held = optimizer.state_dict()["state"]
    state = [held[i][k] for i in sorted(held) for k in sorted(held[i])]
    return weights, [value for value in state if torch.is_tensor(value)], fired


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "Adafactor": lambda p: Adafactor(p, lr=1e-3, scale_parameter=False, relative_step=False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_tensors_step_in_groups_and_nobody_can_tell(make_llama, monkeypatch, name):
    base = make_llama(layers=3).to(torch.bfloat16)
    found = []
    for together in (1, 3000, 1 << 24):
        monkeypatch.setattr(step_copies, "TOGETHER", together)
        found.append(in_groups(copy.deepcopy(base), OPTIMIZERS[name]))
    for weights, state, fired in found[:2]:
        assert all(map(torch.equal, weights, found[2][0]))
        assert len(state) == len(found[2][1]) > 0
        assert all(map(torch.equal, state, found[2][1]))
        assert fired == ["before", "after"] * 4


def test_an_optimizer_of_somebody_else_steps_all_copies_at_once(make_llama, monkeypatch):
    """It may keep a number for the whole step, which several steps of parts would count up."""
    calls = []

    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            calls.append(sum(p.grad is not None for g in self.param_groups for p in g["params"]))
            return super().step(closure)

    monkeypatch.setattr(step_copies, "TOGETHER", 1)
    model = make_llama(layers=2).to(torch.bfloat16)
    in_groups(model, lambda p: Counting(p, lr=1e-2), steps=2)
    assert calls == [len(list(model.parameters()))] * 2


def test_a_step_takes_the_fp32_gradients_of_one_group_and_no_more(make_llama, monkeypatch):
    """16 bytes a weight, and those of a group: a gradient in fp32 is made when its tensor steps."""
    monkeypatch.setattr(step_copies, "TOGETHER", 1)
    monkeypatch.setattr(module, "_CHUNK", 64)
    model = make_llama(layers=4).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    config = lt.LisaConfig(4, 1, precision="fp32_active")
    log = StorageLog()
    with Lisa(model, optimizer, config) as engine:
        train(model, optimizer, engine, range(1))  # state is there
        engine.begin_step(1)
        model(**batch(1)).loss.backward()
        for p in model.parameters():
            for known in (p, p.grad, exact(p), *optimizer.state[p].values()):
                log.note(known, 0, 0)
        start = log.clock
        with log:
            optimizer.step()
    most = max(p.numel() for p in model.parameters())
    every = sum(p.numel() for p in model.parameters())
    live = log.freeze({}).live()
    peak = int(live[start:].max() - live[start])
    assert 4 * most <= peak <= 4 * most + 64 * 64  # the rounding's chunks
    assert peak < every


def test_a_group_that_fails_leaves_the_optimizer_as_it_was(make_llama, monkeypatch):
    monkeypatch.setattr(step_copies, "TOGETHER", 1)
    model = make_llama(layers=2).to(torch.bfloat16)
    optimizer = adamw(model)
    own = [id(p) for p in model.parameters()]
    with Lisa(model, optimizer, CONFIG) as engine:
        train(model, optimizer, engine, range(1))
        engine.begin_step(1)
        model(**batch(1)).loss.backward()
        gradients = {p: p.grad for p in model.parameters() if p.grad is not None}
        rate, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], "a word"
        with pytest.raises((TypeError, ValueError)):
            optimizer.step()
        assert [id(p) for g in optimizer.param_groups for p in g["params"]] == own
        assert {p: p.grad for p in model.parameters() if p.grad is not None} == gradients
        assert {id(p) for p in optimizer.state} == {id(p) for p in gradients}
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        assert [id(p) for g in optimizer.param_groups for p in g["params"]] == own


def test_micro_batches_are_added_in_fp32(make_llama):
    """And rounded once: in bf16 what is small beside the sum would be lost."""
    model = make_llama(layers=2).to(torch.bfloat16)
    optimizer = adamw(model)
    with Lisa(model, optimizer, lt.LisaConfig(1, 2, precision="fp32_active")) as engine:
        sums = engine._active._master_weights._sums
        for step in range(2):
            engine.begin_step(step)
            alone, plain, size = {}, {}, {}
            for number in range(8):
                before = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
                arrived = {}
                handles = [
                    p.register_hook(lambda g, p=p, to=arrived: to.update({p: g.clone()}))
                    for p in model.parameters()
                    if p.requires_grad
                ]
                model(**batch(8 * step + number)).loss.backward()
                assert (sums.bytes() > 0) == (number > 0)
                for handle in handles:
                    handle.remove()
                for p, g in arrived.items():
                    alone[p] = g.float() if p not in alone else alone[p] + g.float()
                    plain[p] = g if p not in before else plain[p] + g
                    size[p] = size.get(p, 0) + g.float().abs()
            active = [p for p in model.parameters() if p.requires_grad]
            assert sums.bytes() == 2 * sum(p.numel() for p in active)
            lost = {"ours": 0.0, "bf16": 0.0}
            for p in active:
                error = (p.grad.double() - alone[p].double()).abs()
                allowed = alone[p].double().abs() * 2**-8 + 8 * 2**-23 * size[p].double()
                assert (error <= allowed).all()
                lost["ours"] += float(error.square().sum())
                lost["bf16"] += float((plain[p].double() - alone[p].double()).square().sum())
            assert lost["ours"] < lost["bf16"] / 3
            optimizer.step()
            optimizer.zero_grad()
            assert sums.bytes() == 0


def test_sums_of_bf16_and_16_bits_are_those_of_fp32():
    torch.manual_seed(0)
    added = [torch.randn(5000).bfloat16() * 10.0 ** (i % 3) for i in range(40)]
    held, rest, total = added[0], torch.zeros(5000, dtype=torch.int16), added[0].float()
    for gradient in added[1:]:
        held, total = add_exactly(held, rest, gradient), total + gradient.float()
        assert (held == total.bfloat16()).float().mean() > 0.99
        together = (held.float().view(torch.int32) + rest).view(torch.float32)
        size = torch.stack([g.float().abs() for g in added]).sum(0)
        assert ((together.double() - total.double()).abs() <= 40 * 2**-23 * size).all()
    one, two = torch.arange(1, 3, 2**-7).bfloat16(), torch.arange(3, 1, -(2**-7)).bfloat16()
    rest = torch.zeros(len(one), dtype=torch.int16)
    assert torch.equal(
        add_exactly(one, rest, two[: len(one)]), one + two[: len(one)]
    )  # halfway too
    odd = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 3.39e38])
    half, rest = odd.bfloat16(), torch.zeros(6, dtype=torch.int16)
    assert torch.equal(add_exactly(half, rest, torch.zeros(6)).isnan(), odd.isnan())
    assert torch.equal(add_exactly(half, rest, torch.zeros(6)).nan_to_num(7), half.nan_to_num(7))
