"""The verdict of a profile in a line: what is known of the layers first, then the shape."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from lisa_analysis.contract.layers import short_stacks
from lisa_analysis.profiles.sentences import named

if TYPE_CHECKING:
    from lisa_analysis import ImportanceProfile

# What a shape says in words; "score" because a metric may be of gradients or of weights.
SHAPES: Mapping[str, str] = {
    "U": "The ends of the stack score above its middle",
    "U with a spike": "The ends of the stack score above its middle, with a spike between them",
    "inverted U": "The middle of the stack scores above its ends",
    "ramp": "One end of the stack scores higher than the other",
    "spikes": "Single layers stand out",
    "uneven": "The layers are unequal, without a course over depth",
    "apart": "No course over depth can be told",
    "drifting": "The layers changed during the run",
    "flat": "No difference between the layers is worth sampling for",
    "undecided": "No difference between the layers can be told from noise",
}

# These name no course.
LEFT_OPEN = ("apart", "undecided")
# These say of the stack what single names would only repeat.
COURSES = ("U", "U with a spike", "inverted U", "ramp")


def headline(profile: "ImportanceProfile") -> str:
    """Say what is known of the layers, then the shape; ``undecided`` where nothing is known."""
    if profile.stacks:
        return _of_stacks(profile)
    verdict = profile.verdict
    shape = f"{SHAPES[verdict]} ({verdict})" if verdict in SHAPES else verdict
    if verdict == "undecided" and len(profile.unknown) == profile.n_layers:
        return f"Nothing can be said of single {profile.by}s yet ({verdict})"
    if verdict in COURSES or not (profile.above or profile.below):
        return shape
    said = _standing(profile)
    if verdict in ("spikes", "apart"):
        # The names say it.
        return said
    return f"{said}. {shape}"


def _of_stacks(profile: "ImportanceProfile") -> str:
    """What is known of the layers, then the shape of every stack that has one."""
    names = short_stacks(stack.path for stack in profile.stacks)
    found = [f"{names[stack.path]} {stack.shape.verdict}" for stack in profile.stacks
             if stack.shape.verdict not in LEFT_OPEN]  # fmt: skip
    said = [f"Shape: {', '.join(found)}"] if found else []
    if profile.above or profile.below:
        return ". ".join([_standing(profile), *said])
    if not said and len(profile.unknown) == profile.n_layers:
        return f"Nothing can be said of single {profile.by}s yet (undecided)"
    return ". ".join(said) or f"{SHAPES['undecided']} (undecided)"


def _standing(profile: "ImportanceProfile") -> str:
    """Name the layers that stand above and below the others, and those unknown."""
    masks = [np.zeros(len(profile), dtype=bool) for _ in range(3)]
    for mask, rows in zip(masks, (profile.above, profile.below, profile.unknown), strict=True):
        mask[list(rows)] = True
    names = [str(name) for name in profile.layers["name"]]
    return named(profile.by, names, masks[0], masks[1], masks[2], limit=6)
