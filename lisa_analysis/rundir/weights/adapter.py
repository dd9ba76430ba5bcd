"""A PEFT adapter on disk: its LoRA factors with their scale, and what it saved whole."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.layers import canonical_name
from lisa_analysis.rundir.weights.checkpoint import as_float
from lisa_analysis.rundir.weights.stored import PIECE, Rows, Stored, read_header

Array = NDArray[np.float64]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PART = re.compile(
    r"\.(lora_embedding_A|lora_embedding_B|lora_A|lora_B|lora_magnitude_vector)"
    r"(?:\.default)?(\.weight|\.bias)?$"
)
# Initialisations with BA = 0 before the first step; with others a part of the base is in BA.
_FROM_ZERO = (True, "gaussian", "eva", "orthogonal", "mica", None)


@dataclass(frozen=True, eq=False)
class Factors:
    """ΔW = s·BA of one module, never multiplied out.

    Attributes
    ----------
    a, b
        Shapes (experts, rank, in) and (experts, out, rank).
    scale
        s.
    embedding
        Whether they adapt an embedding, whose A begins as zero and B as noise.
    transposed
        Whether the weight is stored as (in, out).
    magnitude
        DoRA's length of every output row, or None.
    """

    a: Array
    b: Array
    scale: float
    embedding: bool = False
    transposed: bool = False
    magnitude: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, (in, out) where it is stored so."""
        sides = (self.b.shape[1], self.a.shape[2])
        sides = sides[::-1] if self.transposed or self.embedding else sides
        return sides if len(self.a) == 1 else (len(self.a), *sides)

    @property
    def square_sum(self) -> float:
        """‖s·BA‖² = s² tr((BᵀB)(AAᵀ)), by r×r Gram matrices."""
        found = sum(float(np.vdot(b.T @ b, a @ a.T)) for a, b in zip(self.a, self.b, strict=True))
        return max(0.0, found) * self.scale**2

    def singular_values(self) -> list[Array]:
        """Singular values of s·BA per expert: those of R_B R_Aᵀ after two QR decompositions."""
        found = []
        for a, b in zip(self.a, self.b, strict=True):
            left, right = np.linalg.qr(b)[1], np.linalg.qr(a.T)[1]
            found.append(abs(self.scale) * np.linalg.svd(left @ right.T, compute_uv=False))
        return found

    @property
    def squares(self) -> float:
        """‖A‖² + ‖B‖², the adapter's own size."""
        return float(np.vdot(self.a, self.a) + np.vdot(self.b, self.b))

    @property
    def initial_squares(self) -> float:
        """The same by PEFT's default initialisation: r/3 of A (Kaiming), or B of unit normals."""
        if self.embedding:
            return float(self.b.size)
        return self.a.shape[0] * self.a.shape[1] / 3


@dataclass(frozen=True, eq=False)
class Dora:
    """ΔW of a module with DoRA: m·(W + sBA)/‖W + sBA‖ − W, by rows of the stored weight."""

    base: Rows
    factors: Factors

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.base.shape

    def read(self, first: int, last: int) -> Array:
        """Rows of the change."""
        weight = self.base.read(first, last)
        moved = weight + self._product(first, last)
        assert self.factors.magnitude is not None
        found = self.factors.magnitude / self._lengths
        if self.factors.transposed:
            return moved * found - weight
        return moved * found[first:last, None] - weight

    def _product(self, first: int, last: int) -> Array:
        a, b, scale = self.factors.a[0], self.factors.b[0], self.factors.scale
        if self.factors.transposed:
            return scale * (a.T[first:last] @ b.T)
        return scale * (b[first:last] @ a)

    @property
    def _lengths(self) -> Array:
        """‖W + sBA‖ of every output row."""
        if not hasattr(self, "_kept"):
            rows, width = self.shape
            step = max(1, PIECE // max(width, 1))
            squares = np.zeros(width if self.factors.transposed else rows)
            for first in range(0, rows, step):
                last = min(first + step, rows)
                moved = self.base.read(first, last) + self._product(first, last)
                if self.factors.transposed:
                    squares += (moved * moved).sum(axis=0)
                else:
                    squares[first:last] = (moved * moved).sum(axis=1)
            object.__setattr__(self, "_kept", np.sqrt(squares))
        return self._kept  # type: ignore[attr-defined, no-any-return]


@dataclass(frozen=True, eq=False)
class Adapter:
    """What an adapter's folder holds.

    Attributes
    ----------
    config
        adapter_config.json.
    factors
        Module path of the model -> its factors.
    whole
        Tensors that were saved whole (modules_to_save), by their name in the model.
    remarks
        What of it was left out, in sentences.
    """

    config: Mapping[str, Any]
    factors: Mapping[str, Factors]
    whole: Mapping[str, Stored]
    remarks: tuple[str, ...]

    @property
    def base_name(self) -> str | None:
        """What its base model is called."""
        name = self.config.get("base_model_name_or_path")
        return str(name) if name else None


def open_adapter(path: Path) -> Adapter:
    """Read an adapter's folder.

    Raises
    ------
    LisaError
        When it is no LoRA adapter, is incomplete, or BA was no change from zero.
    """
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except (OSError, ValueError, AttributeError):
        raise LisaError(f"{path / CONFIG} cannot be read: save the adapter again.") from None
    if kind != "LORA":
        raise LisaError(
            f"{path} holds an adapter of the kind {kind}: those of LoRA (DoRA, rsLoRA too) are "
            "read."
        )
    start = config.get("init_lora_weights", True)
    if start not in _FROM_ZERO and start is not False:
        raise LisaError(
            f"{path} was initialised with {start}, which puts a part of the base into BA: what it "
            "changed cannot be told from its file; convert it to plain LoRA as PEFT describes."
        )
    if not (path / WEIGHTS).exists():
        raise LisaError(f"{path} holds no {WEIGHTS}: save the adapter with save_pretrained.")
    parts: dict[str, dict[str, Any]] = {}
    whole, left = {}, []
    for name, tensor in read_header(path / WEIGHTS).items():
        canonical = canonical_name(name)
        match = _PART.search(canonical)
        if match and match[2] != ".bias":
            parts.setdefault(canonical[: match.start()], {})[match[1]] = tensor
        elif match or "trainable_tokens" in canonical or not tensor.is_float:
            left.append(canonical)
        else:
            whole[canonical] = tensor
    # An adapted embedding is saved with the weight that it adapts.
    whole = {name: t for name, t in whole.items() if name.removesuffix(".weight") not in parts}
    factors = {}
    for module, found in parts.items():
        made = _factors(module, found, config, path)
        if made is None:
            left.append(module)
        else:
            factors[module] = made
    remarks = [f"Not read: {_some(left)}."] if left else []
    if start is False:
        remarks.append("init_lora_weights is false: BA did not begin as zero, nor was all learned.")
    return Adapter(config, factors, whole, tuple(remarks))


def _factors(
    module: str, found: Mapping[str, Stored], config: Mapping[str, Any], path: Path
) -> Factors | None:
    embedding = "lora_embedding_A" in found
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if not all(name in found for name in names):
        raise LisaError(f"{path} has half a product for {module}: save the adapter again.")
    a, b = (as_float(found[name]) for name in names)
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    rank = int(_pattern(config.get("rank_pattern"), module) or config.get("r") or len(a))
    alpha = _pattern(config.get("alpha_pattern"), module)
    alpha = float(config.get("lora_alpha") or rank) if alpha is None else float(alpha)
    if a.shape[0] != b.shape[1] or rank <= 0 or a.shape[0] % rank:
        raise LisaError(
            f"{path} has factors of rank {a.shape[0]} and {b.shape[1]} for {module}, and its "
            f"configuration says {rank}: the two do not belong together."
        )
    experts = a.shape[0] // rank
    if config.get("use_dora") and experts > 1:
        return None
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    magnitude = found.get("lora_magnitude_vector")
    return Factors(
        # The experts of fused weights lie behind one another in A, and side by side in B.
        a.reshape(experts, rank, a.shape[1]),
        np.moveaxis(b.reshape(b.shape[0], rank, experts), 2, 0),
        scale,
        embedding,
        bool(config.get("fan_in_fan_out")) and not embedding,
        None if magnitude is None else as_float(magnitude).reshape(-1),
    )


def _pattern(patterns: Any, module: str) -> Any:
    """Value of the pattern that a module's name ends with, as PEFT looks it up."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return None


def _some(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
