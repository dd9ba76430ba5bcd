"""What a model learned: the tensors that differ from its base, and its adapters; put in or out."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from lisa_analysis.contract.errors import ConfigError, LisaError
from lisa_analysis.contract.layers import canonical_name, role_of
from lisa_train.measure.ablation.units import Part, kinds_by_layer
from lisa_train.measure.step.base_weights import StoredWeights
from lisa_train.measure.step.checkpoint_conversions import Conversion
from lisa_train.measure.stops import undisturbed
from lisa_train.model.layer_map import LayerMap, find_layers
from lisa_train.model.module_tree import below
from lisa_train.model.sharding import is_sharded
from lisa_train.model.tensor_table import number_tensors

State = Literal["trained", "base"]
_COPY = ".modules_to_save."  # of PEFT, beside the module that it copied


class LearnedChange:
    """The difference between a trained model and its base, in parts that can be put in or out.

    Of the base one tensor at a time is read from the disk. A tensor that the base does not have (a
    head that was new) stays as it was trained, in the base as well.

    Parameters
    ----------
    model
        The trained model, whole on one device or several; with adapters or without.
    base
        The base's weights.
    trained
        The trained weights on the disk, where they are there: without them what changed is kept
        in memory once more while the model is the base.
    layers
        Path of the stack of layers, see `lisa_train.find_layers`.

    Attributes
    ----------
    parts : list of Part
        What was learned, tensor by tensor and adapter by adapter.
    kinds : list of set
        Kinds of tensors that every layer has.
    unmeasured : list of str
        Tensors that the base does not have.
    layer_map : LayerMap

    Raises
    ------
    LisaError
        When the base is another model's, or the adapters cannot be switched off one by one.
    """

    def __init__(
        self,
        model: nn.Module,
        base: StoredWeights,
        trained: StoredWeights | None = None,
        layers: str | None = None,
    ) -> None:
        if any(is_sharded(p) for p in model.parameters()):
            raise ConfigError(
                "the model's weights are sharded (FSDP2): an ablation takes whole ones; load the "
                "trained model in one process."
            )
        self.model = model
        self.layer_map = find_layers(model, layers)
        table = number_tensors(model, self.layer_map, None)
        self.kinds = kinds_by_layer(table.rows, len(self.layer_map))
        self.state: State = "trained"
        self._whole = True  # whether all parts are in that state
        self._base = _Values(model, base)
        self._trained = None if trained is None else _Values(model, trained)
        self._held: dict[int, torch.Tensor] = {}
        self.parts = [*_adapters(model, self.layer_map, table.rows)]
        known = {row["name"]: row for row in table.rows}
        changed, self.unmeasured = self._compare()
        for name, tensor, number in changed:
            unit, kind = _place(name, known, self.layer_map)
            self.parts.append(Part(canonical_name(name), unit, kind, tensor, None, number))

    def __len__(self) -> int:
        return len(self.layer_map)

    def _compare(self) -> tuple[list[tuple[str, torch.Tensor, int]], list[str]]:
        """Return the tensors that differ from the base's, and names of those it does not have."""
        values, found, there = self._base, [], set()
        for number, base in values.every():
            there.add(number)
            name, tensor = values.tensors[number]
            if base.shape != tensor.shape:
                raise LisaError(
                    f"{canonical_name(name)} has the shape {_shape(base)} in the base and "
                    f"{_shape(tensor)} in the trained model: that is another base (or tokens were "
                    "added after it); name the one that was trained."
                )
            if not torch.equal(base.to(tensor.device, tensor.dtype), tensor):
                found.append((name, tensor, number))
        missing = [
            canonical_name(name)
            for number, (name, tensor) in enumerate(values.tensors)
            if number not in there and tensor.is_floating_point()
        ]
        if len(missing) > len(there):
            raise LisaError(
                f"the base holds {len(there)} of the trained model's {len(values.tensors)} tensors "
                f"(it lacks {missing[0]}, …): that is another model; name the one that was trained."
            )
        lacking = set(missing)
        # Their adapters and copies stand for a change of something that nobody knows.
        self.parts = [p for p in self.parts if not any(below(n, p.name) for n in lacking)]
        if self._trained is not None:
            self._hold_what_differs({number for _, _, number in found})
        return found, sorted(lacking)

    def _hold_what_differs(self, numbers: Collection[int]) -> None:
        """Keep in memory what the trained weights on the disk do not say as the model has it."""
        assert self._trained is not None
        same = {
            number
            for number, value in self._trained.some(numbers)
            if torch.equal(value, self._trained.tensors[number][1].cpu())
        }
        for number in set(numbers) - same:
            self._held[number] = _copy(self._trained.tensors[number][1])

    @contextmanager
    def put(self, parts: Iterable[Part], state: State) -> Iterator[None]:
        """Let `parts` be as they are in `state` within the block, and as they were after it."""
        chosen = list(parts)
        kept = [(p.tensor, p.tensor.detach().clone()) for p in chosen if p.tensor is not None]
        try:
            self._set(chosen, state)
            yield
        finally:
            with undisturbed(), torch.no_grad():
                for tensor, values in kept:
                    tensor.copy_(values)
                self._switch(chosen, self.state)

    def become(self, state: State) -> None:
        """Let everything be as it is in `state`."""
        if state == self.state and self._whole:
            return
        if state == "base":
            for part in self.parts:
                if part.tensor is not None and self._trained is None:
                    self._held.setdefault(part.number, _copy(part.tensor))
        # First: what is stopped in the middle is put back as a whole.
        self.state, self._whole = state, False
        self._set(self.parts, state)
        self._whole = True

    def base_values(self, numbers: Collection[int]) -> dict[int, torch.Tensor]:
        """Return the base's values of some tensors, by their numbers."""
        return dict(self._base.some(set(numbers)))

    @contextmanager
    def as_found(self) -> Iterator[None]:
        """Evaluation mode within the block; weights, flags and modes as they were after it."""
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            self.model.eval()
            yield
        finally:
            with undisturbed():
                self.become("trained")
                for parameter, flag in flags:
                    parameter.requires_grad_(flag)
                for module, mode in modes:
                    module.training = mode

    def _set(self, parts: Iterable[Part], state: State) -> None:
        chosen = list(parts)
        tensors = {p.number: p.tensor for p in chosen if p.tensor is not None}
        with torch.no_grad():
            for number, values in self._values(set(tensors), state):
                tensor = tensors[number]
                assert tensor is not None
                tensor.copy_(values)
        self._switch(chosen, state)

    def _values(self, numbers: Collection[int], state: State) -> Iterator[tuple[int, torch.Tensor]]:
        if state == "base":
            yield from self._base.some(numbers)
            return
        yield from ((n, self._held[n]) for n in numbers if n in self._held)
        if rest := set(numbers) - self._held.keys():
            assert self._trained is not None
            yield from self._trained.some(rest)

    def _switch(self, parts: Iterable[Part], state: State) -> None:
        for part in parts:
            if part.module is not None:
                part.module.enable_adapters(state == "trained")


class _Values:
    """The values of a model's own tensors in a checkpoint, by the number of the tensor."""

    def __init__(self, model: nn.Module, stored: StoredWeights) -> None:
        self.tensors: list[tuple[str, torch.Tensor]] = []
        self._stored = stored
        self._of: dict[str, list[int]] = {}
        seen: dict[int, int] = {}
        for name, tensor in _own_tensors(model):
            if id(tensor) not in seen:
                seen[id(tensor)] = len(self.tensors)
                self.tensors.append((name, tensor))
            self._of.setdefault(canonical_name(name), []).append(seen[id(tensor)])
        self._conversions = stored.conversions(self._of)
        # Which conversion a tensor's values come from: of two the last one counts.
        self._by: dict[int, Conversion] = {}
        for conversion in self._conversions:
            self._by |= dict.fromkeys(self._of.get(conversion.target, ()), conversion)

    def every(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield number and values of every tensor that the checkpoint has, once."""
        yield from self._read(self._conversions)

    def some(self, numbers: Collection[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield number and values of some tensors, each once."""
        needed = {id(self._by[n]): self._by[n] for n in numbers if n in self._by}
        for number, values in self._read(needed.values()):
            if number in numbers:
                yield number, values

    def _read(self, conversions: Iterable[Conversion]) -> Iterator[tuple[int, torch.Tensor]]:
        with self._stored.opened() as checkpoint:
            for conversion in conversions:
                targets = self._of.get(conversion.target, ())
                dtype = self.tensors[targets[0]][1].dtype if targets else None
                for name, values in self._stored.build(conversion, checkpoint, dtype).items():
                    for number in dict.fromkeys(self._of.get(name, ())):
                        if self._by.setdefault(number, conversion) is conversion:
                            yield number, values


def _own_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and saved buffers of the model itself, second names too; no adapter's."""
    saved = model.state_dict(keep_vars=True).keys()
    buffers = ((n, b) for n, b in model.named_buffers() if n in saved and b.is_floating_point())
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *buffers):
        if role_of(name) == "base" and _COPY not in name:
            yield name, tensor


def _adapters(
    model: nn.Module, layer_map: LayerMap, rows: Iterable[Mapping[str, Any]]
) -> Iterator[Part]:
    """Layers of PEFT that can be switched off, each in the unit of what it adapts."""
    configurations = getattr(model, "peft_config", {})
    for one in configurations.values() if isinstance(configurations, dict) else ():
        kind = getattr(one.peft_type, "value", one.peft_type)
        if getattr(one, "is_prompt_learning", False) or kind in ("XLORA", "ADAPTION_PROMPT"):
            raise ConfigError(
                f"the adapter is of the type {kind}, which has no layers that can be switched off "
                "one by one: there is nothing to ablate."
            )
    if not configurations:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    known = {row["name"]: row for row in rows}
    for path, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        if getattr(module, "merged", False):
            raise ConfigError(
                f"the adapter of {canonical_name(path)} is merged into the weights; unmerge it "
                "(model.unmerge_adapter()) to ablate it."
            )
        names = [f"{path}.{name}" for name, _ in module.named_parameters()]
        learned = [n for n in names if role_of(n) != "base" or _COPY in n]
        if learned:
            unit, kind = _place(learned[0], known, layer_map)
            yield Part(canonical_name(path), unit, kind, None, module)


def _place(
    name: str, rows: Mapping[str, Mapping[str, Any]], layer_map: LayerMap
) -> tuple[int | str, str]:
    """Layer or group, and kind, of a parameter or buffer."""
    if name in rows:
        layer = layer_map.layer_of(name)
        return (layer_map.group_of(name) if layer is None else layer), str(rows[name]["kind"])
    path = canonical_name(name)
    for layer, home in enumerate(layer_map.names):
        if below(path, home):
            return layer, "other"
    return "other", "other"


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def _shape(tensor: torch.Tensor) -> str:
    return "×".join(map(str, tensor.shape))
