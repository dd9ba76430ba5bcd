"""fp32 master weights of the active tensors of a bf16 model: small updates are not rounded away."""

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import nn

from lisa_analysis.contract.errors import ConfigError
from lisa_train.optim.frozen_state import FrozenState

# First word of the seed of every rounding, so that no other stream is the same.
_STREAM = 0x115D


def stochastic_round(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Round fp32 to bf16, up or down with the probability that makes the mean exact.

    bf16 is the upper half of fp32: adding 16 uniform random bits to the lower half and cutting
    it off rounds up in magnitude with probability (distance from below)/(distance of the two).

    Parameters
    ----------
    values
        fp32, any shape. Infinities and NaN stay what they are.
    generator
        Source of the random bits, on the tensor's device.
    """
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(
        0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator
    )
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


class MasterWeights:
    """Holds the weights of active bf16 tensors in fp32 and rounds them back on freezing.

    The forward pass runs under bf16 autocast, so that layers of both precisions meet.

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
        self._numbers = {p: i for i, p in enumerate(parameters) if p.dtype == torch.bfloat16}
        half = [n for n, p in model.named_parameters() if p.dtype == torch.float16]
        if half:
            raise ConfigError(
                f"precision='fp32_active' needs a model in bfloat16, but {half[0]} is float16; "
                "load the model with dtype='bfloat16'."
            )
        self._seed = seed
        self._autocasts: list[Any] = []
        self._handles = [
            model.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._leave, always_call=True),
            *(
                part.register_forward_pre_hook(_match_a_resting_norm)
                for part in model.modules()
                if isinstance(part, nn.LayerNorm)
            ),
        ]

    def upcast(self, parameter: nn.Parameter) -> None:
        """Hold an activated tensor in fp32; exact."""
        if parameter in self._numbers and parameter.dtype == torch.bfloat16:
            parameter.grad = None
            parameter.data = parameter.data.float()

    def downcast(self, parameter: nn.Parameter, draw: int) -> None:
        """Round a tensor that is being frozen to bf16; `draw` keys the random bits."""
        if parameter in self._numbers and parameter.dtype == torch.float32:
            generator = torch.Generator(parameter.device)
            key = [_STREAM, self._seed, draw, self._numbers[parameter]]
            generator.manual_seed(_mix(key))
            parameter.grad = None
            parameter.data = stochastic_round(parameter.data, generator)

    def close(self, draw: int) -> None:
        """Round what is still in fp32, and end autocast."""
        for parameter in self._numbers:
            self.downcast(parameter, draw)
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, _: Any) -> None:
        device = next(module.parameters()).device.type
        self._autocasts.append(torch.autocast(device, dtype=torch.bfloat16))
        self._autocasts[-1].__enter__()

    def _leave(self, *_: Any) -> None:
        if self._autocasts:
            self._autocasts.pop().__exit__(None, None, None)


def exact_tensors(
    trainable: Sequence[nn.Parameter], active: Collection[nn.Parameter], state: FrozenState
) -> dict[str, Any]:
    """Return the weights of the active tensors and all optimizer state, uncast.

    Parameters
    ----------
    trainable
        All tensors that may train, in their order.
    active
        Those that train now.
    state
        Their optimizer state.
    """
    weights = [p.detach() if p in active else None for p in trainable]
    return {"weights": weights, "optimizer": state.states()}


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
            parameter.copy_(weight)
    state.replace(tensors["optimizer"], active)


def _match_a_resting_norm(norm: nn.Module, arguments: Any) -> Any:
    """Let a bf16 layer norm take fp32 from a layer that trains.

    CUDA's autocast computes it in fp32. The CPU's leaves it as it is, where an fp32 input and bf16
    weights are an error: the input is rounded, as it would be in a bf16 model.
    """
    weight = norm.weight
    if not arguments or weight is None or weight.device.type != "cpu":
        return None
    entered, *rest = arguments
    if entered.dtype == torch.float32 and weight.dtype == torch.bfloat16:
        return (entered.to(torch.bfloat16), *rest)
    return None


def _mix(key: list[int]) -> int:
    """One 63-bit seed from several numbers (SplitMix64's finaliser, chained)."""
    state = 0
    for word in key:
        state = (state + word + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1
