"""LISA on two GPUs, NCCL between them: what the gloo tests of `methods/lisa` hold on a CPU."""

import pytest
import torch
from helpers_ranks import WAYS, several_equal_one

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.mark.parametrize("name", WAYS)
def test_two_gpus_equal_one(tmp_path, name):
    several_equal_one(tmp_path, name, device="cuda", backend="nccl")
