"""LoRA factor pairs of a PEFT model, and the norms of their products without the products."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lisa_train.measure.processes import Processes
from lisa_train.model.norms import gram_square, local, merged_square, squares, stacked
from lisa_train.model.sharding import is_sharded, local_slices, shards


@dataclass(eq=False)
class LoraPair:
    """One pair of factors: W + s·BA, with everything as matrices.

    Attributes
    ----------
    name_b
        Name of B's parameter; what is measured of the product is recorded on its row.
    a, b
        The parameters; embeddings and convolutions hold them in other shapes, see `factors`.
    module, adapter
        The PEFT layer and the adapter's name: the scaling s is read from them at every use.
    experts
        Number of weights that the factors adapt side by side (fused experts), else 1.
    transposed
        Whether the module holds Wᵀ (embeddings, GPT-2's Conv1D).
    """

    name_b: str
    a: nn.Parameter
    b: nn.Parameter
    module: Any
    adapter: str
    experts: int = 1
    transposed: bool = False

    def __post_init__(self) -> None:
        self._weight_version: tuple[int, int] | None = None
        self._weight_square = torch.zeros(())

    @property
    def scale(self) -> float:
        """S: α/r, or α/√r with rank-stabilised LoRA."""
        return float(self.module.scaling[self.adapter])

    def factors(
        self, a: torch.Tensor | None = None, b: torch.Tensor | None = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return (A, B) of shapes (r, n) and (m, r), one pair per expert.

        `a` and `b` stand for the parameters where these are sharded: as whole tensors.
        """
        a = self.a.detach() if a is None else a
        b = self.b.detach() if b is None else b
        if self.experts > 1:  # as PEFT lays them out: A (e·r, n), B (m, r·e)
            stacked_a = a.reshape(self.experts, -1, a.shape[-1])
            stacked_b = b.reshape(b.shape[0], -1, self.experts)
            return [(stacked_a[e], stacked_b[:, :, e]) for e in range(self.experts)]
        return [(a.flatten(1), b.flatten(1))]

    def delta_square(
        self, a: torch.Tensor | None = None, b: torch.Tensor | None = None
    ) -> torch.Tensor:
        """‖sBA‖², summed over the experts; `a` and `b` as in `factors`."""
        squares_of_experts = [gram_square(*factors) for factors in self.factors(a, b)]
        return self.scale**2 * torch.stack(squares_of_experts).sum()

    def merged_square(
        self, a: torch.Tensor | None = None, b: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """‖W + sBA‖², or None where W is not at hand as a matrix (quantized, fused experts).

        Of a sharded W the part that this process holds: the parts add up.
        """
        weight = self.weight
        if weight is None or self.experts > 1 or self.module_is_wrapper:
            return None
        [(a, b)] = self.factors(a, b)
        block = _matrix(weight, (b.shape[0], a.shape[1]), self.transposed)
        if block is None:
            return None
        matrix, rows, columns = block
        version = (matrix.data_ptr(), matrix._version)
        if version != self._weight_version:  # W rests, so that this happens once
            self._weight_square = squares([matrix])[0]
            self._weight_version = version
        return merged_square(matrix, self._weight_square, a[:, columns], b[rows], self.scale)

    @property
    def weight(self) -> torch.Tensor | None:
        """W as the module holds it now, if it is a tensor of floating-point numbers."""
        weight = getattr(self.module.get_base_layer(), "weight", None)
        if not torch.is_tensor(weight) or not weight.is_floating_point():
            return None
        return None if hasattr(weight, "quant_state") else weight

    @property
    def module_is_wrapper(self) -> bool:
        """Whether the adapter sits on a bare parameter instead of on a module's weight."""
        return hasattr(self.module, "parameter_name")


def _matrix(
    weight: torch.Tensor, shape: tuple[int, int], transposed: bool
) -> tuple[torch.Tensor, slice, slice] | None:
    """What this process holds of W as a matrix, and its rows and columns in a W of `shape`."""
    whole = (weight.shape[0], math.prod(weight.shape[1:]))
    if (whole[::-1] if transposed else whole) != shape or weight.ndim < 2:
        return None
    where = local_slices(weight)
    if where is None:
        return None
    rows, columns = where[:2]
    if weight.ndim > 2:  # of a convolution, whose kernels are flattened
        if any(cut != slice(0, n) for cut, n in zip(where[1:], weight.shape[1:], strict=True)):
            return None
        columns = slice(0, whole[1])
    matrix = local(weight).flatten(1)
    return (matrix.T, columns, rows) if transposed else (matrix, rows, columns)


def find_lora_pairs(model: nn.Module) -> list[LoraPair]:
    """Return the LoRA pairs of a model, in the order of its modules; none without adapters.

    Grouped convolutions and other layers whose product is not a plain BA are left out.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        LoraPair(names[id(b)], a, b, module, adapter, experts, transposed)
        for module in model.modules()
        for adapter, a, b, experts, transposed in _pairs_of(module)
        if id(a) in names and id(b) in names
    ]


def _pairs_of(module: Any) -> Iterator[tuple[str, nn.Parameter, nn.Parameter, int, bool]]:
    scaling = getattr(module, "scaling", None)
    if not isinstance(scaling, dict) or not hasattr(module, "get_base_layer"):
        return
    experts = int(getattr(module, "num_experts", 1))
    if getattr(module.get_base_layer(), "groups", 1) != 1:
        return
    for kind in ("", "embedding_"):
        transposed = bool(kind) or bool(getattr(module, "fan_in_fan_out", False))
        firsts = getattr(module, f"lora_{kind}A", {})
        seconds = getattr(module, f"lora_{kind}B", {})
        for adapter in firsts:
            if adapter in seconds and adapter in scaling:
                a, b = _factor(firsts[adapter]), _factor(seconds[adapter])
                if a is not None and b is not None:
                    yield adapter, a, b, experts, transposed


def _factor(part: Any) -> nn.Parameter | None:
    weight = part if isinstance(part, nn.Parameter) else getattr(part, "weight", None)
    return weight if isinstance(weight, nn.Parameter) else None


def product_squares(
    pairs: Sequence[LoraPair], merged: bool, processes: Processes
) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """Return ‖sBA‖² of the pairs, the indices of those with ‖W+sBA‖², and these.

    All are this process's parts, as those of B are: the parts add up. Sharded factors are small
    enough to be gathered whole, which takes one collective for all pairs together.
    """
    split = [p for pair in pairs for p in (pair.a, pair.b) if is_sharded(p)]
    whole = dict(zip(map(id, split), processes.gather(split), strict=True))
    deltas: list[torch.Tensor] = []
    found: list[tuple[int, torch.Tensor]] = []
    with torch.no_grad():
        for i, pair in enumerate(pairs):
            a, b = whole.get(id(pair.a)), whole.get(id(pair.b))
            deltas.append(pair.delta_square(a, b) / shards(pair.b))
            square = pair.merged_square(a, b) if merged else None
            if square is not None and pair.weight is not None:
                found.append((i, square * (shards(pair.weight) / shards(pair.b))))
    indices = [i for i, _ in found]
    known = stacked(deltas)
    return known, indices, stacked([s for _, s in found]) if found else known[:0]
