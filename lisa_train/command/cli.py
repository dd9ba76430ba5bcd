"""`lisa-train`: recipe and command line -> `TrainConfig` -> a run directory. No torch up here."""

import itertools
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import ConfigError, LisaError, suggest
from lisa_train.command.config import TrainConfig
from lisa_train.estimate.cards import Card, parse_cards

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

PROG = "lisa-train"
_EXTRA = {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "jsonargparse", "yaml"}
_EPILOG = """\
recipes that come with the package: --config full | lora | lisa | lisa-lean | lisa-learned
example: lisa-train --config lisa --model_name_or_path MODEL --dataset_name data.jsonl
--resume continues the run in --output_dir. --estimate [--memory 24GB,80GiB] trains nothing: it
prints the memory of every method, from config.json alone, and which cards it fits.
"""


@dataclass(frozen=True)
class Command:
    """What a command line asks for: a configuration, and what to do with it.

    `resume` continues its run; `estimate` only predicts its memory, for `cards`.
    """

    config: TrainConfig
    resume: bool
    estimate: bool = False
    cards: tuple[Card, ...] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lisa-train`; return 0, 2 for bad input, or 130 after Ctrl-C or SIGTERM."""
    try:
        command = parse(sys.argv[1:] if argv is None else list(argv))
        if command.estimate:
            from lisa_train.command.estimate import estimate_table

            print(estimate_table(command.config, command.cards))
            return 0
        _quiet()
        # A cluster ends a job with SIGTERM: the run is closed as after Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        from lisa_train.command.training import summary, train

        run_dir = train(command.config, resume=command.resume)
    except LisaError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
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
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted; what was recorded is kept.", file=sys.stderr)
        return 130
    if _speaks():
        print(summary(run_dir))
    return 0


def _speaks() -> bool:
    """Whether this process is the first of those that a launcher (torchrun, accelerate) started."""
    return os.environ.get("RANK", "0") == "0"


def _quiet() -> None:
    """Leave the terminal to this command: one progress bar, no notes between libraries."""
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    from datasets.utils.logging import disable_progress_bar as disable_datasets_bars
    from transformers.utils import logging

    disable_datasets_bars()
    logging.disable_progress_bar()


def parse(argv: Sequence[str]) -> Command:
    """Turn a command line into a `Command`.

    Raises
    ------
    ConfigError
        For an unknown key at any depth, a value of the wrong type, or settings that contradict.
    SystemExit
        After `--help` and `--print_config`.
    """
    import jsonargparse

    argv, resume = _take_flag(_expand_recipes(argv), "--resume")
    argv, estimate, cards = _take_estimate(argv)
    _check_flags(argv)
    for path in _config_files(argv):
        _check_file(path)
    parser = build_parser()
    try:
        settings = parser.parse_args(argv)
    except jsonargparse.ArgumentError as error:
        raise ConfigError(_one_sentence(str(error))) from error
    _keep_words(settings, argv)
    settings = parser.instantiate(settings)
    config = TrainConfig(**{f.name: settings[f.name] for f in fields(TrainConfig)})
    if resume:
        config = _with_output_dir(config, _config_files(argv))
    return Command(config, resume, estimate, cards)


def _keep_words(settings: Any, argv: Sequence[str]) -> None:
    """Take a word as it is that YAML reads as nothing (`# a`, `&a`): it is a name, and not null."""
    options = {token.split("=", 1)[0] for token in argv if token.startswith("--")}
    for option in options - {"--config"}:
        for _, _, word in _option_values(argv, option):
            if word[:1] in "#&!" and word and settings.get(option[2:], "") is None:
                settings[option[2:]] = word


def build_parser() -> "ArgumentParser":
    """Build the parser; its options and their help are `TrainConfig`'s fields and docstring."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=PROG,
        description="Train with LISA, LoRA or full fine-tuning and record what every layer did.",
        epilog=_EPILOG,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file, or the name of a recipe")
    parser.add_class_arguments(TrainConfig)
    return parser


def recipes() -> dict[str, Path]:
    """Recipes that come with the package, by name."""
    folder = resources.files("lisa_train.command") / "recipes"
    return {
        Path(str(entry)).stem: Path(str(entry))
        for entry in sorted(folder.iterdir(), key=lambda e: e.name)
        if entry.name.endswith(".yaml")
    }


def _option_values(argv: Sequence[str], option: str) -> Iterator[tuple[int, str, str]]:
    """Yield (position, prefix to keep, value) of each `--option value` or `--option=value`."""
    for i, token in enumerate(argv):
        if token == option and i + 1 < len(argv):
            yield i + 1, "", argv[i + 1]
        elif token.startswith(option + "="):
            yield i, option + "=", token[len(option) + 1 :]


def _expand_recipes(argv: Sequence[str]) -> list[str]:
    """Replace `--config lisa` by the path of the recipe of that name."""
    expanded = list(argv)
    for position, prefix, value in _option_values(argv, "--config"):
        if Path(value).is_file():
            continue
        found = recipes()
        if value not in found:
            raise ConfigError(
                f"--config {value} is neither a file nor a recipe; the recipes are "
                f"{', '.join(found)}.{suggest(value, found)}"
            )
        expanded[position] = prefix + str(found[value])
    return expanded


def _config_files(argv: Sequence[str]) -> list[Path]:
    return [Path(value) for _, _, value in _option_values(argv, "--config")]


def _take_flag(argv: Sequence[str], flag: str) -> tuple[list[str], bool]:
    return [token for token in argv if token != flag], flag in argv


def _take_estimate(argv: Sequence[str]) -> tuple[list[str], bool, tuple[Card, ...]]:
    """Take out `--estimate` and `--memory SIZES`, which implies it; no dataset is needed then."""
    rest, estimate = _take_flag(argv, "--estimate")
    sizes = [value for _, _, value in _option_values(rest, "--memory")]
    if "--memory" in rest:
        # `24 GB` without quotes is two words.
        start = rest.index("--memory")
        words = list(itertools.takewhile(lambda w: not w.startswith("-"), rest[start + 1 :]))
        sizes = [" ".join(words)]
        rest = rest[:start] + rest[start + 1 + len(words) :]
    rest = [token for token in rest if not token.startswith("--memory=")]
    if not estimate and not sizes:
        return rest, False, ()
    cards = parse_cards(",".join(sizes)) if sizes else ()
    return [*rest, "--dataset_name", "not read"], True, cards


def _check_flags(argv: Sequence[str]) -> None:
    """Refuse an unknown `--a.b` with a suggestion; jsonargparse would only say `unrecognized`."""
    for token in argv:
        if not token.startswith("--") or token == "--":
            continue
        name = token[2:].split("=", 1)[0]
        if name in ("help", "config", "print_config"):
            continue
        _check_key(name.split("."), TrainConfig, where=f"--{name}", spell="--{}".format)


def _check_file(path: Path) -> None:
    """Refuse an unknown key of a YAML file at any depth, with a suggestion."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} cannot be read as YAML: {reason[:200]}") from error
    if content is None:
        return
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} holds {type(content).__name__}; expected `key: value` lines.")
    for keys in _paths(content):
        _check_key(keys, TrainConfig, where=f"key {'.'.join(keys)!r} of {path}", spell=str)


def _paths(content: Mapping[Any, Any], above: tuple[str, ...] = ()) -> Iterator[list[str]]:
    for key, value in content.items():
        here = (*above, str(key))
        yield list(here)
        if isinstance(value, Mapping):
            yield from _paths(value, here)


def _check_key(keys: list[str], cls: Any, *, where: str, spell: Any) -> None:
    """Follow `keys` through nested dataclasses; free-form dicts accept any key here."""
    walked: list[str] = []
    for key in keys:
        if not is_dataclass(cls):
            return
        known = {f.name: f for f in fields(cls)}
        if key not in known:
            scope = f" below {'.'.join(walked)}" if walked else ""
            nearest = suggest(key, known)
            if walked and nearest:
                nearest = nearest.replace("'", f"'{'.'.join(walked)}.", 1)
            raise ConfigError(
                f"Unknown {where}: there is no setting {key!r}{scope}."
                + (nearest or f" See {PROG} --help for all of them.")
            )
        walked.append(key)
        cls = _dataclass_of(known[key].type)


def _dataclass_of(annotation: Any) -> Any:
    return annotation if is_dataclass(annotation) else None


def _one_sentence(message: str) -> str:
    """Flatten jsonargparse's message: `Parser key "lisa.k": Expected a <class 'int'>. …`."""
    text = " ".join(message.split())
    text = re.sub(r'^Parser key "([^"]+)": ?', r"\1: ", text)
    text = re.sub(r"Expected a <class '(\w+)'>\. Got value: ", r"expected \1, got ", text)
    text = re.sub(
        r"^the following arguments are required: (.+)$",
        lambda m: "missing " + ", ".join(f"--{n.strip()}" for n in m[1].split(",")) + ".",
        text,
    )
    return text


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
