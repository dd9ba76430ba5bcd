"""Two processes: every rank draws the same layers, and the replicas stay equal."""

import os
import socket
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import lisa_train as lt
from lisa_train.methods.lisa.engine import Lisa

STEPS, WORLD = 9, 2
CONFIG = lt.LisaConfig(1, 3)


def build():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
            num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        )
    )  # fmt: skip


def batch(step, rank):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randint(3, 64, (2, 8), generator=generator)


def work(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    torch.manual_seed(rank)  # the ranks' own streams differ; the draws do not
    np.random.seed(rank)  # noqa: NPY002
    model = build()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    drawn = []
    with Lisa(wrapped, optimizer, CONFIG, seed=3) as engine:
        for step in range(STEPS):
            engine.begin_step(step)
            drawn.append(engine.active_layers)
            ids = batch(step, rank)
            wrapped(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.save({"drawn": drawn, "model": model.state_dict()}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_ranks_agree_and_equal_one_process_with_both_batches(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, str(tmp_path)), nprocs=WORLD)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD))
    assert first["drawn"] == second["drawn"]
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name

    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with Lisa(model, optimizer, CONFIG, seed=3) as engine:
        for step in range(STEPS):
            engine.begin_step(step)
            assert engine.active_layers == first["drawn"][step]
            for rank in range(WORLD):
                ids = batch(step, rank)
                (model(input_ids=ids, labels=ids).loss / WORLD).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(first["model"][name], value, rtol=1e-4, atol=1e-4)
