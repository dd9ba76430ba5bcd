"""What the commands have in common: help in screens, one sentence for a bad word, completion.

Only the standard library is needed; completion asks for shtab when it is asked for.
"""

import argparse
import importlib
import re
from collections.abc import Callable
from typing import Any, NoReturn

from lisa_analysis.contract.errors import ConfigError, suggest

PACKAGE = "lisa-toolkit"
COMPLETION = "--completion"
SHELLS = ("bash", "zsh", "tcsh")
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


def completion(shell: str, script: Callable[[str], str]) -> str:
    """Return a script that completes words in a shell.

    Parameters
    ----------
    shell
        One of `SHELLS`.
    script
        Makes the script of ``shtab-SHELL``.

    Raises
    ------
    ConfigError
        For another shell, and when shtab is not installed.
    """
    if shell not in SHELLS:
        raise ConfigError(
            f"{COMPLETION} is {shell!r}: expected one of {', '.join(SHELLS)}."
            f"{suggest(shell, SHELLS)}"
        )
    try:
        importlib.import_module("shtab")
    except ModuleNotFoundError:
        raise ConfigError(f"{COMPLETION} needs shtab: pip install shtab.") from None
    return script(f"shtab-{shell}")


class _Help(argparse.Action):
    """`--help`: the first screen; `--help all`: everything."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(
            option_strings, argparse.SUPPRESS, nargs="?", metavar="all",
            default=argparse.SUPPRESS, help="a first screen, or all options",
        )  # fmt: skip

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> None:
        if values not in (None, "all"):
            parser.error(f"{option} takes nothing, or all, and not {values!r}")
        first = getattr(parser, "first_screen", "")
        print(first if first and values is None else parser.format_help().rstrip())
        parser.exit()


class _Version(argparse.Action):
    """`--version`, which is looked up when it is asked for."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(
            option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS,
            help="show program's version number and exit",
        )  # fmt: skip

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> None:
        print(f"{parser.prog} {version()}")
        parser.exit()


class _Completion(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> None:
        def script(kind: str) -> str:
            shtab = importlib.import_module("shtab")
            for action in parser._actions:
                if action.metavar in ("FILE", "KIND:FILE"):
                    action.complete = shtab.FILE  # type: ignore[attr-defined]
                elif action.metavar in ("DIR", "RUN_DIR"):
                    action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            return str(shtab.complete(parser, kind.removeprefix("shtab-")))

        print(completion(str(values), script))
        parser.exit()


class Parser(argparse.ArgumentParser):
    """Has `--version`, and raises a `ConfigError` of one sentence where argparse prints the usage.

    A wrong choice is answered with the choices, an unknown option with the nearest known one.

    Parameters
    ----------
    first_screen
        What `--help` prints: 24 lines of 80 characters at most; `--help all` prints everything.
    """

    def __init__(self, *words: Any, first_screen: str = "", **options: Any) -> None:
        super().__init__(*words, **{**options, "add_help": False})
        self.first_screen = first_screen
        self.add_argument("-h", "--help", action=_Help)
        self.add_argument(
            COMPLETION, action=_Completion, metavar="SHELL", default=argparse.SUPPRESS,
            help="print a script that completes words in that shell: bash, zsh or tcsh",
        )  # fmt: skip
        self.add_argument("--version", action=_Version)

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
