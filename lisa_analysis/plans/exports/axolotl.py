"""`axolotl`: `unfrozen_parameters`, its list of expressions on the names of tensors."""

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.plans.exports.groups import tensors_outside
from lisa_analysis.plans.exports.plan import Plan, joined
from lisa_analysis.plans.exports.registry import Content, exporter


@exporter("axolotl", "unfrozen_parameters of axolotl: full weights of the chosen layers",
          syntax="yaml")  # fmt: skip
def make_axolotl(plan: Plan, *, layers: int | None = None, groups: str = "") -> Content:
    """Write one expression per layer.

    Axolotl matches from the start of a name and takes every dot as a dot, so that
    ``^model.layers.1.`` is layer 1 and not layer 11; it freezes all that no expression matches.

    Parameters
    ----------
    plan
        The profile.
    layers
        How many of the best train; None takes those that stand above the mean.
    groups
        What else trains, as ``embed+head+norm``; needs the run, which knows their names.
    """
    chosen = plan.chosen(layers)
    names = plan.names(chosen)
    if any("[" in name for name in names):
        raise LisaError("a layer's name holds '[', which axolotl takes for a range of rows.")
    expressions = [f"^{name}." for name in names]
    expressions += [f"^{name}$" for name in tensors_outside(plan, groups)]
    said = f"{len(names)} of {len(chosen)} layers train: {joined(names)}."
    notes = (said, *plan.strength_words)
    return Content({"unfrozen_parameters": expressions}, notes, chosen.astype(int))
