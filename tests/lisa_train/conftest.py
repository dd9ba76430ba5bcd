"""Fixtures of the training tests: a tiny model folder with a tokenizer, and small data files."""

import json
from pathlib import Path

import pytest

TEXT = (
    "the quick brown fox jumps over a lazy dog while seven wise owls watch from an old tree "
    "and count every star that falls into the quiet river before morning comes again"
)
WORDS = TEXT.split()


def sentence(n: int) -> str:
    """A different short sentence for every n."""
    return " ".join(WORDS[(n * 7 + i * (1 + n % 5)) % len(WORDS)] for i in range(6 + n % 5))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random four-layer Llama (fp32, tied) and a trained BPE tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    build_tiny_model(folder, layers=4)
    return folder


def build_tiny_model(folder: Path, *, layers: int) -> None:
    """Save a random Llama of a few layers with a tokenizer trained on `sentence`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    core.train_from_iterator(
        (sentence(n) for n in range(200)),
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(folder)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


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
