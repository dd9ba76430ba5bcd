"""The vocabulary of parameter names: canonical names, kinds, roles."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lisa_analysis.contract.layers import (
    canonical_name,
    describe,
    kind_of,
    module_of,
    role_of,
    same_layers,
)

# One layer of each naming family, as transformers 5 spells it: name below the layer -> kind.
IN_LAYER = {
    "self_attn.q_proj.weight": "attn.q",
    "self_attn.k_proj.bias": "attn.k",
    "self_attn.v_proj.weight": "attn.v",
    "self_attn.o_proj.weight": "attn.o",
    "self_attn.out_proj.weight": "attn.o",
    "self_attn.q_norm.weight": "norm",
    "self_attn.q_a_proj.weight": "attn.q",
    "self_attn.q_a_layernorm.weight": "norm",
    "self_attn.kv_a_proj_with_mqa.weight": "attn.qkv",
    "self_attn.kv_b_proj.weight": "attn.qkv",
    "self_attn.qkv_proj.weight": "attn.qkv",
    "self_attn.in_proj_weight": "attn.qkv",
    "self_attn.in_proj_bias": "attn.qkv",
    "attn.c_attn.weight": "attn.qkv",
    "attn.c_proj.weight": "attn.o",
    "attn.proj.weight": "attn.o",
    "attn.Wqkv.weight": "attn.qkv",
    "attention.query_key_value.bias": "attn.qkv",
    "attention.dense.weight": "attn.o",
    "attention.self.query.weight": "attn.q",
    "attention.self.key.weight": "attn.k",
    "attention.self.value.weight": "attn.v",
    "attention.self.query_proj.bias": "attn.q",
    "attention.self.value_proj.weight": "attn.v",
    "attention.output.dense.weight": "attn.o",
    "linear1.weight": "mlp.up",
    "linear2.bias": "mlp.down",
    "attention.output.LayerNorm.weight": "norm",
    "layer.0.SelfAttention.q.weight": "attn.q",
    "layer.1.EncDecAttention.o.weight": "attn.o",
    "layer.1.layer_norm.weight": "norm",
    "encoder_attn.out_proj.weight": "attn.o",
    "encoder_attn_layer_norm.bias": "norm",
    "attn1.to_out.0.weight": "attn.o",
    "mlp.gate_proj.weight": "mlp.gate",
    "mlp.up_proj.weight": "mlp.up",
    "mlp.down_proj.weight": "mlp.down",
    "mlp.gate_up_proj.weight": "mlp.gate_up",
    "mlp.c_fc.weight": "mlp.up",
    "mlp.c_proj.bias": "mlp.down",
    "mlp.dense_h_to_4h.weight": "mlp.up",
    "mlp.dense_4h_to_h.weight": "mlp.down",
    "mlp.experts.gate_up_proj": "mlp.gate_up",
    "mlp.experts.down_proj": "mlp.down",
    "mlp.experts.down_proj_bias": "mlp.down",
    "mlp.experts.3.w1.weight": "mlp.gate",
    "mlp.experts.3.w2.weight": "mlp.down",
    "mlp.experts.3.w3.weight": "mlp.up",
    "mlp.gate.weight": "moe.router",
    "mlp.gate.e_score_correction_bias": "moe.router",
    "mlp.router.weight": "moe.router",
    "mlp.shared_expert_gate.weight": "moe.router",
    "mlp.shared_expert.gate_proj.weight": "mlp.gate",
    "fc1.weight": "mlp.up",
    "fc2.bias": "mlp.down",
    "intermediate.dense.weight": "mlp.up",
    "output.dense.weight": "mlp.down",
    "output.LayerNorm.bias": "norm",
    "feed_forward.intermediate_dense.weight": "mlp.up",
    "feed_forward.output_dense.weight": "mlp.down",
    "layer.1.DenseReluDense.wi_0.weight": "mlp.gate",
    "layer.1.DenseReluDense.wi_1.weight": "mlp.up",
    "layer.1.DenseReluDense.wo.weight": "mlp.down",
    "ffn.weight": "mlp.up",
    "ffn_output.weight": "mlp.down",
    "layernorm_before.weight": "norm",
    "norm1.weight": "norm",
    "ln_2.bias": "norm",
    "input_layernorm.weight": "norm",
    "mamba.in_proj.weight": "other",
    "mamba.A_log": "other",
    "self_attn.sinks": "other",
    "mlp.unique.weight": "other",
}
OUTSIDE = {
    "model.embed_tokens.weight": "embed",
    "transformer.wte.weight": "embed",
    "transformer.wpe.weight": "embed",
    "gpt_neox.embed_in.weight": "embed",
    "model.decoder.embed_positions.weight": "embed",
    "transformer.word_embeddings.weight": "embed",
    "transformer.word_embeddings_layernorm.weight": "norm",
    "bert.embeddings.LayerNorm.weight": "norm",
    "bert.embeddings.token_type_embeddings.weight": "embed",
    "vit.embeddings.cls_token": "embed",
    "shared.weight": "embed",
    "lm_head.weight": "head",
    "embed_out.weight": "head",
    "score.weight": "head",
    "cls.predictions.transform.dense.weight": "head",
    "bert.pooler.dense.weight": "head",
    "qa_outputs.bias": "head",
    "model.norm.weight": "norm",
    "transformer.ln_f.bias": "norm",
    "gpt_neox.final_layer_norm.weight": "norm",
    "model.multi_modal_projector.linear_1.weight": "other",
    "model.encoder.conv1.weight": "other",
    "prompt_encoder.default.embedding.weight": "prompt",
    "prompt_encoder.default.mlp_head.0.weight": "prompt",
    "module.prompt_encoder.default.prefix_task_cols": "prompt",
    "base_model.internal_xlora_classifier.layers.0.weight": "other",
    "base_model.shadow_backbone.default.layers.0.input_layernorm.weight": "other",
    "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default": "embed",
}


@pytest.mark.parametrize(("name", "kind"), IN_LAYER.items())
def test_kinds_inside_a_layer(name, kind):
    path = "model.layers.7"
    assert kind_of(f"{path}.{name}", layer_path=path) == kind


@pytest.mark.parametrize(("name", "kind"), OUTSIDE.items())
def test_kinds_outside_the_layers(name, kind):
    assert kind_of(name, layer_path=None) == kind


WRAPPED = {
    "base_model.model.{}": "peft",
    "_orig_mod.{}": "compiled",
    "module.{}": "data parallel",
    "module._orig_mod.base_model.model.{}": "all of them",
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrappers_do_not_change_name_kind_or_role(wrapper):
    plain = "model.layers.3.mlp.up_proj.weight"
    assert canonical_name(wrapper.format(plain)) == plain
    found = describe(wrapper.format(plain), layer_path="model.layers.3")
    assert found == describe(plain, layer_path="model.layers.3")
    assert found == (plain, "model.layers.3.mlp.up_proj", "mlp.up", "base")


@pytest.mark.parametrize(
    ("suffix", "role"),
    [
        ("base_layer.weight", "base"),
        ("original_module.weight", "base"),
        ("modules_to_save.default.weight", "base"),
        ("lora_A.default.weight", "lora_A"),
        ("lora_B.my_adapter.weight", "lora_B"),
        ("lora_embedding_A.default", "lora_A"),
        ("lora_embedding_B.default", "lora_B"),
        ("lora_magnitude_vector.default.weight", "lora_magnitude_vector"),
        ("ia3_l.default", "ia3_l"),
        ("lora_E.default", "lora_E"),
        ("lora_diag.default", "lora_diag"),
        ("osf_svd_params.default.U_low", "osf_svd_params"),
        ("glora_A.default.Xd", "glora_A"),
        ("tinylora_v.default.3", "tinylora_v"),
        ("poly_router.default.module_logits", "poly_router"),
        ("c3a_kernel.default", "c3a_kernel"),
        ("shadow_update_transform.default.0.weight", "shadow_update_transform"),
    ],
)
def test_adapter_parts_have_the_kind_of_the_weight_they_adapt(suffix, role):
    name = f"base_model.model.model.layers.3.self_attn.q_proj.{suffix}"
    found = describe(name, layer_path="model.layers.3")
    assert found.role == role_of(name) == role
    assert found.module == module_of(name) == "model.layers.3.self_attn.q_proj"
    assert found.kind == "attn.q"


NAMES = st.lists(st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True), min_size=1, max_size=5).map(
    ".".join
)


@given(NAMES)
def test_canonical_names_are_their_own_canonical_names(name):
    once = canonical_name(f"_orig_mod.module.{name}")
    assert canonical_name(once) == once
    assert once


@given(NAMES, st.booleans())
def test_every_name_has_a_kind(name, inside):
    kinds = {*IN_LAYER.values(), *OUTSIDE.values()}
    assert kind_of(f"a.0.{name}", layer_path="a.0" if inside else None) in kinds


def test_the_module_needs_the_standard_library_alone():
    code = (
        "import sys; before = set(sys.modules); import lisa_analysis.layers; "
        "print({m.split('.')[0] for m in set(sys.modules) - before} & {'torch', 'numpy', 'pandas'})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("names", "others", "same"),
    [
        (
            ["encoder.layer.0", "encoder.layer.1"],
            ["bert.encoder.layer.0", "bert.encoder.layer.1"],
            1,
        ),
        (["base_model.model.model.layers.0"], ["model.layers.0"], 1),
        (["layers.0"], ["model.language_model.layers.0"], 1),
        (["h.0", "h.1"], ["transformer.h.0", "transformer.h.1"], 1),
        (["encoder.layer.0"], ["bert.encoder.layer.0", "bert.encoder.layer.1"], 0),
        (["encoder.layer.1", "encoder.layer.0"], ["encoder.layer.0", "encoder.layer.1"], 0),
        (["encoder.layers.0"], ["decoder.layers.0"], 0),
        (["vision_model.layers.0"], ["text_model.layers.0"], 0),
        ([], [], 1),
    ],
)
def test_layers_are_the_same_but_for_the_name_of_what_holds_them(names, others, same):
    assert same_layers(names, others) is same_layers(others, names) is bool(same)
