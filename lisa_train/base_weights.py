"""‖W − W₀‖ with W₀ read again from the base checkpoint, tensor by tensor."""

import json
import warnings
from pathlib import Path

import torch
from torch import nn

from lisa_analysis.layers import canonical_name, role_of
from lisa_train.layermap import unwrap
from lisa_train.norms import changes
from lisa_train.shards import local_slices
from lisa_train.tensor_table import TensorTable

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class BaseWeights:
    """The weights that training started from, on the disk; never more than one in memory.

    Parameters
    ----------
    model
        A model loaded by `from_pretrained`, with or without adapters. Where its checkpoint
        cannot be found nothing is measured, with a warning.
    """

    def __init__(self, model: nn.Module) -> None:
        name = getattr(getattr(unwrap(model), "config", None), "_name_or_path", "")
        self._where = _find(name) if name else {}
        self._told = False
        if not self._where:
            warnings.warn(
                f"record.base_delta: no safetensors checkpoint of {name or 'this model'} was "
                "found; ‖W − W₀‖ of its weights is not measured.",
                RuntimeWarning,
                stacklevel=2,
            )

    def deltas(self, table: TensorTable) -> list[tuple[int, torch.Tensor]]:
        """Return (number, ‖W − W₀‖²) of every tensor whose W₀ is in the checkpoint."""
        from safetensors import safe_open

        names = {number: name for name, number in table.ids.items()}
        self._tell_of_missing([names[number] for number, _ in table.tensors])
        wanted: dict[Path, list[tuple[int, str, torch.Tensor]]] = {}
        for number, tensor in table.tensors:
            key = self._key(names[number])
            if key is not None and local_slices(tensor) is not None:
                wanted.setdefault(self._where[key], []).append((number, key, tensor))
        found: list[tuple[int, torch.Tensor]] = []
        for path, entries in wanted.items():
            with safe_open(str(path), framework="pt") as file:
                for number, key, now in entries:
                    # As it was loaded: in the precision that the model is held in.
                    base = file.get_tensor(key).to(now.device, now.dtype)
                    if base.shape == now.shape:
                        # Of a sharded tensor only what this process holds: the parts add up.
                        found.append((number, changes([base[local_slices(now)]], [now])[0][0]))
        return found

    def _tell_of_missing(self, names: list[str]) -> None:
        """Say once which weights have no W₀: new ones, and those that transformers renames."""
        missing = [n for n in names if role_of(n) == "base" and self._key(n) is None]
        if missing and self._where and not self._told:
            self._told = True
            warnings.warn(
                f"record.base_delta: the checkpoint holds no tensor for {len(missing)} of the "
                f"model's {len(names)} ({missing[0]}, …): new ones, or ones that transformers "
                "stores under another name or in another layout; their ‖W − W₀‖ is not measured.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _key(self, name: str) -> str | None:
        if role_of(name) != "base":
            return None
        name = canonical_name(name)
        # A checkpoint of the bare model lacks the prefix of the one with a head, or has it.
        shorter = name.split(".", 1)[-1]
        longer = [key for key in (f"model.{name}", f"transformer.{name}") if key in self._where]
        return next((k for k in (name, shorter, *longer) if k in self._where), None)


def _find(name: str) -> dict[str, Path]:
    """Return key -> file of a checkpoint in a folder or in the local cache of the hub."""
    if (folder := Path(name)).is_dir():
        single, index = folder / _SINGLE, folder / _INDEX
    else:
        from transformers.utils import cached_file

        options = {"local_files_only": True, "_raise_exceptions_for_missing_entries": False,
                   "_raise_exceptions_for_connection_errors": False}  # fmt: skip
        try:
            files = [cached_file(name, file, **options) for file in (_SINGLE, _INDEX)]
        except OSError:
            return {}
        single, index = (Path(file) if file else Path() for file in files)
    if index.is_file():
        shards = json.loads(index.read_text())["weight_map"]
        return {key: index.parent / file for key, file in shards.items()}
    if single.is_file():
        from safetensors import safe_open

        with safe_open(str(single), framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    return {}
