"""‖W − W₀‖ with W₀ read again from the base checkpoint, parameter by parameter."""

import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from lisa_analysis.contract.layers import canonical_name, role_of
from lisa_train.measure.faults import come_through, reason
from lisa_train.measure.step.checkpoint_conversions import Conversion, conversions
from lisa_train.model.module_tree import unwrap
from lisa_train.model.norms import changes
from lisa_train.model.sharding import local_slices
from lisa_train.model.tensor_table import TensorTable

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class StoredWeights:
    """Tensors of a checkpoint on the disk, as the parameters that a model knows them by.

    Parameters
    ----------
    model
        The model whose parameters are looked for, with or without adapters.
    where
        Key -> file of the checkpoint, see `find_checkpoint`.

    Attributes
    ----------
    unreadable : dict
        Name of a parameter -> why it could not be built; under "" why transformers' rules could
        not be asked for.
    """

    def __init__(self, model: nn.Module, where: Mapping[str, Path]) -> None:
        self._model = unwrap(model)
        self._where = where
        self.unreadable: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self._where)

    def conversions(self, names: Mapping[str, Sequence[int]]) -> list[Conversion]:
        """Return how parameters come out of the checkpoint.

        Parameters
        ----------
        names
            Name without adapters -> the tensors (any number for each) that go by it; the model's
            own name of a tensor comes before its second ones.

        Returns
        -------
        list of Conversion
            Of two names of one tensor the model's own comes last, and counts. Parameters of which
            the checkpoint has nothing have none.
        """
        # Transformers is asked; what it does not explain is looked up by name.
        try:
            made = conversions(self._model, self._where, names)
        except Exception as error:  # another version's rules: names alone
            come_through(error, foreign=True)
            self.unreadable[""] = reason(error, foreign=True)
            made = []
        told = {conversion.target for conversion in made}
        for name in names.keys() - told:
            if (key := self._key(name)) is not None:
                made.append(Conversion(name, sources=[(key, None)]))
        own: dict[int, str] = {}
        for name, chosen in names.items():
            for number in chosen:
                own.setdefault(number, name)
        owners = set(own.values())
        return sorted(made, key=lambda conversion: conversion.target in owners)

    def opened(self) -> "_Checkpoint":
        """Return the files, to be closed again; `build` reads them."""
        return _Checkpoint(self._where)

    def build(
        self, conversion: Conversion, checkpoint: "_Checkpoint", dtype: torch.dtype | None
    ) -> dict[str, torch.Tensor]:
        """Return the parameters of a conversion by name; nothing where they cannot be built."""
        try:
            return conversion.build(self._model, lambda key: checkpoint.read(key).to(dtype=dtype))
        except Exception as error:
            come_through(error, foreign=True)
            self.unreadable.setdefault(conversion.target, reason(error, foreign=True))
            return {}

    def _key(self, name: str) -> str | None:
        # A checkpoint of the bare model lacks the prefix of the one with a head, or has it.
        shorter = name.split(".", 1)[-1]
        longer = [key for key in (f"model.{name}", f"transformer.{name}") if key in self._where]
        return next((k for k in (name, shorter, *longer) if k in self._where), None)


class BaseWeights:
    """The weights that training started from, on the disk; never more than one in memory.

    One may be made of several tensors of the checkpoint (experts), and is then there twice while
    it is put together.

    Parameters
    ----------
    model
        A model loaded by `from_pretrained`, with or without adapters. Where its checkpoint
        cannot be found nothing is measured, with a warning.
    name
        Folder or hub id of the weights; None: what the model was loaded from.
    """

    def __init__(self, model: nn.Module, name: str | None = None) -> None:
        name = loaded_from(model) if name is None else name
        self._conversions: list[Conversion] | None = None
        self._stored = StoredWeights(model, find_checkpoint(name) if name else {})
        self._told = False
        if not self._stored:
            warnings.warn(
                f"record.base_delta: no safetensors checkpoint of {name or 'this model'} was "
                "found; ‖W − W₀‖ of its weights is not measured.",
                RuntimeWarning,
                stacklevel=2,
            )

    def deltas(self, table: TensorTable) -> list[tuple[int, torch.Tensor]]:
        """Return (number, ‖W − W₀‖²) of every tensor whose W₀ is in the checkpoint."""
        measured = {i: p for i, p in table.tensors if local_slices(p) is not None}
        numbers = _numbers_by_name(table)
        if self._conversions is None:
            self._conversions = self._stored.conversions(numbers)
        found: dict[int, torch.Tensor] = {}
        with self._stored.opened() as checkpoint:
            for conversion in self._conversions:
                chosen = [i for i in numbers[conversion.target] if i in measured]
                # One tensor of the checkpoint may be split into parameters not yet known by name.
                if not chosen and conversion.converter is None:
                    continue
                dtype = measured[chosen[0]].dtype if chosen else None
                for name, base in self._stored.build(conversion, checkpoint, dtype).items():
                    for i in numbers.get(name, ()):
                        if i in measured and measured[i].shape == base.shape:
                            found[i] = _distance(base, measured[i])
        self._tell_of_missing(table, [i for i in measured if i not in found])
        return sorted(found.items())

    def _tell_of_missing(self, table: TensorTable, numbers: list[int]) -> None:
        """Say once which weights have no W₀: new ones, and those that nobody can build."""
        names = {number: name for name, number in table.ids.items()}
        missing = [names[i] for i in numbers if role_of(names[i]) == "base"]
        if missing and self._stored and not self._told:
            self._told = True
            why = next(iter(self._stored.unreadable.values()), "")
            warnings.warn(
                f"record.base_delta: the checkpoint holds no tensor for {len(missing)} of the "
                f"model's {len(table.tensors)} ({missing[0]}, …): new ones, or ones that it stores "
                "in a layout that transformers cannot be asked for"
                f"{f' ({why})' if why else ''}; their ‖W − W₀‖ is not measured.",
                RuntimeWarning,
                stacklevel=2,
            )


def loaded_from(model: nn.Module) -> str:
    """Return the folder or hub id that a model was loaded from; empty where it is not known."""
    return getattr(getattr(unwrap(model), "config", None), "_name_or_path", "") or ""


def base_of_run(recorded: object, model: nn.Module) -> str | None:
    """Return where the W₀ of a run that goes on is; None where nobody can tell.

    The model at hand may have been loaded from a checkpoint of the run itself, and Trainer fills it
    with the weights of that one: the run remembers what it began with.

    Parameters
    ----------
    recorded
        `model.name` of its run.json, which a user may have chosen freely.
    model
        The model that goes on.
    """
    own = loaded_from(model)
    if isinstance(recorded, str) and recorded != own and find_checkpoint(recorded):
        return recorded
    midway = own and own != recorded and (Path(own) / "trainer_state.json").exists()
    return None if midway else own


class _Checkpoint:
    """Files of a checkpoint, each opened when something in it is asked for."""

    def __init__(self, where: Mapping[str, Path]) -> None:
        self._where = where
        self._files = ExitStack()
        self._open: dict[Path, Any] = {}

    def read(self, key: str) -> torch.Tensor:
        """Read one tensor."""
        from safetensors import safe_open

        path = self._where[key]
        if path not in self._open:
            self._open[path] = self._files.enter_context(safe_open(str(path), framework="pt"))
        return self._open[path].get_tensor(key)  # type: ignore[no-any-return]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()


def _distance(base: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """‖W − W₀‖² with W₀ as it was loaded: in the precision that the model is held in."""
    # Of a sharded tensor only what this process holds: the parts add up.
    base = base[local_slices(now)].to(now.device, now.dtype)
    return changes([base], [now])[0][0]


def _numbers_by_name(table: TensorTable) -> dict[str, list[int]]:
    """Numbers of the model's own weights by the names without adapters, second names too.

    PEFT's `modules_to_save` trains a copy beside the original: one name, two tensors.
    """
    numbers: dict[str, list[int]] = {}
    for row in table.rows:
        if row["role"] == "base":
            number = row["param_id"] if row["tied_to"] is None else row["tied_to"]
            numbers.setdefault(canonical_name(row["name"]), []).append(number)
    return numbers


def find_checkpoint(name: str, revision: str | None = None) -> dict[str, Path]:
    """Return key -> file of a checkpoint in a folder or in the local cache of the hub.

    Empty where there is none in the safetensors format.
    """
    if (folder := Path(name)).is_dir():
        single, index = folder / _SINGLE, folder / _INDEX
    else:
        from transformers.utils import cached_file

        options = {"local_files_only": True, "revision": revision,
                   "_raise_exceptions_for_missing_entries": False,
                   "_raise_exceptions_for_connection_errors": False}  # fmt: skip
        try:
            found = [cached_file(name, file, **options) for file in (_SINGLE, _INDEX)]
        except OSError:
            return {}
        single, index = (Path(file) if file else Path() for file in found)
    if index.is_file():
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {key: index.parent / file for key, file in files.items()}
    if single.is_file():
        from safetensors import safe_open

        with safe_open(str(single), framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    return {}
