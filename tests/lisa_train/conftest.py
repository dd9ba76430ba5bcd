"""Fixtures of the training tests: a tiny model folder with a tokenizer, and small data files."""

from pathlib import Path

import pytest
from helpers_models import build_tiny_model, sentence, write_jsonl


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random four-layer Llama (fp32, tied) and a trained BPE tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    build_tiny_model(folder, layers=4)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 lines of `text`."""
    rows = [{"text": sentence(n)} for n in range(80)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "text.jsonl", rows)


@pytest.fixture(scope="session")
def completion_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 lines of `prompt` and `completion`."""
    rows = [{"prompt": sentence(n), "completion": " " + sentence(n + 1)} for n in range(60)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "completion.jsonl", rows)


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 conversations of four turns in `messages`."""
    rows = [
        {
            "messages": [
                {"role": ("user", "assistant")[i % 2], "content": sentence(n * 4 + i)}
                for i in range(4)
            ]
        }
        for n in range(60)
    ]
    return write_jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", rows)


@pytest.fixture(scope="session")
def make_llama():
    """Factory of random fp32 Llamas; equal seeds give equal weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(layers: int = 8, seed: int = 0, **changes):
        settings = {
            "vocab_size": 64,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(settings | changes)))

    return build
