"""What a run trains on and for, one file a task: the model, the data, and the trainer for both."""

import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lisa_analysis.contract.errors import ConfigError
from lisa_analysis.contract.fields import HELD_OUT_SCORES

if TYPE_CHECKING:
    from lisa_train.command.tasks.task import Task


def tasks_in(folder: Path) -> "dict[str, tuple[str, str] | type[Task]]":
    """Find the tasks of a folder by reading its files: importing them would load torch."""
    found: dict[str, tuple[str, str] | type[Task]] = {}
    for path in sorted(folder.glob("*.py")):
        for part in re.split(r"^class ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            if name := re.search(r'^    name = "([a-z0-9-]+)"$', part, re.MULTILINE):
                found[name[1]] = (path.stem, part.partition("(")[0])
    return found


# name -> module of this folder and class in it, loaded when it is asked for; or a class from
# outside, see `register`. A class with a line `name = "…"` in any file here is a task.
TASKS = tasks_in(Path(__file__).parent)
AUTO = "auto"


def task_named(name: str) -> "Task":
    """Return the task of that name, one of `TASKS`."""
    found = TASKS[name]
    if isinstance(found, tuple):
        module, kind = found
        found = getattr(importlib.import_module(f"{__name__}.{module}"), kind)
    for score, meaning in found.new_scores.items():
        HELD_OUT_SCORES.setdefault(score, meaning)
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
