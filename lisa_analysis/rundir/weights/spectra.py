"""Singular values of matrices that are never whole in memory: their Gram matrix, streamed."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.rundir.weights.stored import PIECE, Rows, pieces

Array = NDArray[np.float64]

# A Gram matrix of this side takes 800 MB, and its decomposition about as much again.
WIDEST = 8192


def singular_values(matrix: Rows, piece: int = PIECE) -> Array | None:
    """Singular values, largest first; None where even the shorter side is too long.

    From the eigenvalues of the Gram matrix of the shorter side, added up in float64: those below
    about 1e-8 of the largest are rounding.
    """
    rows, width = matrix.shape
    if min(rows, width) > WIDEST:
        return None
    if rows >= width:
        gram = np.zeros((width, width))
        for part in pieces(matrix, piece):
            gram += part.T @ part
    else:
        gram = _of_rows(matrix, piece)
    return np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0))


def _of_rows(matrix: Rows, piece: int) -> Array:
    """M Mᵀ, blocks of rows with one another."""
    rows, width = matrix.shape
    step = max(1, piece * 4 // max(width, 1))
    gram = np.zeros((rows, rows))
    for first in range(0, rows, step):
        upper = matrix.read(first, min(first + step, rows))
        gram[first : first + step, first : first + step] = upper @ upper.T
        for second in range(first + step, rows, step):
            lower = matrix.read(second, min(second + step, rows))
            block = lower @ upper.T
            gram[second : second + step, first : first + step] = block
            gram[first : first + step, second : second + step] = block.T
    return gram


def cost(shape: tuple[int, ...] | Any) -> float:
    """Floating-point operations of the singular values of a matrix, about."""
    short, long = min(shape), max(shape)
    return 2.0 * short * short * long + 4.0 * short**3
