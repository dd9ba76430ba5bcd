"""What holds for every module of both packages: its name, its size, and that of its functions."""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("lisa_analysis", "lisa_train")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
# Code alone: a docstring may be as long as its subject needs. Nothing is excepted today.
MOST_OF_A_FUNCTION = 60
MOST_OF_A_MODULE = 350
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def name_of(path: Path) -> str:
    return path.parent.name if path.name == "__init__.py" else path.stem


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def shown(path: Path) -> set[str]:
    """Functions and classes that a module defines, and whatever a package shows of its modules."""
    body = parsed(path).body
    names = {node.name for node in body if isinstance(node, DEFINITIONS)}
    if path.name == "__init__.py":
        taken = [node for node in body if isinstance(node, ast.ImportFrom)]
        names |= {alias.asname or alias.name for node in taken for alias in node.names}
    return names


def test_there_are_modules_to_look_at() -> None:
    assert len(MODULES) > 200
    assert shown(ROOT / "lisa_analysis/metrics/registry.py") >= {"metric", "Metric"}
    assert "METRICS" in shown(ROOT / "lisa_analysis/metrics/__init__.py")


def test_a_module_shares_its_name_with_no_function_of_its_own() -> None:
    """`from room import name` would be one or the other, by the order of imports."""
    assert [path for path in MODULES if name_of(path) in shown(path)] == []


def lines_of_code(node: ast.AST) -> int:
    """Lines of a function, its docstrings and those of what it defines left out."""
    assert isinstance(node, FUNCTIONS)
    documented = [n for n in ast.walk(node) if isinstance(n, DEFINITIONS) and ast.get_docstring(n)]
    docs = [n.body[0] for n in documented]
    return _height(node) - sum(_height(doc) for doc in docs)


def _height(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_docstrings_are_no_code() -> None:
    doc = '"""One.\n\n    Two.\n    """'
    [function] = ast.parse(
        f"def f(x):\n    {doc}\n    def g():\n        {doc}\n    return g\n"
    ).body
    assert lines_of_code(function) == 3


def test_no_function_has_more_lines_of_code_than_can_be_read_at_once() -> None:
    found = {}
    for path in MODULES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, FUNCTIONS) and lines_of_code(node) > MOST_OF_A_FUNCTION:
                found[f"{path.relative_to(ROOT)}: {node.name}"] = lines_of_code(node)
    assert found == {}


def test_no_module_is_longer_than_a_subject() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {p: n for p, n in lengths.items() if n > MOST_OF_A_MODULE} == {}
