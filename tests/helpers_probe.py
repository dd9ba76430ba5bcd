"""One process of several that probe a model together: FOLDER RANK COUNT."""

import sys
from pathlib import Path

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


def main(folder: Path, rank: int, count: int) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=count
    )
    data = batches(5)
    model = torch.nn.parallel.DistributedDataParallel(llama())
    for signal in ("exact", "sketch"):
        # Five batches over two processes: one has three, the other two.
        lt.probe(model, data[rank::count], folder / signal, signal=signal)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
