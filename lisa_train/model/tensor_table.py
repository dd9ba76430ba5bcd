"""The tensors of a model by number: what parameters.parquet says, and which ones are measured."""

import math
import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from lisa_analysis.contract.errors import ConfigError, suggest
from lisa_analysis.contract.layers import canonical_name, kind_of, role_of
from lisa_train.model.layer_map import LayerMap
from lisa_train.model.sharding import reshard


class TensorTable:
    """Numbers the tensors of a model in the order of `named_parameters()`.

    A second name of a shared tensor has a row (`tied_to`) but no number of its own to measure.
    Of a model under FSDP2 it takes the tensors that the modules hold: see `number_tensors`.

    Attributes
    ----------
    rows : list of dict
        The parameters table.
    ids : dict
        Name -> number, for every tensor once.
    tensors : list of (int, Parameter)
        Numbers and tensors to measure, each tensor once; packed integers (quantized weights) have
        no norm and are left out.
    """

    def __init__(
        self, model: nn.Module, layer_map: LayerMap, select: Sequence[str | int] | None
    ) -> None:
        self.rows: list[dict[str, Any]] = []
        self.ids: dict[str, int] = {}
        owners: dict[int, int] = {}
        for number, (name, tensor) in enumerate(model.named_parameters(remove_duplicate=False)):
            owner = owners.setdefault(id(tensor), number)
            if owner == number:
                self.ids[name] = number
            layer = layer_map.layer_of(name)
            path = layer_map.names[layer] if layer is not None else None
            shape = _unpacked_shape(tensor)
            self.rows.append(
                {
                    "param_id": number,
                    "name": name,
                    "layer": layer,
                    "kind": _kind(name, path, layer_map),
                    "role": role_of(name),
                    "numel": math.prod(shape),
                    "shape": "x".join(map(str, shape)),
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "tied_to": None if owner == number else owner,
                }
            )
        selected = set(self.ids.values()) if select is None else self._select(select)
        self.tensors: list[tuple[int, nn.Parameter]] = [
            (self.ids[name], tensor)
            for name, tensor in model.named_parameters()
            if self.ids[name] in selected and tensor.is_floating_point()
        ]

    def _select(self, select: Sequence[str | int]) -> set[int]:
        own = [row for row in self.rows if row["tied_to"] is None]
        chosen: set[int] = set()
        for entry in select:
            found = {row["param_id"] for row in own if _matches(row, entry)}
            if not found:
                kinds = sorted({row["kind"] for row in own})
                hint = suggest(entry, kinds) if isinstance(entry, str) else ""
                raise ConfigError(
                    f"record.select: nothing in the model matches {entry!r}; give a layer index, "
                    f"a kind ({', '.join(kinds)}) or a regular expression for names.{hint}"
                )
            chosen |= found
        return chosen


def _unpacked_shape(tensor: nn.Parameter) -> tuple[int, ...]:
    """Shape of a weight; of one that bitsandbytes packed, two of 4 bits a byte, that of before."""
    state = getattr(tensor, "quant_state", None)
    return tuple(getattr(state, "shape", None) or tensor.shape)


def number_tensors(
    model: nn.Module, layer_map: LayerMap, select: Sequence[str | int] | None
) -> TensorTable:
    """Return the table of the tensors that stay: FSDP2's pieces are put back in their places first.

    An evaluation leaves tensors gathered, which the next step throws away.
    """
    reshard(model)
    return TensorTable(model, layer_map, select)


def _kind(name: str, layer_path: str | None, layer_map: LayerMap) -> str:
    """Kind by name; outside the layers the group that LISA sees is the better witness."""
    kind = kind_of(name, layer_path=layer_path)
    if layer_path is None and kind == "other":
        return layer_map.group_of(name)
    return kind


def _matches(row: dict[str, Any], entry: str | int) -> bool:
    if isinstance(entry, int):
        return bool(row["layer"] == entry)
    return bool(row["kind"] == entry or re.search(entry, canonical_name(row["name"])))
