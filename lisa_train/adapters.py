"""LoRA factor pairs of a PEFT model, and the norms of their products without the products."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lisa_train.norms import gram_square, merged_square, squares


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

    def factors(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return (A, B) of shapes (r, n) and (m, r), one pair per expert."""
        a, b = self.a.detach(), self.b.detach()
        if self.experts > 1:  # as PEFT lays them out: A (e·r, n), B (m, r·e)
            stacked_a = a.reshape(self.experts, -1, a.shape[-1])
            stacked_b = b.reshape(b.shape[0], -1, self.experts)
            return [(stacked_a[e], stacked_b[:, :, e]) for e in range(self.experts)]
        return [(a.flatten(1), b.flatten(1))]

    def delta_square(self) -> torch.Tensor:
        """‖sBA‖², summed over the experts."""
        return self.scale**2 * torch.stack([gram_square(a, b) for a, b in self.factors()]).sum()

    def merged_square(self) -> torch.Tensor | None:
        """‖W + sBA‖², or None where W is not at hand as a matrix (quantized, fused experts)."""
        weight = self._weight()
        if weight is None:
            return None
        version = (weight.data_ptr(), weight._version)
        if version != self._weight_version:  # W rests, so that this happens once
            self._weight_square = squares([weight])[0]
            self._weight_version = version
        [(a, b)] = self.factors()
        return merged_square(weight, self._weight_square, a, b, self.scale)

    def _weight(self) -> torch.Tensor | None:
        weight = getattr(self.module.get_base_layer(), "weight", None)
        if self.experts > 1 or self.module_is_wrapper or not torch.is_tensor(weight):
            return None
        if not weight.is_floating_point() or hasattr(weight, "quant_state"):
            return None
        weight = weight.detach().flatten(1)
        [(a, b)] = self.factors()
        if self.transposed:
            weight = weight.T
        return weight if weight.shape == (b.shape[0], a.shape[1]) else None

    @property
    def module_is_wrapper(self) -> bool:
        """Whether the adapter sits on a bare parameter instead of on a module's weight."""
        return hasattr(self.module, "parameter_name")


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
    pairs: Sequence[LoraPair], merged: bool
) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """Return ‖sBA‖² of the pairs, the indices of those with ‖W+sBA‖², and these."""
    with torch.no_grad():
        deltas = torch.stack([pair.delta_square() for pair in pairs])
        found = [(i, pair.merged_square()) for i, pair in enumerate(pairs)] if merged else []
    known = [(i, square) for i, square in found if square is not None]
    indices = [i for i, _ in known]
    values = torch.stack([s for _, s in known]) if known else deltas[:0]
    return deltas, indices, values
