"""Errors that a person can act on: one sentence, no traceback, exit code 2 (stdlib only)."""

import difflib
from collections.abc import Iterable


class LisaError(ValueError):
    """Bad input: the message says what was found, where, what was expected and what to do.

    Both commands print the message alone and exit with code 2. A subclass of `ValueError`, so
    that library users can catch it without importing this package.
    """


class ConfigError(LisaError):
    """A configuration value, key or combination that cannot be used."""


class RunDirectoryError(LisaError):
    """A run directory that is missing, torn, foreign, or of another major schema version."""


class ProbabilitiesError(LisaError):
    """A sampling-probabilities file or vector that is infeasible or made for another model."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the nearest known name, else an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]!r}?" if matches else ""
