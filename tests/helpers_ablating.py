"""A base and what was trained from it, and losses with weights swapped by hand."""

import copy
from pathlib import Path
from typing import Any

import torch
from helpers_architectures import MODELS, inputs
from peft import LoraConfig, PeftModel, get_peft_model

from lisa_train.measure.ablation.change import LearnedChange
from lisa_train.measure.ablation.losses import ExampleLosses, Rows, choose_examples
from lisa_train.measure.step.base_weights import StoredWeights, find_checkpoint


def build(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def perturb(model: Any, scale: float = 0.05, seed: int = 1) -> Any:
    """Change every parameter a little, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += scale * torch.randn(p.shape, generator=generator)
    return model


def base_and_trained(name: str, folder: Path) -> tuple[Any, Any]:
    """Both loaded from disk, as they would be: the folder holds `base` and `final`."""
    model = build(name)
    model.save_pretrained(folder / "base")
    perturb(model).save_pretrained(folder / "final")
    kind = type(model)
    return kind.from_pretrained(folder / "base").eval(), kind.from_pretrained(
        folder / "final"
    ).eval()


def rows_of(name: str, copies: int = 3) -> Rows:
    """A few examples of an architecture, of unequal lengths where they are text."""
    batch = inputs(name)
    examples = []
    for number in range(copies):
        for i in range(len(batch["labels"])):
            row = {k: v[i].clone() for k, v in batch.items()}
            if "input_ids" in row:
                row["input_ids"] = (row["input_ids"] * (number + 3) + number) % 56 + 4
                if row["labels"].ndim and not row["labels"].is_floating_point():
                    row["labels"] = row["input_ids"].clone()
                    row["labels"][: number + 1] = -100
            examples.append(row)
    return Rows(name, examples, stack, len(examples))


def stack(rows: list[Any]) -> dict[str, torch.Tensor]:
    return {k: torch.stack([torch.as_tensor(row[k]) for row in rows]) for k in rows[0]}


def stored(model: Any, folder: Path) -> StoredWeights:
    return StoredWeights(model, find_checkpoint(str(folder)))


def change_of(model: Any, folder: Path, **options: Any) -> LearnedChange:
    return LearnedChange(model, stored(model, folder / "base"), **options)


def prepared(model: Any, rows: Rows, tokens: int = 32, most: int | None = None) -> Any:
    losses = ExampleLosses(model, rows)
    return losses, choose_examples(losses, rows, most, tokens)


@torch.no_grad()
def by_hand(model: Any, rows: Rows) -> list[float]:
    """The model's own loss of every example alone, times its labels."""
    found = []
    for row in rows.rows:
        batch = rows.collate([row])
        labels = batch["labels"]
        causal = getattr(model, "loss_type", None) == "ForCausalLM"
        if labels.is_floating_point() or labels.ndim == 1:
            count = 1
        else:
            count = int((labels[:, 1:] if causal else labels).ne(-100).sum())
        found.append(float(model(**batch).loss) * count)
    return found


def mixed(base: Any, trained: Any, names: Any, start: str) -> Any:
    """A copy of `start` ("base" or "trained") with the named tensors of the other."""
    model = copy.deepcopy(base if start == "base" else trained)
    other = dict((trained if start == "base" else base).named_parameters())
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name in names:
            own[name].copy_(other[name])
    return model


QV = ["q_proj", "v_proj", "down_proj"]
ADAPTERS = {
    "plain": ("llama", {"target_modules": QV}),
    "dora": ("llama", {"target_modules": QV, "use_dora": True}),
    "rank_pattern": (
        "llama",
        {
            "target_modules": QV,
            "rank_pattern": {"layers.1.self_attn.q_proj": 5},
            "use_rslora": True,
        },
    ),
    "modules_to_save": ("llama", {"target_modules": QV, "modules_to_save": ["lm_head", "norm"]}),
    "biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tokens": ("llama", {"target_modules": QV, "trainable_token_indices": [5, 9]}),
    "pissa": ("llama", {"target_modules": QV, "init_lora_weights": "pissa"}),
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj"]}),
    "bert": ("bert", {"target_modules": ["query", "dense"]}),
    "t5": ("t5", {"target_modules": ["q", "v", "wo"]}),
    "whisper": ("whisper", {"target_modules": ["q_proj", "v_proj", "fc2"], "use_dora": True}),
}


def trained_adapter(tmp_path: Path, name: str) -> tuple[str, Any, Any]:
    """Base on disk, adapter on disk, and the model that is loaded from both."""
    architecture, settings = ADAPTERS[name]
    model = build(architecture)
    model.save_pretrained(tmp_path / "base")
    kind = type(model)
    torch.manual_seed(2)
    base = kind.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, **settings))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=generator)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    fresh = kind.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).eval()
    return architecture, kind.from_pretrained(tmp_path / "base").eval(), loaded
