"""Sums of tensors on the CPU by one compiled kernel, on machines that have a C compiler.

torch has a kernel for each sum: of an update's three sums each reads weights or their difference
again, from the cache at best. `sums.c` takes all of them in one pass over memory, at the speed at
which memory is read. It is compiled on first use (a quarter of a second), kept in the cache folder
beside what the demo fetches, and shares torch's threads. Without a compiler, or with
`LISA_COMPILE=0`, the same sums come from torch's kernels (`lisa_train.model.norms`).
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path

import numpy as np
import torch

from lisa_analysis.contract.paths import cache_dir
from lisa_train.model.joined import ROW

LOGGER = logging.getLogger(__name__)

BLOCK = 65_536  # elements that one thread adds up at a time
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_SOURCE = Path(__file__).with_name("sums.c")
# Sums may be taken in any order; what is not finite stays so (-ffast-math would lose that, and
# make subnormal numbers zero in the whole process). OpenMP's functions are not linked: those that
# torch has loaded are found by name, so that both share one set of threads.
_FLAGS = (
    "-O3", "-march=native", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math",
    "-fno-math-errno", "-fopenmp", "-fPIC", f"-DROW={ROW}L", f"-DBLOCK={BLOCK}L",
)  # fmt: skip
_SECONDS = 60  # for the compiler


class Kind(IntEnum):
    """What is summed over the elements of one, two or three tensors, as in `sums.c`."""

    SQUARE = 0
    SQUARE_AND_MAGNITUDE = 1
    CHANGE = 2
    CHANGE_AND_PRODUCT = 3
    PRODUCT = 4


def prepare() -> bool:
    """Compile now rather than in the first measured step; return whether sums are compiled."""
    return _function() is not None


def suits(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the kernel reads these flat tensors: fp32 or bf16, dense, of one size, on the CPU."""
    size = tensors[0].shape
    return all(
        x.dtype in _TYPES and x.is_cpu and x.layout == torch.strided and x.shape == size
        and x.is_contiguous() and not x.is_neg()
        for x in tensors
    )  # fmt: skip


def sums(kind: Kind, groups: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor | None:
    """Return the sums of every group of flat tensors that `suits`.

    Parameters
    ----------
    kind
        What is summed.
    groups
        Tensors of one size each, at least one group: x; x and y; before and after; before, after
        and gradients.

    Returns
    -------
    tensor of float64, shape (len(groups), 3), or None
        Σx², then Σ|x|; Σ(after - before)², Σafter², Σ(after - before)·gradient; Σxy; columns that
        the kind does not have are zero. None without a compiler.
    """
    function = _function()
    if function is None:
        return None
    types = np.array([[_TYPES[x.dtype] for x in group] for group in groups], np.int64)
    starts = np.array([[x.data_ptr() for x in group] for group in groups], np.uint64)
    sizes = np.array([group[0].numel() for group in groups], np.int64)
    return _sums(function, kind, starts, types, sizes)


def sums_of_rows(
    kind: Kind, columns: Sequence[torch.Tensor], first: np.ndarray, count: np.ndarray
) -> torch.Tensor | None:
    """Return sums as `sums`, of rows that lie one after the other in fp32 buffers.

    Parameters
    ----------
    kind
        What is summed.
    columns
        Buffers of one shape, (rows, elements of a row).
    first, count
        First row and number of rows of every group.
    """
    function = _function()
    if function is None:
        return None
    width = columns[0].shape[1]
    bases = np.array([rows.data_ptr() for rows in columns], np.uint64)
    starts = bases + (first[:, None] * (width * columns[0].itemsize)).astype(np.uint64)
    return _sums(function, kind, starts, np.zeros(starts.shape, np.int64), count * width)


def _sums(
    function: "ctypes._NamedFuncPointer",
    kind: Kind,
    starts: np.ndarray,
    types: np.ndarray,
    sizes: np.ndarray,
) -> torch.Tensor:
    blocks = -(-sizes // BLOCK)
    owners = np.repeat(np.arange(len(sizes)), blocks)
    firsts = (np.arange(len(owners)) - np.repeat(np.cumsum(blocks) - blocks, blocks)) * BLOCK
    found = np.empty((len(owners), 3))
    arrays = [np.ascontiguousarray(x) for x in (owners, firsts, starts, types, sizes)]
    threads = max(1, min(torch.get_num_threads(), len(owners)))
    function(
        int(kind), starts.shape[1], len(owners), *(x.ctypes.data for x in arrays),
        found.ctypes.data, threads,
    )  # fmt: skip
    result = torch.zeros(len(sizes), 3, dtype=torch.float64)
    return result.index_add_(0, torch.from_numpy(arrays[0]), torch.from_numpy(found))


# --- compiled once -------------------------------------------------------------------------------


@functools.cache
def _function() -> "ctypes._NamedFuncPointer | None":
    """Return the kernel, compiled if it has to be; None where this machine cannot."""
    if os.environ.get("LISA_COMPILE") == "0" or not hasattr(os, "getuid"):  # as on Windows
        return None
    try:
        function = _from_cache() or _compiled_aside()
    except (OSError, subprocess.SubprocessError) as error:
        LOGGER.debug("Sums are taken by torch's kernels: %s", error)
        return None
    if not _agrees(function):
        LOGGER.warning(
            "The compiled sums are not those of torch, and are not used (%s). "
            "LISA_COMPILE=0 leaves them out.", _SOURCE.name,
        )  # fmt: skip
        return None
    return function


def _from_cache() -> "ctypes._NamedFuncPointer | None":
    """Return the kernel of the user's cache folder, compiled there if it is not; None without one.

    The folder may be shared by machines, so source, compiler and processor are part of the name.
    """
    try:
        folder = cache_dir() / "compiled"
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK) or folder.stat().st_uid != os.getuid():
        return None
    about = "\n".join([_SOURCE.read_text(), _compiler(), *_FLAGS, *_processor()])
    kept = folder / f"sums-{hashlib.sha256(about.encode()).hexdigest()[:16]}.so"
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # several processes may begin
            _compile(Path(scratch)).replace(kept)
    return _loaded(kept)


def _compiled_aside() -> "ctypes._NamedFuncPointer":
    """Return the kernel, compiled for this process alone."""
    with tempfile.TemporaryDirectory(prefix="lisa-toolkit-") as scratch:
        return _loaded(_compile(Path(scratch)))  # once loaded, its file is not needed


def _compile(folder: Path) -> Path:
    compiler, made, library = _compiler().split(), folder / "sums.o", folder / "sums.so"
    for words in (
        [*_FLAGS, "-c", str(_SOURCE), "-o", str(made)],
        ["-shared", str(made), "-o", str(library)],
    ):
        subprocess.run(
            [*compiler, *words], check=True, capture_output=True, timeout=_SECONDS,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    return library


def _compiler() -> str:
    return os.environ.get("CC") or "cc"


def _loaded(library: Path) -> "ctypes._NamedFuncPointer":
    function = ctypes.CDLL(str(library)).lisa_block_sums
    function.restype = None
    function.argtypes = [
        ctypes.c_int, ctypes.c_int, ctypes.c_long, *[ctypes.c_void_p] * 6, ctypes.c_int,
    ]  # fmt: skip
    return function


def _processor() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return [platform.machine(), platform.processor(), *sorted(set(told))]


def _agrees(function: "ctypes._NamedFuncPointer") -> bool:
    """Whether the kernel gives what float64 gives: a compiler may be anything."""
    drawn = torch.randn(3, BLOCK + 77, generator=torch.Generator().manual_seed(0))
    for rows in (drawn, drawn.bfloat16()):
        x, y, z = rows.double()
        types = np.full((1, 3), _TYPES[rows.dtype], np.int64)
        starts = np.array([[row.data_ptr() for row in rows]], np.uint64)
        size = np.array([rows.shape[1]], np.int64)
        found = _sums(function, Kind.CHANGE_AND_PRODUCT, starts, types, size)[0]
        moved = (y.float() - x.float()).double()
        right = torch.stack([moved.square().sum(), y.square().sum(), (moved * z).sum()])
        scale = torch.stack([right[0], right[1], (moved * z).abs().sum()])
        if not bool(((found - right).abs() <= 1e-6 * scale).all()):
            return False
    return True
