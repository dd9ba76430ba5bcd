"""A model's weights in a folder: the tensors of all its shards, and its layers by their names."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.layers import canonical_name
from lisa_analysis.rundir.weights.stored import Scaled, Stored, read_header

INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SCALES = ("_scale_inv", "_scale")
_PACKED = (".qweight", ".weight_packed", ".absmax", ".SCB", ".quant_state.bitsandbytes__nf4")


def open_checkpoint(path: Path) -> dict[str, Stored]:
    """Tensors of a model by name: of a safetensors file, or of the shards of a folder.

    Raises
    ------
    LisaError
        When there are none, one is missing, or they are packed in fewer than 8 bits.
    """
    found: dict[str, Any] = {}
    for file in _files(path):
        found |= read_header(file)
    for name in found:
        if name.endswith(_PACKED) or re.search(r"\.quant_state\.", name):
            raise LisaError(
                f"{path} holds packed weights ({name}), of 4 bits or so: give the weights as they "
                "were before they were quantised."
            )
    return _with_scales(found, read_config(path))


def read_config(path: Path) -> Mapping[str, Any]:
    """config.json of a model's folder; empty where there is none."""
    try:
        content = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def holds_weights(path: Path) -> bool:
    """Whether a path is a safetensors file or a folder with some."""
    return path.suffix == ".safetensors" if path.is_file() else any(path.glob("*.safetensors"))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise LisaError(f"{path} does not exist: give a model's folder, or a safetensors file.")
    indices = sorted(path.glob("*.safetensors.index.json"))
    index = path / INDEX if (path / INDEX).exists() else next(iter(indices), None)
    if index is not None:
        try:
            names = sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise LisaError(f"{index} is no index of shards: copy it again.") from None
        for name in names:
            if Path(name).name != name or not (path / name).is_file():
                raise LisaError(f"{path} lacks {name}, which {index.name} names: copy it there.")
        return [path / name for name in names]
    files = sorted(path.glob("*.safetensors"))
    files = [file for file in files if not file.name.startswith("adapter")] or files
    if files:
        return files
    pickled = [file.name for file in sorted(path.iterdir()) if file.suffix in _PICKLES]
    if pickled:
        raise LisaError(
            f"{path} holds its weights in {pickled[0]}, which only torch reads: save them with "
            "save_pretrained, as safetensors."
        )
    raise LisaError(f"{path} holds no safetensors: give a folder written by save_pretrained.")


def _with_scales(found: dict[str, Stored], config: Mapping[str, Any]) -> dict[str, Any]:
    """8-bit tensors with their factors; the factors themselves are no weights."""
    settings = config.get("quantization_config")
    sides = settings.get("weight_block_size") if isinstance(settings, Mapping) else None
    kept: dict[str, Any] = {}
    for name, tensor in found.items():
        if any(name.endswith(end) and name[: -len(end)] in found for end in _SCALES):
            continue
        beside = [found[name + end] for end in _SCALES if name + end in found]
        if beside and tensor.dtype.startswith("F8") and len(tensor.shape) == 2:
            kept[name] = _scaled(tensor, beside[0], sides)
        else:
            kept[name] = tensor
    return kept


def _scaled(tensor: Stored, scale: Stored, sides: Any) -> Scaled:
    factors = scale.elements(0, scale.numel)
    rows, columns = tensor.shape
    if scale.numel == 1:
        return Scaled(tensor, factors.reshape(1, 1), (rows, columns))
    if scale.shape in ((rows,), (rows, 1)):
        return Scaled(tensor, factors.reshape(rows, 1), (1, columns))
    if len(scale.shape) == 2:
        down, across = scale.shape
        block = (-(-rows // down), -(-columns // across))
        if isinstance(sides, list) and len(sides) == 2:
            block = (int(sides[0]), int(sides[1]))
        if -(-rows // block[0]) == down and -(-columns // block[1]) == across:
            return Scaled(tensor, factors.reshape(down, across), block)
    raise LisaError(
        f"{scale.path} has factors {scale.name} of shape {scale.shape} for {tensor.name} of shape "
        f"{tensor.shape}: expected one for all, one per row or one per block."
    )


def find_layers(names: Iterable[str], matrices: Iterable[str], least: int = 2) -> list[str]:
    """Paths of the layers in the order of stacks and indices, from the names of tensors alone.

    A stack is a path whose next part counts from 0 or from anywhere (an adapter of some layers),
    with at least `least` matrices in a layer on average; what lies between two indices that are
    there is a layer too.
    """
    found: dict[str, dict[int, int]] = {}
    wide = {*matrices}
    for name in names:
        match = re.match(r"(.*?(?:^|\.)?[^.\d][^.]*)\.(\d+)\.", canonical_name(name))
        if match:
            layers = found.setdefault(match[1], {})
            layers[int(match[2])] = layers.get(int(match[2]), 0) + (name in wide)
    stacks = {
        stack: layers for stack, layers in found.items()
        if sum(layers.values()) >= least * len(layers) and max(layers) < 10_000
    }  # fmt: skip
    return [f"{stack}.{index}" for stack, layers in stacks.items()
            for index in range(max(layers) + 1)]  # fmt: skip


def as_float(values: Any) -> Any:
    """Numbers of a small tensor, in its shape."""
    return np.asarray(values.elements(0, values.numel).reshape(values.shape))
