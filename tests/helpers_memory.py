"""Small real models, real steps on the CPU, and bytes counted from their tensors alone."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen3Config,
    T5Config,
)

SIZES = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**SIZES, "architectures": ["LlamaForCausalLM"], **changes})


def qwen3(**changes: Any) -> Qwen3Config:
    more = {"head_dim": 16, "architectures": ["Qwen3ForCausalLM"]}
    return Qwen3Config(**{**SIZES, **more, **changes})


def gpt2(**changes: Any) -> GPT2Config:
    sizes = {
        "n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 300, "n_positions": 128,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "architectures": ["GPT2LMHeadModel"],
    }  # fmt: skip
    return GPT2Config(**{**sizes, **changes})


def bert(**changes: Any) -> BertConfig:
    sizes = {
        **SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "architectures": ["BertForSequenceClassification"],
    }  # fmt: skip
    del sizes["num_key_value_heads"]
    return BertConfig(**{**sizes, **changes})


def t5(**changes: Any) -> T5Config:
    sizes = {
        "d_model": 64, "d_ff": 160, "d_kv": 16, "num_layers": 3, "num_heads": 4,
        "vocab_size": 300, "dropout_rate": 0.0, "decoder_start_token_id": 0,
        "architectures": ["T5ForConditionalGeneration"],
    }  # fmt: skip
    return T5Config(**{**sizes, **changes})


def mixtral(**changes: Any) -> MixtralConfig:
    more = {"num_local_experts": 4, "architectures": ["MixtralForCausalLM"]}
    return MixtralConfig(**{**SIZES, **more, **changes})


def opt(**changes: Any) -> OPTConfig:
    """Projections into and out of the layers are neither embedding, head nor norm."""
    sizes = {
        **SIZES, "ffn_dim": 160, "word_embed_proj_dim": 32, "dropout": 0.0, "activation_function":
        "gelu", "architectures": ["OPTForCausalLM"],
    }  # fmt: skip
    del sizes["num_key_value_heads"], sizes["intermediate_size"]
    return OPTConfig(**{**sizes, **changes})


FAMILIES = {"llama": llama, "gpt2": gpt2, "qwen3": qwen3, "bert": bert}


def real_model(config: PretrainedConfig, **keywords: Any) -> Any:
    """Build the model with random weights."""
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, config.architectures[0])._from_config(config, **keywords).train()


def batch_for(model: Any, batch: int, length: int) -> dict[str, Any]:
    ids = torch.arange(batch * length).reshape(batch, length) % 299 + 1
    if "SequenceClassification" in type(model).__name__:
        return {"input_ids": ids, "labels": torch.zeros(batch, dtype=torch.long)}
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def stored(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages of tensors, each counted once."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    sizes.pop(0, None)
    return sum(sizes.values())


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of optimizer state on the device: step counts stay on the host unless fused."""
    fused = bool(optimizer.defaults.get("fused"))
    return stored(
        value
        for state in optimizer.state.values()
        for key, value in state.items()
        if torch.is_tensor(value) and (fused or key != "step")
    )


def saved_bytes(model: nn.Module, batch: dict[str, Any], held_by: Iterable[nn.Module] = ()) -> int:
    """Bytes that a real forward pass saves for backward, parameters and buffers excluded.

    `held_by`: checkpointed layers, which hold their keyword arguments (mask, rotary angles) for
    the second forward pass without saving them through autograd.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor

    def arguments(module: nn.Module, args: Any, keywords: Any) -> None:
        for leaf in torch.utils._pytree.tree_leaves(keywords):
            if isinstance(leaf, torch.Tensor):
                pack(leaf)

    handles = [m.register_forward_pre_hook(arguments, with_kwargs=True) for m in held_by]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    total = stored(saved.values())
    for handle in handles:
        handle.remove()
    del loss
    return total
