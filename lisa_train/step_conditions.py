"""Settings under which an optimizer can step inside the backward pass. No torch here."""

from lisa_analysis.errors import ConfigError

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
