"""Where the layers of a model are: found from its structure, for any architecture."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from lisa_analysis.contract.errors import ConfigError, suggest
from lisa_analysis.contract.layers import canonical_name, kind_of, role_of
from lisa_train.model.module_tree import (
    Stack,
    below,
    children_of,
    common_path,
    embeddings_path,
    holds_blocks,
    module_from,
    output_head,
    parameter_ids,
    resting_tower,
    shared_depth,
    stacks,
    unwrap,
)

GROUPS = ("embed", "head", "norm", "other")

# A unit is what trains or rests as a whole: a layer by its index, or a group by its name.
Unit = int | str


@dataclass(frozen=True)
class LayerMap:
    """Every parameter of a model in exactly one place: a layer or a group.

    Parameters
    ----------
    names
        Canonical module path of each layer, as ``model.layers.0``: what wrappers (PEFT,
        torch.compile, DDP) add is left out.
    stacks
        Path of the stack that each layer belongs to; the layers of an encoder and a decoder are
        numbered on.
    layers
        Names of the parameters of each layer, as in `model.named_parameters()`.
    groups
        Names of the parameters outside the layers: ``embed``, ``head``, ``norm``, ``other``, which
        is everything else (a projection, a head of an unknown name, a second tower), and
        ``prompt`` where virtual tokens train (prompt tuning).
    tied
        Second names of shared tensors -> the name that `named_parameters()` gives.
    sizes
        Number of elements of every parameter.
    repeats
        Places of the stack that use a layer again -> the layer: ``blocks.1`` is ``blocks.0``.
    """

    names: tuple[str, ...]
    stacks: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...]
    groups: Mapping[str, tuple[str, ...]]
    tied: Mapping[str, str]
    sizes: Mapping[str, int] = field(repr=False)
    repeats: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def layer_of(self, name: str) -> int | None:
        """Index of the layer that holds parameter `name`, or None outside the layers."""
        return self._layers_by_name.get(self.tied.get(name, name))

    def group_of(self, name: str) -> str:
        """``layer``, ``embed``, ``head``, ``norm``, ``prompt``, ``other``; else `KeyError`."""
        name = self.tied.get(name, name)
        return "layer" if name in self._layers_by_name else self._groups_by_name[name]

    def units(self, model: nn.Module) -> dict[Unit, tuple[nn.Parameter, ...]]:
        """Parameters of every layer, by its index, and of every group, by its name.

        A matrix that is embedding and head at once belongs to both groups here.
        """
        tied_heads = (
            owner for name, owner in self.tied.items() if kind_of(name, layer_path=None) == "head"
        )
        names: dict[Unit, tuple[str, ...]] = dict(enumerate(self.layers))
        names.update(self.groups)
        names["head"] = tuple(dict.fromkeys((*self.groups["head"], *tied_heads)))
        parameters = dict(model.named_parameters())
        return {unit: tuple(parameters[name] for name in found) for unit, found in names.items()}

    def parameters(self, model: nn.Module, layer: int) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters of layer `layer` of `model`."""
        return _pick(model, self.layers[layer])

    def __str__(self) -> str:
        rows = [("layer", "path", "tensors", "parameters")]
        rows += [
            (str(i), name, str(len(tensors)), f"{self._count(tensors):,}")
            for i, (name, tensors) in enumerate(zip(self.names, self.layers, strict=True))
        ]
        rows += [
            (group, _summary(names), str(len(names)), f"{self._count(names):,}")
            for group, names in self.groups.items()
        ]
        everything = [name for names in (*self.layers, *self.groups.values()) for name in names]
        rows.append(("total", "", str(len(everything)), f"{self._count(everything):,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}"
            for a, b, c, d in rows
        ]
        lines += [f"used again: {place} is {layer}" for place, layer in self.repeats.items()]
        again = tuple(self.repeats)
        lines += [
            f"tied: {name} is {owner}"
            for name, owner in self.tied.items()
            if not any(below(canonical_name(name), place) for place in again)
        ]
        return "\n".join(lines)

    @cached_property
    def _layers_by_name(self) -> dict[str, int]:
        return {name: i for i, names in enumerate(self.layers) for name in names}

    @cached_property
    def _groups_by_name(self) -> dict[str, str]:
        return {name: group for group, names in self.groups.items() for name in names}

    def _count(self, names: Iterable[str]) -> int:
        return sum(self.sizes[name] for name in names)


def _pick(model: nn.Module, names: Iterable[str]) -> list[tuple[str, nn.Parameter]]:
    parameters = dict(model.named_parameters())
    return [(name, parameters[name]) for name in names]


def _summary(names: tuple[str, ...]) -> str:
    """First names of a group: enough to recognise it in the table."""
    shown = ", ".join(canonical_name(name) for name in names[:2])
    return shown + (f", … ({len(names) - 2} more)" if len(names) > 2 else "")


def find_layers(model: nn.Module, layers: str | None = None) -> LayerMap:
    """Find the layers of a model from its structure.

    A stack is a list of modules of which each has at least two weight matrices. The stack of a
    model is its only one; both of an encoder-decoder; of several in a generating model (vision
    and language), the one that lies nearest to the token embeddings. Anything else is ambiguous.
    A block that stands in the stack several times is one layer.

    Parameters
    ----------
    model
        Any `torch.nn.Module`, wrapped by PEFT, `torch.compile` or DDP or not.
    layers
        Path of the stack to take instead, as ``model.vision_tower.encoder.layers``; several
        separated by commas. An `nn.ModuleDict` of blocks is taken in its own order.

    Returns
    -------
    LayerMap

    Raises
    ------
    ConfigError
        When there is no stack, when several are equally plausible, or `layers` names none.
    """
    bare = unwrap(model)
    found = stacks(model)
    chosen = _named(found, layers, model) if layers else _main(found, bare)
    layer_ids: dict[int, int] = {}
    names: list[str] = []
    homes: list[str] = []
    repeats: dict[str, str] = {}
    for home, place, block in _places(chosen):
        ids = [id(parameter) for parameter in block.parameters()]
        if ids and all(known in layer_ids for known in ids):
            repeats[place] = names[layer_ids[ids[0]]]
            continue
        for known in ids:
            layer_ids.setdefault(known, len(names))  # a tensor shared by layers stays in the first
        names.append(place)
        homes.append(home)
    inside: list[list[str]] = [[] for _ in names]
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    owners: dict[int, str] = {}
    tied: dict[str, str] = {}
    group_of = _Grouping(model, bare, found, chosen)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in owners:
            tied[name] = owners[id(parameter)]
            continue
        owners[id(parameter)] = name
        if id(parameter) in layer_ids:
            inside[layer_ids[id(parameter)]].append(name)
        else:
            groups.setdefault(group_of(name, parameter), []).append(name)
    return LayerMap(
        names=tuple(names),
        stacks=tuple(homes),
        layers=tuple(tuple(names) for names in inside),
        groups={group: tuple(names) for group, names in groups.items()},
        tied=tied,
        sizes={name: _numel(p) for name, p in model.named_parameters()},
        repeats=repeats,
    )


def _places(stacks: Iterable[Stack]) -> Iterator[tuple[str, str, nn.Module]]:
    """Path of the stack, path of the block, and the block, one after the other."""
    for stack in stacks:
        for key, block in stack.blocks:
            yield stack.path, f"{stack.path}.{key}", block


def _numel(parameter: torch.Tensor) -> int:
    return int(parameter.numel())


def _main(stacks: list[Stack], bare: nn.Module) -> list[Stack]:
    """Choose the stack, or both of an encoder-decoder, whose layers LISA rotates."""
    if not stacks:
        weights = {path: _weights(stack) for path, stack in _containers(bare).items()}
        found = max(weights, key=lambda path: weights[path], default=None)
        advice = (
            f"name the list or ModuleDict that holds its layers with `layers`, as layers={found!r}"
            if found
            else "put its layers into an nn.ModuleList or nn.ModuleDict, whose path `layers` names"
        )
        raise ConfigError(
            f"no stack of repeated layers was found in {type(bare).__name__}; {advice}."
        )
    if len(stacks) == 1:
        return stacks
    config = getattr(bare, "config", None)
    if len(stacks) == 2 and getattr(config, "is_encoder_decoder", False):
        return stacks
    if (embeddings := embeddings_path(bare)) is not None and output_head(bare) is not None:
        depth = {stack.path: shared_depth(stack.path, embeddings) for stack in stacks}
        deepest = [s for s in stacks if depth[s.path] == max(depth.values())]
        if len(deepest) == 1:
            return deepest
    raise ConfigError(
        f"{type(bare).__name__} has {len(stacks)} stacks of layers ({_listing(stacks)}) and its "
        f"structure does not say which to train; choose one with layers={stacks[0].path!r}."
    )


def _listing(stacks: list[Stack]) -> str:
    return ", ".join(map(str, stacks))


def _weights(stack: Stack) -> int:
    return sum({id(p): p.numel() for _, b in stack.blocks for p in b.parameters()}.values())


def _containers(model: nn.Module) -> dict[str, Stack]:
    """Every list or dict of modules with weights, by its canonical path."""
    found = {}
    for name, module in model.named_modules():
        if name and holds_blocks(module) and next(module.parameters(), None) is not None:
            path = canonical_name(name)
            found[path] = Stack(path, tuple(children_of(module)))
    return found


def _named(stacks: list[Stack], layers: str, model: nn.Module) -> list[Stack]:
    """Stacks that the user names, found among all lists of the model."""
    containers = _containers(model)
    chosen = []
    for path in (part.strip() for part in layers.split(",")):
        if path not in containers:
            candidates = _listing(stacks) or _listing(list(containers.values())) or "none"
            raise ConfigError(
                f"layers={path!r} is not a list (or ModuleDict) of modules with weights of "
                f"{type(unwrap(model)).__name__}; the candidates are {candidates}."
                f"{suggest(path, containers)}"
            )
        chosen.append(containers[path])
    return chosen


class _Grouping:
    """Sorts the parameters outside the layers into embed, head, norm and other.

    The modules that the model itself names (token embeddings, output embeddings, everything
    outside its base model) come first, then the type of the module, then the vocabulary of
    `lisa_analysis.contract.layers`. What belongs to a stack that does not rotate is ``other``.
    """

    def __init__(
        self, model: nn.Module, bare: nn.Module, stacks: list[Stack], chosen: list[Stack]
    ) -> None:
        self._modules = dict(model.named_modules())
        self._embed = parameter_ids(module_from(bare, "get_input_embeddings"))
        head = output_head(bare)
        base = getattr(bare, "base_model", None)
        outside = isinstance(base, nn.Module) and base is not bare
        self._head = parameter_ids(head)
        self._in_base = parameter_ids(base) if outside else None
        rotating = [stack.path for stack in chosen]
        others = [stack.path for stack in stacks if stack.path not in rotating]
        self._frozen = tuple(resting_tower(path, rotating) for path in others)
        # With a second stack about, only what surrounds the rotating one belongs to it.
        embeddings = embeddings_path(bare)
        self._home = (
            common_path([*rotating, *([embeddings] if embeddings else [])]) if others else ""
        )

    def __call__(self, name: str, parameter: nn.Parameter) -> str:
        if id(parameter) in self._embed:
            return "embed"
        if id(parameter) in self._head:
            return "head"
        path = canonical_name(name)
        if (role := role_of(name)) in ("prompt", "xlora", "shadow"):
            return "prompt" if role == "prompt" else "other"  # beside the model, no part of it
        if any(below(path, tower) for tower in self._frozen):
            return "other"
        if self._in_base is not None and id(parameter) not in self._in_base:
            return "head"
        if self._home and not below(path, self._home):
            return "other"
        owner = self._modules[name.rpartition(".")[0]]
        kind = kind_of(name, layer_path=None)
        if kind == "head":
            return "head"
        if isinstance(owner, nn.Embedding):
            return "embed"
        if re.search("norm", type(owner).__name__, re.IGNORECASE):
            return "norm"
        return kind if kind in GROUPS else "other"
