"""Layers found by structure on the real architectures, with random weights."""

from collections import Counter

import pytest
import torch
import transformers as hf
from helpers_architectures import ARCHITECTURES, DECODER, ENCODER, VISION, llava, qwen2_vl
from torch import nn

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_analysis.contract.layers import kind_of
from lisa_train.methods.lisa.engine import Lisa
from lisa_train.model.layer_map import find_layers
from lisa_train.model.towers import sense_towers

# 2026-11-23: peft asks for a property that transformers 5.23 renamed
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


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
        towers = tuple(f"{path}." for path in sense_towers(model, engine.layer_map))
        expected = {n for n in expected if not n.startswith(towers)}
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
def test_a_second_tower_is_other_unless_it_is_asked_for(build, tower):
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


class Sharing(nn.Module):
    """Two blocks in four places, as MobileLLM's; or four modules of which two pairs share all."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)

        def make():
            return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

        self.embed = nn.Embedding(8, 4)
        a, b = make(), make()
        blocks = [a, a, b, b] if how == "modules" else [a, make(), b, make()]
        if how == "tensors":
            for twin, block in ((blocks[1], a), (blocks[3], b)):
                twin[0].weight, twin[0].bias = block[0].weight, block[0].bias
                twin[2].weight, twin[2].bias = block[2].weight, block[2].bias
        self.blocks = nn.ModuleList(blocks)
        self.fc = nn.Linear(4, 8)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.fc(x)


@pytest.mark.parametrize("how", ["modules", "tensors"])
def test_repeated_blocks_are_layers_that_stand_in_two_places(how, caplog):
    model = Sharing(how)
    for layer_map in (find_layers(model), find_layers(model, "blocks")):
        assert layer_map.names == ("blocks.0", "blocks.2")
        assert layer_map.repeats == {"blocks.1": "blocks.0", "blocks.3": "blocks.2"}
        assert sorted(everything(layer_map)) == sorted(n for n, _ in model.named_parameters())
        assert len(layer_map.layers[1]) == 4
        assert layer_map.layer_of("blocks.3.0.weight") == 1
        assert "used again: blocks.1 is blocks.0" in str(layer_map)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    config = lt.LisaConfig(1, 1, always_active=())
    with Lisa(model, optimizer, config) as engine:
        engine.begin_step(0)
        model(torch.arange(8)).square().mean().backward()
        optimizer.step()
        drawn = engine.layer_map.layers[engine.active_layers[0]]
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == set(drawn)
    assert "the model has 2 layers that 4 places of its stack share" in caplog.text


class Named(nn.Module):
    """Blocks in a dict, which nothing but its user can know to be the layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(8, 4)
        self.parts = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for name in ("low", "top")}
        )

    def forward(self, ids):
        x = self.embed(ids)
        for part in self.parts.values():
            x = x + part(x)
        return x


def test_a_dict_of_blocks_can_be_named_and_is_what_the_advice_names():
    model = Named()
    with pytest.raises(ConfigError, match=r"no stack .* ModuleDict .*layers='parts'"):
        find_layers(model)
    with pytest.raises(ConfigError, match=r"'embed' is not a list .* candidates are parts: 2 lay"):
        find_layers(model, "embed")
    layer_map = find_layers(model, "parts")
    assert layer_map.names == ("parts.low", "parts.top")
    assert sorted(everything(layer_map)) == sorted(n for n, _ in model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Lisa(model, optimizer, lt.LisaConfig(1, 1, layers="parts")) as engine:
        for step in range(6):
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            engine.begin_step(step)
            model(torch.arange(8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
            drawn = set(layer_map.layers[engine.active_layers[0]])
            assert moved == drawn | {"embed.weight"}


def test_a_model_without_any_list_is_told_to_make_one():
    with pytest.raises(ConfigError, match=r"no stack .* in Linear; put its layers into an nn\.Mod"):
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


@pytest.mark.parametrize("tied", [False, True])
def test_units_hold_every_parameter_and_a_tied_head_twice(make_llama, tied):
    model = make_llama(layers=3, tie_word_embeddings=tied)
    units = find_layers(model).units(model)
    for i, layer in enumerate(model.model.layers):
        assert [id(p) for p in units[i]] == [id(p) for p in layer.parameters()]
    assert [id(p) for p in units["head"]] == [id(model.lm_head.weight)]
    assert [id(p) for p in units["embed"]] == [id(model.model.embed_tokens.weight)]
    counted = [id(p) for tensors in units.values() for p in tensors]
    assert set(counted) == {id(p) for p in model.parameters()}
    assert len(counted) == len(set(counted)) + tied
