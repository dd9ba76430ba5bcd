"""Schedule-free optimizers (package schedulefree): the weights are an average that they keep."""

import torch
from torch.optim import Optimizer

from lisa_train.private_names import check


def is_schedule_free(optimizer: Optimizer) -> bool:
    """Whether the weights are an average that the optimizer computes.

    `ConfigError` where the installed package keeps it under other names.
    """
    if type(optimizer).__module__.startswith("schedulefree"):
        check("schedulefree")
    return "weight_sum" in optimizer.param_groups[0]


@torch.no_grad()
def start_schedule_free(optimizer: Optimizer, parameter: torch.Tensor) -> None:
    """Give a tensor that starts late in a schedule-free AdamW a second moment of the right size.

    The optimizer corrects the bias of all second moments by one step count per group. A moment
    that starts from zero at step k would be corrected as if it were k steps old, and the first
    update would be about 1/√(1−β₂) ≈ 30 times too long. Starting it so that the first corrected
    moment is g² makes the first update that of any Adam.
    """
    if parameter.grad is None or "z" in optimizer.state.get(parameter, {}):
        return
    for group in optimizer.param_groups:
        if any(p is parameter for p in group["params"]):
            if not group.get("k") or len(group.get("betas", ())) != 2:
                return
            beta2 = group["betas"][1]
            corrected = 1.0 - beta2 ** (group["k"] + 1)
            moment = parameter.grad.square() * ((corrected - (1.0 - beta2)) / beta2)
            optimizer.state[parameter] = {"z": parameter.detach().clone(), "exp_avg_sq": moment}
