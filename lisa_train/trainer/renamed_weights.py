"""Checkpoints whose tensors bear other names than the model's.

`save_pretrained` writes some architectures (ViT, experts, …) under the names that their files have
always had. `from_pretrained` translates them; Trainer, which loads a checkpoint into the model at
hand, does not: it logs the missing names, and goes on from the weights that training began with,
or, where it is to end with the best ones, with a mixture of these and the last.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from lisa_train.model.module_tree import unwrap
from lisa_train.model.sharding import is_sharded
from lisa_train.private_names import check
from lisa_train.trainer.events import patch


def is_renamed(model: nn.Module, path: Path) -> bool:
    """Whether a checkpoint lacks a tensor of `model` under any of its names in the model."""
    stored = _names(path)
    if stored is None or hasattr(model, "peft_config"):
        return False
    aliases: dict[int, set[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(tensor), set()).add(name)
    return any(not names & stored for names in aliases.values())


@torch.no_grad()
def load_renamed(model: Any, path: Path) -> None:
    """Copy the weights of a checkpoint into `model`, with the names translated."""
    stored = type(model).from_pretrained(path, dtype=model.dtype).state_dict()
    for name, tensor in model.state_dict().items():
        tensor.copy_(stored[name])


@contextmanager
def best_weights_whole(trainer: Trainer) -> Iterator[None]:
    """Let `load_best_model_at_end` load every tensor of the best checkpoint, whatever its name."""
    if not trainer.args.load_best_model_at_end:
        yield
        return
    check("best weights")

    def load(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        model, best = unwrap(trainer.model), trainer.state.best_model_checkpoint
        whole = isinstance(model, PreTrainedModel) and not any(map(is_sharded, model.parameters()))
        if best is not None and whole and is_renamed(model, Path(best)):
            load_renamed(model, Path(best))
        return result

    take_off = patch(trainer, "_load_best_model", load)
    try:
        yield
    finally:
        take_off()


def _names(path: Path) -> set[str] | None:
    """Names of the tensors of a checkpoint; None where they are not in safetensors."""
    from safetensors import safe_open

    index = path / "model.safetensors.index.json"
    if index.is_file():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    file = path / "model.safetensors"
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as tensors:
        return set(tensors.keys())
