"""`lisa-train`: recipe and command line -> `TrainConfig` -> a run directory. No torch up here."""

import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from lisa_analysis.contract.command_line import COMPLETION, SHELLS, completion, version
from lisa_analysis.contract.errors import ConfigError, LisaError
from lisa_train.command.config import TrainConfig
from lisa_train.command.help import asked_help, screen
from lisa_train.command.interruption import stop_on_signals
from lisa_train.command.together import LostProcessError, is_to_say
from lisa_train.command.volume import at_volume
from lisa_train.command.words import (
    asks_for_estimate,
    check_file,
    check_flags,
    check_resume,
    config_files,
    expand_estimate,
    expand_recipes,
    expand_sections,
    keep_words,
    one_sentence,
    option_values,
)
from lisa_train.command.words import recipes as recipes
from lisa_train.estimate.cards import Card, parse_cards
from lisa_train.methods import METHODS

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

PROG = "lisa-train"
_EXTRA = {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "jsonargparse", "yaml"}
# In the place of a dataset that nothing reads.
NO_DATA = ""
_SWITCHES = {
    "--resume": "continue the run in --output_dir, or that of --config RUN_DIR/config.yaml",
    "--version": "print the version of this package",
    "--estimate": "train nothing: print the memory as configured, and of full, LoRA and LISA "
    "beside it, from config.json alone",
    "--quiet": "print the run directory and errors alone (-q)",
    "--verbose": "print what the libraries say, and the traceback of what is refused (-v)",
    "--schema": "print the JSON schema of a configuration file, for editors",
}
_SHORT = {"-q": "--quiet", "-v": "--verbose"}


@dataclass(frozen=True)
class Command:
    """What a command line asks for: a configuration, and what to do with it.

    `resume` continues its run; `estimate` only predicts its memory, for `cards`. `quiet` and
    `verbose` say how much is printed.
    """

    config: TrainConfig
    resume: bool
    estimate: bool = False
    cards: tuple[Card, ...] = ()
    quiet: bool = False
    verbose: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lisa-train`; return 0, 2 for bad input, or 130 after Ctrl-C or SIGTERM."""
    words = sys.argv[1:] if argv is None else list(argv)
    if "--version" in words:  # before anything is loaded that training needs
        print(f"{PROG} {version()}")
        return 0
    try:
        stop_on_signals()
        command = parse(words)
        if command.estimate:
            from lisa_train.command.estimate import estimate_table

            print(estimate_table(command.config, command.cards))
            return 0
        with at_volume(quiet=command.quiet, verbose=command.verbose):
            from lisa_train.command.training import summary, train

            run_dir = train(command.config, resume=command.resume, quiet=command.quiet)
    except LisaError as error:
        lost = isinstance(error, LostProcessError)
        if is_to_say(str(error), consequence=lost):
            if {"-v", "--verbose"} & set(words):
                traceback.print_exc()
            print(f"{PROG}: {error}", file=sys.stderr, flush=True)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in _EXTRA:
            raise
        print(
            f"{PROG}: {error.name} is not installed; training needs an extra: "
            'pip install "lisa-toolkit[train]"',
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as stop:
        if is_to_say("interrupted", consequence=True):
            print(f"{PROG}: {'; '.join(('interrupted', *stop.args))}.", file=sys.stderr)
        return 130
    if _speaks():
        print(run_dir if command.quiet else summary(run_dir))
    return 0


def _speaks() -> bool:
    """Whether this process is the first of those that a launcher (torchrun, accelerate) started."""
    return os.environ.get("RANK", "0") == "0"


def parse(argv: Sequence[str]) -> Command:
    """Turn a command line into a `Command`.

    Raises
    ------
    ConfigError
        For an unknown key at any depth, a value of the wrong type, or settings that contradict.
    SystemExit
        After `--help`, `--print_config`, `--schema` and `--completion`.
    """
    if (asked := asked_help(argv)) is not None and (text := screen(asked)) is not None:
        print(text)
        raise SystemExit(0)
    import jsonargparse

    argv = [_SHORT.get(word, word) for word in expand_estimate(argv)]
    if asked is not None:
        build_parser().print_help()
        raise SystemExit(0)
    _print_for_tools(argv)
    argv = expand_sections(expand_recipes(argv))
    check_flags(argv)
    check_resume(argv)
    for path in config_files(argv):
        check_file(path)
    parser = build_parser(reads_data=not asks_for_estimate(argv))
    try:
        settings = parser.parse_args(argv)
    except jsonargparse.ArgumentError as error:
        raise ConfigError(one_sentence(str(error))) from error
    keep_words(settings, argv)
    try:
        settings = parser.instantiate(settings)
    except LisaError:
        raise
    except ValueError as error:  # jsonargparse's words around a sentence of ours
        raise ConfigError(one_sentence(str(error))) from error
    config = TrainConfig(**{f.name: settings[f.name] for f in fields(TrainConfig)})
    if settings.get("resume"):
        config = _with_output_dir(config, config_files(argv))
    # `24 GB` without quotes is two words.
    sizes = None if settings.get("memory") is None else parse_cards(" ".join(settings.memory))
    estimate = bool(settings.get("estimate")) or sizes is not None
    switched = {name: bool(settings.get(name)) for name in ("resume", "quiet", "verbose")}
    return Command(config, estimate=estimate, cards=sizes or (), **switched)


def _print_for_tools(argv: Sequence[str]) -> None:
    """Print what a shell or an editor reads, if the command line asks for that, and end."""
    if "--schema" in argv:
        import json

        from lisa_train.command.schema import config_schema

        print(json.dumps(config_schema(build_parser()), indent=2, ensure_ascii=False))
        raise SystemExit(0)
    for _, _, shell in option_values(argv, COMPLETION):
        print(completion(shell, build_parser().get_completion_script))
        raise SystemExit(0)


def build_parser(*, reads_data: bool = True) -> "ArgumentParser":
    """Build the parser; its options and their help are `TrainConfig`'s fields and docstring.

    An estimate reads no data, and its command line need not name any.
    """
    from jsonargparse import SUPPRESS, ArgumentParser

    parser = ArgumentParser(
        prog=PROG,
        description="Train with LISA, LoRA or full fine-tuning and record what every layer did.",
        epilog=_epilog(),
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file, or the name of a recipe")
    # Without a default: `--print_config` prints settings of the run alone.
    for option, words in _SWITCHES.items():
        parser.add_argument(option, action="store_true", default=SUPPRESS, help=words)
    parser.add_argument(
        "--memory", nargs="*", default=SUPPRESS, metavar="SIZE",
        help="sizes of cards, as 24GB,80GiB, that an estimate is compared with; implies --estimate",
    )  # fmt: skip
    parser.add_argument(
        COMPLETION, choices=SHELLS, default=SUPPRESS, metavar="SHELL",
        help="print a script that completes words in that shell: bash, zsh or tcsh",
    )  # fmt: skip
    parser.add_class_arguments(TrainConfig)
    if not reads_data:
        parser.set_defaults(dataset_name=NO_DATA)
    return parser


def _epilog() -> str:
    """Methods, recipes and an example, as one paragraph: the help is wrapped as it fits."""
    methods = "; ".join(f"{m.name} {m.help}" for m in METHODS.values())
    return (
        f"Methods: {methods}. "
        f"Recipes that come with the package: --config {' | '.join(recipes())}. "
        "Example: lisa-train --config lisa --model_name_or_path MODEL --dataset_name data.jsonl"
    )


def _with_output_dir(config: TrainConfig, files: list[Path]) -> TrainConfig:
    """`--resume` with a run's own config.yaml continues that run."""
    import dataclasses

    if config.output_dir is not None:
        return config
    for path in reversed(files):
        if (path.parent / "run.json").is_file():
            return dataclasses.replace(config, output_dir=str(path.parent))
    raise ConfigError(
        "--resume needs the run to continue: give --output_dir RUN_DIR, or --config "
        "RUN_DIR/config.yaml."
    )
