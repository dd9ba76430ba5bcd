"""`--memory 24GB,80GiB`: sizes of cards in bytes; no torch here."""

import re
from dataclasses import dataclass

from lisa_analysis.contract.errors import ConfigError

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True)
class Card:
    """Memory of a device as it was written, and in bytes."""

    name: str
    bytes: int


def parse_cards(text: str) -> tuple[Card, ...]:
    """Read sizes separated by commas; GB is 10⁹ bytes, GiB is 2³⁰.

    Raises
    ------
    ConfigError
        For anything but a positive number with a unit.

    >>> parse_cards("24GB, 80GiB")
    (Card(name='24 GB', bytes=24000000000), Card(name='80 GiB', bytes=85899345920))
    """
    return tuple(_card(part.strip()) for part in text.split(","))


def _card(text: str) -> Card:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text)
    units = {unit.lower(): unit for unit in _UNITS}
    unit = units.get(found[2].lower()) if found else None
    if found is None or unit is None or float(found[1]) <= 0:
        raise ConfigError(
            f"--memory {text!r} is not a size of memory; write a number and a unit, as 24GB "
            "(10⁹ bytes each) or 24GiB (2³⁰), several separated by commas."
        )
    return Card(f"{found[1]} {unit}", int(float(found[1]) * _UNITS[unit]))
