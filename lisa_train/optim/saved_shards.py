"""Optimizer state out of a checkpoint of a model that FSDP2 splits: what is there, and no more.

`torch.distributed.checkpoint.state_dict` makes the optimizer step once with zeros before it loads,
so that there is state of every tensor to load into. Of a training with LISA that is more state
than it ever holds, and of resting layers the checkpoint has none. Here what the checkpoint holds
is asked for first.
"""

import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lisa_analysis.contract.errors import RunDirectoryError
from lisa_analysis.contract.layers import canonical_name
from lisa_train.model.parallel import processes
from lisa_train.model.sharding import split_as
from lisa_train.optim.frozen_state import tensors_of


def load_saved_state(
    model: nn.Module, optimizer: Optimizer, saved: str | PathLike[str], *, key: str = "optimizer"
) -> None:
    """Load an optimizer's state that was saved by the names of its tensors.

    That is what `torch.distributed.checkpoint.state_dict.get_optimizer_state_dict` returns, as
    `torch.distributed.checkpoint.save({key: …})` writes it in pieces (a folder), or `torch.save`
    as a whole (a file, of a state with ``full_state_dict=True``). Any number of processes may have
    written it; all of those that train call this together. Tensors of which nothing was saved
    have no state afterwards.

    Parameters
    ----------
    model
        The model, split over the processes as it trains; or whole, in one process.
    optimizer
        Its optimizer, of all tensors that may train.
    saved
        The folder or the file.
    key
        In a folder: under which name the state was saved.

    Raises
    ------
    RunDirectoryError
        When the state is of other tensors, or of tensors of other shapes.
    """
    path = Path(saved)
    named = {canonical_name(name): p for name, p in model.named_parameters()}
    if path.is_dir():
        states, groups = _pieces(path, key, named)
    else:
        whole = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        states = {canonical_name(name): state for name, state in whole["state"].items()}
        groups = whole["param_groups"]
    tensors = tensors_of(optimizer)
    places = {id(tensor): place for place, tensor in enumerate(tensors)}
    found: dict[int, dict[str, Any]] = {}
    for name, state in states.items():
        parameter = _of(named, name, path)
        if id(parameter) not in places:
            raise RunDirectoryError(
                f"{path} holds optimizer state of {name}, which this optimizer does not train; "
                "resume with the settings of the training that wrote it."
            )
        found[places[id(parameter)]] = {
            part: _split(value, parameter, name, path) for part, value in state.items()
        }
    mine = optimizer.state_dict()["param_groups"]
    if len(mine) != len(groups):
        raise RunDirectoryError(
            f"{path} holds {len(groups)} parameter groups, this optimizer has {len(mine)}; resume "
            "with the settings of the training that wrote it."
        )
    for own, other in zip(mine, groups, strict=True):
        own |= {name: value for name, value in other.items() if name != "params"}
    optimizer.load_state_dict({"state": found, "param_groups": mine})


def _pieces(
    folder: Path, key: str, named: Mapping[str, torch.Tensor]
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """States by name and settings of the groups, each process's own pieces of them."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(folder)
    about = reader.read_metadata()
    paths: Mapping[str, tuple[Any, ...]] = about.planner_data or {}
    wanted: dict[str, Any] = {}
    for entry, stored in about.state_dict_metadata.items():
        path = paths.get(entry, ())
        if len(path) < 2 or path[0] != key:
            continue
        if path[1] == "state" and len(path) != 4:
            raise RunDirectoryError(
                f"{folder} holds optimizer state of {path[2]} in parts of parts, which cannot be "
                "taken up here; take an optimizer that keeps tensors, as AdamW."
            )
        wanted[entry] = None
        if isinstance(stored, TensorStorageMetadata):
            dtype = stored.properties.dtype
            like = _of(named, path[2], folder) if path[1] == "state" else None
            wanted[entry] = (
                torch.empty(stored.size, dtype=dtype)
                if like is None or like.shape != stored.size
                else torch.empty_like(like, dtype=dtype, requires_grad=False)
            )
    with warnings.catch_warnings():  # one process is a number of processes like any other
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable")
        dcp.load(wanted, storage_reader=reader, no_dist=processes() == 1)
    states: dict[str, dict[str, Any]] = {}
    groups: dict[int, dict[str, Any]] = {}
    for entry, value in wanted.items():
        _, what, *where = paths[entry]
        if what == "state":
            states.setdefault(canonical_name(where[0]), {})[where[1]] = value
        elif what == "param_groups" and not where:
            groups = dict(enumerate(value))
        elif what == "param_groups":
            groups.setdefault(int(where[0]), {})[where[1]] = value
    return states, [groups[number] for number in sorted(groups)]


def _of(named: Mapping[str, torch.Tensor], name: str, path: Path) -> torch.Tensor:
    parameter = named.get(canonical_name(name))
    if parameter is None:
        raise RunDirectoryError(
            f"{path} holds optimizer state of {name}, which the model does not have: it is a "
            "checkpoint of another model."
        )
    return parameter


def _split(value: Any, parameter: torch.Tensor, name: str, path: Path) -> Any:
    """What this process holds of a value that was saved as a whole."""
    if not torch.is_tensor(value) or value.ndim == 0:
        return value
    if value.shape != parameter.shape:
        raise RunDirectoryError(
            f"{path} holds optimizer state of {name} in the shape {tuple(value.shape)}, the tensor "
            f"has {tuple(parameter.shape)}: it is a checkpoint of another model, or of an "
            "optimizer whose state cannot be taken up here."
        )
    return split_as(value, parameter)
