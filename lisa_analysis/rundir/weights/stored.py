"""Tensors of safetensors files: headers checked, numbers read a piece at a time, every float type.

numpy knows neither bfloat16 nor the 8-bit floats: the former is the upper half of a float32, the
latter have 256 values, which stand in a table.
"""

import json
import math
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.contract.errors import LisaError

Array = NDArray[np.float64]

# Numbers of a piece, unless asked otherwise: 32 MiB in float64.
PIECE = 2**22
_LARGEST_HEADER = 100 * 2**20
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
OTHERS = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}


class Rows(Protocol):
    """A matrix that is read by rows."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    def read(self, first: int, last: int) -> Array:
        """Rows `first` to `last` (not included), as float64."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file.

    Attributes
    ----------
    name, dtype, shape
        As the file has them.
    path, offset
        Where its bytes begin.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether it holds numbers that can be weights."""
        return self.dtype in FLOATS

    def elements(self, first: int, last: int) -> Array:
        """Elements `first` to `last` (not included) in the file's order, as float64."""
        size = FLOATS[self.dtype]
        kind = {8: "<f8", 4: "<f4", 2: "<u2", 1: "u1"}[size]
        try:
            raw = np.fromfile(
                self.path, dtype=kind, count=last - first, offset=self.offset + first * size
            )
        except OSError as error:
            raise LisaError(f"{self.path} cannot be read ({error.strerror or error}).") from None
        if len(raw) != last - first:
            raise LisaError(f"{self.path} ends within {self.name}: copy the file again.")
        return decoded(raw, self.dtype)

    def matrices(self) -> list["Slice"]:
        """Return it as matrices: one, or one per expert of fused experts; a vector is a column."""
        if len(self.shape) < 2:
            return [Slice(self, 0, (self.numel, 1))]
        if len(self.shape) == 3 and "experts" in self.name:
            size = self.shape[1] * self.shape[2]
            shape = (self.shape[1], self.shape[2])
            return [Slice(self, size * expert, shape) for expert in range(self.shape[0])]
        return [Slice(self, 0, (self.shape[0], self.numel // max(self.shape[0], 1)))]


@dataclass(frozen=True)
class Slice:
    """A matrix within a stored tensor."""

    tensor: Any
    start: int
    shape: tuple[int, int]

    def read(self, first: int, last: int) -> Array:
        """Rows `first` to `last`."""
        width = self.shape[1]
        found = self.tensor.elements(self.start + first * width, self.start + last * width)
        return np.asarray(found.reshape(last - first, width))


@dataclass(frozen=True, eq=False)
class Scaled:
    """An 8-bit tensor with the factors that stand beside it: of all, of its rows or of blocks.

    Attributes
    ----------
    stored
        The tensor of 8-bit floats, a matrix.
    scale
        Its factors, of shape (1, 1), (rows, 1) or one per block.
    block
        Rows and columns of a block.
    """

    stored: Stored
    scale: Array
    block: tuple[int, int]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stored, name)

    def elements(self, first: int, last: int) -> Array:
        """Elements as they are meant: decoded, times the factor of their block."""
        place = np.arange(first, last)
        row, column = np.divmod(place, self.stored.shape[-1])
        factor = self.scale[row // self.block[0], column // self.block[1]]
        return self.stored.elements(first, last) * factor

    def matrices(self) -> list[Slice]:
        """Return it as a matrix."""
        return [Slice(self, 0, (self.stored.shape[0], self.stored.shape[1]))]


def decoded(raw: NDArray[Any], dtype: str) -> Array:
    """Numbers of the bytes of a tensor.

    Parameters
    ----------
    raw
        Elements as they are stored; of 16 and 8 bits as unsigned integers.
    dtype
        Their type, as safetensors calls it.
    """
    if dtype == "BF16":
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    elif dtype == "F16":
        raw = raw.view(np.float16)
    elif dtype in ("F8_E4M3", "F8_E5M2"):
        raw = _eight_bit(dtype)[raw]
    return raw.astype(np.float64)


@cache
def _eight_bit(dtype: str) -> Array:
    """Value of every byte: E4M3 (no infinity, NaN where all bits are set) or E5M2 (like a half)."""
    byte = np.arange(256, dtype=np.uint16)
    if dtype == "F8_E5M2":
        return (byte << 8).view(np.float16).astype(np.float64)
    exponent, fraction = (byte >> 3) & 15, (byte & 7).astype(np.float64)
    size = np.where(
        exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7.0)
    )
    size[(byte & 127) == 127] = np.nan
    return np.where(byte & 128, -size, size)


def read_header(path: Path) -> dict[str, Stored]:
    """Tensors of one safetensors file by name; nothing but its header is read.

    Raises
    ------
    LisaError
        When it is no safetensors file, or what its header says does not fit its size.
    """
    wrong = f"{path} is no whole safetensors file"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
            if length > min(_LARGEST_HEADER, size - 8):
                raise LisaError(f"{wrong} (its header would be {length:,} bytes): copy it again.")
            header = json.loads(file.read(length))
    except OSError as error:
        raise LisaError(f"{path} cannot be read ({error.strerror or error}).") from None
    except ValueError as error:
        if isinstance(error, LisaError):
            raise
        raise LisaError(f"{wrong} (its header is no JSON): copy it again.") from None
    found = {}
    try:
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype, shape = entry["dtype"], tuple(int(side) for side in entry["shape"])
            first, last = entry["data_offsets"]
            width = (FLOATS | OTHERS).get(dtype)
            if width is not None and last - first != width * math.prod(shape):
                raise ValueError(name)
            if not 0 <= first <= last <= size - 8 - length:
                raise ValueError(name)
            found[name] = Stored(name, dtype, shape, path, 8 + length + first)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise LisaError(f"{wrong} (what it says of {error} does not fit): copy it again.") from None
    return found


def square_sum(matrix: Rows, piece: int = PIECE) -> float:
    """‖M‖², a piece at a time."""
    total = 0.0
    for rows in pieces(matrix, piece):
        total += float(np.vdot(rows, rows))
    return total


def pieces(matrix: Rows, piece: int = PIECE) -> Any:
    """Rows of a matrix, at most `piece` numbers (and at least a row) at a time."""
    rows, width = matrix.shape
    step = max(1, piece // max(width, 1))
    for first in range(0, rows, step):
        yield matrix.read(first, min(first + step, rows))
