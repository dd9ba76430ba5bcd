"""Where the layers of a model are: found from its structure, for any architecture."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lisa_analysis.errors import ConfigError, suggest
from lisa_analysis.layers import canonical_name, kind_of

GROUPS = ("embed", "head", "norm", "other")


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
        Names of the parameters outside the layers: ``embed``, ``head``, ``norm`` and ``other``
        (which LISA never trains: a frozen vision tower, say).
    tied
        Second names of shared tensors -> the name that `named_parameters()` gives.
    sizes
        Number of elements of every parameter.
    """

    names: tuple[str, ...]
    stacks: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...]
    groups: Mapping[str, tuple[str, ...]]
    tied: Mapping[str, str]
    sizes: Mapping[str, int] = field(repr=False)

    def __post_init__(self) -> None:
        places = {name: i for i, names in enumerate(self.layers) for name in names}
        object.__setattr__(self, "_layer_of", places)
        groups = {name: group for group, names in self.groups.items() for name in names}
        object.__setattr__(self, "_group_of", groups)

    def __len__(self) -> int:
        return len(self.names)

    def layer_of(self, name: str) -> int | None:
        """Index of the layer that holds parameter `name`, or None outside the layers."""
        return self._layer_of.get(self.tied.get(name, name))  # type: ignore[attr-defined]

    def group_of(self, name: str) -> str:
        """``layer``, ``embed``, ``head``, ``norm`` or ``other``; `KeyError` for a stranger."""
        name = self.tied.get(name, name)
        if name in self._layer_of:  # type: ignore[attr-defined]
            return "layer"
        return self._group_of[name]  # type: ignore[attr-defined]

    def parameters(self, model: nn.Module, layer: int) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters of layer `layer` of `model`."""
        return _pick(model, self.layers[layer])

    def group_parameters(self, model: nn.Module, group: str) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters of the group called `group`."""
        return _pick(model, self.groups[group])

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
        lines += [f"tied: {name} is {owner}" for name, owner in self.tied.items()]
        return "\n".join(lines)

    def _count(self, names: Iterable[str]) -> int:
        return sum(self.sizes[name] for name in names)


def _pick(model: nn.Module, names: Iterable[str]) -> list[tuple[str, nn.Parameter]]:
    parameters = dict(model.named_parameters())
    return [(name, parameters[name]) for name in names]


def _summary(names: tuple[str, ...]) -> str:
    """First names of a group: enough to recognise it in the table."""
    shown = ", ".join(canonical_name(name) for name in names[:2])
    return shown + (f", … ({len(names) - 2} more)" if len(names) > 2 else "")


@dataclass(frozen=True)
class _Stack:
    """A list of repeated blocks: its canonical path and the blocks."""

    path: str
    blocks: tuple[nn.Module, ...]


def find_layers(model: nn.Module, layers: str | None = None) -> LayerMap:
    """Find the layers of a model from its structure.

    A stack is a list of modules of which each has at least two weight matrices. The stack of a
    model is its only one; both of an encoder-decoder; of several in a generating model (vision
    and language), the one that lies nearest to the token embeddings. Anything else is ambiguous.

    Parameters
    ----------
    model
        Any `torch.nn.Module`, wrapped by PEFT, `torch.compile` or DDP or not.
    layers
        Path of the stack to take instead, as ``model.vision_tower.encoder.layers``; several
        separated by commas.

    Returns
    -------
    LayerMap

    Raises
    ------
    ConfigError
        When there is no stack, when several are equally plausible, or `layers` names none.
    """
    bare = unwrap(model)
    stacks = _stacks(model)
    chosen = _named(stacks, layers, model) if layers else _main(stacks, bare)
    layer_ids: dict[int, int] = {}
    blocks = [block for stack in chosen for block in stack.blocks]
    for i, block in enumerate(blocks):
        for parameter in block.parameters():
            layer_ids.setdefault(id(parameter), i)  # a tensor shared by layers stays in the first
    found: list[list[str]] = [[] for _ in blocks]
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    owners: dict[int, str] = {}
    tied: dict[str, str] = {}
    group_of = _Grouping(model, bare, stacks, chosen)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in owners:
            tied[name] = owners[id(parameter)]
            continue
        owners[id(parameter)] = name
        if id(parameter) in layer_ids:
            found[layer_ids[id(parameter)]].append(name)
        else:
            groups[group_of(name, parameter)].append(name)
    return LayerMap(
        names=tuple(f"{stack.path}.{i}" for stack in chosen for i in range(len(stack.blocks))),
        stacks=tuple(stack.path for stack in chosen for _ in stack.blocks),
        layers=tuple(tuple(names) for names in found),
        groups={group: tuple(names) for group, names in groups.items()},
        tied=tied,
        sizes={name: _numel(p) for name, p in model.named_parameters()},
    )


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile, data-parallel and PEFT wrappers."""
    bare: Any = model
    while True:
        if isinstance(getattr(bare, "_orig_mod", None), nn.Module):
            bare = bare._orig_mod
        elif isinstance(bare, nn.DataParallel | nn.parallel.DistributedDataParallel):
            bare = bare.module
        elif hasattr(bare, "peft_config") and hasattr(bare, "get_base_model"):
            bare = bare.get_base_model()
        else:
            return bare


def _numel(parameter: torch.Tensor) -> int:
    return int(parameter.numel())


def _stacks(model: nn.Module) -> list[_Stack]:
    """Outermost lists of blocks, in the order of `named_modules`."""
    found: list[_Stack] = []
    inside: set[int] = set()
    for name, module in model.named_modules():
        children = list(module.named_children())
        if id(module) in inside or not _is_list(children):
            continue
        blocks = tuple(child for _, child in children)
        if all(_matrices(block) >= 2 for block in blocks):
            found.append(_Stack(canonical_name(name), blocks))
            inside.update(id(part) for part in module.modules())
    return found


def _is_list(children: list[tuple[str, nn.Module]]) -> bool:
    """Whether children are numbered 0, 1, …: `ModuleList`, `Sequential` and their subclasses."""
    return bool(children) and [name for name, _ in children] == [
        str(i) for i in range(len(children))
    ]


def _matrices(block: nn.Module) -> int:
    """Number of weights with two or more dimensions: a convolution with its norm has one."""
    return sum(p.ndim >= 2 or hasattr(p, "quant_state") for p in block.parameters())


def _main(stacks: list[_Stack], bare: nn.Module) -> list[_Stack]:
    """Choose the stack, or both of an encoder-decoder, whose layers LISA rotates."""
    if not stacks:
        raise ConfigError(
            f"no stack of repeated layers was found in {type(bare).__name__}; name the list that "
            "holds its layers with `layers`, as layers='encoder.blocks'."
        )
    if len(stacks) == 1:
        return stacks
    config = getattr(bare, "config", None)
    if len(stacks) == 2 and getattr(config, "is_encoder_decoder", False):
        return stacks
    if (embeddings := _embeddings(bare)) is not None and _head(bare) is not None:
        depth = {stack.path: _shared_depth(stack.path, embeddings) for stack in stacks}
        deepest = [s for s in stacks if depth[s.path] == max(depth.values())]
        if len(deepest) == 1:
            return deepest
    raise ConfigError(
        f"{type(bare).__name__} has {len(stacks)} stacks of layers ({_listing(stacks)}) and its "
        f"structure does not say which to train; choose one with layers={stacks[0].path!r}."
    )


def _listing(stacks: list[_Stack]) -> str:
    return ", ".join(f"{stack.path}: {len(stack.blocks)} layers" for stack in stacks)


def _named(stacks: list[_Stack], layers: str, model: nn.Module) -> list[_Stack]:
    """Stacks that the user names, found among all lists of the model."""
    lists = {
        canonical_name(name): tuple(module.children())
        for name, module in model.named_modules()
        if name and _is_list(list(module.named_children()))
    }
    chosen = []
    for path in (part.strip() for part in layers.split(",")):
        if path not in lists:
            raise ConfigError(
                f"layers={path!r} is not a list of modules of {type(unwrap(model)).__name__}; the "
                f"candidates are {_listing(stacks) or 'none'}.{suggest(path, lists)}"
            )
        chosen.append(_Stack(path, lists[path]))
    return chosen


def _embeddings(bare: nn.Module) -> str | None:
    """Canonical path of the token embeddings, or None when the model has none."""
    return _path(bare, _call(bare, "get_input_embeddings"))


def _head(bare: nn.Module) -> nn.Module | None:
    """Return the output embeddings (`lm_head`), or None."""
    return _call(bare, "get_output_embeddings")


def _call(bare: nn.Module, method: str) -> nn.Module | None:
    try:
        module = getattr(bare, method)()
    except (AttributeError, NotImplementedError):
        return None
    return module if isinstance(module, nn.Module) else None


def _path(bare: nn.Module, module: nn.Module | None) -> str | None:
    return next((canonical_name(n) for n, m in bare.named_modules() if m is module), None)


def _shared_depth(a: str, b: str) -> int:
    """Number of leading path components that two modules share."""
    depth = 0
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        depth += 1
    return depth


class _Grouping:
    """Sorts the parameters outside the layers into embed, head, norm and other.

    The modules that the model itself names (token embeddings, output embeddings, everything
    outside its base model) come first, then the type of the module, then the vocabulary of
    `lisa_analysis.layers`. What belongs to a stack that does not rotate is ``other``.
    """

    def __init__(
        self, model: nn.Module, bare: nn.Module, stacks: list[_Stack], chosen: list[_Stack]
    ) -> None:
        self._modules = dict(model.named_modules())
        self._embed = _ids(_call(bare, "get_input_embeddings"))
        head = _head(bare)
        base = getattr(bare, "base_model", None)
        outside = isinstance(base, nn.Module) and base is not bare
        self._head = _ids(head)
        self._in_base = _ids(base) if outside else None
        rotating = [stack.path for stack in chosen]
        others = [stack.path for stack in stacks if stack.path not in rotating]
        self._frozen = tuple(_tower(path, rotating) for path in others)
        # With a second stack about, only what surrounds the rotating one belongs to it.
        embeddings = _embeddings(bare)
        self._home = _common([*rotating, *([embeddings] if embeddings else [])]) if others else ""

    def __call__(self, name: str, parameter: nn.Parameter) -> str:
        if id(parameter) in self._embed:
            return "embed"
        if id(parameter) in self._head:
            return "head"
        path = canonical_name(name)
        if any(_below(path, tower) for tower in self._frozen):
            return "other"
        if self._in_base is not None and id(parameter) not in self._in_base:
            return "head"
        if self._home and not _below(path, self._home):
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


def _ids(module: nn.Module | None) -> frozenset[int]:
    return frozenset(id(p) for p in module.parameters()) if module is not None else frozenset()


def _below(path: str, ancestor: str) -> bool:
    return path == ancestor or path.startswith(ancestor + ".")


def _common(paths: list[str]) -> str:
    """Longest module path that all paths start with."""
    shared = paths[0].split(".")
    for path in paths[1:]:
        shared = shared[: _shared_depth(".".join(shared), path)]
    return ".".join(shared)


def _tower(path: str, rotating: list[str]) -> str:
    """Highest ancestor of a resting stack that holds no rotating one: `model.vision_tower`."""
    parts = path.split(".")
    for depth in range(1, len(parts) + 1):
        ancestor = ".".join(parts[:depth])
        if not any(_below(stack, ancestor) for stack in rotating):
            return ancestor
    return path
