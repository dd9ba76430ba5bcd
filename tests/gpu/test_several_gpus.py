"""LISA on two GPUs, NCCL between them: what the gloo tests of `methods/lisa` hold on a CPU."""

import pytest
import torch
from helpers_accelerate import near, process, taken_up_to_the_bit, train
from helpers_processes import ranks
from helpers_ranks import WAYS, several_equal_one

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.mark.parametrize("name", WAYS)
def test_two_gpus_equal_one(tmp_path, name):
    several_equal_one(tmp_path, name, device="cuda", backend="nccl")


def test_a_model_that_accelerate_splits(tmp_path):
    names = ("reset", "offload, learned, recomputed", "fp32_active")
    ranks(process, tmp_path, names, "cuda", backend="nccl")
    for name in names:
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2))
        for found in (first, second):
            taken_up_to_the_bit(found)
        alone = train(name, tmp_path / "one" / name, 1, split=False, device="cuda")
        near(first["done"], alone, name, tolerance=1e-3)
