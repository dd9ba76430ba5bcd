"""One process of a two-process run: a plain loop under DDP or FSDP2, recorded.

Usage: distributed_worker.py MODE FOLDER RANK WORLD; MODE is single, ddp or fsdp2.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from helpers_recording import examples, llama

import lisa_train as lt
from lisa_train.layermap import find_layers
from lisa_train.silent_writer import SilentWriter
from lisa_train.tensor_table import TensorTable

STEPS = 4


def main(mode, folder, rank, world):
    torch.set_num_threads(1)
    if mode != "single":
        store = f"file://{folder}/store-{mode}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    model = llama(hidden_size=24, intermediate_size=33)  # rows that two processes share unevenly
    layer_map = find_layers(model)
    trained = model
    if mode == "ddp":
        trained = torch.nn.parallel.DistributedDataParallel(model)
    if mode == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    config = lt.RecordConfig(str(folder / mode), every=2)
    table = TensorTable(model, layer_map, None)
    writer = SilentWriter() if rank else None
    calls = count_collectives()
    with lt.NormRecorder(model, optimizer, config, writer, layer_map, table=table) as recorder:
        for step in range(1, STEPS + 1):
            rows = examples(64)[4 * step : 4 * step + 4]
            mine = rows if mode == "single" else rows[rank::world]
            # Labels everywhere: equal numbers of tokens, so that means of means are means.
            ids = torch.stack([row["input_ids"] for row in mine])
            loss = trained(input_ids=ids, labels=ids).loss
            loss.backward()
            before = calls["n"]
            recorder.before_step(step)
            optimizer.step()
            recorder.after_step(step, loss=loss, tokens=torch.tensor(ids.numel() * step))
            due = step == 1 or step % 2 == 0
            assert calls["n"] - before == (1 if due and mode != "single" else 0), calls
            optimizer.zero_grad()
    if mode != "single":
        dist.destroy_process_group()


def count_collectives():
    """Count the all-reduces that the recorder itself asks for."""
    calls = {"n": 0}
    original = dist.all_reduce

    def all_reduce(*args, **kwargs):
        calls["n"] += 1
        return original(*args, **kwargs)

    dist.all_reduce = all_reduce
    return calls


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
