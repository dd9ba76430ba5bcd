"""`mergekit`: how much of a tuned model each layer takes in a merge."""

from typing import Any

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.plans.exports.plan import Plan, joined
from lisa_analysis.plans.exports.registry import Content, exporter


@exporter("mergekit", "mergekit: how much of the tuned model each layer takes", syntax="yaml")
def make_mergekit(
    plan: Plan,
    *,
    base_model: str = "BASE_MODEL",
    model: str = "TUNED_MODEL",
    mean: float = 0.5,
    method: str = "slerp",
    dtype: str = "bfloat16",
) -> Content:
    """Write a merge of two models whose weight follows the scores.

    Parameters
    ----------
    plan
        The profile.
    base_model, model
        The two models; without names the file has placeholders.
    mean
        Mean share of the tuned model over layers, above 0 and below 1.
    method
        ``slerp`` (its `t`: 0 is the base, 1 the tuned model), or ``dare_ties`` or ``ties`` (their
        `density`: the part of the tuned model's change that is kept).
    dtype
        Of the merged model.
    """
    if method not in ("slerp", "ties", "dare_ties"):
        raise LisaError(f"method is {method!r}: expected slerp, ties or dare_ties.")
    if not (isinstance(mean, int | float) and 0 < mean < 1):
        raise LisaError(f"mean is {mean!r}: expected a number above 0 and below 1.")
    if len(plan.stacks) > 1:
        raise LisaError(
            f"mergekit numbers the layers of one stack, the profile has {len(plan.stacks)} "
            f"({', '.join(plan.stacks)})."
        )
    shares = plan.multiples(mean=mean, most=1.0).pi
    weights = [round(float(share), 6) for share in shares]
    # Mergekit lays a list evenly over the depth: one number per layer is that layer's own. What
    # lies outside the layers would take the first or the last of them.
    named, unnamed = _outside(plan)
    course = [*({"filter": name, "value": mean} for name in named), {"value": weights}]
    if method == "slerp":
        by_layer = [
            {"model": name, "layer_range": [0, len(weights)]} for name in (base_model, model)
        ]
        models: dict[str, Any] = {"slices": [{"sources": by_layer}]}
        setting: dict[str, Any] = {"t": course}
    else:
        models = {"models": [{"model": model, "parameters": {"weight": 1.0, "density": course}}]}
        setting = {"normalize": False}
    values = {
        **models, "merge_method": method, "base_model": base_model, "parameters": setting,
        "dtype": dtype,
    }  # fmt: skip
    what = "t" if method == "slerp" else "density"
    notes = [
        f"Layers take between {shares.min():.3g} and {shares.max():.3g} of the tuned model "
        f"({what}), {mean:g} on average."
    ]
    if unnamed:
        notes.append(f"Like the first or last layer, for no filter tells it: {joined(unnamed)}.")
    return Content(values, tuple(notes), shares)


def _outside(plan: Plan) -> tuple[list[str], list[str]]:
    """Names outside the layers that, as a part of a name, match nothing within; and the others."""
    if plan.model is None:
        return ["embed_tokens", "lm_head"], []
    inside = [name for name, layer in plan.model.tensors if layer is not None]
    outside = [name for name, layer in plan.model.tensors if layer is None]
    named = [name for name in outside if not any(name in other for other in inside)]
    return named, [name for name in outside if name not in named]
