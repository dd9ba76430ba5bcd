"""Ways in which Trainer spreads training over devices that are refused until they are proved."""

from typing import Any

from transformers import Trainer
from transformers.training_args import ParallelMode

from lisa_analysis.contract.errors import ConfigError
from lisa_train.model.parallel import ONE_PROCESS_EACH

_PROVED = (ParallelMode.NOT_PARALLEL, ParallelMode.NOT_DISTRIBUTED, ParallelMode.DISTRIBUTED)


def check_parallel(trainer: Trainer, who: str, *, sharded: bool) -> None:
    """`ConfigError` for a way of training on several devices that is not known to be right.

    Parameters
    ----------
    trainer
        The trainer; its model need not be wrapped yet.
    who
        What is to work with it, for the sentence.
    sharded
        Whether it works with weights that are split over processes (FSDP2).
    """
    args = trainer.args
    if args.n_gpu > 1:
        raise ConfigError(
            f"this process sees {args.n_gpu} GPUs, for which Trainer takes torch.nn.DataParallel, "
            f"and {who} does not work with its copies of the model; {ONE_PROCESS_EACH}."
        )
    if getattr(trainer, "is_deepspeed_enabled", False):
        raise ConfigError(
            f"{who} cannot read gradients under DeepSpeed; use DDP{', FSDP2' if sharded else ''} "
            "or a single device."
        )
    plugin: Any = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    version = getattr(plugin, "fsdp_version", 1)
    if plugin is not None and (version == 1 or not sharded):
        raise ConfigError(
            f"{who} does not work under FSDP (version {version}), which splits the tensors of a "
            f"model over processes; use DDP{', or FSDP2 (fsdp_version 2)' if sharded else ''}."
        )
    if args.parallel_mode not in _PROVED:
        raise ConfigError(
            f"{who} is not proved with {args.parallel_mode.value} processes; use DDP or a single "
            "device."
        )


def check_lisa_processes(trainer: Trainer, precision: str) -> None:
    """`ConfigError` where the copies of a model under LISA would part, or Trainer would stop."""
    check_parallel(trainer, "LISA", sharded=False)
    processes = trainer.args.world_size
    if precision == "fp32_active" and processes > 1:
        raise ConfigError(
            f"lisa.precision is 'fp32_active' with {processes} processes, whose copies of the "
            "model it would let part; train with one process, or set lisa.precision to 'model'."
        )
