"""Every recorded number against float64 recomputation in a real Trainer."""

import copy

import numpy as np
import pytest
import torch
from helpers_adapters import merged_weights
from helpers_recording import (
    Witness,
    arguments,
    compare,
    examples,
    llama,
    mixtral,
    t5,
)

import lisa_train as lt
from lisa_analysis.metrics.step_tables import step_table
from lisa_analysis.rundir.opening import load

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")


def record(folder, model, *, lisa=None, record=None, **changes):
    trainer = Witness(model, arguments(folder / "out", **changes), train_dataset=examples())
    settings = {"run_dir": str(folder / "run"), "every": 1, **(record or {})}
    lt.attach(trainer, lisa=lisa, record=lt.RecordConfig(**settings))
    trainer.train()
    return trainer, folder / "run"


@pytest.mark.parametrize("clip", [0.0, 0.05], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_precision_accumulation_and_clipping(tmp_path, dtype, accumulation, clip):
    trainer, path = record(
        tmp_path, llama().to(dtype), gradient_accumulation_steps=accumulation,
        max_grad_norm=clip, adam_epsilon=1e-4,
    )  # fmt: skip
    run = compare(path, trainer)
    logged = {line["step"]: line for line in trainer.state.log_history if "loss" in line}
    total = run.metrics(["grad_norm"]).groupby("step")["grad_norm"].agg(lambda x: (x**2).sum())
    for line in run.scalars.itertuples():
        exact = np.sqrt(sum(float(g.norm() ** 2) for g in
                            trainer.seen[line.step]["gradient"].values()))  # fmt: skip
        assert np.sqrt(total[line.step]) == pytest.approx(exact, rel=1e-5)
        # Trainer adds up half-precision gradients in half precision.
        assert line.grad_norm == pytest.approx(exact, rel=1e-5 if dtype == torch.float32 else 1e-2)
        assert line.grad_norm == logged[line.step]["grad_norm"]
        assert line.loss == pytest.approx(trainer.losses[line.step], rel=1e-6)
        assert line.loss == pytest.approx(logged[line.step]["loss"], rel=1e-6)
        assert line.learning_rate == logged[line.step]["learning_rate"]
        expected = min(1.0, clip / (line.grad_norm + 1e-6)) if clip else 1.0
        assert line.clip_coef == pytest.approx(expected, rel=1e-2 if clip else 0)
        assert line.tokens == trainer.tokens[line.step]
        assert line.recorder_seconds > 0
        assert line.step_seconds > 0
        assert line.skipped is False


def test_tied_weights_are_one_tensor(tmp_path):
    trainer, path = record(tmp_path, llama(tied=True))
    run = compare(path, trainer)
    tied = run.parameters[run.parameters["tied_to"].notna()]
    assert tied["name"].tolist() == ["lm_head.weight"]
    [owner] = run.parameters.loc[run.parameters["param_id"] == tied["tied_to"].iloc[0], "name"]
    assert owner == "model.embed_tokens.weight"
    assert not run.metrics()["param_id"].isin(tied["param_id"]).any()


@pytest.mark.parametrize("model", [mixtral, t5], ids=["mixture-of-experts", "encoder-decoder"])
def test_other_architectures(tmp_path, model):
    trainer, path = record(tmp_path, model(), max_steps=3)
    run = compare(path, trainer)
    assert run.n_layers == (2 if model is mixtral else 4)


def test_lisa_records_active_tensors_between_censuses(tmp_path):
    lisa = lt.LisaConfig(activated_layers=1, interval_steps=2, sampling="cyclic")
    trainer, path = record(tmp_path, llama(), lisa=lisa, max_steps=6)
    run = compare(path, trainer)
    frame = run.metrics().merge(run.parameters[["param_id", "layer"]], on="param_id")
    draws = run.events[run.events["event"] == "lisa_draw"]
    assert draws["step"].tolist() == [0, 2, 4]
    for step in range(1, 6):
        active = draws["layers"].iloc[(step - 1) // 2]
        assert set(frame.loc[frame["step"] == step, "layer"].dropna()) == set(active)
    # The optimizer state of a layer begins anew when it is drawn (reset), that of the rest not.
    steps = frame[frame["step"].between(1, 6) & frame["grad_norm"].notna()]
    inside = steps[steps["layer"].notna()]
    assert (inside["opt_steps"] == (inside["step"] - 1) % 2 + 1).all()
    outside = steps[steps["layer"].isna()]
    assert (outside["opt_steps"] == outside["step"]).all()
    assert (frame.groupby("step").size()[[0, 6]] == len(run.parameters)).all()


def test_frozen_weights_are_constant_to_the_bit(tmp_path):
    model = llama()
    model.model.layers[1].requires_grad_(False)
    trainer, path = record(tmp_path, model)
    run = compare(path, trainer)
    frozen = run.parameters.loc[run.parameters["layer"] == 1, "param_id"]
    frame = run.metrics(layers=1)
    assert frame["step"].unique().tolist() == [0, 4]
    assert set(frame["param_id"]) == set(frozen)
    assert (frame.groupby("param_id")["weight_norm"].nunique() == 1).all()
    assert frame["grad_norm"].isna().all()


def lora(model, **changes):
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(**{**settings, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": False, "target_modules": ["embed_tokens", "o_proj", "lm_head"]},
        {"modules_to_save": ["lm_head"], "bias": "all"},
    ],
    ids=["plain", "rslora", "pissa", "orthogonal", "embedding", "modules_to_save"],
)
def test_lora_products_agree_with_dense_ones(tmp_path, changes):
    model = lora(llama(), **changes)
    initial = merged_weights(model)
    trainer, path = record(tmp_path, model, max_steps=3)
    run = compare(path, trainer)
    assert run.method == "lora"
    frame = run.metrics().merge(run.parameters[["param_id", "name", "role"]], on="param_id")
    on_b = frame[frame["delta_norm"].notna()]
    assert set(on_b["role"]) == {"lora_B"}
    for step, expected in ((0, initial), (3, merged_weights(model))):
        rows = on_b[on_b["step"] == step].set_index("name")
        assert set(rows.index) == set(expected)
        for name, weight in expected.items():
            delta = float((weight - initial[name]).norm())
            assert rows.loc[name, "delta_norm"] == pytest.approx(delta, rel=1e-5)
            assert rows.loc[name, "merged_norm"] == pytest.approx(float(weight.norm()), rel=1e-5)
    assert len(on_b) == 4 * len(initial)
    # What takes the base weights is measured in censuses.
    assert set(frame.loc[frame["merged_norm"].notna(), "step"]) == {0, 3}


def test_the_analysis_finds_adapted_weights_in_a_census_between_recorded_steps(tmp_path):
    model = lora(llama())
    _, path = record(tmp_path, model, max_steps=3, record={"every": 2})
    run = load(path)
    frame = run.metrics(["merged_norm", "grad_norm"]).dropna(subset=["merged_norm"])
    assert set(frame["step"]) == {0, 3}
    assert frame["grad_norm"].isna().all()
    names = dict(zip(run.parameters["name"], run.parameters["layer"], strict=True))
    squares = np.zeros(run.n_layers)
    for name, (_, merged) in dense_products(model).items():
        squares[names[name]] += merged**2
    found = step_table(run).final_merged[: run.n_layers]
    assert found == pytest.approx(np.sqrt(squares), rel=1e-5)


@torch.no_grad()
def dense_products(model):
    """‖ΔW‖ and ‖W + ΔW‖ by PEFT's own dense product, in float64, by the name of B."""
    found = {}
    model = copy.deepcopy(model).double()
    names = {id(p): n for n, p in model.named_parameters()}
    for module in model.modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        if getattr(module.get_base_layer(), "groups", 1) != 1:
            continue  # not a plain product: PEFT's own dense form refuses this one
        second = module.lora_B["default"].weight if "default" in module.lora_B else (
            module.lora_embedding_B["default"])  # fmt: skip
        delta = module.get_delta_weight("default")
        merged = module.get_base_layer().weight + delta
        found[names[id(second)]] = (float(delta.norm()), float(merged.norm()))
    return found


@pytest.mark.parametrize("kind", ["ia3", "vera", "oft"])
def test_other_adapters(tmp_path, kind):
    import peft

    target = ["k_proj", "down_proj"]
    config = {
        "ia3": lambda: peft.IA3Config(target_modules=target, feedforward_modules=["down_proj"]),
        "vera": lambda: peft.VeraConfig(r=4, target_modules=["k_proj"]),
        "oft": lambda: peft.OFTConfig(oft_block_size=4, r=0, target_modules=["k_proj"]),
    }[kind]()
    model = peft.get_peft_model(llama(), config)
    with pytest.warns(
        RuntimeWarning, match=f"are not measured of .*{kind.upper()}.* is no product BA"
    ):
        trainer, path = record(tmp_path, model, max_steps=3)
    run = compare(path, trainer)
    assert run.method == "peft"
    assert run.metrics()["delta_norm"].isna().all()


def test_lora_on_transposed_weights(tmp_path):
    """GPT-2 keeps its matrices transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(
        GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    )
    model = lora(base, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    trainer, path = record(tmp_path, model, max_steps=2)
    run = compare(path, trainer)
    last = run.metrics(["delta_norm", "merged_norm"], steps=[2]).dropna()
    names = dict(zip(run.parameters["param_id"], run.parameters["name"], strict=True))
    expected = dense_products(model)
    assert len(last) == len(expected)
    for row in last.itertuples():
        delta, merged = expected[names[row.param_id]]
        assert row.delta_norm == pytest.approx(delta, rel=1e-5)
        assert row.merged_norm == pytest.approx(merged, rel=1e-5)


def test_lora_on_convolutions():
    from torch import nn

    from lisa_train.measure.adapters.search import find_lora_pairs

    torch.manual_seed(0)
    base = nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, 3, groups=2)
    )
    model = lora(base, target_modules=["0", "2", "3"], init_lora_weights=False, r=2)
    pairs = find_lora_pairs(model)
    expected = dense_products(model)
    assert [pair.name_b for pair in pairs] == list(expected)
    for pair in pairs:
        delta, merged = expected[pair.name_b]
        assert float(pair.delta_square().sqrt()) == pytest.approx(delta, rel=1e-6)
        assert float(pair.merged_square().sqrt()) == pytest.approx(merged, rel=1e-6)


def test_lora_on_fused_experts(tmp_path):
    """PEFT adapts the three-dimensional weights of experts by bare parameters."""
    model = lora(
        mixtral(), target_modules=["q_proj"], init_lora_weights=False,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    initial = expert_deltas(model)
    with pytest.warns(RuntimeWarning, match="merged_norm is not measured of 2 modules .*experts"):
        trainer, path = record(tmp_path, model, max_steps=2)
    run = compare(path, trainer)
    expected = expert_deltas(model)
    last = run.metrics(["delta_norm", "merged_norm"], steps=[2]).set_index("param_id")
    ids = dict(zip(run.parameters["name"], run.parameters["param_id"], strict=True))
    assert len(expected) == 4
    for name, product in expected.items():
        delta = float((product - initial[name]).norm())
        assert last.loc[ids[name], "delta_norm"] == pytest.approx(delta, rel=1e-5)
        assert np.isnan(last.loc[ids[name], "merged_norm"])


@torch.no_grad()
def expert_deltas(model):
    model = copy.deepcopy(model).double()
    names = {id(p): n for n, p in model.named_parameters()}
    return {
        names[id(module.lora_B["default"].weight)]: module.get_delta_weight("default")
        for module in model.modules()
        if hasattr(module, "parameter_name")
    }


def test_non_finite_values_are_kept(tmp_path):
    class Explodes(Witness):
        def training_step(self, model, inputs, *args, **kwargs):
            loss = super().training_step(model, inputs, *args, **kwargs)
            if self.state.global_step == 1:
                model.model.layers[0].mlp.up_proj.weight.grad[0, 0] = float("inf")
            return loss

    trainer = Explodes(llama(), arguments(tmp_path / "out", max_steps=3), train_dataset=examples())
    lt.attach(trainer, record=lt.RecordConfig(str(tmp_path / "run"), every=1))
    trainer.train()
    run = load(tmp_path / "run")
    bad = run.non_finite()
    names = dict(zip(run.parameters["param_id"], run.parameters["name"], strict=True))
    first = bad[(bad["step"] == 2) & (bad["column"] == "grad_norm")]
    assert [names[i] for i in first["param_id"]] == ["model.layers.0.mlp.up_proj.weight"]
    assert first["value"].tolist() == [np.inf]
    assert np.isinf(run.scalars["grad_norm"][1])


def test_pure_bf16_loses_updates_and_the_number_shows_it(tmp_path):
    weights = llama().to(torch.bfloat16)
    _, path = record(tmp_path, weights, max_steps=1, learning_rate=1e-5)
    fp32 = tmp_path / "fp32"
    _, reference = record(fp32, llama(), max_steps=1, learning_rate=1e-5)

    def total(path):
        return float((load(path).metrics(["update_norm"])["update_norm"] ** 2).sum() ** 0.5)

    assert total(path) < 0.7 * total(reference)
