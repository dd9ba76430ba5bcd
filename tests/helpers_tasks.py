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


class Steps:
    """What every optimizer step of a run did, in float64; it looks from outside all other hooks.

    What has no gradient when a step begins has the same bits when it is done.
    """

    def __init__(self, parameters):
        self.parameters = parameters
        self.resting = 0  # elements that rested, over all steps
        self.gradients, self.updates, self.weights = [], [], []
        self._before = {}

    def __enter__(self):
        from torch.optim import optimizer

        self._unhook = [
            optimizer.register_optimizer_step_pre_hook(self._begin),
            optimizer.register_optimizer_step_post_hook(self._end),
        ]
        return self

    def __exit__(self, *_):
        for handle in self._unhook:
            handle.remove()

    def _begin(self, *_):
        self._before = {n: p.detach().clone() for n, p in self.parameters.items()}
        self.gradients.append(
            {n: float(p.grad.double().norm()) for n, p in self.parameters.items()
             if p.requires_grad and p.grad is not None}
        )  # fmt: skip

    def _end(self, *_):
        import torch

        moved = {}
        for name, p in self.parameters.items():
            if p.requires_grad:
                moved[name] = float((p.detach().double() - self._before[name].double()).norm())
            else:
                assert torch.equal(p, self._before[name]), name
                self.resting += p.numel()
        self.updates.append(moved)
        self.weights.append({n: float(p.detach().double().norm()) for n, p in
                             self.parameters.items()})  # fmt: skip


def train_watched(config, monkeypatch):
    """Train; return the run and the norm of every tensor at its end.

    It learned, what rested in a step kept its bits in it, and the log has a row for exactly what
    had a gradient in each step, with the norms of its gradient, update and weights in float64.
    """
    import numpy as np

    import lisa_analysis as la
    from lisa_train.command.training import PreparedRun, train

    seen = []
    original = PreparedRun.train

    def watched(prepared):
        with Steps(dict(prepared.trainer.model.named_parameters())) as steps:
            original(prepared)
        seen.append(steps)

    with monkeypatch.context() as patched:
        patched.setattr(PreparedRun, "train", watched)
        run = la.load(train(config))
    (steps,) = seen
    result = run.manifest["result"]
    assert result["last_held_out_loss"] < result["first_held_out_loss"]
    assert (run.manifest["task"], run.method, run.n_layers) == (config.task, config.method, 4)
    assert (steps.resting > 0) == (config.method != "full" or _always_frozen(steps))
    names = run.parameters.set_index("param_id")["name"]
    clipped = run.scalars.set_index("step")["clip_coef"].fillna(1.0)
    rows = run.metrics(["grad_norm", "update_norm", "weight_norm"]).dropna(subset="grad_norm")
    rows = rows[rows["step"] > 0].assign(name=rows["param_id"].map(names))
    assert sorted(set(rows["step"])) == list(range(1, config.max_steps + 1))
    for step, found in rows.groupby("step"):
        own = found.set_index("name")
        gradients = steps.gradients[step - 1]
        assert set(own.index) == set(gradients)
        order = list(own.index)
        for column, values in (
            ("grad_norm", {n: g / clipped[step] for n, g in gradients.items()}),
            ("update_norm", steps.updates[step - 1]),
            ("weight_norm", steps.weights[step - 1]),
        ):
            expected = [values[n] for n in order]
            np.testing.assert_allclose(own[column], expected, rtol=1e-4, atol=1e-7)
    last = run.metrics(["weight_norm"], steps=[config.max_steps]).dropna()
    expected = [steps.weights[-1][names[i]] for i in last["param_id"]]
    np.testing.assert_allclose(last["weight_norm"], expected, rtol=1e-5, atol=1e-7)
    return run, steps.weights[-1]


def _always_frozen(steps):
    """Whether the model itself has tensors that never train (Whisper's positions)."""
    return any(not p.requires_grad for p in steps.parameters.values())


def assert_resumed_equals_uninterrupted(config, run):
    """Take the last checkpoint away, resume from the one before, and compare to the bit.

    Losses, the norms of every step after it, and every file of weights that the run leaves.
    """
    import lisa_analysis as la
    from lisa_train.command.training import train

    def numbers(of):
        columns = ["weight_norm", "grad_norm", "update_norm"]
        found = of.metrics(columns, steps=slice(1, config.max_steps + 1))
        return found.sort_values(["step", "param_id"]).reset_index(drop=True)

    def weights():
        files = [f for folder in ("adapter", "checkpoints/final") for f in
                 sorted((run.path / folder).glob("*.safetensors"))]  # fmt: skip
        return {file.name: file.read_bytes() for file in files}

    losses, norms, kept = list(run.scalars["loss"]), numbers(run), weights()
    assert kept
    shutil.rmtree(run.path / "checkpoints" / f"checkpoint-{config.max_steps}")
    for name in kept:
        for file in run.path.glob(f"*/{name}"):
            file.unlink()
    resumed = la.load(train(config, resume=True))
    assert resumed.manifest["segment"] == 1
    assert resumed.events.query("event == 'resume'")["step"].tolist() == [config.save_steps]
    assert list(resumed.scalars["loss"]) == losses
    assert numbers(resumed).equals(norms)
    assert weights() == kept
