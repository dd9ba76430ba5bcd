"""‖W − W₀‖ of every parameter against dense float64 copies, however the checkpoint lays it out."""

import weakref

import pytest
import torch
from helpers_recording import VOCABULARY, examples, llama, mixtral, t5
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5ForConditionalGeneration,
)

import lisa_train as lt
from lisa_analysis.rundir.opening import load
from lisa_train.measure.step.base_weights import _Checkpoint


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1,
            eos_token_id=2,
        )
    )  # fmt: skip


def bert():
    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24,
        )
    )  # fmt: skip


def qwen2_moe():
    torch.manual_seed(0)
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, num_experts=12, num_experts_per_tok=2,
            moe_intermediate_size=8, shared_expert_intermediate_size=8, bos_token_id=1,
            eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip


def train(model, folder, steps=2):
    """Two steps in float64 eyes: return the run and the dense distance of every parameter."""
    start = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.5)
    batch = {k: torch.stack([row[k] for row in examples(4)]) for k in ("input_ids", "labels")}
    with lt.NormRecorder(
        model, optimizer, lt.RecordConfig(str(folder), base_delta=True)
    ) as recorder:
        for step in range(1, steps + 1):
            if isinstance(model, LlamaModel | BertModel):
                model(input_ids=batch["input_ids"]).last_hidden_state.square().mean().backward()
            else:
                model(**batch).loss.backward()
            recorder.before_step(step)
            optimizer.step()
            recorder.after_step(step)
            optimizer.zero_grad()
    moved = {n: float((p.detach().double() - start[n]).norm()) for n, p in model.named_parameters()}
    return load(folder), moved


def hold(run, moved, missing=()):
    """Hold every parameter's distance at the end against the dense one."""
    names = dict(zip(run.parameters["param_id"], run.parameters["name"], strict=True))
    for step in (0, 2):
        rows = run.metrics(["delta_norm"], steps=[step]).dropna()
        found = {names[i]: x for i, x in zip(rows["param_id"], rows["delta_norm"], strict=True)}
        assert set(moved) - set(found) == set(missing)
        for name, x in found.items():
            exact = moved[name] if step else 0.0
            assert x == pytest.approx(exact, rel=1e-5, abs=1e-9), name
    assert max(moved.values()) > 1e-3


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (mixtral, AutoModelForCausalLM),  # experts stacked and fused into 3-D parameters
        (qwen2_moe, AutoModelForCausalLM),  # 12 experts: 10 and 11 come after 9, not after 1
        (gpt2, AutoModelForCausalLM),
        (t5, T5ForConditionalGeneration),
        (lambda: llama(tied=True), AutoModelForCausalLM),
        (llama, LlamaModel),  # the checkpoint has a prefix that the model lacks
        (lambda: llama().model, LlamaForCausalLM),  # and the other way round
    ],
    ids=["mixtral", "qwen2_moe", "gpt2", "t5", "tied", "prefix to remove", "prefix to add"],
)
@pytest.mark.parametrize("size", ["5GB", "5KB"])
def test_every_parameter(tmp_path, make, kind, size):
    make().save_pretrained(tmp_path / "base", max_shard_size=size)
    assert (tmp_path / "base" / "model.safetensors").exists() == (size == "5GB")
    model = kind.from_pretrained(tmp_path / "base")
    if kind is LlamaForCausalLM:
        with pytest.warns(RuntimeWarning, match=r"no tensor for 1 of .*lm_head\.weight"):
            run, moved = train(model, tmp_path / "run")
        hold(run, moved, missing=["lm_head.weight"])
    else:
        run, moved = train(model, tmp_path / "run")
        hold(run, moved)


def rename(folder, change):
    """Rewrite a checkpoint with other keys."""
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {change(k): x for k, x in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def test_names_of_old(tmp_path):
    """`LayerNorm.gamma`, as the first BERTs have it, is among transformers' own renamings."""
    bert().save_pretrained(tmp_path / "base")
    rename(
        tmp_path / "base",
        lambda k: k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ),
    )
    run, moved = train(BertModel.from_pretrained(tmp_path / "base"), tmp_path / "run")
    hold(run, moved)


def test_names_that_the_user_maps(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    rename(tmp_path / "base", lambda k: k.replace("model.layers", "model.blocks"))
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "base", key_mapping={r"model\.blocks": "model.layers"}
    )
    run, moved = train(model, tmp_path / "run")
    hold(run, moved)


def test_adapters_over_a_mixture_of_experts(tmp_path):
    mixtral().save_pretrained(tmp_path / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    )
    expert = next(p for n, p in model.named_parameters() if n.endswith("gate_up_proj"))
    with torch.no_grad():
        expert[1] += 0.25  # somebody merges something into the frozen base
    moved_by_hand = 0.25 * expert[1].numel() ** 0.5
    run, moved = train(model, tmp_path / "run")
    names = dict(zip(run.parameters["param_id"], run.parameters["name"], strict=True))
    roles = dict(zip(run.parameters["param_id"], run.parameters["role"], strict=True))
    rows = run.metrics(["delta_norm"], steps=[2]).dropna()
    base = {
        names[i]: x
        for i, x in zip(rows["param_id"], rows["delta_norm"], strict=True)
        if roles[i] == "base"
    }
    assert set(base) == {names[i] for i, role in roles.items() if role == "base"}
    changed = {n.removeprefix("base_model.model."): x for n, x in base.items() if x}
    copy = "lm_head.modules_to_save.default.weight"
    assert changed.keys() == {"model.layers.0.mlp.experts.gate_up_proj", copy}
    expert_moved = changed["model.layers.0.mlp.experts.gate_up_proj"]
    assert expert_moved == pytest.approx(moved_by_hand, rel=1e-5)
    assert changed[copy] == pytest.approx(moved[f"base_model.model.{copy}"], rel=1e-5)


def test_no_more_is_held_than_one_parameter_is_made_of(tmp_path, monkeypatch):
    qwen2_moe().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    alive, most = {}, [0]
    read = _Checkpoint.read

    def counted(self, key):
        tensor = read(self, key)
        alive[key] = tensor.numel()
        weakref.finalize(tensor, alive.pop, key, None)
        most[0] = max(most[0], sum(alive.values()))
        return tensor

    monkeypatch.setattr(_Checkpoint, "read", counted)
    run, moved = train(model, tmp_path / "run")
    hold(run, moved)
    assert most[0] <= max(p.numel() for p in model.parameters())
    assert most[0] > 0


def test_what_cannot_be_built_is_said(tmp_path, monkeypatch):
    from transformers.core_model_loading import MergeModulelist

    def fail(*args, **kwargs):
        raise ValueError("no such layout")

    mixtral().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    monkeypatch.setattr(MergeModulelist, "convert", fail)
    with pytest.warns(
        RuntimeWarning, match=r"no tensor for 4 of .*experts.*no such layout"
    ) as all_:
        run, moved = train(model, tmp_path / "run")
    assert len(all_) == 1
    hold(run, moved, missing=[n for n in moved if "experts" in n])
