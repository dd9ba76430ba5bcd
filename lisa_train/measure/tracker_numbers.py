"""A few numbers per recorded step for trackers: norms of groups of tensors."""

import numpy as np

from lisa_train.model.tensor_table import TensorTable


def tensor_groups(table: TensorTable, n_layers: int) -> dict[str, np.ndarray]:
    """Numbers of the tensors of each group that trackers are shown: thirds of the layers, rest."""
    groups: dict[str, list[int]] = {}
    thirds = ("first", "middle", "last")
    for row in table.rows:
        if row["layer"] is None:
            outside = ("embed", "head", "norm", "prompt")
            name = row["kind"] if row["kind"] in outside else "other"
        else:
            name = f"layers_{thirds[3 * row['layer'] // max(1, n_layers)]}"
        groups.setdefault(name, []).append(row["param_id"])
    return {name: np.array(ids) for name, ids in groups.items()}


def aggregates(rows: dict[str, np.ndarray], groups: dict[str, np.ndarray]) -> dict[str, float]:
    """Norms of a few groups of tensors at one step, for trackers; empty for a census."""
    found: dict[str, float] = {}
    for column in ("grad_norm", "update_norm"):
        if column not in rows:
            continue
        values = np.ma.asarray(rows[column])
        for name, ids in groups.items():
            members = values[np.isin(rows["param_id"], ids)].compressed().astype(np.float64)
            if len(members):
                found[f"{column}/{name}"] = float(np.sqrt((members**2).sum()))
    return found
