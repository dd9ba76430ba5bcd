"""Layers found by structure on the real architectures, with random weights."""

from collections import Counter

import pytest
import torch
import transformers as hf
from torch import nn

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_analysis.contract.layers import kind_of
from lisa_train.methods.lisa.engine import Lisa
from lisa_train.model.layer_map import find_layers

# 2026-11-23: peft asks for a property that transformers 5.23 renamed
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = TOKENS | {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
HEADS = DECODER | {"head_dim": 8}
ENCODER = {k: v for k, v in DECODER.items() if k != "num_key_value_heads"}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
OLD = TOKENS | {"hidden_size": 16, "n_layer": 3, "n_head": 2}


def llava():
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**VISION, projection_dim=16),
            text_config=hf.LlamaConfig(**DECODER),
            image_token_index=3,
        )
    )


def qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 8}
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(text_config=DECODER | {"rope_parameters": rope}, vision_config=vision)
    )


def whisper():
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            **TOKENS,
            d_model=16,
            encoder_layers=2,
            decoder_layers=3,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=20,
            decoder_start_token_id=1,
        )
    )


def wav2vec2():
    return hf.Wav2Vec2ForCTC(
        hf.Wav2Vec2Config(
            **ENCODER,
            conv_dim=(16,) * 7,  # as many weights in the feature extractor as in the layers
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
        )
    )


def t5():
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            d_model=16, d_kv=8, d_ff=24, num_layers=3, num_decoder_layers=2, num_heads=2,
            vocab_size=64,
        )
    )  # fmt: skip


# name -> (model, stacks with their number of layers, groups that must hold something)
TIED, UNTIED = {"embed", "norm"}, {"embed", "head", "norm"}
ARCHITECTURES = {
    "llama": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)), {"model.layers": 3}, UNTIED
    ),
    "qwen3": (
        lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**HEADS)), {"model.layers": 3}, UNTIED
    ),
    "gemma2": (
        lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**HEADS)), {"model.layers": 3}, TIED
    ),
    "gemma3": (
        lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**HEADS)), {"model.layers": 3}, TIED
    ),
    "mistral": (
        lambda: hf.MistralForCausalLM(hf.MistralConfig(**DECODER)), {"model.layers": 3}, UNTIED
    ),
    "phi3": (lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**DECODER)), {"model.layers": 3}, UNTIED),
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**OLD)), {"transformer.h": 3}, TIED),
    "gpt_neox": (
        lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**ENCODER)), {"gpt_neox.layers": 3}, UNTIED
    ),
    "opt": (
        lambda: hf.OPTForCausalLM(hf.OPTConfig(**ENCODER, ffn_dim=24, word_embed_proj_dim=8)),
        {"model.decoder.layers": 3},
        TIED,
    ),
    "falcon": (
        lambda: hf.FalconForCausalLM(hf.FalconConfig(**ENCODER)), {"transformer.h": 3}, TIED
    ),
    "bloom": (lambda: hf.BloomForCausalLM(hf.BloomConfig(**OLD)), {"transformer.h": 3}, TIED),
    "mixtral": (
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**DECODER, num_local_experts=4)),
        {"model.layers": 3},
        UNTIED,
    ),
    "qwen3_moe": (
        lambda: hf.Qwen3MoeForCausalLM(
            hf.Qwen3MoeConfig(
                **HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8
            )
        ),
        {"model.layers": 3},
        UNTIED,
    ),
    "bert": (
        lambda: hf.BertForMaskedLM(hf.BertConfig(**ENCODER)), {"bert.encoder.layer": 3}, UNTIED
    ),
    "bert_classifier": (
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**ENCODER)),
        {"bert.encoder.layer": 3},
        UNTIED,
    ),
    "llama_reward": (
        lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**DECODER, num_labels=1)),
        {"model.layers": 3},
        UNTIED,
    ),
    "t5": (t5, {"encoder.block": 3, "decoder.block": 2}, TIED),
    "whisper": (whisper, {"model.encoder.layers": 2, "model.decoder.layers": 3}, TIED),
    "vit": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION)), {"vit.layers": 2}, UNTIED
    ),
    "wav2vec2": (wav2vec2, {"wav2vec2.encoder.layers": 3}, UNTIED),
    "llava": (llava, {"model.language_model.layers": 3}, UNTIED),
    "qwen2_vl": (qwen2_vl, {"model.language_model.layers": 3}, UNTIED),
}  # fmt: skip


@pytest.fixture(params=sorted(ARCHITECTURES))
def architecture(request):
    build, stacks, filled = ARCHITECTURES[request.param]
    torch.manual_seed(0)
    return build(), stacks, filled


def everything(layer_map):
    return [n for names in (*layer_map.layers, *layer_map.groups.values()) for n in names]


def test_every_parameter_is_in_exactly_one_place(architecture):
    model, stacks, filled = architecture
    layer_map = find_layers(model)
    assert Counter(layer_map.stacks) == stacks
    assert sorted(everything(layer_map)) == sorted(n for n, _ in model.named_parameters())
    assert {g for g in ("embed", "head", "norm") if layer_map.groups[g]} == filled
    modules = dict(model.named_modules())
    for i, name in enumerate(layer_map.names):
        # an independent reading of the same thing: the names below the layer's module
        below = {f"{name}.{n}" for n, _ in modules[name].named_parameters()}
        assert set(layer_map.layers[i]) == below
        assert all(layer_map.layer_of(n) == i and layer_map.group_of(n) == "layer" for n in below)
    for group, names in layer_map.groups.items():
        assert all(layer_map.group_of(n) == group for n in names)
        assert all(layer_map.layer_of(n) is None for n in names)


def test_the_printed_map_counts_every_parameter(architecture):
    model, _, _ = architecture
    text = str(find_layers(model))
    total = next(line for line in text.splitlines() if line.startswith("total")).split()
    assert int(total[1]) == sum(1 for _ in model.parameters())
    assert int(total[2].replace(",", "")) == sum(p.numel() for p in model.parameters())
    assert all(word in text for word in ("embed", "head", "norm", "other"))


def test_lisa_moves_exactly_what_the_map_says(architecture):
    model, _, _ = architecture
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with Lisa(model, optimizer, lt.LisaConfig(2, 1)) as engine:
        engine.begin_step(0)
        for p in model.parameters():  # gradients of everything, as some loops hand them out
            p.grad = torch.ones_like(p)
        optimizer.step()
        expected = {n for i in engine.active_layers for n in engine.layer_map.layers[i]}
        expected |= {n for g in engine.layer_map.groups for n in engine.layer_map.groups[g]}
        expected = {n for n in expected if flags[n]}  # Whisper's sinusoids never train
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == expected
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_unrouted_experts_of_an_active_layer_do_not_stop_training():
    torch.manual_seed(0)
    config = hf.MixtralConfig(**DECODER, num_local_experts=8, num_experts_per_tok=1)
    model = hf.MixtralForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    experts = model.model.layers[0].mlp.experts.down_proj
    before = experts.detach().clone()
    ids = torch.tensor([[5, 5]])  # few tokens: most of the 8 experts get none
    with Lisa(model, optimizer, lt.LisaConfig(3, 1)) as engine:
        engine.begin_step(0)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    moved = [not torch.equal(experts[e], before[e]) for e in range(8)]
    assert 0 < sum(moved) < 8


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "opt", "falcon", "bloom", "t5", "whisper"])
def test_tied_tensors_are_listed_once_and_named(name):
    layer_map = find_layers(ARCHITECTURES[name][0]())
    assert layer_map.tied
    for other, owner in layer_map.tied.items():
        assert owner in layer_map.groups["embed"]
        assert layer_map.group_of(other) == "embed"
        assert other not in everything(layer_map)
        assert f"tied: {other} is {owner}" in str(layer_map)


@pytest.mark.parametrize(
    ("build", "tower"), [(llava, "model.vision_tower"), (qwen2_vl, "model.visual")]
)
def test_vision_rests_unless_it_is_asked_for(build, tower):
    model = build()
    layer_map = find_layers(model)
    outside = {n for n, _ in model.named_parameters() if n.startswith(tower)}
    assert outside
    assert outside <= set(layer_map.groups["other"])
    stack = f"{tower}.encoder.layers" if tower.endswith("tower") else f"{tower}.blocks"
    only = find_layers(model, stack)
    assert set(only.stacks) == {stack}
    both = find_layers(model, f"model.language_model.layers, {stack}")
    assert Counter(both.stacks) == {"model.language_model.layers": 3, stack: len(only)}
    assert sorted(everything(both)) == sorted(n for n, _ in model.named_parameters())


def test_two_equal_candidates_are_an_error_that_lists_them_and_the_option():
    text, vision = ENCODER, VISION
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision))
    with pytest.raises(ConfigError) as error:
        find_layers(model)
    for part in (
        "text_model.encoder.layers: 3 layers",
        "vision_model.encoder.layers: 2 layers",
        "layers='text_model.encoder.layers'",
    ):
        assert part in str(error.value)
    assert len(find_layers(model, "vision_model.encoder.layers")) == 2
    optimizer = torch.optim.AdamW(model.parameters())
    config = lt.LisaConfig(1, layers="text_model.encoder.layers")
    with Lisa(model, optimizer, config) as engine:
        assert len(engine.layer_map) == 3


def test_a_path_that_is_no_stack_is_an_error_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"model\.layer.*model\.layers: 3.*Did you mean"):
        find_layers(ARCHITECTURES["llama"][0](), "model.layer")
    with pytest.raises(ConfigError, match=r"no stack of repeated layers was found in Linear"):
        find_layers(nn.Linear(3, 3))


def test_shared_layers_are_one_layer_that_cannot_be_rotated():
    model = hf.AlbertForMaskedLM(hf.AlbertConfig(**ENCODER, embedding_size=8))
    layer_map = find_layers(model)
    assert len(layer_map) == 1  # three applications of one set of weights
    assert sorted(everything(layer_map)) == sorted(n for n, _ in model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ConfigError, match="activated_layers is 2, but the model has 1 layer"):
        Lisa(model, optimizer, lt.LisaConfig(2))


def test_wrappers_do_not_show_in_the_paths():
    import peft
    from torch._dynamo import OptimizedModule

    def plain():
        torch.manual_seed(0)
        return ARCHITECTURES["llama"][0]()

    names = find_layers(plain()).names
    adapted = peft.get_peft_model(
        plain(), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    compiled = torch.compile(plain())
    assert isinstance(compiled, OptimizedModule)
    for model in (adapted, compiled, nn.DataParallel(plain())):
        layer_map = find_layers(model)
        assert layer_map.names == names
        assert set(layer_map.stacks) == {"model.layers"}
        assert sorted(everything(layer_map)) == sorted(n for n, _ in model.named_parameters())
    assert len(find_layers(adapted).layers[0]) == 9 + 2  # lora_A and lora_B belong to their layer
    assert not find_layers(adapted).groups["other"]


def test_a_compiled_model_trains_like_a_plain_one(make_llama):
    weights = []
    for wrap in (lambda m: m, lambda m: torch.compile(m, backend="eager")):
        inner = make_llama(layers=4)
        model = wrap(inner)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        ids = torch.arange(3, 19).reshape(2, 8)
        with Lisa(model, optimizer, lt.LisaConfig(1, 1)) as engine:
            for step in range(3):
                engine.begin_step(step)
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        weights.append([p.detach() for p in inner.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_kinds_of_every_architecture_are_recognised(architecture):
    model, _, _ = architecture
    layer_map = find_layers(model)
    for i, names in enumerate(layer_map.layers):
        kinds = Counter(kind_of(n, layer_path=layer_map.names[i]) for n in names)
        assert kinds["norm"] > 0
        assert kinds["attn.o"] > 0
        assert kinds["mlp.down"] > 0
        assert kinds["attn.qkv"] or kinds["attn.q"] * kinds["attn.k"] * kinds["attn.v"]
        assert kinds["mlp.up"] or kinds["mlp.gate_up"]
        unknown = [n for n in names if kind_of(n, layer_path=layer_map.names[i]) == "other"]
        assert all("relative_attention_bias" in n for n in unknown), unknown


@pytest.mark.parametrize("method", ["get_input_embeddings", "get_output_embeddings"])
@pytest.mark.parametrize("error", [AttributeError("no attribute 'wte'"), TypeError("argument")])
def test_a_models_own_method_that_fails_is_no_missing_head(make_llama, method, error):
    """Its tensors would come out as `other`, which nothing activates."""

    def fail():
        raise error

    model = make_llama(layers=2)
    setattr(model, method, fail)
    with pytest.raises(
        ConfigError, match=rf"{method}\(\) of Llama.* fails \({type(error).__name__}"
    ):
        find_layers(model)


def test_a_model_may_have_neither_embeddings_nor_a_head(make_llama):
    def none():
        raise NotImplementedError

    model = make_llama(layers=2)
    model.get_input_embeddings = none
    model.get_output_embeddings = lambda: None
    assert len(find_layers(model)) == 2
