"""delta_norm and merged_norm of adapters against PEFT's own weights in float64."""

import dataclasses
import json
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers_adapters import TARGETS, adapted, batches, merged_weights, train
from helpers_recording import arguments, examples, llama
from transformers import Trainer

import lisa_analysis as la
import lisa_train as lt
from lisa_analysis.contract.layers import canonical_name
from lisa_analysis.rundir.opening import load

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")


# ------------------------------------------------------------------ initialisation


def corda():
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    settings = {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="kpm")}
    base = llama(layers=2)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS, **settings)
    with torch.no_grad():
        rows = [b["input_ids"][:1] for b in batches(8)]
        preprocess_corda(base, config, run_model=lambda: [base(input_ids=row) for row in rows])
    return adapted(base, **settings)


def lora_ga():
    from peft import LoraConfig
    from peft.tuners.lora import LoraGAConfig, preprocess_loraga

    settings = {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}
    base = llama(layers=2)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS, **settings)
    preprocess_loraga(base, config, lambda: [base(**b).loss.backward() for b in batches(2)])
    base.zero_grad()
    return adapted(base, **settings)


def eva():
    from peft import initialize_lora_eva_weights

    model = adapted(init_lora_weights="eva")
    initialize_lora_eva_weights(model, batches(4))
    return model


def loftq():
    """What LoftQ does, whose own code wants a GPU: a coarse W, and factors of what that lost."""
    model = adapted()
    for module in model.modules():
        if hasattr(module, "get_delta_weight"):
            weight = module.get_base_layer().weight.data
            coarse = (weight * 10).round() / 10
            u, s, v = torch.linalg.svd(weight - coarse, full_matrices=False)
            module.lora_B["default"].weight.data = u[:, :4] * s[:4].sqrt()
            module.lora_A["default"].weight.data = s[:4, None].sqrt() * v[:4]
            module.get_base_layer().weight.data = coarse
    return model


def kasa():
    from peft import KasaConfig

    return adapted(kasa_config=KasaConfig())


def conv1d(**changes):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(
        GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1,
                   eos_token_id=2)
    )  # fmt: skip
    return adapted(base, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **changes)


PLAIN = {
    "default": lambda: adapted(),
    "gaussian": lambda: adapted(init_lora_weights="gaussian"),
    "mica": lambda: adapted(init_lora_weights="mica"),
    "eva": eva,
    "kasa": kasa,
    "rslora": lambda: adapted(use_rslora=True),
    "patterns": lambda: adapted(rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3}),
    "lora_bias": lambda: adapted(
        llama(layers=2, attention_bias=True, mlp_bias=True), lora_bias=True
    ),
    "conv1d": conv1d,
}
AWAY_FROM_ZERO = {
    "random": lambda: adapted(init_lora_weights=False),
    "random-embeddings": lambda: adapted(
        init_lora_weights=False, target_modules=["embed_tokens", "o_proj", "lm_head"]
    ),
    "random-conv1d": lambda: conv1d(init_lora_weights=False),
    "pissa": lambda: adapted(init_lora_weights="pissa"),
    "pissa-fast": lambda: adapted(init_lora_weights="pissa_niter_4"),
    "pissa-conv1d": lambda: conv1d(init_lora_weights="pissa"),
    "olora": lambda: adapted(init_lora_weights="olora"),
    "orthogonal": lambda: adapted(init_lora_weights="orthogonal"),
    "corda": corda,
    "lora_ga": lora_ga,
    "loftq": loftq,
}
DORA = {
    "dora": lambda: adapted(use_dora=True),
    "dora-pissa": lambda: adapted(use_dora=True, init_lora_weights="pissa"),
    "dora-embeddings": lambda: adapted(use_dora=True, target_modules=["embed_tokens", "q_proj"]),
    "dora-conv1d": lambda: conv1d(use_dora=True),
}
INITIALISERS = PLAIN | AWAY_FROM_ZERO | DORA


@pytest.mark.parametrize("name", INITIALISERS)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_changes_are_measured_from_where_the_run_began(tmp_path, name):
    model = INITIALISERS[name]()
    start = merged_weights(model)
    run = load(train(model, tmp_path / "run"))
    end = merged_weights(model)
    numbers = dict(zip(run.parameters["name"], run.parameters["param_id"], strict=True))
    frame = run.metrics(["delta_norm", "merged_norm"]).set_index(["step", "param_id"])
    assert set(frame.index.get_level_values("step")) == {0, 1, 2, 3}
    for b, weight in end.items():
        first, last = frame.loc[(0, numbers[b])], frame.loc[(3, numbers[b])]
        assert first["delta_norm"] == 0, b
        assert first["merged_norm"] == pytest.approx(float(start[b].norm()), rel=1e-5), b
        assert last["delta_norm"] == pytest.approx(float((weight - start[b]).norm()), rel=1e-5), b
        assert last["merged_norm"] == pytest.approx(float(weight.norm()), rel=1e-5), b
        assert last["delta_norm"] > 1e-3
    rest = frame.drop([numbers[b] for b in end], level="param_id")
    assert rest["delta_norm"].isna().all()
    assert rest["merged_norm"].isna().all()


@pytest.mark.parametrize("name", ["default", "mica", "pissa", "olora", "loftq", "random", "dora"])
@pytest.mark.parametrize("quantities", [None, ["weight_norm", "grad_norm", "delta_norm"]])
def test_the_relative_change_is_that_of_the_weights(tmp_path, name, quantities):
    """Under PiSSA W is what is left of the pretrained weight, and no measure of it."""
    model = INITIALISERS[name]()
    start = merged_weights(model)
    asked = {} if quantities is None else {"quantities": tuple(quantities)}
    run = la.load(train(model, tmp_path / "run", **asked))
    end = merged_weights(model)
    scores = la.importance(run, metric="delta_rel").to_frame()["score"]
    for layer in (0, 1):
        inside = [b for b in end if f"layers.{layer}." in b]
        moved = sum(float((end[b] - start[b]).square().sum()) for b in inside) ** 0.5
        whole = sum(float(start[b].square().sum()) for b in inside) ** 0.5
        assert len(inside) == 3
        assert scores[layer] == pytest.approx(moved / whole, rel=1e-5)


def test_what_the_initialiser_did_to_the_base_weights(tmp_path):
    """It stands beside the change in training and is no part of it."""
    from transformers import AutoModelForCausalLM

    llama(layers=2).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = {n: p.detach().double().clone() for n, p in base.named_parameters()}
    model = adapted(base, init_lora_weights="pissa")
    start = merged_weights(model)
    run = la.load(train(model, tmp_path / "run", base_delta=True))
    assert_equal_to_peft(run, start, merged_weights(model), last=3)
    rows = run.metrics(["delta_norm"], steps=[0]).set_index("param_id")["delta_norm"]
    for row in run.parameters.itertuples():
        if "base_layer" in row.name:
            left = model.get_parameter(row.name).double()
            taken = float((left - before[canonical_name(row.name)]).norm())
            assert taken > 1
            assert rows[row.param_id] == pytest.approx(taken, rel=1e-5)
    scores = la.importance(run, metric="delta_rel").to_frame()["score"]
    train(other := adapted(init_lora_weights="pissa"), tmp_path / "without")
    assert merged_weights(other).keys() == start.keys()
    without = la.importance(la.load(tmp_path / "without"), metric="delta_rel").to_frame()["score"]
    assert scores.tolist() == pytest.approx(without.tolist(), rel=1e-5)
    text = la.importance(run, metric="weight_norm").initialisation.statement
    assert "began in another way" in text
    assert "another way" not in (
        la.importance(
            la.load(train(adapted(), tmp_path / "default")), metric="weight_norm"
        ).initialisation.statement
    )


# ------------------------------------------------------------------ every method of PEFT

SETTINGS = {
    "ADALORA": {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": 8},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "CPT": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
    "DELORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 10},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "LORA": {"r": 4},
    "MISS": {"r": 4},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4, "num_tasks": 2},
    "OFT": {"oft_block_size": 4, "r": 0},
    "POLY": {"r": 4, "n_tasks": 2, "n_skills": 2, "n_splits": 2},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "PSOFT": {"r": 4},
    "P_TUNING": {"num_virtual_tokens": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2], "target_modules": ["embed_tokens"]},
    "VBLORA": {"r": 2, "num_vectors": 8, "vector_length": 4, "topk": 2},
    "VERA": {"r": 4, "target_modules": ["q_proj"]},
    "WAVEFT": {"n_frequency": 10},
}
PROMPTS = {
    "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING",
}  # fmt: skip


def methods():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING)


def build(kind):
    """A Llama with adapters of one kind, and the identities of the Llama's own tensors."""
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    known = {f.name for f in dataclasses.fields(config)}
    settings = {"task_type": "CAUSAL_LM", **SETTINGS.get(kind, {})}
    if "target_modules" in known and kind not in ("ADAPTION_PROMPT", "SHADOW"):
        settings.setdefault("target_modules", TARGETS)
    base = llama(layers=2)
    own = {id(p): p for p in base.parameters()}
    torch.manual_seed(3)
    return get_peft_model(base, config(**settings)), own


@pytest.mark.parametrize("kind", methods())
def test_every_method_of_peft(tmp_path, kind):
    """Right numbers, or null and a word; tensors of adapters are never taken for the model's."""
    if kind == "ADAMSS":
        pytest.importorskip("sklearn")
    if kind == "XLORA":
        pytest.skip("made of saved adapters: a test of its own")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT's own making
        model, own = build(kind)
    measured = kind in ("LORA", "ADALORA")
    start = merged_weights(model) if measured else {}
    tasks = kind in ("MULTITASK_PROMPT_TUNING", "POLY")
    extra = {"task_ids": torch.zeros(2, dtype=torch.long)} if tasks else {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = train(model, tmp_path / "run", batch=extra)
    words = [str(w.message) for w in caught if "are not measured" in str(w.message)]
    run = load(path)
    frame = run.metrics(["delta_norm", "merged_norm"])
    if measured:
        assert not words
        assert_equal_to_peft(run, start, merged_weights(model), last=3)
    else:
        assert frame["delta_norm"].isna().all()
        assert frame["merged_norm"].isna().all()
        [text] = words
        assert "delta_norm and merged_norm are not measured" in text
        assert kind in text
        assert text in list(run.events["message"])
    rows = run.parameters.set_index("name")
    for name, parameter in model.named_parameters():
        assert (rows.loc[name, "role"] == "base") == (id(parameter) in own), name
    if kind == "SHADOW":
        beside = rows[rows["role"] == "shadow"]
        assert set(beside["kind"]) == {"other"}
        assert beside["layer"].isna().all()
    if kind in PROMPTS:
        added = rows[rows["role"] != "base"]
        assert set(added["kind"]) == {"prompt"}
        assert added["layer"].isna().all()
        assert set(added["role"]) == {"prompt"}
        groups = lt.find_layers(model).groups
        assert set(groups["prompt"]) == set(added.index)
        assert not any("prompt_encoder" in n for g in ("embed", "head", "norm") for n in groups[g])


def assert_equal_to_peft(run, start, end, *, last):
    numbers = dict(zip(run.parameters["name"], run.parameters["param_id"], strict=True))
    frame = run.metrics(["delta_norm", "merged_norm"]).set_index(["step", "param_id"])
    for b, weight in end.items():
        row = frame.loc[(last, numbers[b])]
        assert frame.loc[(0, numbers[b]), "delta_norm"] == 0
        assert row["delta_norm"] == pytest.approx(float((weight - start[b]).norm()), rel=1e-5), b
        assert row["merged_norm"] == pytest.approx(float(weight.norm()), rel=1e-5), b
    assert frame.loc[last, "delta_norm"].max() > 0


@pytest.mark.parametrize("init", [True, False])
def test_adalora_while_it_takes_ranks_away(tmp_path, init):
    """What stands between B and A, and the rank that scales them, change with the steps."""
    from peft import AdaLoraConfig, get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(
        llama(layers=2),
        AdaLoraConfig(
            init_r=6, target_r=2, tinit=1, tfinal=1, deltaT=1, total_step=6, lora_alpha=5,
            target_modules=TARGETS, init_lora_weights=init,
        ),
    )  # fmt: skip
    start = merged_weights(model)
    path = train(model, tmp_path / "run", steps=5, after=model.base_model.update_and_allocate)
    kept = [int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n]
    assert min(kept) < 6, "no rank was taken away"
    assert_equal_to_peft(load(path), start, merged_weights(model), last=5)
    for module in model.modules():  # PEFT trains no rank number, but its own tools set it
        if hasattr(module, "ranknum"):
            module.ranknum["default"].data.fill_(3.0)
    start = merged_weights(model)
    path = train(model, tmp_path / "again")
    assert_equal_to_peft(load(path), start, merged_weights(model), last=3)


def test_xlora_has_no_product(tmp_path):
    """It weighs the adapters anew for every token."""
    from peft import XLoraConfig, get_peft_model

    for i in (0, 1):
        adapted(init_lora_weights=False, task_type="CAUSAL_LM").save_pretrained(tmp_path / str(i))
    folders = {str(i): str(tmp_path / str(i)) for i in (0, 1)}
    base = llama(layers=2, use_cache=False)
    own = {id(p) for p in base.parameters()}
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=24, adapters=folders)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config)
    with pytest.warns(RuntimeWarning, match=r"not measured of .*X-LoRA weighs its adapters anew"):
        run = load(train(model, tmp_path / "run"))
    assert run.metrics()["delta_norm"].isna().all()
    assert run.metrics()["merged_norm"].isna().all()
    rows = run.parameters.set_index("name")
    for name, parameter in model.named_parameters():
        assert (rows.loc[name, "role"] == "base") == (id(parameter) in own), name
    assert set(rows.loc[rows["role"] == "xlora", "kind"]) == {"other"}


def test_tokens_that_train_beside_lora(tmp_path):
    model = adapted(trainable_token_indices=[1, 2])
    start = merged_weights(model)
    with pytest.warns(
        RuntimeWarning, match=r"of model\.embed_tokens: trainable_tokens_delta .LORA"
    ):
        run = load(train(model, tmp_path / "run"))
    assert_equal_to_peft(run, start, merged_weights(model), last=3)
    assert run.metrics(["delta_norm"], steps=[3])["delta_norm"].notna().sum() == len(start)
    [kind] = set(run.parameters.loc[run.parameters["name"].str.contains("tokens_delta"), "kind"])
    assert kind == "embed"


# ------------------------------------------------------------------ several at once


def test_an_adapter_that_is_switched_off_changes_nothing(tmp_path):
    """As the reference of preference tuning: a second adapter that rests."""
    from peft import LoraConfig

    model = adapted(init_lora_weights="orthogonal")
    model.add_adapter("reference", LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    start = merged_weights(model)
    run = load(train(model, tmp_path / "run", steps=10))
    assert_equal_to_peft(run, start, merged_weights(model), last=10)
    assert run.metrics(["delta_norm"])["delta_norm"].notna().sum() == 11 * len(start)
    finding = la.diagnose(la.load(tmp_path / "run"))["lora_dead"]
    assert finding.state == "warn", finding.evidence  # of the tensors that rest, no more


def test_adapters_that_act_on_one_weight_together_are_not_measured_apart(tmp_path):
    from peft import LoraConfig

    model = adapted(init_lora_weights=False)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    with pytest.warns(RuntimeWarning, match=r"not measured of 2 modules .*q_proj.*another adapter"):
        run = load(train(model, tmp_path / "run"))
    numbers = dict(zip(run.parameters["param_id"], run.parameters["name"], strict=True))
    rows = run.metrics(["delta_norm", "merged_norm"], steps=[3]).dropna()
    assert len(rows) == 4
    assert not any("q_proj" in numbers[i] for i in rows["param_id"])


def test_adapters_of_several_kinds_around_one_weight(tmp_path):
    import peft

    torch.manual_seed(3)
    model = peft.get_peft_model(
        llama(layers=2), peft.LoraConfig(r=4, target_modules=TARGETS), mixed=True
    )
    model.add_adapter("hada", peft.LoHaConfig(r=4, target_modules=["q_proj"]))
    model.set_adapter(["default", "hada"])
    with pytest.warns(
        RuntimeWarning, match=r"not measured of 2 modules .*q_proj.*of different kinds"
    ):
        run = load(train(model, tmp_path / "run"))
    numbers = dict(zip(run.parameters["param_id"], run.parameters["name"], strict=True))
    rows = run.metrics(["delta_norm", "merged_norm"], steps=[3]).dropna()
    assert len(rows) == 4
    assert not any("q_proj" in numbers[i] for i in rows["param_id"])


def test_merged_adapters_are_not_added_twice(tmp_path):
    model = adapted(init_lora_weights=False)
    for module in model.modules():
        if hasattr(module, "get_delta_weight"):
            module.merge()
    config = lt.RecordConfig(str(tmp_path / "run"), every=1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    with pytest.warns(RuntimeWarning, match="merged into its weight"):
        lt.NormRecorder(model, optimizer, config).close()
    assert load(tmp_path / "run").metrics()["merged_norm"].isna().all()


@pytest.mark.parametrize("variant", ["bdlora", "convolution"])
def test_variants_without_a_product(tmp_path, variant):
    if variant == "bdlora":
        from peft import BdLoraConfig

        blocks = BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2, match_strict=False)
        model = adapted(use_bdlora=blocks, target_modules=["q_proj"])
        words = r"not measured of 2 modules .*BdLoraLinearVariant"
    else:
        base = llama(layers=2)
        base.model.conv = torch.nn.Conv2d(4, 4, 3, groups=2)
        model = adapted(base, target_modules=["q_proj", "conv"], r=2)
        words = r"not measured of model\.conv: a grouped convolution"
    with pytest.warns(RuntimeWarning, match=words):
        run = load(train(model, tmp_path / "run"))
    names = dict(zip(run.parameters["param_id"], run.parameters["name"], strict=True))
    rows = run.metrics(["delta_norm", "merged_norm"]).dropna()
    assert {names[i].split(".")[-4] for i in rows["param_id"]} == (
        set() if variant == "bdlora" else {"q_proj"}
    )


# ------------------------------------------------------------------ resumed runs


def go_on(folder, model, *, steps, resume=None):
    trainer = Trainer(
        model,
        arguments(folder / "out", max_steps=steps, save_strategy="steps", save_steps=2, seed=7),
        train_dataset=examples(),
    )
    lt.attach(trainer, record=lt.RecordConfig(str(folder / "run"), every=1))
    trainer.train(resume_from_checkpoint=resume)
    return load(folder / "run")


@pytest.mark.parametrize("name", ["default", "orthogonal", "pissa", "random-embeddings", "dora"])
def test_a_resumed_run_is_measured_from_its_own_start(tmp_path, name):
    """Not from the checkpoint's, and not from what a second drawing of A and B gives."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    model = INITIALISERS[name]()
    start = merged_weights(model)
    assert_equal_to_peft(go_on(whole, model, steps=4), start, merged_weights(model), last=4)
    go_on(halves, INITIALISERS[name](), steps=2)
    torch.manual_seed(99)
    model = INITIALISERS[name]()
    if name == "orthogonal":
        for module in layers(model):
            module.orthogonal_init("default")
            module.set_adapter("default")
    run = go_on(halves, model, steps=4, resume=str(halves / "out" / "checkpoint-2"))
    assert run.manifest["segment"] == 1
    assert_equal_to_peft(run, start, merged_weights(model), last=4)
    kept = (halves / "run" / "adapter_start.safetensors").exists()
    assert kept == (name != "default")


def test_a_start_that_was_lost_is_said(tmp_path):
    go_on(tmp_path, INITIALISERS["orthogonal"](), steps=2)
    (tmp_path / "run" / "adapter_start.safetensors").unlink()
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    with pytest.warns(RuntimeWarning, match=r"delta_norm of LoRA is not measured.*is missing"):
        run = go_on(tmp_path, INITIALISERS["orthogonal"](), steps=4, resume=checkpoint)
    later = run.metrics(["delta_norm", "merged_norm"], steps=[3, 4])
    assert later["delta_norm"].isna().all()
    assert later.loc[later["step"] == 4, "merged_norm"].notna().sum() == 6


@pytest.mark.parametrize("name", ["default", "orthogonal"])
def test_a_run_of_an_earlier_version_is_continued(tmp_path, name):
    """It kept no start, and recorded ‖sBA‖ itself: zero at step 0 says that nothing is missing."""
    model = INITIALISERS[name]()
    start = merged_weights(model)
    bases = [module.get_base_layer().weight.double() for module in layers(model)]
    products = {
        b: float((w - base).norm()) for (b, w), base in zip(start.items(), bases, strict=True)
    }
    go_on(tmp_path, model, steps=2)
    as_earlier_version(tmp_path / "run", products)
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    model = INITIALISERS[name]()
    if name == "default":
        run = go_on(tmp_path, model, steps=4, resume=checkpoint)
        assert_equal_to_peft(run, start, merged_weights(model), last=4)
        return
    with pytest.warns(RuntimeWarning, match="delta_norm of LoRA is not measured"):
        run = go_on(tmp_path, model, steps=4, resume=checkpoint)
    assert run.metrics(["delta_norm"], steps=[3, 4])["delta_norm"].isna().all()


def layers(model):
    return [module for module in model.modules() if hasattr(module, "get_delta_weight")]


def as_earlier_version(run_dir, products):
    """Take away what only this version writes; at step 0 stands ‖sBA‖."""
    (run_dir / "adapter_start.safetensors").unlink(missing_ok=True)
    manifest = json.loads((run_dir / "run.json").read_text())
    del manifest["recording"]["adapter_start"]
    (run_dir / "run.json").write_text(json.dumps(manifest))
    parameters = load(run_dir).parameters
    numbers = dict(zip(parameters["name"], parameters["param_id"], strict=True))
    for shard in (run_dir / "metrics").iterdir():
        frame = pq.read_table(shard).to_pandas()
        for name, value in products.items():
            frame.loc[(frame["step"] == 0) & (frame["param_id"] == numbers[name]), "delta_norm"] = (
                value
            )
        table = pa.Table.from_pandas(frame, preserve_index=False)
        pq.write_table(table.replace_schema_metadata({"schema_version": "1.0"}), shard)


def test_training_that_goes_on_from_an_adapter_begins_there(tmp_path):
    """As with PiSSA: what an earlier training did is part of this one's start."""
    from peft import PeftModel

    first = adapted(task_type="CAUSAL_LM")
    train(first, tmp_path / "first")
    first.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(llama(layers=2), tmp_path / "adapter", is_trainable=True)
    start = merged_weights(model)
    run = load(train(model, tmp_path / "run"))
    assert_equal_to_peft(run, start, merged_weights(model), last=3)
