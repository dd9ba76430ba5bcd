"""What the commands have in common: one sentence for a bad word, and the version (stdlib only)."""

import argparse
import re
from typing import NoReturn

from lisa_analysis.contract.errors import ConfigError, suggest

PACKAGE = "lisa-toolkit"
_CHOICE = re.compile(
    r"argument (?P<option>\S+): invalid choice: '(?P<given>.*)' \(choose from .*\)"
)
_UNKNOWN = re.compile(r"unrecognized arguments: (?P<words>.*)")


def version() -> str:
    """Version of the installed package, or that it is not installed."""
    from importlib import metadata

    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return f"unknown: {PACKAGE} is not installed, its folder is only on the path"


class Parser(argparse.ArgumentParser):
    """Has `--version`, and raises a `ConfigError` of one sentence where argparse prints the usage.

    A wrong choice is answered with the choices, an unknown option with the nearest known one.
    """

    def __init__(self, *words: object, **options: object) -> None:
        super().__init__(*words, **options)  # type: ignore[arg-type]
        self.add_argument("--version", action="version", version=f"%(prog)s {version()}")

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, as a `ConfigError`."""
        if found := _CHOICE.fullmatch(message):
            choices = self._choices_of(found["option"].split("/")[-1])
            raise ConfigError(
                f"{found['option']} is {found['given']!r}: expected one of {', '.join(choices)}."
                f"{suggest(found['given'], choices)}"
            )
        if found := _UNKNOWN.fullmatch(message):
            word = found["words"].split()[0]
            if word.startswith("-"):
                option = word.split("=", 1)[0]
                nearest = suggest(option, self._option_string_actions)
                raise ConfigError(
                    f"there is no option {option}.{nearest or f' See {self.prog} --help.'}"
                )
        raise ConfigError(f"{message}; see {self.prog} --help.")

    def _choices_of(self, option: str) -> list[str]:
        action = self._option_string_actions.get(option)
        return [] if action is None or action.choices is None else [str(c) for c in action.choices]
