"""What holds for every module of both packages: its name, its size, and that of its functions."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("lisa_analysis", "lisa_train")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def name_of(path: Path) -> str:
    return path.parent.name if path.name == "__init__.py" else path.stem


def shown(path: Path) -> set[str]:
    """Functions and classes that a module defines, and whatever a package shows of its modules."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
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
