"""Files for other tools, loaded by the libraries that read them, on models of several families."""

import importlib.util
import json
import logging
import re
import runpy
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as hf
import yaml
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from peft.tuners.lora import LoraLayer

import lisa_analysis as la
import lisa_train as lt
from lisa_analysis.contract.layers import canonical_name
from lisa_analysis.plans.exports.modules import ModelModules
from lisa_train.model.tensor_table import number_tensors

TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = TOKENS | {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 12, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32,
}  # fmt: skip


def t5():
    return hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=3,
                    num_decoder_layers=3, num_heads=2, decoder_start_token_id=0)
    )  # fmt: skip


def llava():
    """A tower beside the stack whose list of layers has the same name."""
    vision = hf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=16,
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=vision, text_config=hf.LlamaConfig(**DECODER),
                       image_token_index=3)
    )  # fmt: skip


FAMILIES = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)),
    "bare llama": lambda: hf.LlamaModel(hf.LlamaConfig(**DECODER)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(**TOKENS, n_embd=16, n_layer=12, n_head=2, n_positions=32)
    ),
    "t5": t5,
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**DECODER, num_local_experts=4)),
    "llava": llava,
}


def run_of(model, layers=None):
    """What a run directory says of a model: its layers and its tensors."""
    layer_map = lt.find_layers(model, layers)
    rows = number_tensors(model, layer_map, None).rows
    frame = pd.DataFrame(rows).astype({"layer": "Int16"})
    return SimpleNamespace(run_id="run", layer_names=layer_map.names, parameters=frame)


@pytest.fixture(params=FAMILIES)
def case(request):
    torch.manual_seed(0)
    model = FAMILIES[request.param]()
    # The language stack of a model with two towers.
    layers = "model.language_model.layers" if request.param == "llava" else None
    run = run_of(model, layers)
    n = len(run.layer_names)
    score = np.exp(np.linspace(1, -1, n)[np.random.default_rng(3).permutation(n)])
    profile = la.ImportanceProfile.from_scores(
        score, run.layer_names, score * 0.97, score * 1.03, metric="grad_rms", sources=("a", "b")
    )
    return SimpleNamespace(model=model, run=run, profile=profile, score=score, n=n)


def other_tool(name):
    """Skip where a tool is not installed: `make other-tools` installs and runs."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: make other-tools")


def undecided(case):
    return la.ImportanceProfile.from_scores(case.score, case.run.layer_names)


def adapted(model, values):
    """Layers and ranks of the adapters that PEFT makes of these settings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # GPT-2's Conv1D: PEFT sets it itself
        peft = get_peft_model(model, LoraConfig(**values))
    found = {
        canonical_name(name): module
        for name, module in peft.named_modules()
        if isinstance(module, LoraLayer)
    }
    trained = sum(p.numel() for p in peft.parameters() if p.requires_grad)
    return found, trained


def layer_of(case, name):
    for position, layer in enumerate(case.run.layer_names):
        if name.startswith(f"{layer}."):
            return position
    return None


class TestPeftRank:
    @pytest.mark.parametrize("strength", [1.0, 4.0])
    def test_ranks_follow_the_scores_within_the_budget(self, case, strength):
        made = la.export(case.profile, "peft-rank", run=case.run, r=6, strength=strength)
        found, trained = adapted(case.model, made.values)
        ranks = np.array(made.provenance["ranks"])
        assert len(set(ranks)) > 2
        assert (np.diff(ranks[np.argsort(case.score)]) >= 0).all()
        assert {layer_of(case, name) for name in found} == set(range(case.n))
        for name, module in found.items():
            assert module.r["default"] == ranks[layer_of(case, name)], name
            assert module.scaling["default"] == 2.0
        uniform = {
            k: v for k, v in made.values.items() if k not in ("rank_pattern", "alpha_pattern")
        }
        budget = adapted(FAMILIES_AGAIN(case), {**uniform, "r": 6, "lora_alpha": 12})[1]
        assert trained == made.provenance["trained_parameters"] <= budget
        assert trained > 0.9 * budget

    def test_a_budget_of_parameters_is_kept(self, case):
        made = la.export(case.profile, "peft-rank", run=case.run, budget=8_000)
        _, trained = adapted(case.model, made.values)
        assert 0.8 * 8_000 < trained <= 8_000
        with pytest.raises(la.LisaError, match=r"the budget is 10 parameters, but 1 for each"):
            la.export(case.profile, "peft-rank", run=case.run, budget=10)

    def test_undecided_gives_every_layer_the_same(self, case):
        made = la.export(undecided(case), "peft-rank", run=case.run, r=4)
        assert made.values["r"] == 4
        assert made.values["rank_pattern"] == made.values["alpha_pattern"] == {}
        assert made.statement.startswith("Undecided: the data are insufficient")
        found, _ = adapted(case.model, made.values)
        assert {module.r["default"] for module in found.values()} == {4}

    def test_a_pool_leaves_the_others_bare(self, case):
        made = la.export(case.profile, "peft-rank", run=case.run, strength="pool=2")
        found, _ = adapted(case.model, made.values)
        best = set(np.argsort(-case.score)[:2].tolist())
        assert {layer_of(case, name) for name in found} == best


def FAMILIES_AGAIN(case):
    """The model as it was before it got adapters."""
    return type(case.model)(case.model.config)

    def test_peft_reads_the_file_itself(self, tmp_path):
        names = [f"model.layers.{i}" for i in range(12)]
        score = np.exp(np.linspace(-1, 1, 12))
        profile = la.ImportanceProfile.from_scores(score, names, score, score)
        made = la.export(profile, "peft-rank", target_modules="q_proj+v_proj")
        made.save(tmp_path / "adapter_config.json")
        read = LoraConfig.from_pretrained(tmp_path)
        assert read.rank_pattern == made.values["rank_pattern"]
        assert read.target_modules == {"q_proj", "v_proj"}
        assert "mean rank is" in made.statement

    def test_no_rank_exceeds_the_smallest_module(self):
        model = FAMILIES["mixtral"]()
        run = run_of(model)
        profile = la.ImportanceProfile.from_scores(np.ones(12), run.layer_names)
        made = la.export(profile, "peft-rank", run=run, r=100)
        assert made.provenance["ranks"] == [8] * 12  # k_proj is 8 x 16
        assert "No rank exceeds 8" in made.statement
        assert "Experts in one block" in made.statement


class TestPeftLayers:
    def test_exactly_the_modules_of_the_chosen_layers(self, case):
        made = la.export(case.profile, "peft-layers", run=case.run, layers=2, r=4)
        found, trained = adapted(case.model, made.values)
        best = set(np.argsort(-case.score)[:2].tolist())
        frame = case.run.parameters
        wanted = frame[frame["layer"].isin(best) & frame["kind"].str.match("attn|mlp")]
        wanted = wanted[(wanted["shape"].str.count("x") == 1) & wanted["name"].str.endswith("ght")]
        assert set(found) == set(wanted["name"].str.removesuffix(".weight"))
        assert trained == made.provenance["trained_parameters"]

    def test_those_above_the_mean_or_all_of_an_undecided_profile(self, case):
        made = la.export(case.profile, "peft-layers", run=case.run)
        above = case.score * 0.97 > case.score.mean()
        found, _ = adapted(case.model, made.values)
        assert {layer_of(case, n) for n in found} == set(np.flatnonzero(above).tolist())
        made = la.export(undecided(case), "peft-layers", run=case.run)
        found, _ = adapted(FAMILIES_AGAIN(case), made.values)
        assert {layer_of(case, n) for n in found} == set(range(case.n))

    def test_some_modules(self, case):
        leaf = {"gpt2": "c_attn", "t5": "v"}.get(case.model.config.model_type, "v_proj")
        made = la.export(case.profile, "peft-layers", run=case.run, layers=2, target_modules=[leaf])
        found, _ = adapted(case.model, made.values)
        assert found
        assert all(name.endswith(f".{leaf}") for name in found)
        with pytest.raises(la.LisaError, match="target_modules holds 'q_porj'"):
            la.export(case.profile, "peft-layers", run=case.run, target_modules="q_porj")


def names_of(model):
    return [name for name, _ in model.named_parameters()]


SMALL = {"vocab_size": 50, "d_model": 16, "pad_token_id": 0}
HEADS = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
WIDTH = dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32)
DEPTH = {"encoder_layers": 2, "decoder_layers": 2}
CLASSIFIERS = {  # with more around the base model than `classifier` or `score`
    "bart": lambda: hf.BartForSequenceClassification(
        hf.BartConfig(**SMALL, **HEADS, **WIDTH, **DEPTH)
    ),
    "t5": lambda: hf.T5ForSequenceClassification(
        hf.T5Config(**SMALL, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ),
    "deberta": lambda: hf.DebertaV2ForSequenceClassification(
        hf.DebertaV2Config(vocab_size=50, hidden_size=16, num_attention_heads=2,
                           intermediate_size=32, num_hidden_layers=2)
    ),
    "distilbert": lambda: hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(vocab_size=50, dim=16, n_heads=2, n_layers=2, hidden_dim=32)
    ),
    "wav2vec2": lambda: hf.Wav2Vec2ForSequenceClassification(
        hf.Wav2Vec2Config(hidden_size=16, num_attention_heads=2, intermediate_size=32,
                          num_hidden_layers=2, conv_dim=(16, 16), conv_kernel=(10, 3),
                          conv_stride=(5, 2), num_conv_pos_embeddings=4,
                          num_conv_pos_embedding_groups=2, num_feat_extract_layers=2)
    ),
}  # fmt: skip


class Plain(torch.nn.Module):
    """A classifier that is none of transformers'."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 16)
        self.layers = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(16, 2, 32) for _ in range(3)
        )
        self.fc = torch.nn.Linear(16, 2)


def prompted():
    """A classifier with a prompt of PEFT around it, whose names begin otherwise."""
    model = hf.LlamaForSequenceClassification(
        hf.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
                       num_attention_heads=2, pad_token_id=0)
    )  # fmt: skip
    return get_peft_model(model, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4))


def poolformer():
    return hf.PoolFormerForImageClassification(
        hf.PoolFormerConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8])
    )


NO_BASE = {  # model, its layers, what trains whole
    "plain": lambda: (Plain(), "layers", []),
    "prompt": lambda: (prompted(), None, ["score"]),
    "norms of one name": lambda: (poolformer(), None, ["classifier"]),
}


class TestClassifiers:
    @pytest.mark.parametrize("kind", ["peft-rank", "peft-layers"])
    def test_the_new_head_trains(self, kind):
        """Without a task type PEFT adapts the layers and leaves the random head as it is."""
        model = hf.BertForSequenceClassification(
            hf.BertConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_labels=3,
                          num_hidden_layers=3, num_attention_heads=2)
        )  # fmt: skip
        run = run_of(model)
        run.manifest = {"task": "text-classification"}
        profile = la.ImportanceProfile.from_scores([1.0, 2.0, 3.0], run.layer_names)
        made = la.export(profile, kind, run=run, r=4)
        assert "classifier trains whole beside them." in made.statement
        peft = get_peft_model(model, LoraConfig(**made.values))
        trains = {canonical_name(n) for n, p in peft.named_parameters() if p.requires_grad}
        assert {"classifier.weight", "classifier.bias"} <= trains
        run.manifest = {"task": "causal-lm"}
        assert "modules_to_save" not in la.export(profile, kind, run=run, r=4).values
        # Of a run of adapters what they trained whole stays so.
        adapted = run_of(peft, "bert.encoder.layer")
        found = la.export(profile, kind, run=adapted, r=4).values["modules_to_save"]
        assert found == ["classifier"]

    @pytest.mark.parametrize("family", CLASSIFIERS)
    def test_all_that_is_around_the_base_model_trains(self, family):
        model = CLASSIFIERS[family]()
        run = run_of(model)
        run.manifest = {"model": {"architecture": type(model).__name__}}
        scores = np.arange(1.0, len(run.layer_names) + 1)
        profile = la.ImportanceProfile.from_scores(scores, run.layer_names)
        peft = get_peft_model(
            model, LoraConfig(**la.export(profile, "peft-rank", run=run, r=4).values)
        )
        rest = [
            canonical_name(name)
            for name, tensor in peft.named_parameters()
            if not tensor.requires_grad and ".original_module." not in name
        ]
        assert rest
        assert all(name.startswith(f"{model.base_model_prefix}.") for name in rest)

    @pytest.mark.parametrize("family", NO_BASE)
    def test_a_model_without_a_base_of_its_own_keeps_all_but_its_head(self, family):
        model, layers, whole = NO_BASE[family]()
        run = run_of(model, layers)
        run.manifest = {"task": "text-classification"}
        found = ModelModules.of(run, run.layer_names)
        assert list(found.whole) == whole
        assert found.classifies

    def test_a_head_that_cannot_be_told_is_said(self):
        model = FAMILIES["llama"]()
        run = run_of(model)
        run.parameters = run.parameters[run.parameters["kind"] != "head"]
        run.manifest = {"task": "text-classification"}
        profile = la.ImportanceProfile.from_scores(np.ones(12), run.layer_names)
        made = la.export(profile, "peft-layers", run=run, layers=2)
        assert "add it to modules_to_save" in made.statement


def test_a_tied_head_has_one_name():
    """Others look for names among the parameters, where it is the embedding alone."""
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
                       num_attention_heads=2, tie_word_embeddings=True)
    )  # fmt: skip
    run = run_of(model)
    assert "lm_head.weight" in set(run.parameters["name"])
    profile = la.ImportanceProfile.from_scores([1.0, 2.0, 3.0], run.layer_names)
    with pytest.raises(la.LisaError, match="a head that is tied to the embeddings is 'embed'"):
        la.export(profile, "axolotl", run=run, layers=1, groups="head")
    made = la.export(profile, "axolotl", run=run, layers=1, groups="embed")
    assert "model.embed_tokens.weight" in str(made.values)


class TestFreeze:
    def test_every_tensor_of_a_layer_is_named_once(self, case):
        made = la.export(case.profile, "freeze", layers=2, run=case.run)
        train, rest = (tuple(made.values[part]["prefixes"]) for part in ("train", "freeze"))
        inside = [n for n in names_of(case.model) if layer_of(case, n) is not None]
        for name in inside:
            best = layer_of(case, name) in np.argsort(-case.score)[:2]
            assert (name.startswith(train), name.startswith(rest)) == (best, not best)
        counted = made.provenance["tensors_to_train"] + made.provenance["tensors_to_freeze"]
        assert counted == len(inside)


class TestAxolotl:
    @staticmethod
    def unfrozen(model, expressions):
        """Axolotl's rule: dots are dots, and a name matches from its start."""
        patterns = [re.compile(expression.replace(".", r"\.")) for expression in expressions]
        return {n for n in names_of(model) if any(p.match(n) for p in patterns)}

    def test_expressions_name_the_chosen_layers_alone(self, case, tmp_path):
        made = la.export(case.profile, "axolotl", layers=2)
        text = made.save(tmp_path / "a.yaml").read_text("utf-8")
        found = self.unfrozen(case.model, yaml.safe_load(text)["unfrozen_parameters"])
        best = set(np.argsort(-case.score)[:2].tolist())
        assert found == {n for n in names_of(case.model) if layer_of(case, n) in best}
        assert "# provenance: {" in text

    @pytest.mark.slow
    def test_axolotl_itself_trains_them(self, case, monkeypatch):
        other_tool("axolotl")
        # Its package imports far more than the function that reads these lines.
        for name in ("axolotl", "axolotl.utils"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        ours = {
            "distributed": {"is_main_process": lambda *_, **__: True},
            "logging": {"get_logger": lambda *_, **__: logging.getLogger("axolotl")},
        }
        for name, content in ours.items():
            module = ModuleType(f"axolotl.utils.{name}")
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, module.__name__, module)
        folder = Path(next(p for p in sys.path if Path(p, "axolotl/utils/freeze.py").is_file()))
        read = runpy.run_path(str(folder / "axolotl/utils/freeze.py"))["freeze_layers_except"]
        for options in ({"layers": 2}, {"layers": 1, "groups": "embed", "run": case.run}):
            expressions = la.export(case.profile, "axolotl", **options).values[
                "unfrozen_parameters"
            ]
            read(case.model, expressions)
            trains = {n for n, p in case.model.named_parameters() if p.requires_grad}
            assert trains
            assert trains == self.unfrozen(case.model, expressions)

    def test_groups_outside_the_layers(self, case):
        made = la.export(case.profile, "axolotl", layers=1, groups="embed", run=case.run)
        found = self.unfrozen(case.model, made.values["unfrozen_parameters"])
        outside = {n for n in found if layer_of(case, n) is None}
        assert outside
        assert all("embed" in n or "wte" in n or "wpe" in n or "shared" in n for n in outside)


class TestLlamaFactory:
    @staticmethod
    def trained(model, values, n):
        """LLaMA-Factory's freeze tuning: the last n layers, or the first n of a negative number."""
        count = values["freeze_trainable_layers"]
        ids = range(max(0, n - count), n) if count > 0 else range(min(-count, n))
        return {name for name in names_of(model) if any(f".{i}." in name for i in ids)}

    @pytest.mark.parametrize("end", ["first", "last"])
    def test_freeze_tuning_where_it_can_say_it(self, end):
        model = FAMILIES["llama"]()
        run = run_of(model)
        score = np.where((np.arange(12) >= 9) == (end == "last"), 5.0, 1.0)
        profile = la.ImportanceProfile.from_scores(score, run.layer_names, score, score)
        values = la.export(profile, "llamafactory").values
        chosen = np.flatnonzero(score > 1)
        expected = {
            n for i in chosen for n in names_of(model) if n.startswith(f"model.layers.{i}.")
        }
        assert self.trained(model, values, 12) == expected

    @pytest.mark.slow
    @pytest.mark.parametrize("end", ["first", "last"])
    def test_llama_factory_itself_trains_them(self, end, monkeypatch):
        other_tool("llamafactory")
        import trl

        # It still imports a class that TRL has dropped, for another of its stages.
        monkeypatch.setattr(trl, "AutoModelForCausalLMWithValueHead", object, raising=False)
        from llamafactory.model.adapter import _setup_freeze_tuning

        model = FAMILIES["llama"]()
        score = np.where((np.arange(12) >= 9) == (end == "last"), 5.0, 1.0)
        names = run_of(model).layer_names
        values = la.export(
            la.ImportanceProfile.from_scores(score, names, score, score), "llamafactory"
        ).values
        settings = SimpleNamespace(
            freeze_trainable_layers=values["freeze_trainable_layers"],
            freeze_trainable_modules=[values["freeze_trainable_modules"]],
            freeze_extra_modules=None, use_llama_pro=False, freeze_vision_tower=True,
            freeze_multi_modal_projector=True, freeze_language_model=False, pure_bf16=False,
        )  # fmt: skip
        _setup_freeze_tuning(model, settings, True, False)
        trains = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trains == self.trained(model, values, 12)

    def test_any_other_choice_as_lora_on_named_modules(self, case, tmp_path):
        made = la.export(case.profile, "llamafactory", layers=2, method="lora", run=case.run)
        text = made.save(tmp_path / "l.yaml").read_text("utf-8")
        values = yaml.safe_load(text)
        assert values["finetuning_type"] == "lora"
        targets = values["lora_target"].split(",")
        found, _ = adapted(case.model, {"r": 4, "target_modules": targets})
        best = set(np.argsort(-case.score)[:2].tolist())
        assert {layer_of(case, name) for name in found} == best
        assert len(found) == len(targets)

    def test_what_it_cannot_say_is_refused(self):
        names = [f"model.layers.{i}" for i in range(4)]
        score = np.array([1.0, 5, 1, 5])
        profile = la.ImportanceProfile.from_scores(score, names, score, score)
        with pytest.raises(la.LisaError, match=r"first or the last layers .*layers\.1 and"):
            la.export(profile, "llamafactory", method="freeze")
        with pytest.raises(la.LisaError, match="give run="):
            la.export(profile, "llamafactory", target_modules="q_proj")


class TestLr:
    def test_optimizer_groups_of_the_model(self, case, tmp_path):
        from lisa_analysis.contract.multipliers_file import read_multipliers

        path = la.export(case.profile, "lr", embed=0.5).save(tmp_path / "lr.json")
        read = read_multipliers(path)
        assert np.mean(read.layers) == pytest.approx(1.0)
        assert (np.diff(np.array(read.layers)[np.argsort(case.score)]) >= 0).all()
        assert read.groups == {"embed": 0.5, "head": 1.0, "norm": 1.0, "other": 1.0}
        assert read.layer_names == tuple(case.run.layer_names)
        layer_map = lt.find_layers(
            case.model, "model.language_model.layers" if "llava" in str(case.model.config) else None
        )
        groups = [
            {"params": [p], "lr": 1e-3 * (read.layers[at] if at is not None
                                          else read.groups[layer_map.group_of(name)])}
            for name, p in case.model.named_parameters()
            for at in [layer_map.layer_of(name)]
        ]  # fmt: skip
        optimizer = torch.optim.AdamW(groups)
        assert len({group["lr"] for group in optimizer.param_groups}) > 3


class TestMergekit:
    @staticmethod
    def at(setting, depth, name):
        """Mergekit's rule: the first filter that is part of a name; a list lies over the depth."""
        value = next(c["value"] for c in setting if c.get("filter", "") in name)
        if not isinstance(value, list):
            return value
        place = depth * (len(value) - 1)
        low = int(place)
        high = min(low + 1, len(value) - 1)
        return value[low] + (place - low) * (value[high] - value[low])

    @pytest.mark.parametrize("method", ["slerp", "dare_ties"])
    def test_every_layer_has_its_own_weight(self, case, method, tmp_path):
        if case.model.config.model_type == "t5":
            with pytest.raises(la.LisaError, match="layers of one stack"):
                la.export(case.profile, "mergekit")
            return
        made = la.export(case.profile, "mergekit", run=case.run, mean=0.4, method=method)
        values = yaml.safe_load(made.save(tmp_path / "m.yaml").read_text("utf-8"))
        shares = np.array(made.provenance["shares"])
        assert shares.mean() == pytest.approx(0.4)
        assert ((shares > 0) & (shares <= 1)).all()
        assert values["merge_method"] == method
        setting = (
            values["parameters"]["t"] if method == "slerp"
            else values["models"][0]["parameters"]["density"]
        )  # fmt: skip
        for name in names_of(case.model):
            layer = layer_of(case, name)
            if layer is None and name in made.statement:
                continue  # said to have no weight of its own: the norm of a bare stack
            depth = 0.0 if layer is None else layer / (case.n - 1)
            expected = 0.4 if layer is None else shares[layer]
            assert self.at(setting, depth, name) == pytest.approx(expected, abs=2e-6), name

    @pytest.mark.slow
    @pytest.mark.parametrize("method", ["slerp", "dare_ties"])
    def test_mergekit_itself_reads_the_same_weights(self, case, method, tmp_path):
        other_tool("mergekit")
        from mergekit.config import MergeConfiguration, evaluate_setting

        if case.model.config.model_type == "t5":
            pytest.skip("refused, see above")
        made = la.export(case.profile, "mergekit", run=case.run, method=method)
        text = made.save(tmp_path / "m.yaml").read_text("utf-8")
        read = MergeConfiguration.model_validate(yaml.safe_load(text))
        assert read.merge_method == method
        setting, raw = (
            (read.parameters["t"], made.values["parameters"]["t"]) if method == "slerp"
            else (read.models[0].parameters["density"],
                  made.values["models"][0]["parameters"]["density"])
        )  # fmt: skip
        for name in names_of(case.model):
            layer = layer_of(case, name)
            if layer is None and name in made.statement:
                continue
            depth = 0.0 if layer is None else layer / (case.n - 1)
            found = evaluate_setting(name, setting, depth, validate=float)
            assert found == pytest.approx(self.at(raw, depth, name), abs=1e-6), name


class TestEveryExport:
    @pytest.mark.parametrize("kind", la.EXPORTS)
    def test_an_undecided_profile_is_uniform_and_says_so(self, kind, tmp_path):
        model = FAMILIES["llama"]()
        run = run_of(model)
        profile = la.ImportanceProfile.from_scores(
            np.arange(1.0, 13), run.layer_names, sources=("first", "second")
        )
        made = la.export(profile, kind, run=run)
        assert len(set(made.provenance["shares"])) == 1
        assert "insufficient for intervals" in made.statement
        path = made.save(tmp_path / "file")
        about = tmp_path / "file.about.json"
        text = (about if made.beside else path).read_text("utf-8")
        assert "insufficient for intervals" in text
        assert "first" in text
        assert "second" in text
        believed = la.export(profile, kind, run=run, use_intervals=False)
        assert len(set(believed.provenance["shares"])) > 1
        assert "taken as certain" in believed.statement

    @pytest.mark.parametrize("kind", la.EXPORTS)
    def test_strict_json_or_yaml(self, kind, tmp_path):
        def no_constant(name):
            raise AssertionError(f"{name} is no JSON")

        names = [f"model.layers.{i}" for i in range(4)]
        score = np.array([1.0, 2, np.nan, 5])
        profile = la.ImportanceProfile.from_scores(score, names, score, score)
        options = {"target_modules": ["q_proj"]} if kind.startswith("peft") else {}
        options |= {"method": "freeze"} if kind == "llamafactory" else {}
        made = la.export(profile, kind, **options)
        path = made.save(tmp_path / "file")
        text = path.read_text("utf-8")
        if la.EXPORTS[kind].syntax == "yaml":
            assert yaml.safe_load(text) == made.values
        else:
            assert (
                json.loads(text, parse_constant=no_constant).items()
                >= json.loads(json.dumps(made.values)).items()
            )

    def test_a_control_is_a_placebo_of_the_same_shares(self):
        names = [f"model.layers.{i}" for i in range(12)]
        score = np.exp(np.linspace(-1, 1, 12))
        profile = la.ImportanceProfile.from_scores(score, names, score, score)
        plain = la.export(profile, "lr").provenance["shares"]
        placebo = la.export(profile, "lr", control="permuted", seed=5)
        assert sorted(placebo.provenance["shares"]) == sorted(plain)
        assert placebo.provenance["shares"] != plain
        assert placebo.provenance["seed"] == 5
        assert "placebo" in placebo.statement
