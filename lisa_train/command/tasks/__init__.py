"""What a run trains on and for, one file a task: the model, the data, and the trainer for both."""

import importlib
from typing import TYPE_CHECKING, TypeVar

from lisa_analysis.contract.errors import ConfigError

if TYPE_CHECKING:
    from lisa_train.command.tasks.task import Task

# name -> module of this room and class in it, loaded when it is asked for; or a class from
# outside, see `register`.
TASKS: "dict[str, tuple[str, str] | type[Task]]" = {
    "causal-lm": ("text", "CausalLM"),
    "seq2seq-lm": ("seq2seq", "Seq2SeqLM"),
    "text-classification": ("text_classification", "TextClassification"),
    "token-classification": ("token_classification", "TokenClassification"),
    "speech-recognition": ("speech_recognition", "SpeechRecognition"),
    "image-classification": ("image_classification", "ImageClassification"),
}
AUTO = "auto"


def task_named(name: str) -> "Task":
    """Return the task of that name, one of `TASKS`."""
    found = TASKS[name]
    if isinstance(found, tuple):
        module, kind = found
        found = getattr(importlib.import_module(f"{__name__}.{module}"), kind)
    return found()


_Kind = TypeVar("_Kind", bound="type[Task]")


def register(task: _Kind) -> _Kind:
    """Add a class of tasks to `TASKS` under its name; a decorator.

    One of your own may be registered again; `ConfigError` for the name of a built-in.
    """
    if task.name == AUTO or isinstance(TASKS.get(task.name), tuple):
        raise ConfigError(f"task {task.name!r} is built in: give yours another name.")
    TASKS[task.name] = task
    return task
