"""The built wheel: the analysis half works where there is no torch and no training stack."""

import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
GOLDEN_RUN = ROOT / "tests" / "data" / "golden-run"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built from a copy (no stale build/) and without the network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("lisa_analysis", "lisa_train"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source],
        check=True, capture_output=True,
    )  # fmt: skip
    return next(out.glob("lisa_toolkit-*.whl"))


def base_requirements(wheel: Path) -> set[str]:
    """Distributions that the base install brings, found by following the declared requirements."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    waiting = [line.split(": ", 1)[1] for line in lines if line.startswith("Requires-Dist: ")]
    found: set[str] = set()
    while waiting:
        requirement = Requirement(waiting.pop())
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if requirement.name not in found:
            found.add(requirement.name)
            waiting += metadata.requires(requirement.name) or []
    return found


@pytest.fixture(scope="module")
def bare_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A Python that sees the wheel and its base requirements, and nothing else that is installed.

    The requirements are linked from this environment instead of downloaded: tests run offline.
    """
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for name in base_requirements(wheel):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    code = f"import sys; sys.path.insert(0, {str(site)!r}); "
    return [sys.executable, "-I", "-S", "-c", code]


def run(bare_python: list[str], code: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [*bare_python[:-1], bare_python[-1] + code, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_wheel_holds_both_packages_and_their_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for needed in (
        "lisa_analysis/py.typed", "lisa_train/py.typed", "lisa_train/command/recipes/lisa.yaml",
        "lisa_train/command/demo/demo.yaml",
    ):  # fmt: skip
        assert needed in names
    assert any(name.startswith("lisa_analysis/views/report/templates/") for name in names)
    assert any(name.startswith("lisa_analysis/views/report/assets/") for name in names)
    assert not any(name.startswith("tests/") for name in names)


def test_the_base_install_brings_no_training_stack(wheel: Path, bare_python: list[str]) -> None:
    assert not base_requirements(wheel) & {"torch", "transformers", "peft", "trl", "datasets"}
    assert run(bare_python, "import torch").returncode != 0, "the environment is not bare"


def test_a_committed_run_is_analysed_without_torch(bare_python: list[str], tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("report.html", "all.json", "probabilities.json")]
    done = run(
        bare_python, "from lisa_analysis.views.cli import main; sys.exit(main())",
        str(GOLDEN_RUN), "-o", str(files[0]), "--json", str(files[1]),
        "--probabilities", str(files[2]),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_size > 0 for path in files)


def test_training_without_its_extra_says_what_to_install(bare_python: list[str]) -> None:
    done = run(
        bare_python, "from lisa_train.command.cli import main; sys.exit(main())", "--config", "lisa"
    )
    assert done.returncode == 2
    assert 'pip install "lisa-toolkit[train]"' in done.stderr
    assert "Traceback" not in done.stderr
