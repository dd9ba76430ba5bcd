"""Parameter name -> canonical name, kind and role: one vocabulary for both halves (pure).

Names differ between architectures (`q_proj`, `query`, `c_attn`, `Wqkv`); the *kind* is the same
word everywhere, and the original name is kept beside it. Which layer a parameter belongs to is
found from the module structure by `lisa_train.find_layers`, not guessed from the name.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

# Prefixes and infixes added by wrappers (PEFT, torch.compile, DDP, FSDP), not by the model.
_WRAPPERS = re.compile(
    r"^base_model\.model\.(?=.)|(?:^|(?<=\.))(?:_orig_mod|module|_fsdp_wrapped_module|"
    r"_checkpoint_wrapped_module)\."
)
# Parts of a path that a wrapper adds or leaves out; one model has them, its twin has not.
_OPTIONAL = {"model", "language_model", "text_model", "base_model", "transformer", "backbone"}
# What transformers calls an encoder that stands under a head; without a head the name is left out.
_OPTIONAL |= {
    "albert", "beit", "bert", "convbert", "data2vec_text", "deberta", "deit", "dinov2",
    "dinov2_with_registers", "distilbert", "electra", "ernie", "esm", "funnel", "gpt_neox",
    "hubert", "ibert", "longformer", "mobilebert", "mpnet", "nomic_bert", "rembert", "roberta",
    "roberta_prelayernorm", "roformer", "swin", "swinv2", "vit", "wav2vec2", "wav2vec2_bert",
    "wavlm",
}  # fmt: skip
_BASE_LAYER = re.compile(
    r"\.(?:base_layer|original_module|token_adapter|modules_to_save\.[^.]+)(?=\.|$)"
)

# Adapter parts as PEFT spells them: `<module>.lora_A.<adapter>.weight`, or without `.weight`, or
# with parts of their own below (`osf_svd_params.<adapter>.U_low`).
_ADAPTER = re.compile(
    r"\.(?P<part>lora_embedding_[AB]|lora_[AB]|lora_magnitude_vector|lora_E|ranknum|lora_diag|"
    r"lora_monteclora_sampler|lora_arrow|ia3_l|oft_[A-Za-z]+|boft_[A-Za-z]+|hada_[A-Za-z0-9_]+|"
    r"lokr_[A-Za-z0-9_]+|p?vera_lambda_[bd]|randlora_[A-Za-z_]+|fourierft_[A-Za-z_]+|hra_u|"
    r"vblora_[A-Za-z_]+|bone_block|miss_block|adamss_[A-Za-z_]+|adaption_(?:prompt|gate)|"
    r"beft_bias|c3a_kernel|deft_[A-Za-z]+|delora_(?:A|B|lambda)|frod_[a-z_]+|glora_[A-Z]|"
    r"gralora_[A-Za-z_]+|hira_(?:embedding_)?[AB]|lily_(?:A|B|router)|ln_tuning_layers|"
    r"osf_svd_params|peanut_[A-Za-z_]+|poly_(?:lora_[AB]|router)|psoft_[A-Za-z_]+|"
    r"road_(?:theta|alpha)|shadow_[a-z_]+|shira_weight|supertuning_[A-Za-z_]+|tinylora_[A-Za-z]+|"
    r"trainable_tokens_(?:delta|original)|unilora_[A-Za-z_]+|waveft_[a-z]+)"
    r"(?:\.[^.]+){0,4}$"
)
# What stands beside the model instead of in it: prompts that train, what weighs adapters, a model
# of its own.
_BESIDE = re.compile(
    r"(?:^|\.)(?P<part>prompt_encoder|internal_xlora_classifier|shadow_backbone)\."
)
_ROLE_NAMES = {
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "prompt_encoder": "prompt",
    "internal_xlora_classifier": "xlora",
    "shadow_backbone": "shadow",
}

_NUMBERED = re.compile(r"(?P<stack>.+)\.\d+")

_ATTENTION = r"(attn|attention)\w*\.(.*\.)?"


def _last(names: str, prefix: str = r"(^|\.)") -> re.Pattern[str]:
    """Match a path whose last component is one of `names`; fused experts spell `<name>_bias`."""
    return re.compile(rf"{prefix}({names})(_weight|_bias)?$")


# (kind, pattern on the lower-case module path below the layer), first match wins: from specific
# to general, `attn.o` before the `dense` and `wo` of the feed-forward part.
_IN_LAYER: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("norm", re.compile(r"norm(_?\w+|\d*)$|(^|\.)ln(_?\w+)?$")),
    ("moe.router", _last(r"router|gate|wg|shared_expert_gate|gate\.e_score_correction_bias")),
    ("attn.qkv", _last(r"c_attn|qkv_proj|query_key_value|w_?qkv|qkv|kv_a_proj_with_mqa|kv_b_proj")),
    ("attn.qkv", _last("in_proj", _ATTENTION)),
    ("attn.q", _last("q_proj|q_[ab]_proj|q_lin|query|query_proj|wq|to_q|q")),
    ("attn.k", _last("k_proj|k_lin|key|key_proj|wk|to_k|k")),
    ("attn.v", _last("v_proj|v_lin|value|value_proj|wv|to_v|v")),
    ("attn.o", _last(r"(out_proj|out_lin|c_proj|dense|wo|to_out|o|proj)(\.\d+)?", _ATTENTION)),
    ("attn.o", _last("o_proj")),
    ("mlp.gate_up", _last("gate_up_proj|input_linear|wi_fused")),
    ("mlp.gate", _last("gate_proj|w1|wi_0|gate_linear")),
    ("mlp.up", _last("up_proj|w3|wi_1|wi|fc1|lin1|c_fc|dense_h_to_4h|intermediate_dense|ffn")),
    ("mlp.up", _last(r"intermediate(\.dense)?|linear1")),
    ("mlp.down", _last("down_proj|w2|wo|fc2|lin2|c_proj|dense_4h_to_h|output_dense|ffn_output")),
    ("mlp.down", _last(r"output(\.dense)?|output_linear|linear2")),
)
_HEADS = (
    "lm_head|embed_out|score|classifier|cls|qa_outputs|output_projection|proj_out|v_head|"
    "generator_lm_head|pre_classifier|classification_head|pooler"
)
_EMBEDDINGS = (
    r"wte|wpe|embed\w*|shared|word_embeddings|position_embeddings?|token_type_embeddings|"
    r"patch_embed\w*|cls_token|pos_embed\w*"
)
_OUTSIDE: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("prompt", re.compile(r"(^|\.)prompt_encoder(\.|$)")),
    ("other", re.compile(r"(^|\.)(internal_xlora_classifier|shadow_backbone)(\.|$)")),
    ("head", re.compile(rf"(^|\.)({_HEADS})(\.|$)")),
    ("norm", re.compile(r"(^|[._])(norm|layernorm|layer_norm|ln_\w+)\w*$", re.IGNORECASE)),
    ("embed", re.compile(rf"(^|[._])({_EMBEDDINGS})(\.|$)")),
)


class ParameterName(NamedTuple):
    """What a parameter's name says: canonical name, module path, kind and role."""

    canonical: str
    module: str
    kind: str
    role: str


@lru_cache(maxsize=65536)
def canonical_name(name: str) -> str:
    """Strip what wrappers added, so that one weight has one name in every run.

    >>> canonical_name("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    previous = None
    while previous != name:
        previous, name = name, _WRAPPERS.sub("", name)
    return _BASE_LAYER.sub("", name)


def plain_name(name: str) -> str:
    """Name without what wrappers add, so that versions of one model agree.

    >>> plain_name("language_model.model.layers.0.mlp.up_proj.weight")
    'layers.0.mlp.up_proj.weight'
    >>> plain_name("model.language_model.layers.0.mlp.up_proj.weight")
    'layers.0.mlp.up_proj.weight'
    >>> plain_name("bert.encoder.layer.0.output.dense.weight")  # of a classifier
    'encoder.layer.0.output.dense.weight'
    """
    parts = canonical_name(name).split(".")
    while len(parts) > 1 and parts[0] in _OPTIONAL:
        parts.pop(0)
    return ".".join(parts)


def same_layers(names: Iterable[str], others: Iterable[str]) -> bool:
    """Whether two lists name the same layers in the same order, see `plain_name`.

    >>> same_layers(["encoder.layer.0"], ["bert.encoder.layer.0"])  # without a head, and with one
    True
    """
    return [*map(plain_name, names)] == [*map(plain_name, others)]


def role_of(name: str) -> str:
    """``base`` for a weight of the model, else the adapter part as PEFT calls it (`lora_A`, …)."""
    match = _ADAPTER.search(name) or _BESIDE.search(name)
    return _ROLE_NAMES.get(match["part"], match["part"]) if match else "base"


def module_of(name: str) -> str:
    """Canonical path of the model's own module that the parameter belongs to or adapts.

    >>> module_of("base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight")
    'model.layers.0.mlp.up_proj'
    """
    canonical = canonical_name(name)
    adapted = _ADAPTER.sub("", canonical)
    if adapted != canonical:
        return adapted
    return re.sub(r"\.?[^.]+$", "", canonical)


def kind_of(name: str, *, layer_path: str | None) -> str:
    """Canonical kind of a parameter.

    Parameters
    ----------
    name
        Name in `model.named_parameters()`.
    layer_path
        Canonical path of the layer that holds it (`model.layers.3`), or None outside the stack.

    Returns
    -------
    str
        ``attn.q``, ``attn.k``, ``attn.v``, ``attn.qkv``, ``attn.o``, ``mlp.gate``, ``mlp.up``,
        ``mlp.gate_up``, ``mlp.down``, ``moe.router``, ``norm``, ``embed``, ``head``, ``prompt``
        (virtual tokens that train, and what makes them) or ``other``.
    """
    module = module_of(name)
    leaf = canonical_name(name).rsplit(".", 1)[-1]
    if layer_path is None:
        for kind, pattern in _OUTSIDE:
            if pattern.search(module) or pattern.search(canonical_name(name)):
                return kind
        return "other"
    inside = module[len(layer_path) :].lstrip(".").lower()
    if leaf not in ("weight", "bias") and role_of(name) == "base":
        # A bare parameter (fused experts, `in_proj_weight`): its own name is the informative part.
        inside = f"{inside}.{leaf.lower()}".lstrip(".")
    for kind, pattern in _IN_LAYER:
        if pattern.search(inside):
            return kind
    return "other"


def describe(name: str, *, layer_path: str | None = None) -> ParameterName:
    """Everything that a parameter's name says, see `canonical_name`, `kind_of` and `role_of`."""
    return ParameterName(
        canonical_name(name), module_of(name), kind_of(name, layer_path=layer_path), role_of(name)
    )


def stacks_of(names: Iterable[str]) -> tuple[str, ...]:
    """Path of the stack that each layer is in, from its name; empty for names without a number.

    >>> stacks_of(["encoder.block.0", "encoder.block.1", "decoder.block.0"])
    ('encoder.block', 'encoder.block', 'decoder.block')
    """
    found = [_NUMBERED.fullmatch(str(name)) for name in names]
    return tuple(match["stack"] if match else "" for match in found)


def short_stacks(stacks: Iterable[str]) -> dict[str, str]:
    """Stacks in order, each with the part of its path that tells it from the others.

    >>> short_stacks(["model.encoder.layers", "model.encoder.layers", "model.decoder.layers"])
    {'model.encoder.layers': 'encoder', 'model.decoder.layers': 'decoder'}
    """
    paths = {stack: stack.split(".") for stack in stacks}
    if len(paths) < 2:
        return {stack: stack for stack in paths}
    least = min(map(len, paths.values())) - 1
    first = next((i for i in range(least) if len({p[i] for p in paths.values()}) > 1), least)
    last = next((i for i in range(least - first) if len({p[-1 - i] for p in paths.values()}) > 1),
                least - first)  # fmt: skip
    return {stack: ".".join(path[first : len(path) - last]) for stack, path in paths.items()}
