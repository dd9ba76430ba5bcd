"""What a training is made from, in a few JSON values: its data, its model, its adapters.

Small enough for the `trainer_state.json` of every checkpoint, and enough to tell that a
continuation has another one.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence, Sized
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lisa_analysis.contract.layers import canonical_name
from lisa_analysis.contract.multipliers_file import read_multipliers
from lisa_train.methods.lisa.config import LisaConfig
from lisa_train.methods.lisa.learning.config import PRIORS
from lisa_train.model.module_tree import unwrap
from lisa_train.model.run_entries import as_lists
from lisa_train.model.sharding import is_sharded

# Rows whose content is taken note of: all of them, or so many evenly spaced ones.
_ROWS = 4096
# Numbers that are taken note of in every tensor that a checkpoint does not hold.
_NUMBERS = 64
# Fields of an adapter's configuration that say where it came from, or how it began, and nothing
# of what it computes.
_OF_ORIGIN = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying",
        "eva_config", "inference_mode", "loftq_config", "lora_ga_config", "megatron_config",
        "megatron_core", "peft_version", "revision", "task_type",
    }
)  # fmt: skip
# What the names of those settings of a model hold that change a training and not its weights.
_OF_TRAINING = ("drop", "aux_loss", "jitter")


def plain(value: Any) -> Any:
    """Return a setting as a JSON value; what is none by its text."""
    value = getattr(value, "value", value)
    return value if isinstance(value, str | int | float | bool | list | dict | None) else str(value)


def model_inputs(model: nn.Module) -> dict[str, Any]:
    """Return what of a model decides how its training goes on, beside the weights."""
    return {
        "trained tensors": _trained(model),
        "model": {
            "dtype": ", ".join(sorted({str(p.dtype)[6:] for p in model.parameters()})),
            **_settings_of_training(getattr(unwrap(model), "config", None)),
        },
        "adapters": dict(_adapter_settings(getattr(model, "peft_config", None))),
    }


def _trained(model: nn.Module) -> dict[str, Any]:
    total, tensors, numbers = hashlib.sha256(), 0, 0
    for name, tensor in model.named_parameters():
        if tensor.requires_grad:
            total.update(f"{canonical_name(name)} {tuple(tensor.shape)}\n".encode())
            tensors, numbers = tensors + 1, numbers + tensor.numel()
    return {"tensors": tensors, "numbers": numbers, "content": total.hexdigest()[:16]}


def _settings_of_training(config: Any) -> dict[str, Any]:
    """Dropout and the like, by the names that the model's configuration has for them."""

    def found(part: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
        for name, value in part.items():
            if isinstance(value, Mapping):
                yield from found(value, f"{path}{name}.")
            elif any(word in str(name) for word in _OF_TRAINING):
                yield f"{path}{name}", plain(value)

    return dict(found(config.to_dict(), "")) if hasattr(config, "to_dict") else {}


def _adapter_settings(configurations: Any) -> Iterator[tuple[str, Any]]:
    """Fields of PEFT's configurations, which its checkpoints hold and a resume does not read."""
    if not isinstance(configurations, Mapping):
        return
    for adapter, configuration in configurations.items():
        for name, value in configuration.to_dict().items():
            if name not in _OF_ORIGIN and not name.startswith("init_"):
                yield (
                    f"{adapter}.{name}",
                    json.loads(json.dumps(value, default=_json_of, skipkeys=True)),
                )


def _json_of(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    return value.value if isinstance(value, Enum) else str(value)


def multipliers_content(path: str | os.PathLike[str] | None) -> str | None:
    """Return a sum over the multipliers of a file; None without one."""
    if path is None:
        return None
    rates = read_multipliers(Path(path))
    content = json.dumps([rates.layers, sorted(rates.groups.items())])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def lisa_content(config: LisaConfig) -> dict[str, Any]:
    """Return the settings of LISA, with a sum over each file that they name in place of its path.

    A run's own config.yaml names the copies that the run keeps.
    """
    found: dict[str, Any] = as_lists(dataclasses.asdict(config))
    if isinstance(config.probabilities, str):
        found["probabilities"] = _file_content(config.probabilities)
    learn = config.learn
    if learn is not None and isinstance(learn.prior, str) and learn.prior not in PRIORS:
        found["learn"]["prior"] = _file_content(learn.prior)
    return found


def _file_content(path: str) -> dict[str, str]:
    return {"content": hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}


def data_content(dataset: Any) -> dict[str, Any] | None:
    """Number of rows and a sum over their content, as far as it can be had without side effects."""
    if not isinstance(dataset, Sized):
        return None  # a stream: nobody knows its rows beforehand
    rows = len(dataset)
    stored: Any = getattr(dataset, "with_format", None)
    if stored is not None and hasattr(dataset, "column_names"):
        dataset = stored("arrow")  # of `datasets`: without transforms, undecoded
    elif not isinstance(dataset, Sequence):
        return {"rows": rows, "content": None}  # a row may be another one every time
    total = hashlib.sha256()
    for number in range(0, rows, max(1, -(-rows // _ROWS))):
        _add(total, dataset[number].to_pydict() if stored else dataset[number])
    return {"rows": rows, "content": total.hexdigest()[:16]}


def _add(total: Any, value: Any) -> None:
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            total.update(repr(key).encode())
            _add(total, value[key])
    elif torch.is_tensor(value):
        total.update(
            value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    elif hasattr(value, "tobytes"):
        total.update(value.tobytes())
    elif isinstance(value, list | tuple):
        total.update(repr(len(value)).encode())
        plain_items = all(isinstance(item, str | int | float | bool | None) for item in value)
        if plain_items:
            total.update(repr(list(value)).encode())
        else:
            for item in value:
                _add(total, item)
    elif isinstance(value, str | int | float | bool | bytes | None):
        total.update(repr(value).encode())
    else:
        total.update(type(value).__name__.encode())


def base_weights(model: nn.Module) -> str | None:
    """A sum over the weights that the checkpoints of an adapter do not hold."""
    if not hasattr(model, "peft_config"):
        return None
    return _sum_over({n: p for n, p in model.named_parameters() if not p.requires_grad})


def reference_weights(trainer: Any) -> str | None:
    """A sum over the model that a trainer of preferences compares with, which no checkpoint holds.

    None without one, and where it follows the model that trains (`sync_ref_model`).
    """
    reference = getattr(trainer, "ref_model", None)
    if reference is None or getattr(trainer.args, "sync_ref_model", False):
        return None
    return _sum_over(dict(unwrap(reference).named_parameters()))


@torch.no_grad()
def _sum_over(tensors: Mapping[str, torch.Tensor]) -> str | None:
    total = hashlib.sha256()
    for name, tensor in tensors.items():
        if is_sharded(tensor) or tensor.is_meta:
            return None
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _NUMBERS)][:_NUMBERS].contiguous()
        total.update(name.encode())
        total.update(some.cpu().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]
