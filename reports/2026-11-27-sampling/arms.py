"""What an arm is, and which of them an environment gets that does not get the whole matrix."""

from collections.abc import Callable
from dataclasses import dataclass

TUNING = (101, 102)
RANDOM = 3
LEARNED = ("default", "strong", "pool", "pilot", "ablation", "online")
CARRYING = (  # the arms of environments that do not get the whole matrix
    "lora-probe", *(f"lora-random-{n}" for n in range(1, RANDOM + 1)), "lora-last", "lora-even",
    "lora-all", "lora-everything", "full", "uniform", "reset", "default", "default-placebo",
    "strong", "strong-placebo", "pool", "pool-placebo", "online", "online-placebo",
)  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One thing to do with the layers.

    Parameters
    ----------
    name
        As in DESIGN.md.
    family
        Whose learning rate it has.
    words
        Gives the words of `lisa-train` for a seed.
    sources
        Kinds of earlier runs that it reads, of the next seed: probe, pilot, ablation.
    primary
        Whether it is in a primary contrast.
    head_apart
        Whether a new head has the rate of the family `head`, whatever the rate of all else.
    """

    name: str
    family: str
    words: Callable[[int], list[str]]
    sources: tuple[str, ...] = ()
    primary: bool = False
    head_apart: bool = False
