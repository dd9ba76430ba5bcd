"""fp32 master weights of the active tensors of a bf16 model: small updates are not rounded away.

The parameters stay what they are, bf16 tensors of the same identity, so that hooks, replicas,
pieces, autocast and compiled code never see another dtype. Beside every active one lies an fp32
copy, which the optimizer steps; after the step the parameter is the copy, stochastically rounded.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lisa_analysis.contract.errors import ConfigError
from lisa_train.model.master_copies import drop_copy, exact, keep_copy
from lisa_train.model.norms import local
from lisa_train.model.sharding import is_sharded, local_slices
from lisa_train.optim.frozen_state import FrozenState
from lisa_train.optim.gradient_sums import GradientSums
from lisa_train.optim.rounding import mixed, round_into, stochastic_round
from lisa_train.optim.step_copies import CopyStep
from lisa_train.private_names import check

# First word of the seed of every rounding, so that no other stream is the same.
_STREAM = 0x115D


class MasterWeights:
    """Holds fp32 copies of the active bf16 tensors, and has the optimizers step those.

    Parameters
    ----------
    model
        The model.
    parameters
        Its tensors that may train; those in bf16 are concerned, fp32 ones are left as they are.
    seed
        Seed of the rounding; no global random stream is touched.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter], seed: int) -> None:
        check("step of copies")
        self._numbers: dict[torch.Tensor, int] = {
            p: i for i, p in enumerate(parameters) if p.dtype == torch.bfloat16
        }
        half = [n for n, p in model.named_parameters() if p.dtype == torch.float16]
        if half:
            raise ConfigError(
                f"precision='fp32_active' needs a model in bfloat16, but {half[0]} is float16; "
                "load the model with dtype='bfloat16'."
            )
        self._seed = seed
        self._copies: dict[torch.Tensor, torch.Tensor] = {}
        self._sums = GradientSums()
        self._steps: dict[Optimizer, CopyStep] = {}

    def hold(self, parameter: nn.Parameter) -> None:
        """Begin a copy of a tensor that trains from now on; exact."""
        if parameter in self._numbers and parameter not in self._copies:
            copy = parameter.detach().float()
            self._copies[parameter] = copy
            keep_copy(parameter, copy)
            self._sums.watch(parameter)

    def drop(self, parameter: nn.Parameter) -> None:
        """Let the copy of a tensor go: its last rounding is what stays."""
        if self._copies.pop(parameter, None) is not None:
            drop_copy(parameter)
            self._sums.leave(parameter)

    def before_step(self, optimizer: Optimizer, closure: object) -> None:
        """Have the optimizer step the copies, in this step and, in part, before it."""
        self.after_step(optimizer)  # a step before that an exception has left
        if closure is not None:
            raise ConfigError(
                "the optimizer's step is given a closure, and lisa.precision is 'fp32_active', "
                "which steps copies that a closure's gradients would not reach; compute the "
                "gradients before, and call optimizer.step() without it."
            )
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._sums.stepped(parameter)
        step = self._steps[optimizer] = CopyStep(optimizer)
        step.begin(self._copies)

    def after_step(self, optimizer: Optimizer) -> list[torch.Tensor]:
        """Put the parameters back; return those whose copies have moved."""
        step = self._steps.pop(optimizer, None)
        return [] if step is None else step.end()

    @torch.no_grad()
    def round(self, parameters: Iterable[torch.Tensor], step: int) -> None:
        """Make parameters the roundings of their copies; `step` keys the random bits."""
        for parameter in parameters:
            copy = self._copies.get(parameter)
            if copy is None:
                continue
            key = mixed([_STREAM, self._seed, step, self._numbers[parameter]])
            target, values = local(parameter), local(copy)
            if target.is_contiguous():
                round_into(target, values, key, _start(parameter))
            else:
                target.copy_(stochastic_round(values, key, _start(parameter)))

    def close(self) -> None:
        """Let go of every copy."""
        for optimizer in list(self._steps):
            self.after_step(optimizer)
        for parameter in list(self._copies):
            drop_copy(parameter)
            self._sums.leave(parameter)
        self._copies = {}


def exact_tensors(
    trainable: Sequence[nn.Parameter], active: Collection[nn.Parameter], state: FrozenState
) -> dict[str, Any]:
    """Return the weights of the active tensors and all optimizer state, uncast and whole.

    All processes call it together where the weights are split over them.

    Parameters
    ----------
    trainable
        All tensors that may train, in their order.
    active
        Those that train now.
    state
        Their optimizer state.
    """
    weights = [_whole(exact(p).detach()) if p in active else None for p in trainable]
    return {"weights": weights, "optimizer": _whole(state.states())}


@torch.no_grad()
def load_exact_tensors(
    tensors: Mapping[str, Any],
    trainable: Sequence[nn.Parameter],
    active: Set[torch.Tensor],
    state: FrozenState,
) -> None:
    """Take up what `exact_tensors` returned, to the bit."""
    for parameter, weight in zip(trainable, tensors["weights"], strict=True):
        if weight is not None:
            held = exact(parameter)
            where = local_slices(held) if is_sharded(held) else None
            local(held).copy_(weight if where is None else weight[where])
    state.replace(tensors["optimizer"], active)


def _whole(value: Any) -> Any:
    """Put the tensors that are split together, on the host, wherever they lie in `value`."""
    if isinstance(value, Mapping):
        return {key: _whole(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_whole(part) for part in value]
    if not is_sharded(value):
        return value
    # What waits on the host goes back to where the processes speak with each other.
    return value.to(value.device_mesh.device_type).full_tensor().cpu()


def _start(parameter: torch.Tensor) -> int:
    """Place of this process's first element in the whole tensor, which is cut into rows."""
    if not is_sharded(parameter) or not parameter.ndim:
        return 0
    where = local_slices(parameter)
    first = 0 if where is None else where[0].start
    return first * math.prod(parameter.shape[1:])
