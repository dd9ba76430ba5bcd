"""Training on several devices: what is refused until it is proved, and one schedule for all."""

import sys
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lisa_analysis.contract.errors import ConfigError
from lisa_analysis.contract.layers import canonical_name
from lisa_train.model.sharding import fsdp_modules, is_sharded

ONE_PROCESS_EACH = (
    "start one process per GPU (torchrun --nproc-per-node N), or show this one a single GPU "
    "(CUDA_VISIBLE_DEVICES=0)"
)
INSTEAD_OF_DEEPSPEED = (
    "leave DeepSpeed out, and start one process per GPU (torchrun --nproc-per-node N), each with a "
    "copy of the model; where that does not fit, let FSDP2 split it"
)


def processes() -> int:
    """Return how many processes train together; 1 outside a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def in_all(flag: bool) -> bool:
    """Whether a flag is set in every process; all of them call it together."""
    every: list[Any] = [flag]
    if processes() > 1:
        every = [None] * processes()
        dist.all_gather_object(every, flag)
    return all(every)


def is_first() -> bool:
    """Whether this process is the one that speaks."""
    return processes() == 1 or dist.get_rank() == 0


def lost_a_process(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that another process has ended or hangs.

    What was to come from it did not. NCCL's errors have a class of their own; gloo's are plain
    `RuntimeError` with the place in gloo that gave up.
    """
    if processes() == 1:
        return False
    while error is not None:
        if isinstance(error, dist.DistError):
            return True
        if isinstance(error, RuntimeError) and "gloo/transport" in str(error):
            return True
        error = error.__cause__
    return False


def refuse_wrappers(model: nn.Module, who: str) -> None:
    """`ConfigError` for wrappers under which a tensor of the model is not what it seems.

    Parameters
    ----------
    model
        The model.
    who
        What cannot work with them, for the sentence.
    """
    modules = list(model.modules())
    _refuse_other_parts(modules, who)
    # Looked up, not imported: whoever wrapped the model has imported it.
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    if any(isinstance(module, fsdp) for module in modules):
        raise ConfigError(
            f"{who} does not work under FSDP version 1, which hides the tensors of a model in flat "
            "pieces; use DDP, or FSDP2."
        )
    if any(isinstance(module, nn.DataParallel) for module in modules):
        raise ConfigError(
            f"{who} does not work under torch.nn.DataParallel, which trains copies of the model "
            f"that it does not see; {ONE_PROCESS_EACH}."
        )
    engine = getattr(sys.modules.get("deepspeed"), "DeepSpeedEngine", ())
    # ZeRO-3 marks the tensors of a model that it has taken apart.
    apart = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    if apart or any(isinstance(module, engine) for module in modules):
        raise ConfigError(
            f"{who} does not work under DeepSpeed, which keeps gradients{' and weights' * apart} "
            f"in buffers of its own; {INSTEAD_OF_DEEPSPEED}."
        )


def _refuse_other_parts(modules: list[nn.Module], who: str) -> None:
    """`ConfigError` for ways of transformers by which processes hold other layers or experts."""
    configs = (getattr(module, "config", None) for module in modules)
    found = (getattr(config, "distributed_config", None) for config in configs)
    asked: Any = next((each for each in found if each is not None), None)
    for name, means in (
        ("pp_size", "different layers (pipeline parallelism)"),
        ("ep_size", "different experts (expert parallelism)"),
    ):
        size = getattr(asked, name, None) or 1
        if size > 1:
            raise ConfigError(
                f"{who} is not proved where processes hold {means}: DistributedConfig.{name} is "
                f"{size}; leave it out, and split the model with fsdp_size where it does not fit."
            )


def refuse_unproved(model: nn.Module, *, rotates: bool) -> None:
    """`ConfigError` for ways to train on several devices in which LISA is not known to be right.

    Parameters
    ----------
    model
        The model as LISA gets it, wrapped or not.
    rotates
        Whether any tensor ever rests.
    """
    refuse_wrappers(model, "LISA")
    _check_pieces(model)
    replicas = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    if rotates:
        for replica in replicas:
            _check_ddp(replica)


def _check_pieces(model: nn.Module) -> None:
    """`ConfigError` for tensors that processes share in another way than by FSDP2 alone."""
    split = [(name, p) for name, p in model.named_parameters() if is_sharded(p)]
    if not split:
        return
    name = canonical_name(split[0][0])
    if not fsdp_modules(model) or any(p.device_mesh.ndim > 1 for _, p in split):  # type: ignore[attr-defined]
        raise ConfigError(
            f"LISA is not proved with weights that tensor parallelism splits, or FSDP2 with copies "
            f"(HSDP), as {name} is; use FSDP2 over one dimension, or one copy of the model per "
            "process."
        )


def _check_ddp(replica: Any) -> None:
    """`ConfigError` for settings of DDP that stop, or go wrong, when layers rest."""
    if not replica.find_unused_parameters or replica.static_graph:
        static = ", ddp_static_graph=False" if replica.static_graph else ""
        wrong, right = (
            ("static_graph is on", "leave it off")
            if replica.static_graph
            else ("find_unused_parameters is off", "turn it on")
        )
        raise ConfigError(
            f"{wrong} in DistributedDataParallel, which then waits for the gradients of layers "
            f"that LISA lets rest; {right} (in Trainer: ddp_find_unused_parameters=True{static}), "
            "or leave the model unwrapped: LISA averages gradients itself."
        )


def agree_on_start(
    mine: Mapping[str, Any] | None, problem: Exception | None
) -> tuple[Mapping[str, Any] | None, list[Any]]:
    """Return the settings of the first process, and the seeds of all, when all can start alike.

    All processes call it; it is one exchange. A process that cannot start stops the others too:
    they would wait for it for ever.

    Parameters
    ----------
    mine
        Settings that must be the same everywhere, and `seed`, which need not be; None after a
        problem.
    problem
        What keeps this process from starting.

    Raises
    ------
    ConfigError
        When a setting differs, or another process cannot start.
    """
    if processes() == 1:
        return mine, []
    said: list[Any] = [None] * processes()
    dist.all_gather_object(said, (mine, None if problem is None else str(problem)))
    if problem is not None:
        raise problem
    for rank, (_, sentence) in enumerate(said):
        if sentence is not None:
            raise ConfigError(f"process {rank} cannot start LISA: {sentence}")
    first = said[0][0]
    for rank, (settings, _) in enumerate(said):
        for name, value in settings.items():
            if name != "seed" and value != first[name]:
                raise ConfigError(
                    f"LISA starts with {name} = {_short(first[name])} in process 0, but "
                    f"{_short(value)} in process {rank}: their models would part; start all "
                    "processes with the same settings."
                )
    return first, [settings["seed"] for settings, _ in said]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
