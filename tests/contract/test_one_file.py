"""A file put into the right folder is enough: nothing else of the package names what is in it."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lisa_analysis.contract.folder import import_modules
from lisa_analysis.plans.exports import EXPORTS
from lisa_train.command.tasks import TASKS, task_named, tasks_in
from lisa_train.methods import METHODS
from lisa_train.methods.lisa.samplers import SAMPLERS

EXPORT = """
from lisa_analysis.plans.exports.plan import Plan
from lisa_analysis.plans.exports.registry import Content, exporter

@exporter("shouting", "the names of the layers, aloud")
def shouting(plan: Plan) -> Content:
    raise AssertionError
"""
METHOD = """
from lisa_train.methods.registry import Method, register

@register
class Resting(Method):
    name = "resting"
"""
SAMPLER = """
from lisa_train.methods.lisa.samplers.sampler import PureSampler, register

@register
class Lazy(PureSampler):
    scheme = "lazy"
"""
TASK = """
from lisa_train.command.tasks.task import Task

class Helper:
    pass

class Counting(Task):
    \"\"\"Numbers.\"\"\"

    name = "counting"
"""


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Put a file beside those of a package, and import the folder as the package does."""
    added: list[str] = []

    def into(package: str, text: str) -> None:
        (tmp_path / "put_there_by_a_test.py").write_text(text)
        module = importlib.import_module(package)
        monkeypatch.setattr(module, "__path__", [*module.__path__, str(tmp_path)])
        added.append(f"{package}.put_there_by_a_test")
        import_modules(package, module.__path__)

    yield into
    for name in added:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("package", "text", "registry", "name"),
    [
        ("lisa_analysis.plans.exports", EXPORT, EXPORTS, "shouting"),
        ("lisa_train.methods", METHOD, METHODS, "resting"),
        ("lisa_train.methods.lisa.samplers", SAMPLER, SAMPLERS, "lazy"),
    ],
)
def test_a_file_registers_itself(
    put: Callable[[str, str], None], package: str, text: str, registry: dict[str, object], name: str
) -> None:
    assert name not in registry
    put(package, text)
    assert name in registry
    del registry[name]


def test_a_task_is_found_without_being_imported(tmp_path: Path) -> None:
    (tmp_path / "numbers.py").write_text(TASK)
    (tmp_path / "broken.py").write_text("raise AssertionError")
    assert tasks_in(tmp_path) == {"counting": ("numbers", "Counting")}


def test_every_task_of_the_folder_is_one() -> None:
    assert {"causal-lm", "seq2seq-lm", "text-classification"} <= set(TASKS)
    assert [task_named(name).name for name in TASKS] == list(TASKS)
