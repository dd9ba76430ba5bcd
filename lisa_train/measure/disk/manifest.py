"""What run.json says about the machine, the packages and the model."""

import dataclasses
import os
import platform
import socket
import sys
from importlib import metadata
from typing import Any

import torch
from torch import nn

from lisa_analysis.contract.layers import role_of
from lisa_train.measure.config import RecordConfig
from lisa_train.model.layer_map import LayerMap
from lisa_train.model.module_tree import unwrap
from lisa_train.model.run_entries import method_entries
from lisa_train.model.tensor_table import TensorTable

try:
    import resource
except ImportError:  # Windows counts no peak that Python's own library can ask for
    resource = None  # type: ignore[assignment]

_PACKAGES = ("lisa-toolkit", "torch", "transformers", "peft", "trl", "accelerate", "datasets")


def versions() -> dict[str, str]:
    """Python's version and those of the packages that decide what a run computes."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Describe the device that trains, its memory, the processors and the host."""
    described: dict[str, Any] = {
        "device": device.type,
        "processes": processes,
        "processors": os.cpu_count(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["name"] = properties.name
        described["memory_bytes"] = properties.total_memory
    else:
        described["name"] = platform.processor() or platform.machine()
        described["threads"] = torch.get_num_threads()
    return described


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Name, architecture, precision and parameter counts of a model; adapters do not count."""
    bare = unwrap(model)
    parameters = list(model.parameters())
    config = getattr(bare, "config", None)
    own = [p for name, p in model.named_parameters() if role_of(name) == "base"]
    described = {
        "name": getattr(config, "_name_or_path", "") or type(bare).__name__,
        "architecture": type(bare).__name__,
        "model_type": getattr(config, "model_type", None),
        "parameters": sum(p.numel() for p in own),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "dtype": str(own[0].dtype).removeprefix("torch.") if own else None,
    }
    return {name: value for name, value in described.items() if value is not None}


def layer_entries(layer_map: LayerMap) -> list[dict[str, Any]]:
    """Return the layer table of run.json."""
    pairs = zip(layer_map.names, layer_map.stacks, strict=True)
    return [{"index": i, "name": name, "stack": stack} for i, (name, stack) in enumerate(pairs)]


def describe_run(
    model: nn.Module, config: RecordConfig, table: TensorTable, layer_map: LayerMap
) -> dict[str, Any]:
    """Entries of run.json that the model and the machine tell."""
    recording = {k: v for k, v in dataclasses.asdict(config).items() if k != "run_dir"}
    return {
        "model": describe_model(model),
        "versions": versions(),
        "hardware": hardware(table.tensors[0][1].device),
        "layers": layer_entries(layer_map),
        "recording": recording,
        **method_entries(model),
    }


def peak_memory_bytes(*devices: torch.device) -> int | None:
    """Peak allocated memory of CUDA devices, added up, else the process's peak resident set.

    None where the platform does not tell.
    """
    if cuda := {device for device in devices if device.type == "cuda"}:
        return sum(int(torch.cuda.max_memory_allocated(device)) for device in cuda)
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
