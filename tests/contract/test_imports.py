"""The import rules of the architecture, each held by a test."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAINING_STACK = {"torch", "transformers", "peft", "trl", "accelerate", "datasets", "lisa_train"}
TORCH_FREE_FOR_TRAINING = {
    "lisa_analysis", "lisa_analysis.errors", "lisa_analysis.layers", "lisa_analysis.probabilities",
    "lisa_analysis.rundir", "lisa_analysis.schema", "lisa_analysis.shards", "lisa_analysis.streams",
}  # fmt: skip


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at the top or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def modules(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"{folder} holds no module: the rule would pass on nothing"
    return found


@pytest.mark.parametrize("path", modules("lisa_analysis"), ids=lambda p: p.stem)
def test_analysis_never_imports_the_training_stack(path: Path) -> None:
    roots = {name.split(".")[0] for name in imported(path)}
    assert not roots & TRAINING_STACK


# The demo runs the whole loop, analysis included, and the command sums a finished run up.
TRAINING = [path for path in modules("lisa_train") if "demo" not in path.parts]


@pytest.mark.parametrize("path", TRAINING, ids=lambda p: p.stem)
def test_training_imports_only_torch_free_modules_of_the_analysis(path: Path) -> None:
    used = {name for name in imported(path) if name.split(".")[0] == "lisa_analysis"}
    assert used <= TORCH_FREE_FOR_TRAINING


@pytest.mark.parametrize("path", modules("lisa_analysis/plots"), ids=lambda p: p.stem)
def test_plots_never_read_files_and_never_show(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    called = {
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    }
    assert not called & {"open", "read_text", "read_bytes", "read_parquet", "read_csv", "show"}
    assert "pyarrow" not in {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", modules("lisa_analysis/report"), ids=lambda p: p.stem)
def test_report_never_computes(path: Path) -> None:
    used = imported(path)
    assert not {n for n in used if n.startswith("lisa_analysis.statistics")}
    assert not used & {"lisa_analysis.fitting", "lisa_analysis.judgement", "pyarrow", "duckdb"}


@pytest.mark.parametrize("path", modules("lisa_analysis/diagnostics"), ids=lambda p: p.stem)
def test_rules_never_draw(path: Path) -> None:
    roots = {name.split(".")[0] for name in imported(path)}
    assert not roots & {"matplotlib", "seaborn"}
    assert "lisa_analysis.plots" not in imported(path)


@pytest.mark.parametrize("name", ["lisa", "samplers", "norms"])
def test_the_engine_knows_no_trainer(name: str) -> None:
    used = imported(ROOT / "lisa_train" / f"{name}.py")
    assert not {n.split(".")[0] for n in used} & {"transformers", "trl", "accelerate"}
    assert not any(n.startswith("lisa_train.integration") for n in used)


def loaded_after(code: str) -> set[str]:
    """Top-level packages in `sys.modules` after `code` in a new interpreter."""
    code += "\nimport sys; print('\\n'.join(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("package", ["lisa_train", "lisa_analysis"])
def test_importing_a_package_loads_nothing_heavy(package: str) -> None:
    assert not loaded_after(f"import {package}") & {"torch", "transformers", "pandas", "pyarrow"}


@pytest.mark.parametrize("module", ["lisa_train.cli", "lisa_analysis.cli"])
def test_help_loads_nothing_heavy(module: str) -> None:
    code = (
        f"import contextlib, io\nfrom {module} import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "    main(['--help'])"
    )
    assert not loaded_after(code) & {"torch", "transformers", "pandas", "pyarrow", "matplotlib"}


def test_public_names_exist() -> None:
    import lisa_analysis as la
    import lisa_train as lt

    for package in (la, lt):
        for name in package.__all__:
            assert getattr(package, name) is not None, name


def test_functions_stay_functions_after_their_module_is_imported() -> None:
    code = (
        "import lisa_analysis.importance, lisa_analysis.compare, lisa_analysis.report\n"
        "import lisa_analysis as la\n"
        "assert all(map(callable, (la.importance, la.compare, la.report)))"
    )
    loaded_after(code)
