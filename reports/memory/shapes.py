"""The shapes of public models, written out: no hub is asked."""

from transformers import (
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen3Config,
)


def _llama(**sizes: object) -> LlamaConfig:
    return LlamaConfig(architectures=["LlamaForCausalLM"], **sizes)


SHAPES: dict[str, PretrainedConfig] = {
    "GPT2-Small": GPT2Config(architectures=["GPT2LMHeadModel"]),
    "TinyLlama-1.1B": _llama(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=32000, max_position_embeddings=2048,
    ),
    "Phi-2": PhiConfig(
        architectures=["PhiForCausalLM"], hidden_size=2560, intermediate_size=10240,
        num_hidden_layers=32, num_attention_heads=32, vocab_size=51200,
        max_position_embeddings=2048, partial_rotary_factor=0.4,
    ),
    "Mistral-7B": MistralConfig(
        architectures=["MistralForCausalLM"], hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=32000,
        max_position_embeddings=32768, sliding_window=4096,
    ),
    "LLaMA-2-7B": _llama(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32000, max_position_embeddings=4096,
    ),
    "LLaMA-2-70B": _llama(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=32000, max_position_embeddings=4096,
    ),
    "Llama-3.1-8B": _llama(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    # As wide as Llama-3.1-8B, half as deep: what the other does not fit on a small machine.
    "Llama-3.1-8B, 16 layers": _llama(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "Qwen3-8B": Qwen3Config(
        architectures=["Qwen3ForCausalLM"], hidden_size=4096, intermediate_size=12288,
        num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        vocab_size=151936, max_position_embeddings=40960,
    ),
    # For the CPU, where every byte is counted and nothing is timed against a GPU.
    "tiny-llama": _llama(
        hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=512, max_position_embeddings=512,
    ),
    "tiny-qwen3": Qwen3Config(
        architectures=["Qwen3ForCausalLM"], hidden_size=64, intermediate_size=160,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        vocab_size=512, max_position_embeddings=512, tie_word_embeddings=True,
    ),
    "tiny-gpt2": GPT2Config(
        architectures=["GPT2LMHeadModel"], n_embd=64, n_layer=4, n_head=4, vocab_size=512,
        n_positions=512, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1,
        eos_token_id=2,
    ),
}  # fmt: skip
