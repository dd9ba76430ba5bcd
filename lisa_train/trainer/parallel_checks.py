"""Trainer on several devices: what is refused until it is proved, and LISA without DDP."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer
from transformers.training_args import ParallelMode

from lisa_analysis.contract.errors import ConfigError
from lisa_train.methods.lisa.config import LisaConfig
from lisa_train.model.parallel import INSTEAD_OF_DEEPSPEED, ONE_PROCESS_EACH
from lisa_train.trainer.events import patch

_PROVED = (ParallelMode.NOT_PARALLEL, ParallelMode.NOT_DISTRIBUTED, ParallelMode.DISTRIBUTED)


def check_parallel(trainer: Trainer, who: str) -> None:
    """`ConfigError` for a way of training on several devices that is not known to be right.

    Parameters
    ----------
    trainer
        The trainer; its model need not be wrapped yet.
    who
        What is to work with it, for the sentence.
    """
    args = trainer.args
    if args.n_gpu > 1:
        raise ConfigError(
            f"this process sees {args.n_gpu} GPUs, for which Trainer takes torch.nn.DataParallel, "
            f"and {who} does not work with its copies of the model; {ONE_PROCESS_EACH}."
        )
    if getattr(trainer, "is_deepspeed_enabled", False):
        raise ConfigError(
            f"{who} cannot read gradients under DeepSpeed (its setting: deepspeed, or the file of "
            f"accelerate launch), whichever stage of ZeRO; {INSTEAD_OF_DEEPSPEED}."
        )
    plugin: Any = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    version = getattr(plugin, "fsdp_version", 1)
    if plugin is not None and version == 1:
        raise ConfigError(
            f"{who} does not work under FSDP version 1, which hides the tensors of a model in flat "
            "pieces; use DDP, or FSDP2 (fsdp_version 2)."
        )
    asked = getattr(args, "fsdp_plugin_args", None) is not None
    if plugin is None and (asked or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"):
        raise ConfigError(
            "fsdp is set (trainer_args: fsdp, or the file of accelerate launch), but accelerate "
            "splits models on accelerators only, and here would train with a whole copy in every "
            "process (DDP) without a word; leave fsdp out, or let transformers split the model "
            "(from_pretrained(…, distributed_config=DistributedConfig(fsdp_size=N)))."
        )
    for name, size in _sizes(trainer).items():
        if name in ("cp", "sp") and size > 1:
            raise ConfigError(
                f"{who} is not proved where processes share the positions of a sequence "
                f"({name}_size is {size}); leave {name}_size out."
            )
    if args.parallel_mode not in _PROVED:
        raise ConfigError(
            f"{who} is not proved with {args.parallel_mode.value} processes; use DDP or a single "
            "device."
        )


def check_lisa_processes(trainer: Trainer, config: LisaConfig) -> None:
    """`ConfigError` where the copies of a model under LISA would part, or Trainer would stop."""
    check_parallel(trainer, "LISA")
    sizes = _sizes(trainer)
    if sizes["tp"] > 1:
        raise ConfigError(
            f"LISA is not proved with weights that tensor parallelism splits (tp_size is "
            f"{sizes['tp']}); split the model with FSDP2 alone, or use DDP."
        )
    if sizes["dp_replicate"] > 1 and sizes["dp_shard"] > 1:
        raise ConfigError(
            f"LISA is not proved under FSDP2 with copies (HSDP: dp_replicate_size is "
            f"{sizes['dp_replicate']}, dp_shard_size {sizes['dp_shard']}); leave dp_replicate_size "
            "out, so that FSDP2 splits the model over all processes."
        )
    plugin: Any = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if type(getattr(plugin, "cpu_offload", None)).__name__ == "CPUOffloadPolicy":
        raise ConfigError(
            "LISA is not proved under FSDP2 that keeps weights on the host (cpu_offload, "
            "fsdp_offload_params); leave that out: resting layers have no optimizer state to move."
        )
    kind = str(getattr(plugin, "state_dict_type", ""))
    if config.optimizer_state == "offload" and "FULL_STATE_DICT" in kind:
        raise ConfigError(
            "lisa.optimizer_state is 'offload', and whole checkpoints (state_dict_type "
            "FULL_STATE_DICT) are put together on the accelerators, where that state is not; set "
            "state_dict_type in fsdp_config to SHARDED_STATE_DICT."
        )


def _sizes(trainer: Trainer) -> dict[str, int]:
    """How many processes share each dimension of accelerate's parallelism."""
    config = getattr(trainer.accelerator, "parallelism_config", None)
    names = ("tp", "cp", "sp", "dp_replicate", "dp_shard")
    return {name: getattr(config, f"{name}_size", None) or 1 for name in names}


@contextmanager
def without_wrapper(trainer: Trainer) -> Iterator[None]:
    """Train with several processes without `DistributedDataParallel`: LISA averages gradients.

    Everything else that accelerate prepares (device, autocast, compilation) stays; transformers
    itself prepares models so that average their own gradients.
    """
    if trainer.args.parallel_mode != ParallelMode.DISTRIBUTED:
        yield
        return

    def prepared(original: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if model is trainer.model:
            kwargs["evaluation_mode"] = True
        return original(model, *args, **kwargs)

    take_off = patch(trainer.accelerator, "prepare_model", prepared)
    try:
        yield
    finally:
        take_off()
