"""What takes turns: layers, their attention and MLP halves, or single matrices; their sizes."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lisa_analysis.contract.layers import canonical_name, kind_of
from lisa_train.methods.lisa.config import TOWER, By
from lisa_train.methods.lisa.control import Control
from lisa_train.methods.lisa.schedule import Draw
from lisa_train.model.layer_map import LayerMap, Unit
from lisa_train.model.module_tree import below
from lisa_train.model.towers import sense_towers

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


@dataclass(frozen=True)
class Units:
    """What a draw chooses from, in the order of the layers.

    Parameters
    ----------
    by
        ``layer``, ``half`` or ``module``.
    names
        Layers by their paths; halves as ``model.layers.0.attention``; modules by theirs, as
        ``model.layers.0.self_attn.q_proj``.
    layers
        Index of the layer that each unit is in, or is.
    tensors
        Names of the tensors of each, as in `model.named_parameters()`.
    sizes
        Number of elements of each.
    count
        Number of layers.
    stacks
        Path of the stack that each unit is in.
    """

    by: By
    names: tuple[str, ...]
    layers: tuple[int, ...]
    tensors: tuple[tuple[str, ...], ...]
    sizes: tuple[int, ...]
    count: int
    stacks: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def of(cls, model: nn.Module, layer_map: LayerMap, by: By) -> "Units":
        """Split the layers of a model; what is frozen now is in no half and no module.

        A module is a matrix (or a stack of them, as fused experts) with its bias; a half is
        attention, or what is not attention. What else a layer has (norms, gates) goes with the unit
        that stands nearest to it in the tree of modules, the largest of equally near ones.
        """
        count = len(layer_map)
        if by == "layer":
            sizes = tuple(sum(layer_map.sizes[n] for n in names) for names in layer_map.layers)
            return cls(
                by, layer_map.names, tuple(range(count)), layer_map.layers, sizes, count,
                layer_map.stacks,
            )  # fmt: skip
        parameters = dict(model.named_parameters())
        found: list[tuple[str, int, tuple[str, ...]]] = []
        for layer, (path, names) in enumerate(zip(layer_map.names, layer_map.layers, strict=True)):
            trained = {n: parameters[n] for n in names if parameters[n].requires_grad}
            split = _split(path, trained, by)
            found += [(unit, layer, tuple(tensors)) for unit, tensors in split.items()]
        return cls(
            by,
            tuple(unit for unit, _, _ in found),
            tuple(layer for _, layer, _ in found),
            tuple(tensors for _, _, tensors in found),
            tuple(sum(layer_map.sizes[n] for n in tensors) for _, _, tensors in found),
            count,
            tuple(layer_map.stacks[layer] for _, layer, _ in found),
        )

    @property
    def weights(self) -> NDArray[np.float64] | None:
        """Sizes over their mean, shape (U,), by which a draw is budgeted; None by layer."""
        if self.by == "layer":
            return None
        sizes = np.array(self.sizes, dtype=np.float64)
        return sizes / sizes.mean()

    @property
    def part_names(self) -> tuple[str, ...] | None:
        """Names of the parts; None by layer, where numbers say it."""
        return None if self.by == "layer" else self.names

    def named(self, draw: Draw) -> Draw:
        """Say of which layers a draw took parts, and which parts."""
        if self.by == "layer":
            return draw
        return replace(draw, layers=self.layers_of(draw.layers), units=draw.layers)

    def entries(self, control: Control) -> dict[str, Any]:
        """Return what a run's manifest says: the placebo's permutation; the parts."""
        placed = control.entries(len(self), self.weights)
        if self.by == "layer":
            return placed
        return placed | {
            "unit_names": list(self.names),
            "unit_layers": list(self.layers),
            "unit_sizes": list(self.sizes),
            "unit_tensors": [list(names) for names in self.tensors],
        }

    def coverage(self, visits: NDArray[np.int64]) -> dict[str, list[Any]]:
        """Draws of every layer or part, and those that no draw took: parts by their names."""
        counts = visits.tolist()
        missed = [i for i, count in enumerate(counts) if count == 0]
        if self.by == "layer":
            return {"layer_visits": counts, "layers_never_drawn": missed}
        return {"unit_visits": counts, "units_never_drawn": [self.names[i] for i in missed]}

    def layers_of(self, units: Iterable[int]) -> tuple[int, ...]:
        """Layers of which any of `units` is a part, sorted."""
        return tuple(sorted({self.layers[unit] for unit in units}))

    def parameters(
        self, model: nn.Module, layer_map: LayerMap
    ) -> dict[Unit, tuple[nn.Parameter, ...]]:
        """Return the tensors with gradients of every unit and group, see `LayerMap.units`.

        Towers of images and sounds are a group of their own here, and no part of ``other``.
        """
        whole = {
            unit: tuple(p for p in tensors if p.requires_grad)
            for unit, tensors in layer_map.units(model).items()
        }
        whole[TOWER] = towers = _tower_tensors(model, layer_map)
        if towers:
            inside = set(towers)
            whole["other"] = tuple(p for p in whole["other"] if p not in inside)
        if self.by == "layer":
            return whole
        parameters = dict(model.named_parameters())
        groups = {unit: tensors for unit, tensors in whole.items() if isinstance(unit, str)}
        units: dict[Unit, tuple[nn.Parameter, ...]] = {
            unit: tuple(parameters[name] for name in tensors)
            for unit, tensors in enumerate(self.tensors)
        }
        return units | groups

    def measured(
        self, tensors: Mapping[Unit, Sequence[nn.Parameter]]
    ) -> dict[Unit, Sequence[nn.Parameter]]:
        """Tensors that speak for a unit: of a half or module its matrices alone.

        The norms beside them have far larger gradients per element.
        """
        if self.by == "layer":
            return dict(tensors)
        matrices = {unit: [p for p in some if p.dim() > 1] for unit, some in tensors.items()}
        return {unit: matrices[unit] or some for unit, some in tensors.items()}


def _tower_tensors(model: nn.Module, layer_map: LayerMap) -> tuple[nn.Parameter, ...]:
    """Tensors with gradients of the towers of images and sounds."""
    paths = sense_towers(model, layer_map)
    if not paths:
        return ()
    other = set(layer_map.groups["other"])
    return tuple(
        p for name, p in model.named_parameters()
        if p.requires_grad and name in other
        and any(below(canonical_name(name), path) for path in paths)
    )  # fmt: skip


def _split(path: str, tensors: Mapping[str, torch.Tensor], by: By) -> dict[str, list[str]]:
    """Tensors of every unit of one layer, by the unit's name, in the order of the layer."""
    inside = {name: canonical_name(name)[len(path) + 1 :] for name in tensors}
    modules = {name: inside[name].rpartition(".")[0] for name in tensors}
    matrices = [
        name for name, tensor in tensors.items()
        if tensor.dim() > 1 and kind_of(name, layer_path=path) != "norm"
    ]  # fmt: skip
    alone = {name: [modules[m] for m in matrices].count(modules[name]) == 1 for name in matrices}
    # A module that holds several matrices (fused experts) is none: each is one by its own name.
    homes = {name: modules[name] if alone[name] else inside[name] for name in matrices}
    if by == "half":
        homes = {
            name: "attention" if _is_attention(name, path, inside[name]) else "mlp"
            for name in matrices
        }
    if not homes:
        return {path: list(tensors)} if tensors else {}
    sizes: dict[str, int] = {}
    for name, home in homes.items():
        sizes[home] = sizes.get(home, 0) + tensors[name].numel()
    for name in tensors:
        if name not in homes:
            near = max(matrices, key=lambda m: (_shared(inside[m], inside[name]), sizes[homes[m]]))
            homes[name] = homes[near]
    order = list(dict.fromkeys(homes[name] for name in matrices))
    return {
        f"{path}.{home}" if home else path: [name for name in tensors if homes[name] == home]
        for home in order
    }


def _is_attention(name: str, path: str, inside: str) -> bool:
    return kind_of(name, layer_path=path).startswith("attn") or bool(_ATTENTION.search(inside))


def _shared(a: str, b: str) -> int:
    """Number of modules that two tensors of a layer have above them in common."""
    shared = 0
    for mine, yours in zip(a.split(".")[:-1], b.split(".")[:-1], strict=False):
        if mine != yours:
            break
        shared += 1
    return shared
