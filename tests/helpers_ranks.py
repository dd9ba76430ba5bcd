"""A small model and its batches, for tests of several processes that train it together."""

from pathlib import Path

import torch
from helpers_processes import ranks


def build(seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
            num_attention_heads=2, num_key_value_heads=1, pad_token_id=0,
        )
    )  # fmt: skip


def batch(step, micro, rank):
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
    return torch.randint(3, 64, (2, 8), generator=generator)


# How a small LISA is trained in several processes -> settings, dtype, whether FSDP2 splits it.
WAYS = {
    "copies": ({}, torch.float32, False),
    "copies, fp32_active": ({"precision": "fp32_active"}, torch.bfloat16, False),
    "FSDP2": ({"optimizer_state": "keep"}, torch.float32, True),
    "FSDP2, fp32_active": ({"precision": "fp32_active"}, torch.bfloat16, True),
}


def train_way(name, shares, device, *, split, seed=0):
    """Return what was drawn and the weights, of a training on the batches of `shares`."""
    import lisa_train as lt

    settings, dtype, _ = WAYS[name]
    model = build(seed).to(device, dtype).train()
    if split:
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    drawn = []
    with lt.Lisa(model, optimizer, lt.LisaConfig(1, 2, **settings), seed=3) as engine:
        for step in range(6):
            engine.begin_step(step)
            drawn.append(engine.active_layers)
            for rank in shares:
                ids = batch(step, 0, rank).to(device)
                (model(input_ids=ids, labels=ids).loss / len(shares)).backward()
            engine.average_gradients()
            optimizer.step()
            optimizer.zero_grad()
    whole = {
        key: (value.full_tensor() if hasattr(value, "full_tensor") else value).cpu()
        for key, value in model.state_dict().items()
    }
    return {"drawn": drawn, "model": whole}


def _way(rank, folder, name, device):
    split = WAYS[name][2]
    found = train_way(name, [rank], device, split=split, seed=0 if split else rank)
    torch.save(found, Path(folder) / f"{rank}.pt")


def several_equal_one(folder, name, *, device, backend):
    """Train in two processes and in one; the copies are bit-equal, and near to the one."""
    ranks(_way, folder, name, device, backend=backend)
    first, second = (torch.load(Path(folder) / f"{rank}.pt") for rank in range(2))
    alone = train_way(name, range(2), device, split=False)
    assert first["drawn"] == second["drawn"] == alone["drawn"]
    half, begun = WAYS[name][1] == torch.bfloat16, build().state_dict()
    for key, value in alone["model"].items():
        assert torch.equal(first["model"][key], second["model"][key]), key
        distance = (first["model"][key].float() - value.float()).norm()
        moved = (value.float() - begun[key]).norm()
        # Products of matrices are summed in another order on every device.
        assert distance <= (0.1 if half else 1e-3) * moved, key
