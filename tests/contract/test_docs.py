"""The pages: every public name is in the reference, commands parse, links lead somewhere."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

import lisa_analysis as la
import lisa_train as lt
from lisa_analysis.views.cli import build_parser
from lisa_train.command import ablate
from lisa_train.command.cli import parse

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def test_the_reference_has_every_public_name_and_no_other() -> None:
    paths = re.findall(r"^::: (\S+)$", (DOCS / "reference.md").read_text(), re.MULTILINE)
    found = {}
    for path in paths:
        module, _, name = path.rpartition(".")
        if path == "lisa_analysis.views.plots":
            found[path] = importlib.import_module(path)
            continue
        found[path] = getattr(importlib.import_module(module), name)
    for package in (la, lt):
        shown = [thing for path, thing in found.items() if path.startswith(package.__name__)]
        for name in set(package.__all__) - ({"LisaError"} if package is lt else set()):
            assert any(getattr(package, name) is thing for thing in shown), name
    assert len(paths) == len(la.__all__) + len(lt.__all__) - 1


def test_every_page_is_in_the_navigation() -> None:
    entries = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    named = set(re.findall(r"[\w-]+\.md", yaml.safe_dump(entries)))
    assert named == {page.name for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert link.startswith("http") or (page.parent / link).exists(), link


COMMANDS = [
    line
    for name in ("index.md", "jobs.md")
    for block in re.findall(r"```sh\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith(("lisa-train ", "lisa-analyze "))
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_pages_are_understood(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora.json").write_text('{"r": 8}')
    (tmp_path / "p.json").write_text("{}")
    program, *words = shlex.split(command, comments=True)
    if program == "lisa-train":
        assert parse(words).config.model_name_or_path in ("M", "MODEL")
    else:
        assert build_parser().parse_args(words).run_dirs


SEVERAL = (DOCS / "several-gpus.md").read_text(encoding="utf-8")
_STARTS = r"(?:torchrun --|accelerate launch --config_file )"
LAUNCHED = [
    *re.findall(rf"^({_STARTS}.*)$", SEVERAL, re.MULTILINE),
    *(" ".join(code.split()) for code in re.findall(rf"`({_STARTS}[^`]*)`", SEVERAL)),
]


REST = "--config lisa --model_name_or_path MODEL --dataset_name DATA"  # what an ellipsis stands for


@pytest.mark.parametrize("command", LAUNCHED)
def test_commands_for_several_gpus_are_understood(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the launcher and by what it launches; the files that they name are there."""
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    if " -m " not in command:
        command += f" -m lisa_train {REST}"
    program, *words = shlex.split(command.replace("--config lisa …", REST))
    if program == "torchrun":
        launched = get_args_parser().parse_args(words)
        assert launched.nproc_per_node == "2"
    else:
        launched = launch_command_parser().parse_args(words[1:])
        assert (ROOT / launched.config_file).is_file()
    assert launched.module
    monkeypatch.chdir(tmp_path)
    if launched.training_script == "lisa_train":
        assert parse(launched.training_script_args).config.model_name_or_path == "MODEL"
    else:
        assert launched.training_script == ablate.__name__
        assert ablate.build_parser().parse_args(launched.training_script_args).run_dir == "RUN_DIR"


def test_the_tests_that_the_page_of_several_gpus_names_exist() -> None:
    named = set(re.findall(r"`((?:\w+/)*test_\w+\.py)`", SEVERAL))
    named |= set(re.findall(r"tests/(benchmarks/test_\w+\.py)", SEVERAL))
    assert len(named) > 10
    files = [path.as_posix() for path in (ROOT / "tests").rglob("test_*.py")]
    for name in named:
        assert any(file.endswith("/" + name) for file in files), name


def test_the_code_on_the_page_of_several_gpus_uses_names_that_exist() -> None:
    blocks = re.findall(r"```python\n(.*?)```", SEVERAL, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = {"lt": lt, "engine": lt.Lisa}.get(node.value.id)
                assert owner is None or hasattr(owner, node.attr), f"{node.value.id}.{node.attr}"
