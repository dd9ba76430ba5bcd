"""Floating-point operations of a training step, counted while it runs on shapes alone.

Matrix products only, as torch counts them: forward, recomputation, gradients of activations, and
gradients of the weights that train. What LISA skips is thus left out, and nothing else is.
"""

from dataclasses import replace
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from lisa_train.estimate.patterns import lisa_pattern, plain_pattern
from lisa_train.estimate.setting import Setting
from lisa_train.estimate.stage import Stage
from lisa_train.estimate.step import record_step


def step_flops(config: Any, setting: Setting, layers: tuple[int, ...] | None) -> int:
    """Operations of one forward and backward pass when these layers of LISA's train."""
    # Eager attention and whole logits are matrix products that torch knows how to count.
    setting = replace(setting, attn_implementation="eager", chunked_loss=False)
    stage = Stage(config, setting)
    lisa = setting.method == "lisa"
    pattern = lisa_pattern(stage, setting, layers or ()) if lisa else plain_pattern(stage)
    with FlopCounterMode(display=False) as counter:
        record_step(stage, setting, pattern)
    return int(counter.get_total_flops())
