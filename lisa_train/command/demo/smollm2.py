"""SmolLM2 from a GGUF file to an ordinary Hugging Face folder (weights dequantized to fp32)."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.paths import cache_dir
from lisa_train.command.demo.sources import SMOLLM2, fetch

if TYPE_CHECKING:
    import numpy as np

# GGUF name of a tensor of block N -> name below `model.layers.N`
_BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def smollm2_folder() -> Path:
    """Return the folder of the converted model, converting it on first use (about 15 s)."""
    folder = cache_dir() / "SmolLM2-135M-Instruct"
    if (folder / "config.json").is_file():
        return folder
    source = fetch(SMOLLM2)
    print("Converting SmolLM2 to a Hugging Face folder, once …", flush=True)
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    convert(source, partial)
    partial.replace(folder)
    return folder


def convert(gguf_file: Path, folder: Path) -> None:
    """Write model and tokenizer of a Llama-architecture GGUF file with `save_pretrained`."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise LisaError("The demo reads GGUF files; install it with: pip install gguf.") from error
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(str(gguf_file))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
    )
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights: dict[str, Any] = {}
    for tensor in reader.tensors:
        array = dequantize(tensor.data, tensor.tensor_type).astype("float32")
        name, block = _target(tensor.name)
        if block in heads:
            array = _undo_rotary_interleave(array, heads[block])
        weights[name] = torch.from_numpy(array.copy())
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise LisaError(f"{gguf_file} is not a Llama of the expected layout: {missing}{unexpected}")
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    tokenizer.save_pretrained(folder)


def _target(name: str) -> tuple[str, str]:
    """Return the Hugging Face name of a GGUF tensor, and its block part (`attn_q`) or ''."""
    outside = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    stem, leaf = name.rsplit(".", 1)
    if stem in outside:
        return f"{outside[stem]}.{leaf}", ""
    _, index, part = stem.split(".")
    return f"model.layers.{index}.{_BLOCK[part]}.{leaf}", part


def _undo_rotary_interleave(array: "np.ndarray", heads: int) -> "np.ndarray":
    """GGUF pairs the two halves of each rotary dimension; transformers keeps them apart."""
    rows, columns = array.shape
    pairs = array.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)
