"""Bytes of optimizer state, and what a step needs besides, for every optimizer by its name.

torch's and transformers' optimizers are run, on meta tensors; those of bitsandbytes, which have
no step there, are counted as its `init_state` allocates.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from lisa_analysis.contract.errors import ConfigError, suggest
from lisa_train.estimate.trace import StorageLog

# bitsandbytes: tensors with fewer elements keep fp32 state, blocks share one fp32 scale, and a
# paged state of at least so many elements lies in memory that moves to the host under pressure.
_BNB_LEAST, _BNB_BLOCK, _BNB_PAGED = 4096, 256, 100_000
_STEP_COUNT = 4
_BNB_STATES = {"adamw": 2, "lion": 1, "rmsprop": 1, "ademamix": 3}


@dataclass(frozen=True)
class StateBytes:
    """Of one tensor: state on the device, state that is paged to the host, and the step's own.

    `scratch` is what the step allocates and frees.
    """

    device: int
    paged: int = 0
    scratch: int = 0


@dataclass(frozen=True)
class OptimizerKind:
    """An optimizer as far as memory goes.

    Attributes
    ----------
    state
        Shape, dtype and whether the state is 32-bit even in an 8-bit optimizer -> its bytes.
    at_once
        Whether a step works on all tensors at once (foreach), so that its scratch memory adds up.
    """

    state: Callable[[torch.Size, torch.dtype, bool], StateBytes]
    at_once: bool = False


def optimizer_kind(name: str) -> OptimizerKind:
    """Return the optimizer that transformers calls `name`.

    Raises
    ------
    ConfigError
        For a name that transformers does not know or whose memory is not known here.
    """
    if name in _TORCH:
        build, fused = _TORCH[name]
        return OptimizerKind(partial(_measured, build, fused), at_once=not fused and _foreach(name))
    if (found := _bitsandbytes(name)) is not None:
        states, bits, paged = found
        return OptimizerKind(partial(_bnb_state, states, bits, paged))
    known = sorted([*_TORCH, *_BNB_NAMES])
    raise ConfigError(
        f"optim is {name!r}, whose memory is not known here; expected one of "
        f"{', '.join(known)}.{suggest(name, known)}"
    )


def _adafactor(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    # As Trainer sets it.
    return Adafactor(parameters, lr=1e-3, scale_parameter=False, relative_step=False)


# name -> (how to build it as it runs on CUDA, whether one fused kernel makes the step)
_TORCH: dict[str, tuple[Callable[[list[torch.Tensor]], torch.optim.Optimizer], bool]] = {
    "adamw_torch": (partial(torch.optim.AdamW, foreach=True), False),
    "adamw_torch_fused": (partial(torch.optim.AdamW, foreach=False), True),
    "sgd": (partial(torch.optim.SGD, lr=1e-3, foreach=True), False),
    "adagrad": (partial(torch.optim.Adagrad, foreach=True), False),
    "rmsprop": (partial(torch.optim.RMSprop, foreach=True), False),
    "adafactor": (_adafactor, False),
}
_BNB_NAMES = (
    "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit",
    "lion_32bit", "paged_lion_8bit", "paged_lion_32bit", "rmsprop_bnb", "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit", "paged_ademamix_32bit", "paged_ademamix_8bit",
)  # fmt: skip


def _foreach(name: str) -> bool:
    return name != "adafactor"


def _measured(
    build: Callable[[list[torch.Tensor]], torch.optim.Optimizer],
    fused: bool,
    shape: torch.Size,
    dtype: torch.dtype,
    wide: bool,
) -> StateBytes:
    """Take one step on a meta tensor of that shape."""
    tensor = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
    optimizer = build([tensor])
    tensor.grad = torch.zeros_like(tensor)
    optimizer.step()
    state = [v for v in optimizer.state[tensor].values() if torch.is_tensor(v)]
    # Unless the kernel is fused, the step count stays on the host.
    held = sum(v.untyped_storage().nbytes() for v in state if v.device.type == "meta")
    if fused:
        return StateBytes(held + _STEP_COUNT)
    log = StorageLog()
    for known in (tensor, tensor.grad, *state):
        log.note(known, 0, 0)
    start = log.clock
    with log:
        optimizer.step()
    trace = log.freeze({})
    top = trace.peak(start, log.clock)
    return StateBytes(held, scratch=sum(trace.at(top).values()) - sum(trace.at(start).values()))


def _bitsandbytes(name: str) -> tuple[int, int, bool] | None:
    """Number of states, bits and paging of a bitsandbytes optimizer, None for another name."""
    if name not in _BNB_NAMES:
        return None
    family = next(f for f in _BNB_STATES if f in name)
    return _BNB_STATES[family], 8 if "8bit" in name else 32, name.startswith("paged")


def _bnb_state(
    states: int, bits: int, paged: bool, shape: torch.Size, dtype: torch.dtype, wide: bool
) -> StateBytes:
    """As `Optimizer1State` and `Optimizer2State` of bitsandbytes allocate (`init_state`)."""
    numel = math.prod(shape)
    small = bits == 32 or numel < _BNB_LEAST or wide
    buffers = states * numel * (4 if small else 1)
    scales = 0 if small else states * 4 * math.ceil(numel / _BNB_BLOCK)
    if paged and numel >= _BNB_PAGED:
        # The step brings the pages of one tensor at a time.
        return StateBytes(scales, paged=buffers, scratch=buffers)
    return StateBytes(buffers + scales)
