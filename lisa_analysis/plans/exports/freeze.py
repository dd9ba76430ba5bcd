"""`freeze`: which layers train and which rest, as names and indices."""

from lisa_analysis.plans.exports.plan import Plan, joined
from lisa_analysis.plans.exports.registry import Content, exporter


@exporter("freeze", "names and indices of the layers to train and of those to freeze")
def make_freeze(plan: Plan, *, layers: int | None = None) -> Content:
    """List the layers.

    Parameters
    ----------
    plan
        The profile.
    layers
        How many of the best train; None takes those that stand above the mean.
    """
    chosen = plan.chosen(layers)
    values = {
        part: {
            "layers": [i for i, take in enumerate(rows) if take],
            "names": plan.names(rows),
            # The dot at the end keeps layer 1 apart from layer 11.
            "prefixes": [f"{name}." for name in plan.names(rows)],
        }
        for part, rows in (("train", chosen), ("freeze", ~chosen))
    }
    facts = {}
    if plan.model is not None:
        for part, rows in (("train", chosen), ("freeze", ~chosen)):
            facts[f"tensors_to_{part}"] = sum(
                layer is not None and bool(rows[layer]) for _, layer in plan.model.tensors
            )
    said = f"{chosen.sum()} of {len(chosen)} layers train: {joined(plan.names(chosen))}."
    return Content(values, (said, *plan.strength_words), chosen.astype(int), facts)
