"""Help in screens, the schema for editors, completion, and how much the command prints."""

import contextlib
import dataclasses
import importlib
import io
import json
import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from lisa_analysis.contract.errors import ConfigError
from lisa_analysis.views.cli import main as analyze
from lisa_train.command import help as screens
from lisa_train.command.ablate import main as ablate
from lisa_train.command.cli import main, parse, recipes
from lisa_train.command.config import TrainConfig

LINES, WIDTH = 24, 80
NEEDED = ["--model_name_or_path", "m", "--dataset_name", "d"]


def shown(command: Any, *words: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        command(list(words))
    return out.getvalue()


@pytest.mark.parametrize("command", [main, analyze, ablate])
def test_the_first_screen_fits_a_terminal_and_the_rest_is_behind_all(command: Any) -> None:
    first = shown(command, "--help").splitlines()
    assert 10 < len(first) < LINES
    assert max(map(len, first)) <= WIDTH
    assert any("--help all" in line for line in first)
    whole = shown(command, "--help", "all").splitlines()
    assert len(whole) > len(first)
    assert shown(command, "-h") == shown(command, "--help")


@pytest.mark.parametrize(
    ("command", "module"),
    [(analyze, "lisa_analysis.views.cli"), (ablate, "lisa_train.command.ablate")],
)
def test_the_first_screen_names_options_that_there_are(command: Any, module: str) -> None:
    parser = importlib.import_module(module).build_parser()
    named = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", shown(command, "--help")))
    assert len(named) > 8
    assert named <= set(parser._option_string_actions)


@pytest.mark.parametrize("group", screens.GROUPS)
def test_a_group_fits_a_screen(group: str) -> None:
    lines = shown(main, "--help", group).splitlines()
    assert len(lines) < LINES
    assert max(map(len, lines)) <= WIDTH
    assert group in shown(main, "--help")


def test_every_setting_stands_in_one_group_and_has_words() -> None:
    found: list[str] = []
    for group in screens.GROUPS:
        lines = shown(main, "--help", group).splitlines()
        found += [line.split()[0][2:] for line in lines if line.startswith("  --")]
    top = {name.split(".")[0] for name in found}
    assert top == {f.name for f in dataclasses.fields(TrainConfig)}
    assert len(found) == len(set(found))
    known = dict(screens._settings("", TrainConfig))
    sections = {name for name in known if any(other.startswith(f"{name}.") for other in known)}
    assert set(found) == set(known) - (sections - {"lisa.learn"})
    assert all(text for _, text in known.values()), "a setting without a word in its docstring"


def test_one_setting_is_told_in_full() -> None:
    told = shown(main, "--help", "max_grad_norm")
    assert (
        told == "--max_grad_norm 1.0\n  Gradients are clipped to this global norm; 0 never clips.\n"
    )
    assert "--record.every 10" in shown(main, "--help", "record")
    assert set(recipes()) <= set(shown(main, "--help", "recipes").split())


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("lr", "knows no 'lr'"),
        ("learning_rat", "Did you mean 'learning_rate'?"),
        ("date", "'data'"),
    ],
)
def test_help_for_an_unknown_word_is_one_sentence(
    word: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--help", word]) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1


def test_estimate_has_a_screen_of_its_own() -> None:
    said = {shown(main, *words) for words in (["estimate", "--help"], ["estimate", "-h"])}
    [screen] = {*said, shown(main, "--help", "estimate")}
    assert screen.startswith("usage: lisa-train estimate ")
    assert len(screen.splitlines()) <= LINES
    assert max(map(len, screen.splitlines())) <= WIDTH
    known = {field.name for field in dataclasses.fields(TrainConfig)} | {"memory", "config", "help"}
    assert set(re.findall(r"--(\w+)", screen)) <= known
    config = TrainConfig(model_name_or_path="m", dataset_name="d")
    for default in (config.per_device_train_batch_size, config.max_length, config.dtype):
        assert f"({default})" in screen
    for text in (screen, shown(main, "--help", "all")):
        assert "of every method, from" not in " ".join(text.split())  # IA³, select, … have no row


def test_estimate_is_a_word(tmp_path: Path) -> None:
    words = ["--model_name_or_path", "m", "--memory", "24GB"]
    spelled = parse(["--estimate", *words])
    assert parse(["estimate", *words]) == spelled
    assert spelled.estimate


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json.loads(shown(main, "--schema"))


class TestSchema:
    def test_it_holds_every_setting_with_its_default(self, schema: dict[str, Any]) -> None:
        properties = {k: v for k, v in schema["properties"].items() if k != "$schema"}
        assert set(properties) == {f.name for f in dataclasses.fields(TrainConfig)}
        for field in dataclasses.fields(TrainConfig):
            if isinstance(field.default, int | float | str):
                assert properties[field.name]["default"] == field.default, field.name
            assert properties[field.name].get("description"), field.name
        assert properties["method"]["enum"] == ["full", "lisa", "lora", "peft", "select", "probe"]
        assert "image-classification" in properties["task"]["enum"]
        nested = json.dumps(properties["lisa"])
        assert "interval_steps" in nested
        assert "required" not in json.dumps(schema)

    def test_every_recipe_is_valid_by_it_and_a_slip_is_not(self, schema: dict[str, Any]) -> None:
        jsonschema = pytest.importorskip("jsonschema")
        validator = jsonschema.Draft202012Validator(schema)
        for path in recipes().values():
            validator.validate(yaml.safe_load(path.read_text()))
        for wrong in ({"learning_rat": 1e-4}, {"lisa": {"interval": 3}}, {"max_steps": "many"},
                      {"method": "loar"}, {"dtype": "float23"}):  # fmt: skip
            with pytest.raises(jsonschema.ValidationError):
                validator.validate(wrong)

    def test_a_file_may_name_its_schema(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.yaml"
        path.write_text("$schema: ./schema.json\nmethod: full\n")
        assert parse(["--config", str(path), *NEEDED]).config.method == "full"


class TestCompletion:
    @pytest.mark.parametrize("command", [main, analyze, ablate])
    def test_a_script_that_bash_reads(self, command: Any, tmp_path: Path) -> None:
        pytest.importorskip("shtab")
        script = tmp_path / "complete.sh"
        script.write_text(shown(command, "--completion", "bash"))
        subprocess.run(["bash", "-n", script], check=True)
        option = {main: "--lisa.interval_steps", analyze: "--export", ablate: "--restore"}[command]
        assert option in script.read_text()

    @pytest.mark.parametrize("command", [main, analyze, ablate])
    def test_without_shtab_it_says_what_to_install(
        self, command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "shtab", None)
        assert command(["--completion", "bash"]) == 2
        assert "pip install shtab" in capsys.readouterr().err
        assert command(["--completion", "bsh"]) == 2
        assert "one of bash, zsh, tcsh. Did you mean 'bash'?" in capsys.readouterr().err


class TestVolume:
    """`--quiet`, `--verbose`: what reaches the terminal, with the training itself left out."""

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
        asked: dict[str, Any] = {}

        def train(config: TrainConfig, **options: Any) -> Path:
            asked.update(options)
            warnings.warn("a library speaks", UserWarning, stacklevel=1)
            logging.getLogger("lisa_train.methods").warning("a note")
            return tmp_path

        monkeypatch.setattr("lisa_train.command.training.train", train)
        monkeypatch.setattr("lisa_train.command.training.summary", lambda run_dir: "the summary")
        with warnings.catch_warnings():
            yield asked

    def test_quiet_prints_the_run_directory_alone(
        self, asked: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str],
        caplog: pytest.LogCaptureFixture,
    ) -> None:  # fmt: skip
        assert main([*NEEDED, "-q"]) == 0
        assert capsys.readouterr() == (f"{tmp_path}\n", "")
        assert not caplog.records
        assert asked["quiet"] is True

    def test_without_it_the_summary_is_printed(
        self, asked: dict[str, Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.warns(UserWarning, match="a library speaks"):
            assert main(NEEDED) == 0
        assert capsys.readouterr().out == "the summary\n"
        assert asked["quiet"] is False

    def test_verbose_shows_where_a_refusal_comes_from(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["--config", "nowhere", "-v"]) == 2
        said = capsys.readouterr().err
        assert "Traceback" in said
        assert said.rstrip().splitlines()[-1].startswith("lisa-train: --config nowhere")
        assert main(["--config", "nowhere"]) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_a_run_can_be_quiet(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["--model_name_or_path", str(tiny_model_dir), "--dataset_name", str(text_file),
             "--output_dir", str(run), "--max_steps", "2", "--max_length", "16", "--config", "full",
             "--save_final_model", "false"]  # fmt: skip
    levels = {name: logging.getLogger(name).level for name in ("lisa_train", "transformers")}
    with warnings.catch_warnings():
        assert main([*words, "--quiet"]) == 0
    for name, level in levels.items():  # in a notebook or a test the process goes on
        assert logging.getLogger(name).level == level
    out, err = capsys.readouterr()
    assert out == f"{run}\n"
    assert err == ""
    assert yaml.safe_load((run / "config.yaml").read_text())["progress_bar"] is None


@pytest.mark.parametrize(
    "words", [["tensorboard"], ["tensorboard,wandb"], ["[tensorboard, wandb]"]]
)
def test_trackers_are_named_as_one_word_or_a_list(words: list[str], tmp_path: Path) -> None:
    wanted = tuple(words[0].strip("[]").replace(" ", "").split(","))
    assert parse([*NEEDED, "--report_to", *words]).config.report_to == wanted
    path = tmp_path / "mine.yaml"
    path.write_text(f"report_to: {words[0]}\n")
    assert parse(["--config", str(path), *NEEDED]).config.report_to == wanted


class TestTensorBoard:
    def words(self, model: Path, data: Path, run: Path, tracker: str) -> list[str]:
        return ["--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir",
                str(run), "--max_steps", "4", "--max_length", "16", "--config", "full",
                "--report_to", tracker, "--logging_steps", "1", "--record.report_layers", "true",
                "--record.every", "1", "--record.flush_seconds", "0", "--save_final_model",
                "false", "-q"]  # fmt: skip

    def test_its_files_hold_every_layer(
        self, tiny_model_dir: Path, text_file: Path, tmp_path: Path
    ) -> None:
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        run = tmp_path / "run"
        with warnings.catch_warnings():
            assert main(self.words(tiny_model_dir, text_file, run, "tensorboard")) == 0
        files = list(run.rglob("events.out.tfevents.*"))
        assert len(files) == 1
        found = EventAccumulator(str(files[0])).Reload()
        layers = [t for t in found.Tags()["scalars"] if t.startswith("train/grad_norm/layer_")]
        assert sorted(layers) == [f"train/grad_norm/layer_{i}" for i in range(4)]
        assert "train/loss" in found.Tags()["scalars"]

    def test_without_it_the_refusal_is_a_sentence(
        self, tiny_model_dir: Path, text_file: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        from transformers.integrations import integration_utils

        monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)
        run = tmp_path / "run"
        assert main(self.words(tiny_model_dir, text_file, run, "tensorboard")) == 2
        assert "tensorboard" in capsys.readouterr().err.lower()
        assert main(self.words(tiny_model_dir, text_file, run, "tensorbord")) == 2
        assert "tensorbord" in capsys.readouterr().err
        assert not run.exists()


def test_an_old_jsonargparse_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from jsonargparse import ArgumentParser

    monkeypatch.delattr(ArgumentParser, "get_completion_script")
    with pytest.raises(ConfigError, match="pip install --upgrade jsonargparse"):
        parse(["--schema"])
    assert parse(NEEDED).config.method == "lisa"
