"""Values of single settings: of the right type and among those allowed, or one sentence."""

import operator
from collections.abc import Mapping
from typing import Any

from lisa_analysis.contract.errors import ConfigError, suggest


def whole(option: str, value: Any, words: str, least: int | None = None) -> int:
    """Return a whole number of any type (numpy's too) as int, or raise `ConfigError`."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        raise ConfigError(f"{option} is {value!r}, but must be a whole number{words}.")
    return number


def real(option: str, value: Any, words: str) -> float:
    """Return a number of any type as float, or raise `ConfigError`."""
    try:
        if not isinstance(value, str | bytes | bool):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(f"{option} is {value!r}, but must be {words}.")


def one_of(option: str, value: Any, allowed: tuple[str, ...]) -> None:
    """`ConfigError` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(
            f"{option} is {value!r}, but must be one of {', '.join(allowed)}."
            f"{suggest(str(value), allowed)}"
        )


def refuse_built_in(what: str, name: str, known: Mapping[str, type]) -> None:
    """`ConfigError` when `name` belongs to a class of this package in a registry."""
    before = known.get(name)
    if before is not None and before.__module__.startswith("lisa_train."):
        raise ConfigError(f"{what} {name!r} is built in: give yours another name.")
