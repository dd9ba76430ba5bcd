"""How strongly what is budgeted follows the scores: one number, or a pool (stdlib only)."""

import math
import re
from dataclasses import dataclass
from typing import Any

from lisa_analysis.contract.errors import ProbabilitiesError

MOST = 16.0
MIX, FLOOR, CAP = 0.25, 0.25, 4.0
_POOL = re.compile(r"pool(?:=(\d+))?")


@dataclass(frozen=True)
class Strength:
    """What a strength means for the stages between scores and shares.

    Attributes
    ----------
    power
        Power on the scores; 0 is uniform.
    mix
        Share of the prior (uniform, unless another one is given) that is mixed in.
    floor, cap
        Bounds of a share in units of the uniform one.
    pool
        None, or how many of the best layers share equally while the others get nothing; 0 takes
        those that stand above the mean.
    """

    power: float
    mix: float
    floor: float
    cap: float
    pool: int | None = None

    @classmethod
    def of(
        cls,
        strength: Any,
        *,
        mix: float = MIX,
        floor: float = FLOOR,
        cap: float = CAP,
        gamma: float | None = None,
    ) -> "Strength":
        """Read a strength: a power from 0 to 16, ``"pool"``, or ``"pool=6"``.

        Above 1, mix and floor fall in proportion (mix/strength, floor/strength) and the cap rises
        (cap·strength); a probability never exceeds 1.

        Parameters
        ----------
        strength
            The number or the words.
        mix, floor, cap
            What they are at a strength of 1 or less; a pool has none of them.
        gamma
            A power that leaves mix, floor and cap as they are; takes the place of `strength`.

        Raises
        ------
        ProbabilitiesError
            For what is no strength, a value out of range, or one that has no effect beside another.
        """
        pool = None
        if isinstance(strength, str):
            found = _POOL.fullmatch(strength.replace(" ", ""))
            pool = None if found is None else int(found[1] or 0)
            if pool is None or (found and found[1] and pool < 1):
                power = _number_in(strength)
                pool = None
            else:
                power = 0.0
        else:
            power = strength
        for name, value, least, most in (
            ("strength", power, 0.0, MOST), ("gamma", 0.0 if gamma is None else gamma, 0.0, MOST),
            ("mix", mix, 0.0, 1.0), ("floor", floor, 0.0, 1.0), ("cap", cap, 1.0, math.inf),
        ):  # fmt: skip
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and least <= value <= most):
                words = ", 'pool' or 'pool=6'" if name == "strength" else ""
                raise ProbabilitiesError(
                    f"{name} is {value!r}: expected a number from {least:g} to {most:g}{words}."
                )
        if pool is not None:
            bounds = {"mix": (mix, MIX), "floor": (floor, FLOOR), "cap": (cap, CAP)}
            given = [(name, value) for name, (value, usual) in bounds.items() if value != usual]
            for name, value in [("gamma", gamma)] * (gamma is not None) + given:
                raise ProbabilitiesError(
                    f"strength is {strength!r} and {name} {value!r}: a pool has no {name}, its "
                    f"layers share equally; leave {name} out."
                )
            return cls(0.0, 0.0, 0.0, math.inf, pool)
        if gamma is not None:
            if power != 1:
                raise ProbabilitiesError(
                    f"strength is {strength!r} and gamma {gamma!r}: both are the power on the "
                    "scores; give one."
                )
            return cls(float(gamma), float(mix), float(floor), float(cap))
        above = max(1.0, float(power))
        return cls(float(power), mix / above, floor / above, cap * above)

    @classmethod
    def read(cls, strength: Any) -> float | str:
        """Return a checked strength as files have it: a number, ``pool`` or ``pool=6``.

        Raises
        ------
        ProbabilitiesError
            For what is no strength.
        """
        found = cls.of(strength)
        if found.pool is None:
            return found.power
        return f"pool={found.pool}" if found.pool else "pool"


def _number_in(text: str) -> Any:
    """Number that a text of the command line holds; the text where it holds none."""
    try:
        return float(text)
    except ValueError:
        return text
