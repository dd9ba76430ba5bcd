"""What the estimate says is saved for backward is what a real forward pass saves."""

from dataclasses import replace

import helpers_memory as small
import pytest
import torch

from lisa_train.config import LisaConfig
from lisa_train.estimate.patterns import lisa_pattern, plain_pattern
from lisa_train.estimate.setting import Setting
from lisa_train.estimate.stage import Stage
from lisa_train.estimate.step import record_step
from lisa_train.estimate.trace import ACTIVATIONS
from lisa_train.model.layer_map import find_layers
from lisa_train.model.module_tree import unwrap

BATCH, LENGTH = 2, 64
BASE = Setting(method="full", batch_size=BATCH, sequence_length=LENGTH)


def predicted(config, setting, layers=None) -> int:
    stage = Stage(config, setting)
    pattern = plain_pattern(stage)
    if setting.method == "lisa":
        pattern = lisa_pattern(stage, setting, layers)
    return record_step(stage, setting, pattern, backward=False).saved()


def counted(config, setting, layers=None) -> int:
    model = small.real_model(
        config, dtype=getattr(torch, setting.dtype),
        attn_implementation=setting.attn_implementation,
    )  # fmt: skip
    layers_held = []
    if setting.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        layers_held = [model.get_submodule(name) for name in find_layers(model).names]
    if setting.method == "lisa":
        stage = Stage(config, setting)
        names = lisa_pattern(stage, setting, layers).trainable
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
    if setting.method == "lora":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(**{"target_modules": "all-linear", **setting.lora})
        model = get_peft_model(model, lora)
    batch = small.batch_for(unwrap(model), BATCH, LENGTH)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=setting.autocast is not None):
        return small.saved_bytes(model, batch, layers_held)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", small.FAMILIES)
def test_full_fine_tuning(family, dtype, attention, checkpointing):
    # Keys shared by query heads have no flash kernel in fp32 on CUDA; the CPU has one.
    shared = {} if family in ("gpt2", "bert") else {"num_key_value_heads": 4}
    config = small.FAMILIES[family](**(shared if dtype == "float32" else {}))
    setting = replace(
        BASE, dtype=dtype, attn_implementation=attention, gradient_checkpointing=checkpointing
    )
    assert predicted(config, setting) == pytest.approx(counted(config, setting), rel=0.05)


@pytest.mark.parametrize("always", [("embed", "head", "norm"), (), ("head",)], ids=str)
@pytest.mark.parametrize("layers", [(0,), (3,), (1, 2), ()], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_frozen_layers(family, layers, always):
    if not layers and not always:
        pytest.skip("nothing trains")
    config = small.FAMILIES[family]()
    setting = replace(
        BASE, method="lisa", dtype="bfloat16", lisa=LisaConfig(1, always_active=always)
    )
    expected = counted(config, setting, layers)
    assert predicted(config, setting, layers) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("rank", [4, 16])
def test_adapters(rank, checkpointing):
    setting = replace(
        BASE, method="lora", dtype="bfloat16", lora={"r": rank},
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    config = small.llama()
    assert predicted(config, setting) == pytest.approx(counted(config, setting), rel=0.05)


@pytest.mark.parametrize("layers", [None, (1, 2)], ids=["full", "lisa"])
def test_autocast_saves_the_weights_that_it_casts(layers):
    method = "full" if layers is None else "lisa"
    setting = replace(BASE, method=method, dtype="float32", autocast="bfloat16")
    config = small.llama(num_key_value_heads=4)
    found = predicted(config, setting, layers)
    assert found == pytest.approx(counted(config, setting, layers), rel=0.05)


def test_below_the_lowest_training_layer_nothing_is_saved():
    setting = replace(BASE, method="lisa", dtype="bfloat16", lisa=LisaConfig(1, always_active=()))
    stage = Stage(small.llama(), setting)
    trace = record_step(stage, setting, lisa_pattern(stage, setting, (2,)), backward=False)
    kept = trace.alive(trace.marks["forward"]) & (trace.kinds == ACTIVATIONS)
    saved = [int(trace.bytes[kept & (trace.labels == i)].sum()) for i in range(4)]
    # The last lower layer made the input of the lowest training one.
    hidden = BATCH * LENGTH * 64 * 2
    assert saved[0] == 0
    assert saved[1] <= hidden
    assert saved[2] > saved[3] > 0


def test_encoder_and_decoder():
    setting = replace(BASE, dtype="float32", attn_implementation="eager")
    config = small.t5()
    assert predicted(config, setting) == pytest.approx(counted(config, setting), rel=0.05)


def test_experts_are_counted_as_the_grouped_product_computes_them():
    setting = replace(BASE, dtype="bfloat16")
    config = small.mixtral(experts_implementation="grouped_mm")
    assert predicted(config, setting) == pytest.approx(counted(config, setting), rel=0.05)


def test_dropout_saves_one_byte_per_element():
    plain, dropping = small.gpt2(), small.gpt2(resid_pdrop=0.1, embd_pdrop=0.1)
    setting = replace(BASE, dtype="float32")
    extra = predicted(dropping, setting) - predicted(plain, setting)
    elements = BATCH * LENGTH * 64
    # Embedding, attention and MLP output of four layers; a mask each.
    assert extra == pytest.approx(9 * elements, rel=0.05)
