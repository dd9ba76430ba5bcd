"""`estimate_memory`: peak bytes of a training step, from shapes alone."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never

from torch import nn

from lisa_analysis.contract.errors import ConfigError, suggest
from lisa_train.estimate.estimator import Estimator
from lisa_train.estimate.optimizers import optimizer_kind
from lisa_train.estimate.result import MemoryEstimate
from lisa_train.estimate.setting import Attention, Autocast, DType, Setting, Spread
from lisa_train.estimate.stage import Stage
from lisa_train.methods import sections
from lisa_train.methods.lisa.config import LisaConfig
from lisa_train.methods.select.config import SelectConfig
from lisa_train.private_names import check

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def estimate_memory(
    model_or_config: "nn.Module | PretrainedConfig | str | Path",
    method: str = "lisa",
    *,
    batch_size: int = 1,
    sequence_length: int = 1024,
    dtype: DType = "auto",
    autocast: Autocast | None = None,
    attn_implementation: Attention = "sdpa",
    optim: str = "adamw_torch_fused",
    eight_bit_states: tuple[str, ...] | None = None,
    gradient_checkpointing: bool = False,
    gradient_accumulation_steps: int = 1,
    chunked_loss: bool = False,
    step_in_backward: bool = False,
    lisa: LisaConfig | None = None,
    lora: Mapping[str, Any] | None = None,
    peft: Mapping[str, Any] | None = None,
    select: SelectConfig | None = None,
    autocast_adapter_dtype: bool = True,
    active_layers: tuple[int, ...] | None = None,
    devices: int = 1,
    spread: Spread = "fsdp",
    **unknown: Never,
) -> MemoryEstimate:
    """Predict the peak memory of a training step; no weights, data or GPU are needed.

    One step of the real model runs on tensors that have a shape but no data, and every storage
    is followed from birth to death, so that any architecture counts as it computes. The peak is
    the largest of three: the forward pass (weights, optimizer state, what backward needs), the
    backward pass (gradients come while activations go), and the optimizer step (gradients, and
    what the optimizer allocates for its arithmetic). It is that of a step in the middle of
    training: the optimizer state is there from the start.

    Sequences are full, without padding, and the attention mask is the model's own; attention is
    taken to run in the flash kernel where `attn_implementation` is ``sdpa``. Left out: the CUDA
    context, workspaces of kernels and the allocator's fragmentation, for which `allowance` adds
    0.6 GB and 5 % of gradients and activations (assumed, not measured).

    Parameters
    ----------
    model_or_config
        A module, a transformers configuration, or a folder or hub id (only its config.json is
        read). The class is that of `architectures`, else the one for causal language modelling.
    method
        ``full``, ``lora``, ``lisa``, ``peft``, ``select``, or another of `lisa_train.METHODS`.
    batch_size, sequence_length
        Sequences per device and forward pass, and their tokens.
    dtype
        Of the weights; ``auto`` takes the configuration's or the module's.
    autocast
        ``bfloat16`` or ``float16`` to compute under autocast; None computes in the weights' type.
    attn_implementation
        ``sdpa`` or ``eager``.
    optim
        Optimizer, as transformers names it.
    eight_bit_states
        As in `TrainConfig`: the groups with 8-bit state; None as transformers does it.
    gradient_checkpointing
        Recompute each layer in backward.
    gradient_accumulation_steps
        Above 1, gradients already stand during the forward pass.
    chunked_loss
        TRL's fused head (`SFTTrainer`'s default): the logits never stand whole.
    step_in_backward
        Each gradient is used and freed as soon as it is there.
    lisa
        A `LisaConfig` (None: its defaults): layers, always-active groups, probabilities of
        embeddings and head, `optimizer_state`, `precision`.
    lora
        Fields of PEFT's `LoraConfig`, over the defaults of `lisa-train`.
    peft
        With ``peft``: `peft_type` and the fields of that type's configuration.
    select
        With ``select``: a `SelectConfig`, what trains.
    autocast_adapter_dtype
        As PEFT's: adapters of a half-precision model are held in fp32.
    active_layers
        LISA's layers of the period; None takes those that cost the most.
    devices, spread
        Number of devices, and how a model is spread over them: ``fsdp`` splits every tensor
        (FSDP2, each device with its own batch), ``layers`` puts equally many layers on each.
    **unknown
        Settings that a method brings with it, by the method's name. Nothing else is taken; a
        name that is misspelt is answered with the nearest one.

    Returns
    -------
    MemoryEstimate

    Raises
    ------
    ConfigError
        For a setting, an optimizer or a model that cannot be estimated.

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> estimate_memory(LlamaConfig(), "lisa", dtype="bfloat16").total < 24e9
    True
    """
    brought = {f.name for f in fields(sections())}
    given: Mapping[str, Any] = unknown
    for name in given:
        if name not in brought:
            raise _unknown(name)
    wanted = Setting(
        method=method,
        batch_size=batch_size,
        sequence_length=sequence_length,
        dtype=dtype,
        autocast=autocast,
        attn_implementation=attn_implementation,
        optim=optim,
        eight_bit_states=eight_bit_states,
        gradient_checkpointing=gradient_checkpointing,
        gradient_accumulation_steps=gradient_accumulation_steps,
        chunked_loss=chunked_loss,
        step_in_backward=step_in_backward,
        lisa=lisa or LisaConfig(),
        lora=lora or {},
        peft=peft or {},
        select=select or SelectConfig(),
        autocast_adapter_dtype=autocast_adapter_dtype,
        active_layers=active_layers,
        devices=devices,
        spread=spread,
        **given,
    )
    return estimate(model_or_config, wanted)


def estimate(
    source: "Stage | nn.Module | PretrainedConfig | str | Path", setting: Setting
) -> MemoryEstimate:
    """Predict the peak memory of one `Setting`; see `estimate_memory`.

    A `Stage` may serve several settings that differ in the method alone, LoRA excepted.
    """
    check("estimate")
    kind = optimizer_kind(setting.optim)
    stage = source if isinstance(source, Stage) else Stage(source, setting)
    return Estimator(stage, setting, kind).run()


def _unknown(name: str) -> ConfigError:
    known = [f.name for f in fields(Setting)]
    return ConfigError(f"estimate_memory has no setting {name!r}.{suggest(name, known)}")
