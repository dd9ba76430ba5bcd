"""Tiny models and data of every task of `lisa-train`, each with something to learn."""

import json
import shutil
from pathlib import Path

from helpers_models import build_tiny_model, sentence, write_jsonl

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


def build_t5(folder: Path) -> Path:
    """Save a random T5 of two stacks of two layers, with the tokenizer of the tiny Llama."""
    import torch
    import transformers as hf

    build_tiny_model(folder, layers=1)
    for name in ("model.safetensors", "generation_config.json", "config.json"):
        (folder / name).unlink(missing_ok=True)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = hf.T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        dropout_rate=0.0, decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    hf.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def write_pairs(path: Path, rows: int = 80) -> Path:
    """The completion is the last word of the prompt."""
    pairs = [{"prompt": sentence(n), "completion": sentence(n).split()[-1]} for n in range(rows)]
    return write_jsonl(path, pairs)


def build_vit(folder: Path) -> Path:
    """Save a random ViT of four layers for images of 16 × 16, with its processor."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    config = hf.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        image_size=16, patch_size=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    hf.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    hf.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def write_images(folder: Path, rows: int = 48) -> Path:
    """A folder per class: dark images and light ones."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for n in range(rows):
        name, level = (("dark", 60), ("light", 190))[n % 2]
        pixels = np.clip(rng.normal(level, 40, (20, 18, 3)), 0, 255).astype(np.uint8)
        path = folder / "train" / name / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


RATE = 16000
SPOKEN = {"low": 300, "high": 1500}


def build_whisper(folder: Path) -> Path:
    """Save a random Whisper of two and two layers, its feature extractor and a tokenizer."""
    import torch
    import transformers as hf

    build_tiny_model(folder, layers=1)
    for name in ("model.safetensors", "generation_config.json", "config.json"):
        (folder / name).unlink(missing_ok=True)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = hf.WhisperConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=25, max_target_positions=24,
        decoder_start_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        suppress_tokens=[], begin_suppress_tokens=[], dropout=0.0,
    )  # fmt: skip
    model = hf.WhisperForConditionalGeneration(config)
    model.generation_config.suppress_tokens = None
    model.generation_config.begin_suppress_tokens = None
    model.save_pretrained(folder)
    hf.WhisperFeatureExtractor(
        feature_size=8, sampling_rate=RATE, chunk_length=1, n_fft=400, hop_length=320
    ).save_pretrained(folder)
    return folder


def write_tone(path: Path, pitch: float, *, rate: int = RATE, width: int = 2) -> Path:
    """A WAV file of half a second."""
    import wave

    import numpy as np

    time = np.arange(rate // 2) / rate
    wide = np.round(0.5 * np.sin(2 * np.pi * pitch * time) * (2**31 - 1)).astype("<i4")
    raw = wide.view(np.uint8).reshape(-1, 4)[:, 4 - width :].tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(raw)
    return path


def write_speech(folder: Path, rows: int = 32) -> Path:
    """Tones that say how high they are, as an audiofolder with metadata.csv."""
    lines = ["file_name,text"]
    for n in range(rows):
        word = ("low", "high")[n % 2]
        write_tone(folder / f"{n}.wav", SPOKEN[word] + 7 * n)
        lines.append(f"{n}.wav,{word} {word}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def train_watched(config, monkeypatch):
    """Train; return the run and the norm of every tensor at its end.

    It learned, what rests kept its bits, and the log holds the norms of the weights.
    """
    import pytest
    import torch

    import lisa_analysis as la
    from lisa_train.command.training import PreparedRun, train

    norms = {}
    original = PreparedRun.train

    def watched(prepared):
        parameters = dict(prepared.trainer.model.named_parameters())
        before = {n: p.detach().clone() for n, p in parameters.items() if not p.requires_grad}
        original(prepared)
        assert all(torch.equal(parameters[n], p) for n, p in before.items())
        norms.update({n: float(p.detach().double().norm()) for n, p in parameters.items()})

    with monkeypatch.context() as patched:
        patched.setattr(PreparedRun, "train", watched)
        run = la.load(train(config))
    result = run.manifest["result"]
    assert result["last_held_out_loss"] < result["first_held_out_loss"]
    assert (run.manifest["task"], run.method, run.n_layers) == (config.task, config.method, 4)
    names = run.parameters.set_index("param_id")["name"]
    last = run.metrics(["weight_norm"], steps=[config.max_steps]).dropna()
    assert len(last)
    for number, norm in zip(last["param_id"], last["weight_norm"], strict=True):
        assert norm == pytest.approx(norms[names[number]], rel=1e-5, abs=1e-7)
    return run, norms
