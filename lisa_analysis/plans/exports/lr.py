"""`lr`: multipliers of the learning rate by layer, for optimizer groups."""

import math

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.multipliers_file import SCHEMA
from lisa_analysis.plans.exports.plan import Plan
from lisa_analysis.plans.exports.registry import Content, exporter


@exporter("lr", "multipliers of the learning rate by layer, for optimizer groups")
def make_lr(
    plan: Plan, *, embed: float = 1.0, head: float = 1.0, norm: float = 1.0, other: float = 1.0
) -> Content:
    """Write one multiplier per layer, of mean 1.

    Parameters
    ----------
    plan
        The profile.
    embed, head, norm, other
        Multipliers of what lies outside the layers.
    """
    outside = {"embed": embed, "head": head, "norm": norm, "other": other}
    for name, value in outside.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and value >= 0):
            raise LisaError(f"{name} is {value!r}: expected a number of at least 0.")
    shares = plan.multiples().pi
    values = {
        "schema": SCHEMA,
        "layer_names": [layer.name for layer in plan.layers],
        "multipliers": {
            **{str(layer): float(share) for layer, share in enumerate(shares)},
            **{name: float(value) for name, value in outside.items()},
        },
    }
    said = f"Multipliers from {shares.min():.3g} to {shares.max():.3g}, of mean 1."
    return Content(values, (said,), shares)
