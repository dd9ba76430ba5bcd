"""Settings of what is done to an optimizer, and when they fit it. No torch here."""

import re

from lisa_analysis.contract.errors import ConfigError
from lisa_train.checks import one_of

# Whose optimizer state can have 8 bits.
EIGHT_BIT_GROUPS = ("layers", "embed", "head", "norm")

_SCHEDULE_FREE = "schedule_free"
# Optimizers that step inside backward by themselves, in ways of their own.
_OWN_WAY = ("lomo", "adalomo")


def check_step_settings(
    *, max_grad_norm: float | None, gradient_accumulation_steps: int, fp16: bool, optim: str
) -> None:
    """`ConfigError` where stepping inside backward would not equal the ordinary step.

    Parameters
    ----------
    max_grad_norm
        Norm to which all gradients together are clipped; 0 or None never clips.
    gradient_accumulation_steps
        Backward passes per optimizer step.
    fp16
        Whether gradients carry a loss scale.
    optim
        The optimizer, as transformers names it.
    """
    if max_grad_norm:
        raise ConfigError(
            f"step_in_backward is on but max_grad_norm is {max_grad_norm:g}: clipping to a norm of "
            "all gradients needs all of them at once; set max_grad_norm to 0."
        )
    if gradient_accumulation_steps > 1:
        raise ConfigError(
            f"step_in_backward is on but gradient_accumulation_steps is "
            f"{gradient_accumulation_steps}: accumulation keeps every gradient until the last "
            "backward pass; set it to 1 (and raise per_device_train_batch_size)."
        )
    if fp16:
        raise ConfigError(
            "step_in_backward is on but fp16 is true: whether a scaled step overflowed is known "
            "only when all gradients are there; use bf16, or turn step_in_backward off."
        )
    if optim.startswith(_SCHEDULE_FREE):
        raise ConfigError(
            f"step_in_backward is on but optim is {optim!r}, which counts its steps for all "
            "tensors together and cannot step them one by one; choose another optimizer."
        )
    if optim in _OWN_WAY or optim.endswith("_layerwise"):
        raise ConfigError(
            f"step_in_backward is on but optim is {optim!r}, which steps inside the backward pass "
            "by itself; turn step_in_backward off."
        )


def check_eight_bit_states(groups: tuple[str, ...], optim: str) -> None:
    """`ConfigError` for unknown groups, or an optimizer without 8-bit states by tensor."""
    for group in groups:
        one_of("eight_bit_states", group, EIGHT_BIT_GROUPS)
    if not re.fullmatch(r"(paged_)?(adamw|adamw_bnb|ademamix|lion|rmsprop_bnb)_8bit", optim):
        raise ConfigError(
            f"eight_bit_states is {list(groups)} but optim is {optim!r}; set optim to "
            "adamw_bnb_8bit, paged_adamw_8bit or another 8-bit optimizer of bitsandbytes."
        )
