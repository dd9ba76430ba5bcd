"""Tiny models and data of every task of `lisa-train`, each with something to learn."""

import json
import shutil
from pathlib import Path

from helpers_models import WORDS, build_tiny_model, sentence, write_jsonl

CLASSES = ("animals", "sky")
# A row is of the class whose word it holds.
MARKS = {"animals": "owls", "sky": "star"}


def build_bert(folder: Path, *, layers: int = 4, head: str | None = None, **config) -> Path:
    """Save a random BERT with the tokenizer of the tiny Llama; `head` names a class with one."""
    import torch
    import transformers as hf

    build_tiny_model(folder, layers=1)
    for name in ("model.safetensors", "generation_config.json", "config.json"):
        (folder / name).unlink(missing_ok=True)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": layers, "num_attention_heads": 4, "max_position_embeddings": 64,
        "pad_token_id": tokenizer.pad_token_id, "type_vocab_size": 2,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    kind = getattr(hf, head or "BertModel")
    kind(hf.BertConfig(**settings, **config)).save_pretrained(folder)
    return folder


def classified(n: int) -> dict[str, str]:
    """A sentence with the word of its class in it."""
    label = CLASSES[n % 2]
    words = [w for w in sentence(n).split() if w not in MARKS.values()]
    words.insert(n % len(words), MARKS[label])
    return {"text": " ".join(words), "label": label}


def write_texts(path: Path, rows: int = 80) -> Path:
    return write_jsonl(path, [classified(n) for n in range(rows)])


def write_tags(path: Path, rows: int = 80) -> Path:
    """Every word has the tag of its length."""
    tagged = []
    for n in range(rows):
        words = sentence(n).split()
        tags = ["long" if len(word) > 4 else "short" for word in words]
        tagged.append({"tokens": words, "tags": tags})
    return write_jsonl(path, tagged)


def copy_with(folder: Path, to: Path, **changes) -> Path:
    """Copy a model folder with other entries in its config.json."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | changes))
    return to


__all__ = ["CLASSES", "WORDS", "build_bert", "classified", "copy_with", "write_tags", "write_texts"]
