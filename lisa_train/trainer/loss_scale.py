"""The loss scale of fp16 in a Trainer: its factor, and which steps it made the optimizer skip."""

from typing import Any

import torch
from transformers import Trainer


class LossScale:
    """Reads the scaler of a trainer without waiting for the device, as `get_scale` would.

    Parameters
    ----------
    trainer
        The trainer; without a scaler in its accelerator nothing is scaled.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._before: torch.Tensor | None = None

    def now(self, device: torch.device) -> torch.Tensor | None:
        """Return the factor on the loss, None without a scaler."""
        scaler: Any = getattr(self._trainer.accelerator, "scaler", None)
        return None if scaler is None else scaler.scale(torch.ones((), device=device))

    def before_step(self, device: torch.device) -> torch.Tensor | float:
        """Return the factor on the gradients of the step that is about to be made."""
        self._before = self.now(device)
        return 1.0 if self._before is None else self._before

    def skipped(self) -> bool | torch.Tensor:
        """Whether the optimizer skipped the step that was made last.

        Accelerate takes a step for made when the optimizer's `step` was called. A fused optimizer
        is always called and decides on the device; but then too the scale falls.
        """
        seen = bool(self._trainer.accelerator.optimizer_step_was_skipped)
        if seen or self._before is None:
            return seen
        now = self.now(self._before.device)
        return False if now is None else now < self._before
