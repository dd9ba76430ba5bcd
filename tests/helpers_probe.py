"""Probes in float64 by brute force; `main` is one process of several."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from helpers_recording import examples, llama

import lisa_train as lt


def batches(n: int, size: int = 2) -> list[dict[str, torch.Tensor]]:
    rows = examples(n * size)
    return [
        {key: torch.stack([row[key] for row in rows[i : i + size]]) for key in rows[0]}
        for i in range(0, n * size, size)
    ]


def float64_gradients(
    model: Any, data: list[Any], dtype: torch.dtype = torch.float64
) -> list[dict[str, torch.Tensor]]:
    """Dense gradients of every batch, by name, from a copy in double precision."""
    model = copy.deepcopy(model).to(dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    found = []
    for batch in data:
        model.zero_grad()
        model(**batch).loss.backward()
        found.append(
            {
                name: (torch.zeros_like(p) if p.grad is None else p.grad.clone()).double()
                for name, p in model.named_parameters()
            }
        )
    return found


def rows(run_dir: Path) -> pd.DataFrame:
    frame = pq.read_table(run_dir / "probes").to_pandas()
    names = pq.read_table(run_dir / "parameters.parquet").to_pandas().set_index("param_id")["name"]
    return frame.assign(name=frame["param_id"].map(names))


def expected(
    gradients: list[dict[str, torch.Tensor]], weights: dict[str, torch.Tensor]
) -> dict[str, dict[str, Any]]:
    """Brute force over all pairs of batches."""
    n = len(gradients)
    result: dict[str, dict[str, Any]] = {}
    for name in gradients[0]:
        g = torch.stack([batch[name].flatten() for batch in gradients])
        gram = g @ g.T
        off = gram.sum(1) - gram.diag()
        mean = g.mean(0)
        result[name] = {
            "grad_norm": gram.diag().sqrt().numpy(),
            "grad_norm_l1": g.abs().sum(1).numpy(),
            "taylor": (g @ weights[name].detach().flatten().double()).numpy(),
            "agreement": (off / (n - 1)).numpy(),
            "signal": float(off.sum() / (n * (n - 1))),
            "noise": float((g - mean).square().sum() / (n - 1)),
        }
    return result


def check(frame: pd.DataFrame, truth: dict[str, dict[str, Any]], *, exact: bool = True) -> None:
    """Hold the rows of one probe against the brute force, tensor by tensor."""
    for name, of_tensor in frame.groupby("name"):
        single = of_tensor[of_tensor["batch"].notna()].sort_values("batch")
        assert single["batch"].tolist() == list(range(len(truth[name]["grad_norm"])))
        for column in ("grad_norm", "grad_norm_l1"):
            np.testing.assert_allclose(single[column], truth[name][column], rtol=1e-5, atol=1e-8)
        size = np.abs(truth[name]["taylor"]).max()
        np.testing.assert_allclose(single["taylor"], truth[name]["taylor"], atol=1e-5 * size + 1e-9)
        together = of_tensor[of_tensor["batch"].isna()].iloc[0]
        scale = abs(truth[name]["signal"] + truth[name]["noise"])
        np.testing.assert_allclose(
            together["signal"], truth[name]["signal"], atol=2e-5 * scale + 1e-12
        )
        np.testing.assert_allclose(
            together["noise"], truth[name]["noise"], rtol=1e-4, atol=1e-5 * scale + 1e-12
        )
        # No tensor here is larger than a sketch: single batches are exact as well.
        np.testing.assert_allclose(
            single["signal"], truth[name]["agreement"], atol=2e-5 * scale + 1e-12
        )


def in_a_run(folder: Path, data: list[dict[str, torch.Tensor]]) -> None:
    """Probe these batches in a run of no step; each process has its own."""
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with lt.NormRecorder(model, optimizer, lt.RecordConfig(str(folder))) as recorder:
        recorder.probe(0, [lambda b=b: model(**b).loss.backward() for b in data])  # type: ignore[misc]


def main(rank: int, folder: str) -> None:
    count = dist.get_world_size()
    data = batches(5)
    model = torch.nn.parallel.DistributedDataParallel(llama())
    for signal in ("exact", "sketch"):
        # Five batches over two processes: one has three, the other two.
        lt.probe(model, data[rank::count], Path(folder) / signal, signal=signal)
    in_a_run(Path(folder) / "run", batches(4)[rank::count])
