"""What changed between two sets of weights, tensor by tensor: renamed and fused ones matched."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.contract.layers import plain_name
from lisa_analysis.rundir.weights.adapter import Adapter, Dora, Factors
from lisa_analysis.rundir.weights.stored import Rows, Stored, square_sum

Array = NDArray[np.float64]

# Fused projections, whose rows are those of these modules behind one another.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "Wqkv": ("Wq", "Wk", "Wv"),
    "in_proj_weight": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
}


@dataclass(frozen=True, eq=False)
class Joined:
    """Matrices of equal width behind one another."""

    parts: Sequence[Rows]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of all, and columns."""
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    def read(self, first: int, last: int) -> Array:
        """Rows, from whichever parts hold them."""
        found, start = [], 0
        for part in self.parts:
            low, high = max(first - start, 0), min(last - start, part.shape[0])
            if low < high:
                found.append(part.read(low, high))
            start += part.shape[0]
        return np.concatenate(found)


@dataclass(frozen=True, eq=False)
class Difference:
    """One matrix less another."""

    after: Rows
    before: Rows

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.after.shape

    def read(self, first: int, last: int) -> Array:
        """Rows of the difference."""
        return self.after.read(first, last) - self.before.read(first, last)


@dataclass(frozen=True, eq=False)
class Changed:
    """One weight: what it was, and what became of it.

    Attributes
    ----------
    name, shape, dtype
        Of the weight, in the model.
    before
        Its matrices before (several: experts); None where the base is not known.
    change
        Matrices of the change, LoRA's factors, or None where it is not known.
    factors
        LoRA's factors, also where DoRA makes another change of them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    before: Sequence[Rows] | None = field(default=None, repr=False)
    change: Sequence[Rows] | Factors | None = field(default=None, repr=False)
    factors: Factors | None = field(default=None, repr=False)

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        return int(np.prod(self.shape))

    def base_squares(self) -> float:
        """‖W_0‖²; NaN where it is not known."""
        return _squares(self.before)

    def squares(self) -> float:
        """‖ΔW‖²; NaN where it is not known."""
        if isinstance(self.change, Factors):
            return self.change.square_sum
        return _squares(self.change)


def _squares(matrices: Sequence[Rows] | None) -> float:
    return float("nan") if matrices is None else sum(square_sum(matrix) for matrix in matrices)


def of_adapter(
    adapter: Adapter, base: Mapping[str, Stored] | None
) -> tuple[list[Changed], list[str]]:
    """What an adapter changes; with the base also its size, DoRA, and what was saved whole."""
    lookup = None if base is None else Lookup(base)
    found, remarks = [], list(adapter.remarks)
    lost: list[str] = []
    for module, factors in adapter.factors.items():
        name = f"{module}.weight"
        weight = None if lookup is None else lookup.find(name) or lookup.find(module)
        if lookup is not None and (weight is None or weight.shape != factors.shape):
            lost.append(name)
            weight = None
        change: Any = factors
        before = None if weight is None else weight.matrices()
        if factors.magnitude is not None:
            # Of DoRA BA alone is no change: every row is brought to a length of its own.
            change = None
            if before is not None and not factors.embedding and len(factors.shape) == 2:
                change = [Dora(before[0], factors)]
        dtype = "float32" if weight is None else weight.dtype
        found.append(Changed(name, factors.shape, dtype, before, change, factors))
    for name, tensor in adapter.whole.items():
        weight = None if lookup is None else lookup.find(name)
        same = weight is not None and weight.shape == tensor.shape
        before = weight.matrices() if weight is not None and same else None
        after = tensor.matrices()
        change = None if before is None else _differences(after, before)
        found.append(Changed(name, tensor.shape, tensor.dtype, before, change))
    if lost:
        remarks.append(
            f"Of another shape or not in the base, and compared with none: {_some(lost)}."
        )
    if any(f.magnitude is not None for f in adapter.factors.values()) and base is None:
        remarks.append("DoRA changes every row's length: without the base its change is unknown.")
    if adapter.whole and base is None:
        remarks.append(f"Saved whole, and unknown without the base: {_some([*adapter.whole])}.")
    return found, remarks


def of_checkpoints(
    tuned: Mapping[str, Stored], base: Mapping[str, Stored]
) -> tuple[list[Changed], list[str]]:
    """Compare two checkpoints; what has no counterpart is listed, and compared with nothing."""
    after, before = Lookup(tuned), Lookup(base)
    found: list[Changed] = []
    used: set[str] = set()
    lone: list[str] = []
    odd: list[str] = []
    for name, tensor in tuned.items():
        if not tensor.is_float:
            continue
        weight = before.find(name)
        if weight is not None and weight.shape == tensor.shape:
            used.add(weight.name)
            matrices = weight.matrices()
            found.append(_compared(name, tensor.shape, tensor.dtype, tensor.matrices(), matrices))
        elif weight is not None:
            used.add(weight.name)
            odd.append(f"{name} ({_by(tensor.shape)} against {_by(weight.shape)})")
        elif parts := before.parts(name, tensor.shape):
            used |= {part.name for row in parts for part in row}
            matrices = [Joined([m for part in row for m in part.matrices()]) for row in parts]
            found.append(_compared(name, tensor.shape, tensor.dtype, tensor.matrices(), matrices))
        else:
            lone.append(name)
    missing = [name for name, tensor in base.items() if tensor.is_float and name not in used]
    for name in list(missing):
        if parts := after.parts(name, base[name].shape):
            names = {part.name for row in parts for part in row}
            if names <= {*lone}:
                lone = [other for other in lone if other not in names]
                missing.remove(name)
                matrices = [Joined([m for part in row for m in part.matrices()]) for row in parts]
                # By the tuned model's names: its layers are those of the other weights.
                first, old = parts[0][0].name, base[name]
                own = first.removesuffix(plain_name(first)) + plain_name(name)
                found.append(_compared(own, old.shape, old.dtype, matrices, old.matrices()))
    remarks = []
    for left, words in (
        (lone, "only in the tuned weights"), (missing, "only in the base"),
        (odd, "of another shape than in the base"),
    ):  # fmt: skip
        if left:
            remarks.append(f"Not compared, since {words}: {_some(left)}.")
    return found, remarks


def of_model(weights: Mapping[str, Stored]) -> list[Changed]:
    """Weights alone, of which nothing is known to have changed."""
    return [Changed(name, t.shape, t.dtype, t.matrices()) for name, t in weights.items()
            if t.is_float]  # fmt: skip


def _compared(
    name: str, shape: tuple[int, ...], dtype: str, after: Sequence[Rows], before: Sequence[Rows]
) -> Changed:
    return Changed(name, shape, dtype, before, _differences(after, before))


def _differences(after: Sequence[Rows], before: Sequence[Rows]) -> list[Rows]:
    return [Difference(a, b) for a, b in zip(after, before, strict=True)]


class Lookup:
    """Finds tensors by the names that another version of the model gives them."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.tensors = tensors
        self._plain: dict[str, list[str]] = {}
        for name in tensors:
            self._plain.setdefault(plain_name(name), []).append(name)

    def find(self, name: str) -> Any:
        """Tensor of this name, or the only one whose name differs by wrappers; None without."""
        if name in self.tensors:
            return self.tensors[name]
        names = self._plain.get(plain_name(name), [])
        return self.tensors[names[0]] if len(names) == 1 else None

    def parts(self, name: str, shape: tuple[int, ...]) -> list[list[Any]] | None:
        """Tensors that a fused one is made of, per matrix of it; None where they do not fit."""
        for fused, names in FUSED.items():
            match = re.search(rf"(^|\.){fused}(\.weight)?$", name)
            if match:
                own = [f"{name[: match.start()]}.{part}" for part in names]
                return self._rows(own, match[2] or "", shape, name[: match.start()])
        match = re.search(r"(^|\.)(down_proj)$", name)
        if match and len(shape) == 3:
            return self._rows([name], ".weight", shape, name[: match.start()])
        return None

    def _rows(
        self, names: Sequence[str], end: str, shape: tuple[int, ...], module: str
    ) -> list[list[Any]] | None:
        if len(shape) == 3:
            inside = [name[len(module) + 1 :] for name in names]
            wanted = [[f"{module}.{expert}.{part}.weight" for part in inside]
                      for expert in range(shape[0])]  # fmt: skip
        else:
            wanted = [[f"{name}{end}" for name in names]]
        rows = [[self.find(name) for name in row] for row in wanted]
        for row in rows:
            if any(part is None or len(part.shape) != 2 for part in row):
                return None
            if (sum(part.shape[0] for part in row), row[0].shape[1]) != shape[-2:]:
                return None
        return rows


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _some(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
