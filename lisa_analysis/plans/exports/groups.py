"""What lies outside the layers, for exports that can name it too."""

import re

from lisa_analysis.contract.errors import LisaError, suggest
from lisa_analysis.plans.exports.plan import Plan

GROUPS = ("embed", "head", "norm", "other")


def tensors_outside(plan: Plan, groups: str) -> list[str]:
    """Names of the tensors of groups given as ``embed+head``.

    Raises
    ------
    LisaError
        For an unknown group, without a run, or for a group without tensors.
    """
    wanted = [part for part in re.split(r"[+,\s]+", groups) if part]
    found = []
    for group in wanted:
        if group not in GROUPS:
            raise LisaError(
                f"groups holds {group!r}: expected some of {', '.join(GROUPS)}."
                + suggest(group, GROUPS)
            )
        if plan.model is None:
            raise LisaError("the names of groups outside the layers are not known: give run=.")
        names = plan.model.of_group(group)
        if not names:
            tied = " (a head that is tied to the embeddings is 'embed')" if group == "head" else ""
            raise LisaError(f"the model has no tensors of the group {group!r}{tied}.")
        found += list(names)
    return found
