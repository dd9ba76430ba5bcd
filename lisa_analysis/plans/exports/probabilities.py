"""`probabilities`: the file that lisa-train samples layers by."""

import json
import math
from dataclasses import asdict

from lisa_analysis.plans.exports.plan import Plan
from lisa_analysis.plans.exports.registry import Content, exporter
from lisa_analysis.plans.sampling import sampling_probabilities


@exporter("probabilities", "inclusion probabilities for lisa-train --lisa.probabilities")
def make_probabilities(plan: Plan, *, activated_layers: int | None = None) -> Content:
    """Write what `SamplingProbabilities.save` writes.

    Parameters
    ----------
    plan
        The profile.
    activated_layers
        k, layers that train in each interval; None takes that of the run, where it has one, or 2.
    """
    if activated_layers is None:
        own = None if plan.model is None else plan.model.activated_layers
        activated_layers = own or min(2, len(plan.profile.layers))
    made = sampling_probabilities(
        plan.profile, activated_layers, strength=1.0 if plan.strength is None else plan.strength,
        control=plan.control, seed=plan.seed, use_intervals=plan.evidence.low is not None,
    )  # fmt: skip
    record = {"schema_version": made.schema_version, **asdict(made)}
    record["cap"] = None if math.isinf(made.cap) else made.cap
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    shares = made.inclusion_probabilities
    return Content(record, (made.statement,), list(shares), text=text)
