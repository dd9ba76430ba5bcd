"""The import rules of the architecture, each held by a test."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAINING_STACK = {"torch", "transformers", "peft", "trl", "accelerate", "datasets", "lisa_train"}
# What training may import of the analysis; of `runs` the rules, which watch a training as well.
TORCH_FREE_FOR_TRAINING = ("contract", "rundir", "statistics", "plans", "runs.diagnostics")


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
    used = {name for name in imported(path) if name.startswith("lisa_analysis.")}
    allowed = tuple(f"lisa_analysis.{room}." for room in TORCH_FREE_FOR_TRAINING)
    assert not {name for name in used if not f"{name}.".startswith(allowed)}


def called(path: Path) -> set[str]:
    """Names of the functions and methods that a file calls."""
    return {
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    }


def taken(path: Path) -> set[str]:
    """Every name that a file imports, with the module it comes from."""
    return {
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


FILE_READERS = {"open", "read_text", "read_bytes", "read_parquet", "read_csv", "load"}
# What turns numbers into other numbers of runs; thinning for the eye is drawing.
ESTIMATORS = {"mean", "std", "var", "median", "quantile", "percentile", "corr", "cov", "groupby"}


@pytest.mark.parametrize("path", modules("lisa_analysis/views/plots"), ids=lambda p: p.stem)
def test_plots_never_read_files_and_never_show(path: Path) -> None:
    assert not called(path) & {*FILE_READERS, "show"}
    used = imported(path)
    assert not {name.split(".")[0] for name in used} & {"pyarrow", "pathlib", "io"}
    assert not {name for name in used if name.startswith("lisa_analysis.rundir")}


@pytest.mark.parametrize("path", modules("lisa_analysis/views/plots"), ids=lambda p: p.stem)
def test_plots_never_compute(path: Path) -> None:
    assert not called(path) & ESTIMATORS
    assert not {name for name in imported(path) if name.startswith("lisa_analysis.statistics")}
    # A plot may be given a run: then it asks for the grid of what it draws.
    found = {name.rsplit(".", 1)[-1] for name in taken(path)}
    assert not found & (COMPUTING - {"layer_grids", "update_ratio_grid"})


# Functions that look at a run and find something out: the analysis calls them, once.
COMPUTING = {
    "importance", "compare", "diagnose", "sampling_probabilities", "step_table", "measurements",
    "layer_grids", "update_ratio_grid", "load", "draws", "draw_events",
}  # fmt: skip


@pytest.mark.parametrize("path", modules("lisa_analysis/views/html_report"), ids=lambda p: p.stem)
def test_report_never_computes(path: Path) -> None:
    used = imported(path)
    assert not {name for name in used if name.startswith("lisa_analysis.statistics")}
    assert not {name for name in used if name.startswith("lisa_analysis.rundir")}
    assert not {name for name in used if name.startswith("lisa_analysis.metrics")} - {
        "lisa_analysis.metrics.layer_grid",
        "lisa_analysis.metrics.step_tables",
        "lisa_analysis.metrics.thinning",
    }
    assert not {name for name in taken(path) if name.rsplit(".", 1)[-1] in COMPUTING}
    assert not used & {"lisa_analysis.profiles.verdict", "pyarrow", "duckdb"}


@pytest.mark.parametrize("name", ["cli", "json_output", "terminal"])
def test_terminal_and_json_take_what_the_analysis_found(name: str) -> None:
    path = ROOT / "lisa_analysis" / "views" / f"{name}.py"
    found = {name.rsplit(".", 1)[-1] for name in taken(path)}
    assert not found & (COMPUTING - {"load"})


@pytest.mark.parametrize("path", modules("lisa_analysis/runs/diagnostics"), ids=lambda p: p.stem)
def test_rules_never_draw(path: Path) -> None:
    used = imported(path)
    assert not {name.split(".")[0] for name in used} & {"matplotlib", "seaborn"}
    assert not {name for name in used if name.startswith("lisa_analysis.views")}


# From the ground up: a room imports what stands before it here, and what it names.
FLOORS = {
    "lisa_train": {
        "checks": (),
        "private_names": (),
        "model": (),
        "optim": ("model",),
        "methods": ("model", "optim"),
        "measure": ("model", "optim"),
        "trainer": ("model", "optim", "methods", "measure"),
        "estimate": ("model", "optim", "methods", "measure", "trainer"),
        "command": ("model", "optim", "methods", "measure", "trainer", "estimate", "config"),
        "config": ("optim", "methods", "measure", "command"),
    },
    "lisa_analysis": {
        "contract": (),
        "rundir": ("contract",),
        "statistics": (),
        "metrics": ("contract", "rundir", "statistics"),
        "profiles": ("contract", "rundir", "statistics", "metrics"),
        "plans": ("contract", "rundir", "statistics", "profiles"),
        "runs": ("contract", "rundir", "statistics", "metrics", "profiles"),
        "views": (
            "contract", "rundir", "statistics", "metrics", "profiles", "plans", "runs",
        ),
    },
}  # fmt: skip
PLACES = [(package, place) for package, floors in FLOORS.items() for place in floors]


@pytest.mark.parametrize("package", FLOORS)
def test_every_room_has_a_floor(package: str) -> None:
    found = {path.stem if path.suffix else path.name for path in (ROOT / package).iterdir()}
    assert found - {"__init__", "__main__", "__pycache__", "py"} == set(FLOORS[package])


@pytest.mark.parametrize(("package", "place"), PLACES)
def test_a_room_imports_only_what_stands_below_it(package: str, place: str) -> None:
    path = ROOT / package / place
    files = [path.with_suffix(".py")] if not path.is_dir() else modules(f"{package}/{place}")
    allowed = {place, "checks", "private_names", *FLOORS[package][place]}
    for file in files:
        used = {name.split(".")[1] for name in imported(file) if name.startswith(f"{package}.")}
        assert used <= allowed, f"{file.relative_to(ROOT)} imports {sorted(used - allowed)}"


@pytest.mark.parametrize("room", ["model", "optim", "methods", "measure"])
def test_below_the_trainer_nobody_knows_one(room: str) -> None:
    for path in modules(f"lisa_train/{room}"):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        names |= {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
        assert not names & {"Trainer", "TrainerCallback", "SFTTrainer"}, path
        assert not {n.split(".")[0] for n in imported(path)} & {"trl", "accelerate"}, path


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


@pytest.mark.parametrize(
    "module", ["lisa_train.command.cli", "lisa_train.command.ablate", "lisa_analysis.views.cli"]
)
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


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("lisa_train.integration", "lisa_train.trainer"),
        ("lisa_train.memory", "lisa_train.estimate"),
        ("lisa_train.memory.estimate", "lisa_train.estimate.memory"),
        ("lisa_train.samplers", "lisa_train.methods.lisa.samplers"),
        ("lisa_train.measure.step_measure", "lisa_train.measure.step.step_measure"),
        ("lisa_train.measure.disk.outcome", "lisa_train.measure.disk.run_file"),
        ("lisa_analysis.schema", "lisa_analysis.contract.schema"),
        ("lisa_analysis.plots", "lisa_analysis.views.plots"),
        ("lisa_analysis.outcomes", "lisa_analysis.runs.losses"),
    ],
)
def test_old_module_paths_work_and_name_the_new_one(old: str, new: str) -> None:
    code = (
        "import importlib, warnings\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        f"    old = importlib.import_module({old!r})\n"
        f"new = importlib.import_module({new!r})\n"
        "public = [n for n in vars(new) if not n.startswith('_')]\n"
        "assert public or hasattr(new, '__path__')\n"
        "assert all(getattr(old, n) is getattr(new, n) for n in public)\n"
        "told = [str(w.message) for w in seen if w.category is DeprecationWarning]\n"
        f"assert {f'{old} is now {new}.'!r} in told, told"
    )
    loaded_after(code)


def test_every_old_path_leads_to_a_module() -> None:
    import lisa_analysis
    import lisa_train

    assert lisa_analysis is not None
    assert lisa_train is not None
    tables = [finder.table for finder in sys.meta_path if type(finder).__name__ == "_OldNames"]
    assert len(tables) == 2
    for table in tables:
        for new in table.values():
            assert importlib.util.find_spec(new) is not None, new


def names_shown(init: Path) -> set[str]:
    """What a package binds in its `__init__`, or takes from a module, its own modules aside."""
    package = ".".join(init.parent.relative_to(ROOT).parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(init.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom) and node.module != package:
            found |= {alias.asname or alias.name for alias in node.names}
    return found


INITS = [p for package in FLOORS for p in modules(package) if p.name == "__init__.py"]


@pytest.mark.parametrize("init", INITS, ids=lambda p: p.parent.name)
def test_no_package_shows_a_name_that_one_of_its_modules_has(init: Path) -> None:
    """Importing the module would put it into the place of the function."""
    own = {p.stem for p in init.parent.glob("*.py")} | {p.parent.name for p in
           init.parent.glob("*/__init__.py")}  # fmt: skip
    assert not names_shown(init) & own


def test_a_function_is_called_by_its_name_after_an_old_module_of_that_name() -> None:
    code = (
        "import warnings\n"
        "warnings.simplefilter('ignore')\n"
        "import lisa_analysis.importance, lisa_analysis.report, lisa_train.probe\n"
        "import lisa_analysis as la, lisa_train as lt\n"
        "from lisa_analysis.importance import DEFAULT_METRIC\n"
        "for function in (la.importance, la.report):\n"
        "    try: function('nowhere')\n"
        "    except la.LisaError as error: assert 'nowhere' in str(error)\n"
        "try: lt.probe()\n"
        "except TypeError as error: assert 'batches' in str(error), error"
    )
    loaded_after(code)


def test_functions_stay_functions_after_their_module_is_imported() -> None:
    code = (
        "import lisa_analysis.profiles.from_run, lisa_analysis.runs.comparing\n"
        "import lisa_analysis.views.html_report\n"
        "import lisa_analysis as la\n"
        "assert all(map(callable, (la.importance, la.compare, la.report)))"
    )
    loaded_after(code)
