"""LoRA factor pairs of a PEFT model: what each weight is made of, now and at the start."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lisa_train.measure.adapters.factor_norms import (
    gram_square,
    merged_square,
    rescaled_squares,
)
from lisa_train.model.norms import local, squares, widest_float
from lisa_train.model.sharding import local_slices


@dataclass(frozen=True)
class Factors:
    """What the weight of one adapted module is made of beside W, at one moment.

    Attributes
    ----------
    a, b
        The factors as PEFT holds them; None stands for a product of zero.
    scale
        Factor on the product: α/r, α/√r (rank-stabilised), α/(rank now) in AdaLoRA.
    diagonal
        What stands between B and A, if anything: AdaLoRA's and KaSA's singular values.
    magnitude
        DoRA: the norms that the rows of W + s·BA are given.
    """

    a: torch.Tensor | None
    b: torch.Tensor | None
    scale: float | torch.Tensor
    diagonal: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None

    def matrices(
        self, experts: int = 1, *, scaled: bool = True
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return (sA, B) of shapes (r, n) and (m, r) in double precision, a pair per expert.

        Without `scaled` the scale is left out.
        """
        if self.a is None or self.b is None:
            return []
        kind = widest_float(self.a.device)
        a, b = self.a.detach().to(kind), self.b.detach().to(kind)
        if self.diagonal is not None:
            a = a * self.diagonal.detach().to(kind).reshape(-1, 1)
        if scaled:
            a = a * self.scale_for(a)
        if experts > 1:  # as PEFT lays them out: A (e·r, n), B (m, r·e)
            stacked_a = a.reshape(experts, -1, a.shape[-1])
            stacked_b = b.reshape(b.shape[0], -1, experts)
            return [(stacked_a[e], stacked_b[:, :, e]) for e in range(experts)]
        return [(a.flatten(1), b.flatten(1))]

    def scale_for(self, tensor: torch.Tensor) -> float | torch.Tensor:
        """Return the scale to calculate with next to `tensor`."""
        if torch.is_tensor(self.scale):
            return self.scale.to(tensor.device, tensor.dtype)
        return self.scale


@dataclass(eq=False)
class LoraPair:
    """One pair of factors: W + s·BA, with everything as matrices.

    Attributes
    ----------
    name_b
        Name of B's parameter; what is measured of the product is recorded on its row.
    a, b
        The parameters; embeddings and convolutions hold them in other shapes, see `Factors`.
    module, adapter
        The PEFT layer and the adapter's name: the scaling s is read from them at every use.
    experts
        Number of weights that the factors adapt side by side (fused experts), else 1.
    transposed
        Whether the module holds Wᵀ (embeddings, GPT-2's Conv1D).
    diagonal, magnitude
        See `Factors`.
    start
        What the run started with, where that was not a product of zero.
    start_known
        Whether `start` can be trusted; else no change is measured.
    """

    name_b: str
    a: nn.Parameter
    b: nn.Parameter
    module: Any
    adapter: str
    experts: int = 1
    transposed: bool = False
    diagonal: nn.Parameter | None = None
    magnitude: nn.Parameter | None = None
    start: Factors | None = None
    start_known: bool = True

    def __post_init__(self) -> None:
        self._weight_version: tuple[int, int] | None = None
        self._weight_square = torch.zeros(())

    @property
    def scale(self) -> float | torch.Tensor:
        """The scaling s: α/r, α/√r (rank-stabilised LoRA), or α over the current rank (AdaLoRA)."""
        scale = float(self.module.scaling[self.adapter])
        ranks = getattr(self.module, "ranknum", {})
        if self.adapter not in ranks:
            return scale
        number = ranks[self.adapter].detach()
        return scale / (number.to(widest_float(number.device)).reshape(()) + 1e-5)  # as PEFT does

    @property
    def alone(self) -> bool:
        """Whether this adapter, and no other, now acts on the weight from outside it."""
        module = self.module
        if getattr(module, "merged_adapters", ()) or getattr(module, "disable_adapters", False):
            return False
        return _acting(module) == [self.adapter]

    @property
    def plain(self) -> bool:
        """Whether its change is sBA as it stands: one product that began as zero."""
        began_as_zero = self.start is None or self.start.a is None
        extra = self.diagonal is not None or self.magnitude is not None
        return self.start_known and began_as_zero and self.experts == 1 and not extra

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Everything that trains and makes the weight."""
        return [p for p in (self.a, self.b, self.diagonal, self.magnitude) if p is not None]

    def now(self, whole: Mapping[int, torch.Tensor] | None = None) -> Factors:
        """Return the factors as they are; `whole` has sharded ones by identity as whole tensors."""
        whole = whole or {}

        def of(parameter: nn.Parameter | None) -> torch.Tensor | None:
            if parameter is None:
                return None
            return whole.get(id(parameter), parameter.detach())

        return Factors(of(self.a), of(self.b), self.scale, of(self.diagonal), of(self.magnitude))

    def delta_square(self, now: Factors | None = None) -> torch.Tensor:
        """‖sBA − s₀B₀A₀‖², summed over the experts; the second product is that of the start.

        Of differences of the factors, BA − B₀A₀ = (B − B₀)A + B₀(A − A₀): a first step is small
        beside what PiSSA starts with, and would drown in ‖BA‖² − 2⟨BA, B₀A₀⟩ + ‖B₀A₀‖².
        """
        now = now or self.now()
        before = self.start.matrices(self.experts) if self.start is not None else []
        if not before:
            plain = [gram_square(a, b) for a, b in now.matrices(self.experts, scaled=False)]
            total = torch.stack(plain).sum()
            return total * now.scale_for(total) ** 2
        changes = [
            gram_square(torch.cat([a, a - a0]), torch.cat([b - b0, b0], dim=1))
            for (a, b), (a0, b0) in zip(now.matrices(self.experts), before, strict=True)
        ]
        return torch.stack(changes).sum()

    def merged_square(self, now: Factors | None = None) -> torch.Tensor | None:
        """‖W + sBA‖², or None where W is not at hand as a matrix (quantized, fused experts).

        Of a sharded W the part that this process holds: the parts add up.
        """
        if (block := self._block()) is None:
            return None
        matrix, rows, columns = block
        version = (matrix.data_ptr(), matrix._version)
        if version != self._weight_version:  # W rests, so that this happens once
            self._weight_square = squares([matrix])[0]
            self._weight_version = version
        [(a, b)] = (now or self.now()).matrices()
        return merged_square(matrix, self._weight_square, a[:, columns], b[rows], 1.0)

    def rescaled_squares(self, now: Factors) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Of DoRA, where rows of W + sBA are given trained norms: ‖W′ − W′₀‖² and ‖W′‖².

        None where W is not at hand as a matrix of whole rows.
        """
        block = self._block()
        if block is None or self.start is None or self.start.magnitude is None:
            return None
        matrix, rows, _ = block
        if matrix.shape[1] != math.prod(_whole_shape(self.weight, self.transposed)[1:]):
            return None
        assert now.magnitude is not None
        parts = []
        for factors in (now, self.start):
            magnitude = factors.magnitude
            assert magnitude is not None
            products = factors.matrices()
            pair = (products[0][0], products[0][1][rows]) if products else None
            parts.append((magnitude.detach().flatten()[rows], pair))
        return rescaled_squares(matrix, parts[0], parts[1])

    def _block(self) -> tuple[torch.Tensor, slice, slice] | None:
        weight = self.weight
        if weight is None or self.experts > 1 or self.module_is_wrapper:
            return None
        shape = (self.b.shape[0], math.prod(self.a.shape[1:]))
        return _matrix(weight, shape, self.transposed)

    @property
    def has_matrix(self) -> bool:
        """Whether W is at hand as one matrix."""
        return self._block() is not None

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


def _acting(module: Any) -> list[str]:
    """Adapters of a module that are switched on."""
    active = getattr(module, "active_adapters", None)
    names = [*getattr(module, "lora_A", ()), *getattr(module, "lora_embedding_A", ())]
    return names if active is None else [name for name in names if name in active]


def _whole_shape(weight: torch.Tensor | None, transposed: bool) -> tuple[int, ...]:
    assert weight is not None
    return tuple(weight.shape[::-1] if transposed else weight.shape)


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
