"""The words of a command line and the keys of its files, looked at before jsonargparse reads them.

It knows no suggestions, reads some words as null, and calls every stranger `unrecognized`.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from lisa_analysis.contract.errors import ConfigError, suggest
from lisa_analysis.contract.schema import CONFIG
from lisa_train.command.config import TrainConfig
from lisa_train.methods import METHODS

# Options of the command itself: what it does, and no setting of a run.
OF_THE_COMMAND = (
    "help", "version", "config", "print_config", "resume", "estimate", "memory", "quiet", "verbose",
    "schema", "completion",
)  # fmt: skip

# What other trainers call a setting, where its name is too far from ours to be found by spelling.
MEANT = {
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "model": "model_name_or_path",
    "dataset": "dataset_name",
    "scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "rank": "lora.r",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "target_modules": "lora.target_modules",
}


def recipes() -> dict[str, Path]:
    """Recipes by name: those that come with the package, and those of methods that were added."""
    folder = resources.files("lisa_train.command") / "recipes"
    found = {
        Path(str(entry)).stem: Path(str(entry))
        for entry in sorted(folder.iterdir(), key=lambda e: e.name)
        if entry.name.endswith(".yaml")
    }
    return found | {m.name: m.recipe for m in METHODS.values() if m.recipe is not None}


def option_values(argv: Sequence[str], option: str) -> Iterator[tuple[int, str, str]]:
    """Yield (position, prefix to keep, value) of each `--option value` or `--option=value`."""
    for i, token in enumerate(argv):
        if token == option and i + 1 < len(argv):
            yield i + 1, "", argv[i + 1]
        elif token.startswith(option + "="):
            yield i, option + "=", token[len(option) + 1 :]


def expand_recipes(argv: Sequence[str]) -> list[str]:
    """Replace `--config lisa` by the path of the recipe of that name."""
    expanded = list(argv)
    for position, prefix, value in option_values(argv, "--config"):
        if Path(value).is_file():
            continue
        found = recipes()
        if value not in found and (Path(value) / CONFIG).is_file():
            raise ConfigError(
                f"--config {value} is a folder; that of a run is repeated or continued with "
                f"--config {Path(value) / CONFIG}."
            )
        if value not in found:
            raise ConfigError(
                f"--config {value} is neither a file nor a recipe; the recipes are "
                f"{', '.join(found)}.{suggest(value, found)}"
            )
        expanded[position] = prefix + str(found[value])
    return expanded


def expand_sections(argv: Sequence[str]) -> list[str]:
    """Replace `--lora FILE` by what the file holds, as `lisa-analyze --export` writes it."""
    import yaml

    free = [f.name for f in fields(TrainConfig) if f.default_factory is dict]
    expanded = list(argv)
    for name in free:
        for position, prefix, value in option_values(argv, f"--{name}"):
            if value.lstrip().startswith("{") or not Path(value).is_file():
                continue
            try:
                content = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
                reason = " ".join(str(error).split())
                raise ConfigError(f"--{name} {value} cannot be read: {reason[:200]}") from error
            if not isinstance(content, Mapping):
                raise ConfigError(
                    f"--{name} {value} holds {type(content).__name__}; expected the fields of "
                    f"{name}, as JSON or as `key: value` lines."
                )
            expanded[position] = prefix + json.dumps(content)
    return expanded


def asks_for_estimate(argv: Sequence[str]) -> bool:
    """Whether the command line asks for the memory of a run, and not for the run."""
    return any(token.split("=", 1)[0] in ("--estimate", "--memory") for token in argv)


def expand_estimate(argv: Sequence[str]) -> list[str]:
    """Read `lisa-train estimate …` as `lisa-train --estimate …`."""
    return ["--estimate", *argv[1:]] if argv and argv[0] == "estimate" else list(argv)


def config_files(argv: Sequence[str]) -> list[Path]:
    """Files that the settings come from, in the order in which they are read."""
    return [Path(value) for _, _, value in option_values(argv, "--config")]


def keep_words(settings: Any, argv: Sequence[str]) -> None:
    """Take a word as it is that YAML reads as nothing (`# a`, `&a`): it is a name, and not null."""
    options = {token.split("=", 1)[0] for token in argv if token.startswith("--")}
    for option in options - {"--config"}:
        for _, _, word in option_values(argv, option):
            if word[:1] in "#&!" and word and settings.get(option[2:], "") is None:
                settings[option[2:]] = word


def check_resume(argv: Sequence[str]) -> None:
    """Refuse `--resume` without the settings of the run; say where they are."""
    if "--resume" not in argv or any(True for _ in option_values(argv, "--config")):
        return
    for _, _, folder in option_values(argv, "--output_dir"):
        if (path := Path(folder) / CONFIG).is_file() and not any(
            True for _ in option_values(argv, "--model_name_or_path")
        ):
            raise ConfigError(f"--resume needs the settings of the run: add --config {path}.")


def check_flags(argv: Sequence[str]) -> None:
    """Refuse an unknown `--a.b` with a suggestion; jsonargparse would only say `unrecognized`."""
    if argv and argv[0] in recipes():
        raise ConfigError(f"{argv[0]} stands alone: a recipe is named with --config {argv[0]}.")
    for token in argv:
        if not token.startswith("--") or token == "--":
            continue
        name = token[2:].split("=", 1)[0]
        if name in OF_THE_COMMAND:
            continue
        _check_key(name.split("."), TrainConfig, where=f"--{name}", beside=OF_THE_COMMAND)


def check_file(path: Path) -> None:
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
        if keys[-1] == "$schema":  # for the reader's editor
            continue
        _check_key(keys, TrainConfig, where=f"key {'.'.join(keys)!r} of {path}")


def _paths(content: Mapping[Any, Any], above: tuple[str, ...] = ()) -> Iterator[list[str]]:
    for key, value in content.items():
        here = (*above, str(key))
        yield list(here)
        if isinstance(value, Mapping):
            yield from _paths(value, here)


def _check_key(keys: list[str], cls: Any, *, where: str, beside: Sequence[str] = ()) -> None:
    """Follow `keys` through nested dataclasses; free-form dicts accept any key here.

    `beside` are words that may be meant at the top, though they are no settings.
    """
    walked: list[str] = []
    for key in keys:
        if not is_dataclass(cls):
            return
        known = {f.name: f for f in fields(cls)}
        if key not in known:
            scope = f" below {'.'.join(walked)}" if walked else ""
            meant = None if walked else MEANT.get(key.replace("-", "_")) or _within(key, known)
            nearest = (
                f" Did you mean {meant!r}?"
                if meant
                else suggest(key, known if walked else (*known, *beside))
            )
            if walked and nearest:
                nearest = nearest.replace("'", f"'{'.'.join(walked)}.", 1)
            raise ConfigError(
                f"Unknown {where}: there is no setting {key!r}{scope}."
                + (nearest or " See lisa-train --help for all of them.")
            )
        walked.append(key)
        cls = dataclass_of(known[key].type)


def _within(key: str, known: Mapping[str, Any]) -> str | None:
    """Return `lora.r` for `lora_r`: a setting of a section that was written with one name."""
    section, _, rest = key.replace("-", "_").partition("_")
    cls = dataclass_of(known[section].type) if section in known else None
    inner = {f.name for f in fields(cls)} if cls else set()
    return f"{section}.{rest}" if rest in inner else None


def dataclass_of(annotation: Any) -> Any:
    """Return the dataclass of a setting's type, also of one that may be None."""
    return next((kind for kind in (annotation, *get_args(annotation)) if is_dataclass(kind)), None)


# What jsonargparse says of a section that may be null, around what is wrong within.
_OF_A_SECTION = re.compile(
    r"^(?:(?P<section>[\w.]+): )?Does not validate against any of the Union subtypes .*? Errors: "
    r"- (?:Problem with given class_path '[^']*': )?(?:Parser key \"(?P<key>[^\"]+)\": ?)?"
    r"(?P<what>.+?) - Expected a <class 'NoneType'>.*$"
)


def _said_of_a_section(found: re.Match[str]) -> str:
    place = ".".join(name for name in (found["section"], found["key"]) if name and found["key"])
    return f"{place}: {found['what']}" if place else found["what"]


# What jsonargparse says of a value that is not among the choices.
_CHOICE = re.compile(
    r"Expected a typing\.Literal\[(?P<choices>[^]]+)\]\. Got value: (?P<given>.*)$"
)


def _said_of_a_choice(found: re.Match[str]) -> str:
    choices = [word.strip().strip("'\"") for word in found["choices"].split(",")]
    hint = suggest(found["given"], choices)
    return f"expected one of {', '.join(choices)}, got {found['given']}.{hint}"


def one_sentence(message: str) -> str:
    """Flatten jsonargparse's message: `Parser key "lisa.k": Expected a <class 'int'>. …`."""
    text = " ".join(message.split())
    text = re.sub(r'^Parser key "([^"]+)": ?', r"\1: ", text)
    text = _OF_A_SECTION.sub(_said_of_a_section, text)
    text = re.sub(r"Expected a <class '(\w+)'>\. Got value: ", r"expected \1, got ", text)
    text = re.sub(r"expected tuple, got (.*)$", r"expected a list, as '[\1]', got \1", text)
    text = re.sub(r"Expected a <class 'tuple'>$", "expected a list, as '[a, b]'", text)
    text = _CHOICE.sub(_said_of_a_choice, text)
    text = re.sub(
        r"^the following arguments are required: (.+)$",
        lambda m: "missing " + ", ".join(f"--{n.strip()}" for n in m[1].split(",")) + ".",
        text,
    )
    return text
