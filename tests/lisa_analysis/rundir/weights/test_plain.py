"""Plain weights: changes against PEFT's own and dense arithmetic, names matched or listed."""

import copy
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError
from lisa_analysis.statistics.spectra import effective_rank


def llama(layers=4, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 60}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes | options))


def adapted(model, seed=1, **options):
    """An adapter that learned something, as PEFT makes it."""
    torch.manual_seed(seed)
    peft = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8} | options))
    for name, parameter in peft.named_parameters():
        if any(part in name for part in ("lora_B", "lora_embedding_A")):
            parameter.data.normal_(0, 0.05)
        if "magnitude" in name or "modules_to_save" in name:
            parameter.data.mul_(1 + 0.1 * torch.rand_like(parameter))
    return peft


def merged_changes(peft, before):
    """ΔW of every weight by merging, in float64, by its name in the model."""
    merged = copy.deepcopy(peft).double().merge_and_unload().state_dict()
    return {name: (merged[name] - old.double()).numpy() for name, old in before.items()}


CASES = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "rslora and patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 3},
        "alpha_pattern": {"v_proj": 32},
    },
    "dora": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_with_its_base_is_what_peft_merges(tmp_path, case):
    model = llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    peft = adapted(model, **CASES[case])
    peft.save_pretrained(tmp_path / "adapter", save_embedding_layers=case == "embedding")
    changes = {n: d for n, d in merged_changes(peft, before).items() if np.abs(d).max() > 0}
    weights = la.load(tmp_path / "adapter", base=tmp_path / "base")
    found = la.importance(weights, "delta_norm", by="tensor")
    scores = dict(zip(found.layers["name"], found.scores, strict=True))
    outside = la.importance(weights, "delta_norm").outside.set_index("name")["score"]
    groups = {"model.embed_tokens.weight": "embed", "lm_head.weight": "head"}
    for name, change in changes.items():
        score = outside[groups[name]] if name in groups else scores[name]
        assert score == pytest.approx(np.linalg.norm(change), rel=1e-5), name
    layers = la.importance(weights, "delta_norm").scores
    relative = la.importance(weights, "delta_rel").scores
    for layer in range(4):
        own = {n: d for n, d in changes.items() if f"layers.{layer}." in n}
        total = np.sqrt(sum((d**2).sum() for d in own.values()))
        assert layers[layer] == pytest.approx(total, rel=1e-5)
        size = np.sqrt(sum(float((before[n].double() ** 2).sum()) for n in own))
        assert relative[layer] == pytest.approx(total / size, rel=1e-5)
    for metric, measure in (("spectral_norm", np.max), ("effective_rank", np.mean)):
        got = la.importance(weights, metric).scores[1]
        spectra = [
            np.linalg.svd(d, compute_uv=False) for n, d in changes.items() if "layers.1." in n
        ]
        each = [s[0] if metric == "spectral_norm" else effective_rank(s[s > 1e-9]) for s in spectra]
        assert got == pytest.approx(measure(each), rel=1e-3), metric


@pytest.mark.parametrize("case", ["plain", "rslora and patterns"])
def test_an_adapter_alone_is_what_peft_adds(tmp_path, case):
    peft = adapted(llama(), **CASES[case])
    peft.save_pretrained(tmp_path)
    profile = la.importance(tmp_path, by="tensor")
    assert profile.metric == "delta_norm"
    scores = dict(zip(profile.layers["name"], profile.scores, strict=True))
    checked = 0
    for name, module in peft.named_modules():
        if hasattr(module, "get_delta_weight"):
            expected = module.get_delta_weight("default").double().norm().item()
            own = f"{name.removeprefix('base_model.model.')}.weight"
            assert scores[own] == pytest.approx(expected, rel=1e-6)
            checked += 1
    assert checked >= 8
    assert "no interval" in profile.statement
    with pytest.raises(LisaError, match="weights before are not known"):
        la.importance(tmp_path, "delta_rel")


def test_transposed_weights_and_dora_of_gpt2(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=32, n_head=4, vocab_size=50))
    model.save_pretrained(tmp_path / "base")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    peft = adapted(
        model, target_modules=["c_attn", "c_fc"], use_dora=True, fan_in_fan_out=True
    )  # fmt: skip
    peft.save_pretrained(tmp_path / "adapter")
    changes = merged_changes(peft, before)
    weights = la.load(tmp_path / "adapter", base=tmp_path / "base")
    found = la.importance(weights, "delta_norm", by="tensor")
    assert len(found) == 6
    for row in found:
        name = row.name if row.name in changes else f"transformer.{row.name}"
        assert row.score == pytest.approx(np.linalg.norm(changes[name]), rel=1e-5)


def test_fused_experts_with_target_parameters(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=24, num_local_experts=3,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=50))  # fmt: skip
    peft = adapted(model, target_modules=["q_proj"],
                   target_parameters=["mlp.experts.down_proj"])  # fmt: skip
    peft.save_pretrained(tmp_path)
    expected = {}
    for name, module in peft.named_modules():
        if hasattr(module, "get_delta_weight") and "experts" in name:
            expected[name.split("layers.")[1][0]] = module.get_delta_weight("default").double()
    profile = la.importance(tmp_path, by="tensor")
    rows = [row for row in profile if "experts" in row.name]
    assert len(rows) == 2
    for row in rows:
        norm = expected[str(row.layer)].norm().item()
        assert row.score == pytest.approx(norm, rel=1e-6)


def test_an_adapter_that_learned_nothing_says_so(tmp_path):
    peft = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    peft.save_pretrained(tmp_path)
    profile = la.importance(tmp_path)
    assert (profile.scores == 0).all()
    assert profile.statement.startswith("This adapter did nothing: B is zero in every module")
    assert la.plots.side_by_side([profile]).child_axes[0].get_ylim() == (0, 1)  # and no warning
    share = la.importance(tmp_path, "init_share").scores
    np.testing.assert_allclose(share, 1, atol=0.15)  # ‖A‖² varies about r/3


def test_an_adapter_of_some_layers_leaves_the_others_unknown(tmp_path):
    peft = adapted(llama(), target_modules=["q_proj"], layers_to_transform=[1, 3])
    peft.save_pretrained(tmp_path)
    profile = la.importance(tmp_path)
    assert profile.unseen == (0, 2)
    assert "Without an adapter, or not known: layers 0, 2" in profile.statement


def test_two_checkpoints_in_shards_and_16_bit(tmp_path):
    model = llama(tie_word_embeddings=False)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    before = {name: value.double() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    model.model.layers[2].requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "layers.2." in name:
            parameter.data.copy_(before[name])
    model.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 2
    after = {name: value.double() for name, value in model.state_dict().items()}
    weights = la.load(tmp_path / "tuned", base=tmp_path / "base")
    profile = la.importance(weights)
    assert profile.metric == "delta_rel"
    for layer in range(4):
        own = [name for name in before if f"layers.{layer}." in name]
        change = sum(float(((after[n] - before[n]) ** 2).sum()) for n in own)
        size = sum(float((before[n] ** 2).sum()) for n in own)
        assert profile[layer].score == pytest.approx((change / size) ** 0.5, rel=1e-6)
    assert profile.zero == (2,)
    assert "Layer 2: exactly as before." in profile.statement
    assert not weights.warnings


def test_renamed_and_fused_tensors_are_matched_and_the_rest_listed(tmp_path):
    model = llama(2)
    (tmp_path / "base").mkdir()
    (tmp_path / "tuned").mkdir()
    model.save_pretrained(tmp_path / "plain")
    base = load_file(tmp_path / "plain" / "model.safetensors")
    tuned = {name: value + 0.1 * torch.randn_like(value) for name, value in base.items()}
    squares = {n: float(((tuned[n].double() - base[n].double()) ** 2).sum()) for n in base}
    expected = [sum(s for n, s in squares.items() if f"layers.{i}." in n) for i in (0, 1)]
    # The base: other prefixes, gate and up in one. The tuned: q, k and v in one, a word more.
    for layer in (0, 1):
        path = f"model.layers.{layer}"
        parts = [base.pop(f"{path}.mlp.{k}_proj.weight") for k in ("gate", "up")]
        base[f"{path}.mlp.gate_up_proj.weight"] = torch.cat(parts)
        parts = [tuned.pop(f"{path}.self_attn.{k}_proj.weight") for k in "qkv"]
        tuned[f"{path}.self_attn.qkv_proj.weight"] = torch.cat(parts)
    tuned["model.embed_tokens.weight"] = torch.randn(61, 32)
    tuned["extra.weight"] = torch.ones(2)
    base = {f"language_model.{name}": value.contiguous() for name, value in base.items()}
    save_file(base, tmp_path / "base" / "model.safetensors")
    save_file(tuned, tmp_path / "tuned" / "model.safetensors")
    weights = la.load(tmp_path / "tuned", base=tmp_path / "base")
    profile = la.importance(weights, "delta_norm")
    for layer in (0, 1):
        assert profile[layer].score == pytest.approx(expected[layer] ** 0.5, rel=1e-6)
    said = " ".join(weights.warnings)
    assert "only in the tuned weights: extra.weight" in said
    assert "model.embed_tokens.weight (61×32 against 60×32)" in said


def test_a_classifier_is_compared_with_the_encoder_that_it_came_from(tmp_path):
    """Under a head the encoder's names begin with `bert`, alone they do not."""
    config = BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                        num_attention_heads=2, vocab_size=60)  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(tmp_path / "base")
    tuned = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        tuned.bert.encoder.layer[1].output.dense.weight += 0.5
    tuned.save_pretrained(tmp_path / "tuned")
    weights = la.load(tmp_path / "tuned", base=tmp_path / "base")
    scores = la.importance(weights, "delta_norm").scores
    np.testing.assert_allclose(scores, [0, 0.5 * np.sqrt(32 * 48), 0], rtol=1e-6)
    assert np.isfinite(la.importance(weights, "spectrum_snr").scores).all()


def test_experts_one_by_one_match_fused_ones(tmp_path):
    gate, up = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    down, change = torch.randn(3, 5, 4), 0.1
    path = "model.layers.{}.mlp.experts"
    split, fused = {}, {}
    for layer in (0, 1):
        for e in range(3):
            for name, part in (("gate", gate), ("up", up), ("down", down)):
                split[f"{path.format(layer)}.{e}.{name}_proj.weight"] = part[e].clone()
        fused[f"{path.format(layer)}.gate_up_proj"] = torch.cat([gate, up], dim=1) + change
        fused[f"{path.format(layer)}.down_proj"] = down + change
    for name, tensors in (("split", split), ("fused", fused)):
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / f"{name}.safetensors")
    weights = la.load(tmp_path / "fused.safetensors", base=tmp_path / "split.safetensors")
    assert not weights.warnings
    found = la.importance(weights, "delta_norm").scores
    np.testing.assert_allclose(found, change * np.sqrt(2 * gate.numel() + down.numel()), rtol=1e-5)
    top = la.importance(weights, "spectral_norm").scores
    np.testing.assert_allclose(top, change * np.sqrt(8 * 5), rtol=1e-5)


def test_an_export_and_a_report_come_from_it(tmp_path, capsys, monkeypatch):
    from lisa_analysis.views.cli import main

    adapted(llama(), **CASES["plain"]).save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    assert main([str(tmp_path / "adapter")]) == 0
    printed = capsys.readouterr().out
    assert "weights alone: no course of a training to check" in printed
    html = (tmp_path / "adapter-report.html").read_text()
    assert "Importance of each layer: delta_norm" in html
    assert "There are weights alone" in html
    assert "recorded no" not in html
    assert 'href="#heatmaps"' not in html
    assert "Training curves" not in html
    assert not (tmp_path / "adapter" / "report.html").exists()
    found = la.sampling_probabilities(la.importance(tmp_path / "adapter"), use_intervals=False)
    assert sum(found.inclusion_probabilities) == pytest.approx(2)
    weights = la.load(tmp_path / "adapter")
    ranks = la.export(la.importance(weights), "peft-rank", run=weights, use_intervals=False)
    path = ranks.save(tmp_path / "ranks.json")
    assert LoraConfig(**json.loads(path.read_text())).rank_pattern


def test_bad_input_is_a_sentence(tmp_path, capsys):
    from lisa_analysis.views.cli import main

    peft = adapted(llama(), **CASES["plain"])
    peft.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    text = config.read_text()
    for change, words in (
        (('"peft_type": "LORA"', '"peft_type": "IA3"'), "an adapter of the kind IA3"),
        (('"init_lora_weights": true', '"init_lora_weights": "pissa"'), "initialised with pissa"),
        (('"r": 4', '"r": 3'), "do not belong together"),
    ):
        assert change[0] in text
        config.write_text(text.replace(*change))
        with pytest.raises(LisaError, match=words):
            la.load(tmp_path / "adapter")
        assert main([str(tmp_path / "adapter")]) == 2
        assert words in capsys.readouterr().err
    config.write_text(text)
    other = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=50))
    other.save_pretrained(tmp_path / "other")
    assert "compared with none" in " ".join(la.load(tmp_path / "adapter",
                                                    base=tmp_path / "other").warnings)  # fmt: skip
    llama().save_pretrained(tmp_path / "llama")
    with pytest.raises(LisaError, match="no weight in common"):
        la.load(tmp_path / "llama", base=tmp_path / "other")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LisaError, match=r"holds no run\.json"):
        la.load(tmp_path / "empty")


def test_what_was_so_before_training_is_not_said_to_be_a_change(tmp_path):
    """Layer 0 is at the place 0, and was "exactly as before"; seeds would tell how sure."""
    llama(4).save_pretrained(tmp_path / "base")
    for metric in ("depth", "base_norm"):
        said = la.importance(la.load(tmp_path / "base"), metric).statement
        assert "exactly as before" not in said
        assert "over seeds of the same training" not in said
        assert said.startswith("This was so before any training, and is so for every seed")
