"""A method with settings is one folder: put beside those of the package, nothing else names it."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

import lisa_analysis as la
import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_train.methods import Method, register

SETTINGS = '''
"""What `method: thin` trains."""

from dataclasses import dataclass

from lisa_analysis.contract.errors import ConfigError


@dataclass(frozen=True)
class ThinConfig:
    """Which tensors train.

    Parameters
    ----------
    every
        One tensor in so many trains, counted from the first.
    """

    every: int = 2

    def __post_init__(self):
        if self.every < 1:
            raise ConfigError(f"thin.every is {self.every}; expected at least 1.")
'''
METHOD = '''
"""One tensor in a few trains."""

from lisa_train.methods.registry import Method, register
from lisa_train.methods.thin.config import ThinConfig


@register
class Thin(Method):
    name = "thin"
    help = "trains one tensor in a few"
    settings = ThinConfig

    def prepare(self, model, config):
        for i, tensor in enumerate(model.parameters()):
            tensor.requires_grad_(i % config.thin.every == 0)

    def run_entries(self, config, model=None):
        return {"method": self.name, "thin": {"every": config.thin.every}}
'''
# The folder is imported as the package imports its own, before any configuration is made.
SCRIPT = """
import contextlib, io, json, pathlib, sys
import lisa_train.methods
from lisa_analysis.contract.folder import import_modules
home, model, data = map(pathlib.Path, sys.argv[1:])
lisa_train.methods.__path__.append(str(home))
import_modules("lisa_train.methods", lisa_train.methods.__path__)
from lisa_train.command.cli import main
import lisa_train as lt

words = ["--model_name_or_path", str(model), "--dataset_name", str(data), "--max_length=16",
         "--progress_bar=false", "--optim=sgd"]
run = ["--method=thin", "--thin.every=3", "--max_steps=1", "--eval_size=0", *words]
def said(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: code = main(words)
        except SystemExit as end: code = end.code
    return [code, out.getvalue() + err.getvalue()]
found = {
    "run": said(*run, f"--output_dir={home / 'run'}"),
    "again": said(f"--config={home / 'run' / 'config.yaml'}", f"--output_dir={home / 'again'}"),
    "estimate": said("--estimate", "--method=thin", *words),
    "help": said("--help"), "group": said("--help", "thin"), "one": said("--help", "thin.every"),
    "schema": said("--schema"),
    "misspelt": said("--method=thin", "--thin.evry=3", *words),
    "wrong": said("--method=thin", "--thin.every=0", *words),
    "other": said("--method=full", "--thin.every=3", *words),
    "every": lt.TrainConfig("m", "d", "thin").thin.every,
    "trainable": [
        lt.estimate_memory(model, "thin", sequence_length=8, optim="sgd", thin=settings).trainable
        for settings in (lisa_train.methods.METHODS["thin"].settings(every) for every in (1, 3))
    ],
}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("put")
    (folder / "thin").mkdir()
    (folder / "thin" / "__init__.py").write_text(METHOD)
    (folder / "thin" / "config.py").write_text(SETTINGS)
    return folder


@pytest.fixture(scope="module")
def found(home: Path, tiny_model_dir: Path, text_file: Path) -> dict[str, Any]:
    """What a process says and does that finds the folder."""
    words = [sys.executable, "-c", SCRIPT, home, tiny_model_dir, text_file]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_it_trains_by_its_settings_and_is_repeated_by_config_yaml(
    found: dict[str, Any], home: Path
) -> None:
    assert found["run"][0] == found["again"][0] == 0, found["run"]
    for name in ("run", "again"):
        run = la.load(home / name)
        assert (run.method, run.manifest["thin"]) == ("thin", {"every": 3})
        assert yaml.safe_load((run.path / "config.yaml").read_text())["thin"] == {"every": 3}
        trained = run.metrics(["grad_norm"], steps=[1]).dropna()["param_id"]
        assert sorted(trained) == sorted(run.parameters["param_id"][::3])


def test_its_memory_is_estimated_by_its_settings(found: dict[str, Any]) -> None:
    assert found["estimate"][0] == 0
    assert "as configured" in found["estimate"][1]
    every, third = found["trainable"]
    assert 0 < third < every


def test_the_command_knows_its_settings(found: dict[str, Any]) -> None:
    assert found["every"] == 2
    assert "settings of thin" in found["help"][1]
    assert "--thin.every 2" in found["group"][1]
    assert "One tensor in so many trains" in found["one"][1]
    schema = json.loads(found["schema"][1])["properties"]["thin"]
    assert schema["properties"]["every"]["default"] == 2
    assert schema["description"].startswith("Settings of `method: thin`")


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("misspelt", "Did you mean 'thin.every'?"),
        ("wrong", "thin.every is 0; expected at least 1."),
        ("other", "thin.every is set but method is 'full'; set method to thin"),
    ],
)
def test_its_settings_are_refused_in_words(found: dict[str, Any], case: str, expected: str) -> None:
    code, said = found[case]
    assert code == 2
    assert expected in said
    assert "Traceback" not in said


def test_settings_that_come_too_late_are_refused() -> None:
    lt.TrainConfig("m", "d")

    @dataclass(frozen=True)
    class Late:
        every: int = 1

    with pytest.raises(ConfigError, match=r"method late has settings, and comes after"):

        @register
        class LateMethod(Method):
            name = "late"
            help = "too late"
            settings: ClassVar[Any] = Late

    assert "late" not in lt.METHODS
