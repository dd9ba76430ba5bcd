"""Several devices: FSDP2's own shards, and layers side by side."""

import subprocess
import sys
from pathlib import Path

import helpers_memory as small
import pytest

import lisa_train as lt

ROOT = Path(__file__).resolve().parents[3]
# Counts the local shards that torch's FSDP2 makes, in a process group without peers.
SHARDS = """
import sys, torch, torch.distributed as dist
sys.path.append("tests")
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import helpers_memory as small
for family, size in zip(sys.argv[1::2], map(int, sys.argv[2::2])):
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    mesh = init_device_mesh("cpu", (size,))
    model = small.real_model(getattr(small, family)())
    for block in model.transformer.h if family == "gpt2" else model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    local = [p.to_local() for p in model.parameters()]
    print(sum(t.untyped_storage().nbytes() for t in local) + small.stored(model.buffers()))
    dist.destroy_process_group()
"""
SHARDED = [("llama", 3), ("gpt2", 8)]


@pytest.fixture(scope="module")
def shards():
    """Bytes of the first device of each case, as FSDP2 cuts them."""
    words = [str(word) for case in SHARDED for word in case]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SHARDS, *words],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(SHARDED, map(int, done.stdout.split()), strict=True))


@pytest.mark.parametrize(("family", "devices"), SHARDED)
def test_weights_are_cut_as_fsdp2_cuts_them(shards, family, devices):
    found = lt.estimate_memory(
        getattr(small, family)(), "full", sequence_length=16, devices=devices
    )
    assert len(found.devices) == devices
    assert found.fullest.weights == shards[family, devices]


def test_gradients_and_state_are_divided_like_the_weights():
    config = small.llama()  # every first dimension is divisible by 4
    # Fused AdamW holds a step count per tensor on every device, which is not divided.
    options = {"sequence_length": 16, "optim": "adamw_torch"}
    one = lt.estimate_memory(config, "full", **options).fullest
    four = lt.estimate_memory(config, "full", devices=4, **options).fullest
    assert four.gradients * 4 == one.gradients
    assert four.optimizer * 4 == one.optimizer
    assert four.activations == one.activations
    # Gathered layers and unsharded gradients come on top.
    assert four.phases["backward"] > one.phases["backward"] / 4
    assert four.phases["step"] < one.phases["step"] / 3


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_layers_side_by_side_hold_together_what_one_device_holds(method, devices):
    options = {"sequence_length": 16, "lora": {"r": 4}} if method == "lora" else {}
    one = lt.estimate_memory(small.llama(), method, **options).fullest
    found = lt.estimate_memory(small.llama(), method, devices=devices, spread="layers", **options)
    for part in ("weights", "optimizer", "activations"):
        assert sum(getattr(d, part) for d in found.devices) == getattr(one, part)
    assert one.peak > found.total > one.peak / devices


def test_the_worst_draw_of_layers_side_by_side_falls_on_one_device():
    # The last device has the head besides; two active layers on it are the worst.
    config = small.llama(vocab_size=2000)
    lisa = lt.LisaConfig(2)
    found = lt.estimate_memory(
        config, "lisa", lisa=lisa, sequence_length=16, devices=2, spread="layers"
    )
    totals = {
        pair: lt.estimate_memory(
            config, "lisa", lisa=lisa, sequence_length=16, devices=2, spread="layers",
            active_layers=pair,
        ).total
        for pair in [(0, 1), (0, 2), (1, 3), (2, 3)]
    }  # fmt: skip
    assert found.total == max(totals.values())
    assert found.active_layers in [(0, 1), (2, 3)]
