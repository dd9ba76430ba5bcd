"""`lisa-train --help`: one screen, a screen for each group of settings, and all of it behind `all`.

Names, defaults and words are those of the dataclasses; only the groups are written here.
"""

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from itertools import zip_longest
from typing import Any

from lisa_analysis.contract.errors import ConfigError, suggest
from lisa_train.command.config import TrainConfig
from lisa_train.command.words import dataclass_of, recipes
from lisa_train.methods import METHODS, sections

WIDTH = 79

# Group -> what it is, and the settings at the top level that belong to it.
GROUPS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "data": ("model and data", (
        "model_name_or_path", "model_revision", "dtype", "attn_implementation",
        "trust_remote_code", "dataset_name", "dataset_config", "dataset_train_split",
        "dataset_test_split", "eval_size", "columns", "max_train_samples", "max_eval_samples",
        "dataset_text_field", "task",
    )),
    "text": ("how text becomes examples", (
        "max_length", "packing", "completion_only_loss", "assistant_only_loss",
    )),
    "steps": ("learning rate, batches, seeds", (
        "method", "learning_rate", "lr_scheduler_type", "warmup_steps", "lr_multipliers",
        "num_train_epochs", "max_steps", "per_device_train_batch_size",
        "per_device_eval_batch_size", "gradient_accumulation_steps", "max_grad_norm",
        "weight_decay", "optim", "seed", "data_seed", "trainer_args",
    )),
    "memory": ("what saves memory", (
        "bf16", "fp16", "gradient_checkpointing", "step_in_backward", "eight_bit_states",
    )),
    "output": ("what is written, who is told", (
        "output_dir", "eval_steps", "eval_on_start", "save_steps", "save_total_limit",
        "save_final_model", "resume_incomplete", "logging_steps", "report_to", "progress_bar",
    )),
    "lisa": ("layers that take turns", ("lisa",)),
    "learn": ("LISA learns what to draw", ("lisa.learn",)),
    "adapters": ("LoRA, PEFT's other adapters", ("lora", "peft")),
    "select": ("layers, tensors by name", ("select",)),
    "probe": ("gradients without training", ("probe",)),
    "record": ("what is measured, and when", ("record",)),
    **{f.name: (f"settings of {f.name}", (f.name,)) for f in fields(sections())},
}  # fmt: skip

_FIRST = """\
usage: lisa-train --config NAME --model_name_or_path M --dataset_name D [...]
       lisa-train estimate --model_name_or_path M [--memory 24GB,80GB] [...]

Train a model and record what every layer did. The most used settings:
  --config NAME|FILE       a recipe ({recipes}, ...) or a YAML file
  --method NAME            {methods}
  --model_name_or_path M   folder of a saved model, or a hub id
  --dataset_name D         JSONL, CSV, TSV or Parquet file, folder, hub id
  --output_dir DIR         the run directory (runs/METHOD-DATE-TIME)
  --learning_rate, --num_train_epochs, --per_device_train_batch_size N
  --resume                 continue the run in --output_dir
  -q, --quiet              print the run directory and errors alone
  -v, --verbose            what the libraries say too, and tracebacks
All other settings, one screen each:
{groups}
  --help all, --help NAME  all of them in full; one of them (lisa.sampling)
Also --print_config, --schema, --completion SHELL and --version.
Next: lisa-analyze RUN_DIR"""


_ESTIMATE = """\
usage: lisa-train estimate --model_name_or_path M [--memory 24GB,80GB] [...]

Predict the memory of a step as configured, and of full fine-tuning, LoRA and
LISA beside it, from config.json alone: no weights are read, nothing is trained,
no data is needed. What it depends on:
  --model_name_or_path M   folder of a saved model, or a hub id
  --config NAME, --method  what the row "as configured" is of
  --per_device_train_batch_size N, --max_length N   sequences (8), tokens (1024)
  --dtype (float32), --bf16, --attn_implementation, --optim
                                                    precision and optimizer
  --gradient_checkpointing                          less kept, computed twice
  --memory SIZE[,SIZE]     cards to hold it against, as 24GB or 80GiB
Every setting of a training is understood (--help memory, --help lisa).
How the numbers are made: docs/memory.md"""


def asked_help(argv: Sequence[str]) -> str | None:
    """Return what help is asked for: a word, ``""`` for the first screen; None where none is."""
    for position, word in enumerate(argv):
        if word == "estimate" and position == 0 and {"-h", "--help"} & set(argv[-1:]):
            return word
        option, equals, value = word.partition("=")
        if option in ("-h", "--help"):
            after = argv[position + 1] if position + 1 < len(argv) else ""
            return value if equals else "" if after.startswith("-") else after
    return None


def screen(word: str) -> str | None:
    """Return the help for a word; None for ``all``, which the parser prints.

    Raises
    ------
    ConfigError
        For a word that is neither a group nor a setting.
    """
    word = word.removeprefix("--").replace("-", "_")
    if word == "all":
        return None
    if not word:
        return _first()
    if word == "estimate":
        return _ESTIMATE
    if word == "methods":
        return "\n".join(_filled(m.name, m.help) for m in METHODS.values())
    if word == "recipes":
        return "\n".join(_filled(name, _about(path)) for name, path in recipes().items())
    if word in GROUPS:
        return _group(word)
    found = dict(_settings("", TrainConfig))
    if word not in found:
        known = [*GROUPS, "methods", "recipes", "all", *found]
        raise ConfigError(
            f"--help knows no {word!r}: give one of {', '.join(GROUPS)}, methods, recipes, all, or "
            f"the name of a setting.{suggest(word, known)}"
        )
    setting, text = found[word]
    nested = dataclass_of(setting.type)
    if nested is not None:
        return "\n".join(_lines([key for key in found if key.startswith(f"{word}.")], found))
    return f"--{word}{_default(setting)}\n{_indented(text)}"


def _first() -> str:
    wide = [f"{name:<9}{about}" for name, (about, _) in GROUPS.items()]
    wide.append("methods, recipes: which there are")
    half = -(-len(wide) // 2)
    pairs = zip_longest(wide[:half], wide[half:], fillvalue="")
    lines = [f"  {a:<40}{b}".rstrip() for a, b in pairs]
    methods = _cut(" | ".join(METHODS), WIDTH - 27)
    names = ", ".join(name for name in ("full", "lora", "lisa") if name in recipes())
    return _FIRST.format(recipes=names, methods=methods, groups="\n".join(lines))


def _group(name: str) -> str:
    about, members = GROUPS[name]
    found = dict(_settings("", TrainConfig))
    shown = [key for key in found if any(_within(key, member) for member in members)]
    if name == "lisa":  # what is learned has a screen of its own
        shown = [key for key in shown if not key.startswith("lisa.learn.")]
    return "\n".join(
        [f"{name}: {about}", *_lines(shown, found), "lisa-train --help NAME says all of one."]
    )


def _within(key: str, member: str) -> bool:
    nested = dataclass_of(dict(_settings("", TrainConfig))[member][0].type)
    return key == member if nested is None else key.startswith(f"{member}.")


def _settings(above: str, cls: Any) -> Iterator[tuple[str, tuple[Field[Any], str]]]:
    """Yield (name, (field, text of the docstring)) of a dataclass and of those within it."""
    texts = documented(cls)
    for setting in fields(cls):
        name = f"{above}{setting.name}"
        if name == "record.run_dir":  # of attach; here it is output_dir
            continue
        nested = dataclass_of(setting.type)
        yield name, (setting, texts.get(setting.name, ""))
        if nested is not None:
            yield from _settings(f"{name}.", nested)


@cache
def documented(cls: type) -> Mapping[str, str]:
    """Return what the numpydoc section `Parameters` of a class says of each, as one line each."""
    section = textwrap.dedent((cls.__doc__ or "").partition("Parameters\n")[2].partition("\n")[2])
    found: dict[str, str] = {}
    for names, text in re.findall(r"^(\w[\w, ]*)\n((?:[ ]{4}.*\n?|\n)+)", section, re.MULTILINE):
        for name in names.split(", "):
            found[name] = " ".join(text.split())
    return found


def _lines(names: Sequence[str], found: "Mapping[str, tuple[Field[Any], str]]") -> list[str]:
    """One line a setting: name, default, the first sentence as far as it fits."""
    heads = [f"  --{name}{_default(found[name][0])}" for name in names]
    wide = min(36, max(map(len, heads)))
    lines = []
    for name, head in zip(names, heads, strict=True):
        text = found[name][1].replace("`", "")
        first = re.split(r"(?<=[a-z)\d])[.;] ", text, maxsplit=1)[0].rstrip(".")
        lines.append(_cut(f"{head:<{wide}}  {first}", WIDTH))
    return lines


def _default(setting: "Field[Any]") -> str:
    value = setting.default
    if value is MISSING:
        value = None if setting.default_factory is MISSING else setting.default_factory()
    if value in (None, (), {}, "") or is_dataclass(value):
        return ""
    shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f" {shown.lower() if isinstance(value, bool) else _cut(shown, 16)}"


def _about(recipe: Any) -> str:
    """The comment that a recipe begins with."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    comment = [line.lstrip("# ") for line in lines[: next(
        (i for i, line in enumerate(lines) if not line.startswith("#")), len(lines)
    )]]  # fmt: skip
    return " ".join(comment) or "a recipe"


def _filled(name: str, text: str) -> str:
    return textwrap.fill(
        f"  {name:<14}  {text}", WIDTH, subsequent_indent=" " * 18, break_long_words=False
    )


def _indented(text: str) -> str:
    text = text.replace("``", "").replace("`", "")
    return textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="  ")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
