"""The pages: every public name is in the reference, commands parse, links lead somewhere."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

import lisa_analysis as la
import lisa_train as lt
from lisa_analysis.views.cli import build_parser
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
