"""How well runs agree on the order of the layers, as a table to look things up in."""

import numpy as np
import pandas as pd


def agreement_square(pairs: pd.DataFrame) -> pd.DataFrame:
    """Turn one row per pair (``run_a``, ``run_b``, ``kendall``) into a symmetric table."""
    names = list(dict.fromkeys([*pairs["run_a"], *pairs["run_b"]]))
    square = pd.DataFrame(np.eye(len(names)), index=names, columns=names)
    for a, b, value in zip(pairs["run_a"], pairs["run_b"], pairs["kendall"], strict=True):
        square.loc[a, b] = square.loc[b, a] = value
    return square
