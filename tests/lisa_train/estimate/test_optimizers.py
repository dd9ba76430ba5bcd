"""State of every optimizer: as its own class allocates it."""

import math

import pytest
import torch

from lisa_analysis.contract.errors import ConfigError
from lisa_train.estimate.optimizers import optimizer_kind

SHAPES = [(300, 64), (64,), (4096,), (4097, 3), (513, 513)]


def allocated(optimizer, parameter) -> int:
    state = optimizer.state[parameter]
    skip = {"step", "qmap1", "qmap2"}  # host, and tables that all tensors share
    return sum(
        v.numel() * v.element_size()
        for k, v in state.items()
        if k not in skip and torch.is_tensor(v)
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["adamw_torch", "sgd", "adagrad", "rmsprop", "adafactor"])
def test_torch_and_transformers(name, dtype, shape):
    from transformers.optimization import Adafactor

    parameter = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
    classes = {"adamw_torch": torch.optim.AdamW, "sgd": torch.optim.SGD,
               "adagrad": torch.optim.Adagrad, "rmsprop": torch.optim.RMSprop}  # fmt: skip
    if name == "adafactor":
        optimizer = Adafactor([parameter], lr=1e-3, scale_parameter=False, relative_step=False)
    else:
        optimizer = classes[name]([parameter], lr=1e-3)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found = optimizer_kind(name).state(torch.Size(shape), dtype, False)
    assert found.device == allocated(optimizer, parameter)
    assert found.paged == 0


BNB = ["adamw_bnb_8bit", "lion_8bit", "lion_32bit", "rmsprop_bnb_8bit", "rmsprop_bnb",
       "paged_adamw_8bit", "paged_adamw_32bit", "paged_lion_8bit", "paged_ademamix_32bit",
       "paged_ademamix_8bit"]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", BNB)
def test_bitsandbytes(name, shape, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import TrainingArguments
    from transformers.trainer_optimizer import OptimizerContext, _get_bitsandbytes_optimizer

    arguments = TrainingArguments(str(tmp_path), optim=name, use_cpu=True)
    adam = {"betas": (0.9, 0.999), "eps": 1e-8}
    cls, keywords = _get_bitsandbytes_optimizer(
        OptimizerContext(arguments, None, {"lr": 1e-3}, adam, {})
    )
    # Without paging, which only CUDA has, the same buffers are plain tensors.
    keywords["is_paged"] = False
    if "rmsprop" in name:
        del keywords["is_paged"]
    parameter = torch.nn.Parameter(torch.ones(shape))
    optimizer = cls([parameter], **keywords)
    optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)
    found = optimizer_kind(name).state(torch.Size(shape), torch.float32, False)
    assert found.device + found.paged == allocated(optimizer, parameter)
    assert (found.paged > 0) == (name.startswith("paged") and math.prod(shape) >= 1e5)


def test_embeddings_stay_in_32_bits():
    kind = optimizer_kind("adamw_bnb_8bit")
    shape = torch.Size((1000, 64))
    assert kind.state(shape, torch.bfloat16, True).device == 8 * 64_000
    assert kind.state(shape, torch.bfloat16, False).device == 2 * 64_000 + 8 * 250


def test_the_foreach_step_of_adamw_needs_one_more_copy():
    # The root of the second moment of all tensors stands at once; a fused kernel has none.
    found = optimizer_kind("adamw_torch").state(torch.Size((100, 10)), torch.float32, False)
    assert found.scratch == pytest.approx(4000, rel=0.01)
    assert optimizer_kind("adamw_torch").at_once
    fused = optimizer_kind("adamw_torch_fused")
    assert fused.state(torch.Size((100, 10)), torch.float32, False).scratch == 0


@pytest.mark.parametrize("name", ["adamw", "galore_adamw", "nonsense"])
def test_an_unknown_optimizer_is_refused_in_one_sentence(name):
    with pytest.raises(ConfigError, match=f"optim is '{name}', whose memory is not known here"):
        optimizer_kind(name)
