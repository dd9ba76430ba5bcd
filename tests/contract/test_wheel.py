"""The built sdist and wheel, whole and alone; the analysis works where there is no torch."""

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from configparser import ConfigParser
from email import message_from_string
from importlib import metadata
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
GOLDEN_RUN = ROOT / "tests" / "data" / "golden-run"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOT_SHIPPED = ("tests", "reports", "notebooks", "docs", "runs")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of this checkout, and the wheel built from that sdist, without the network.

    They are built from a copy (no stale build/) that holds something in every folder that must
    not be shipped.
    """
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("lisa_analysis", "lisa_train"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, source)
    for name in NOT_SHIPPED:
        (source / name / "inner").mkdir(parents=True)
        for file in ("__init__.py", "page.md", "inner/test_it.py", "table.csv"):
            (source / name / file).write_text("")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source],
        check=True, capture_output=True,
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    [path] = built.glob("lisa_toolkit-*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(built: Path) -> dict[str, bytes]:
    """Every file of the sdist, by its name below the one folder that it unpacks to."""
    [path] = built.glob("lisa_toolkit-*.tar.gz")
    with tarfile.open(path) as archive:
        files = {m.name: archive.extractfile(m) for m in archive.getmembers() if m.isfile()}
        found = {name: file.read() for name, file in files.items() if file is not None}
    [top] = {name.split("/")[0] for name in found}
    assert top == path.name.removesuffix(".tar.gz")
    return {name.removeprefix(f"{top}/"): content for name, content in found.items()}


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


def shipped() -> set[str]:
    """Every file of both packages that is no leftover of a run."""
    return {
        path.relative_to(ROOT).as_posix()
        for name in ("lisa_analysis", "lisa_train")
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_is_both_packages_whole_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == shipped()


def test_the_sdist_is_what_the_wheel_is_built_from(sdist: dict[str, bytes]) -> None:
    of_packages = {name for name in sdist if name.startswith(("lisa_analysis/", "lisa_train/"))}
    assert of_packages == shipped()
    for name in (*sorted(of_packages), "pyproject.toml", "README.md", "LICENSE"):
        assert sdist[name] == (ROOT / name).read_bytes(), name
    rest = {name.split("/")[0] for name in set(sdist) - of_packages}
    assert rest == {
        "LICENSE", "README.md", "pyproject.toml", "setup.cfg", "PKG-INFO", "lisa_toolkit.egg-info"
    }  # fmt: skip


def test_both_say_the_version_the_licence_and_the_commands_of_pyproject(
    sdist: dict[str, bytes], wheel: Path
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = {n.split("/", 1)[1]: archive.read(n).decode() for n in archive.namelist()
                if ".dist-info/" in n}  # fmt: skip
    for text in (sdist["PKG-INFO"].decode(), info["METADATA"]):
        head = message_from_string(text)
        assert (head["Name"], head["Version"]) == (PROJECT["name"], PROJECT["version"])
        assert head["License-Expression"] == PROJECT["license"]
        assert head["Requires-Python"] == PROJECT["requires-python"]
        assert set(head.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    assert info["licenses/LICENSE"] == (ROOT / "LICENSE").read_text()
    commands = ConfigParser()
    commands.read_string(info["entry_points.txt"])
    assert dict(commands["console_scripts"]) == PROJECT["scripts"]
    for target in PROJECT["scripts"].values():
        assert callable(EntryPoint("", target, "console_scripts").load())


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
