"""What a run trains on and for, one file a task: the model, the data, and the trainer for both."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lisa_train.command.tasks.task import Task

# name -> module of this room and class in it; loaded when it is asked for.
TASKS: dict[str, tuple[str, str]] = {
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
    module, kind = TASKS[name]
    task: Task = getattr(importlib.import_module(f"{__name__}.{module}"), kind)()
    return task
