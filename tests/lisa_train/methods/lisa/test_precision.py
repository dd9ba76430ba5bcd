"""Active layers in fp32 inside a bf16 model: rounding, training, resume."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_analysis.rundir.opening import load
from lisa_train.methods.lisa.engine import Lisa
from lisa_train.methods.lisa.precision import stochastic_round

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


def test_stochastic_rounding_takes_one_of_the_two_neighbours_and_is_exact_on_average():
    values = torch.cat([torch.randn(500), 1e-3 * torch.randn(500), torch.tensor([3.0e38, 1e-38])])
    below = (values.view(torch.int32) & -65536).view(torch.float32)  # towards zero
    above = ((values.view(torch.int32) & -65536) + 65536).view(torch.float32)
    generator = torch.Generator().manual_seed(0)
    draws = 4000
    total = torch.zeros_like(values, dtype=torch.float64)
    for _ in range(draws):
        rounded = stochastic_round(values, generator).float()
        assert ((rounded == below) | (rounded == above)).all()
        total += rounded
    share = ((values - below) / (above - below)).double()
    error = (above - below).double().abs() * (share * (1 - share) / draws).sqrt()
    assert ((total / draws - values.double()).abs() <= 5 * error + 1e-30).all()


def test_stochastic_rounding_keeps_what_bf16_holds_and_what_is_not_finite():
    exact = torch.randn(100).bfloat16().float()
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf")])
    generator = torch.Generator().manual_seed(0)
    for values in (exact, special):
        assert torch.equal(stochastic_round(values, generator).float(), values)
    assert stochastic_round(torch.tensor([float("nan")]), generator).isnan().all()


def test_active_tensors_are_fp32_and_the_rest_is_bf16(make_llama):
    model = make_llama(layers=4).to(torch.bfloat16)
    optimizer = adamw(model)
    with Lisa(model, optimizer, CONFIG) as engine:
        for step in range(9):
            train(model, optimizer, engine, [step])
            for _, p in model.named_parameters():
                assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
            for state in optimizer.state.values():
                assert state["exp_avg"].dtype == torch.float32
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in model.parameters())


def test_compute_runs_in_bf16_with_no_autocast_around(make_llama):
    model = make_llama(layers=4).to(torch.bfloat16)
    seen = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda *a: seen.append(a[-1].dtype))
    optimizer = adamw(model)
    with Lisa(model, optimizer, CONFIG) as engine:
        train(model, optimizer, engine, range(2))
    assert set(seen) == {torch.bfloat16}
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_ends_when_the_forward_pass_fails(make_llama):
    model = make_llama(layers=4).to(torch.bfloat16)
    with Lisa(model, adamw(model), CONFIG) as engine:
        engine.begin_step(0)
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[1000]]))
        assert not torch.is_autocast_enabled("cpu")


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
                (p.detach().float(), before[n].float())
                for n, p in model.named_parameters()
                if p.requires_grad
            ]
            kept[precision] = sum((a - b).norm() ** 2 for a, b in pairs).sqrt().item()
        # frozen again at close: the rounded weights still carry the mean of the movement
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
    """When training ends the active layers are rounded; a checkpoint before has them in fp32."""
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
        assert torch.float32 in {t.dtype for t in saved.values()}
        stay = {n: saved.get(n, stay[n]).double() for n in stay}
    run = load(tmp_path / "run")
    last = run.metrics(["weight_norm", "delta_norm"], steps=[4])
    last = last.merge(run.parameters[["param_id", "name"]], on="param_id").set_index("name")
    assert len(last) == len(stay)
    for name, weight in stay.items():
        moved = float((weight - start[name]).norm())
        assert last.loc[name, "delta_norm"] == pytest.approx(moved, rel=1e-5, abs=1e-12), name
        assert last.loc[name, "weight_norm"] == pytest.approx(float(weight.norm()), rel=1e-5), name
    said = run.events["message"].dropna()
    assert said.str.contains("rounded").sum() == (save == "steps")


def test_layer_norms_that_rest_take_fp32_from_layers_that_train():
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
