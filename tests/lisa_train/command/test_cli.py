"""The command line: recipes by name, overrides at any depth, strict keys with suggestions."""

import dataclasses
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from lisa_analysis.contract.errors import ConfigError
from lisa_train.command.cli import main, parse, recipes
from lisa_train.command.volume import at_volume
from lisa_train.command.words import MEANT
from lisa_train.config import LisaConfig, TrainConfig

PROGRAMS = {
    "lisa_train": "lisa-train",
    "lisa_train.command.ablate": "lisa-ablate",
    "lisa_analysis": "lisa-analyze",
}
NEEDED = ["--model_name_or_path", "m", "--dataset_name", "d"]


@pytest.mark.parametrize(("rank", "prints"), [(None, True), ("0", True), ("1", False)])
def test_of_several_processes_the_first_prints_the_summary(
    rank: str | None, prints: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("lisa_train.command.training.train", lambda config, **_: tmp_path)
    monkeypatch.setattr("lisa_train.command.training.summary", lambda run_dir: "the summary")
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert main([*NEEDED, "--config", "lisa"]) == 0
    assert capsys.readouterr().out == ("the summary\n" if prints else "")


@pytest.mark.parametrize("name", sorted(recipes()))
def test_every_recipe_is_valid(name: str) -> None:
    wanted = yaml.safe_load(recipes()[name].read_text())
    config = parse(["--config", name, *NEEDED]).config
    assert config.method == wanted["method"]


def test_the_recipes_that_the_docs_name_are_found() -> None:
    named = {
        "full",
        "lora",
        "lisa",
        "lisa-lean",
        "lisa-learned",
        "lisa-modules",
        "probe",
        "peft",
        "head",
        "bitfit",
    }
    assert named <= set(recipes())


@pytest.mark.parametrize(
    "text", ['{"r": 8, "target_modules": ["q_proj"]}', "r: 8\ntarget_modules: [q_proj]"]
)
def test_a_section_is_read_from_a_file(tmp_path: Path, text: str) -> None:
    """As `lisa-analyze --export peft-rank:FILE` writes it."""
    (tmp_path / "lora.json").write_text(text)
    for words in (["--lora", str(tmp_path / "lora.json")], [f"--lora={tmp_path / 'lora.json'}"]):
        config = parse(["--config", "lora", *words, *NEEDED]).config
        assert config.lora == {"r": 8, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("text", "words"),
    [("[1, 2]", "holds list; expected the fields of lora"), ("{", "cannot be read")],
)
def test_a_section_that_a_file_does_not_hold_is_one_sentence(
    tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "lora.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        parse(["--config", "lora", "--lora", str(tmp_path / "lora.json"), *NEEDED])


def test_the_shell_overrides_the_file_at_any_depth(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "model_name_or_path: m\ndataset_name: d\nlearning_rate: 5e-5\n"
        "lisa:\n  activated_layers: 3\n  interval_steps: 7\n"
    )
    config = parse(["--config", str(recipe), "--lisa.activated_layers=4", "--seed", "7"]).config
    assert config.lisa == LisaConfig(activated_layers=4, interval_steps=7)
    assert config.learning_rate == 5e-5  # plain YAML reads `5e-5` as text
    assert config.seed == 7


def test_any_lora_field_is_passed_on() -> None:
    words = ["--config", "lora", *NEEDED, "--lora.use_rslora", "true", "--lora.r", "8"]
    assert parse(words).config.lora == {
        "r": 8,
        "lora_alpha": 32,
        "target_modules": "all-linear",
        "use_rslora": True,
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--lisa.activated_layer", "3"], "Did you mean 'lisa.activated_layers'?"),
        (["--learning_rat=1"], "Did you mean 'learning_rate'?"),
        (["--lisa.activated_layers", "x"], "lisa.activated_layers: expected int, got x"),
        (["--method", "loar"], "method"),
        (["--config", "lsia"], "Did you mean 'lisa'?"),
        (["--config", "nowhere.yaml"], "neither a file nor a recipe"),
        (["--zzz", "1"], "lisa-train --help"),
        (["--resme"], "Did you mean 'resume'?"),
        (["--dtype", "float23"], "float16, got float23. Did you mean 'float32'?"),
        (["--lisa.sampling", "x"], "expected one of uniform, bernoulli, cyclic"),
        (["--record.quantities", "descent"], "expected a list, as '[descent]', got descent"),
        (["--eight_bit_states", "layers"], "expected a list, as '[a, b]'"),
        (["--lr", "1e-4"], "Did you mean 'learning_rate'?"),
        (["--batch_size=4"], "Did you mean 'per_device_train_batch_size'?"),
        (["--batch-size", "4"], "Did you mean 'per_device_train_batch_size'?"),
        (["--epochs", "3"], "Did you mean 'num_train_epochs'?"),
        (["--model", "m"], "Did you mean 'model_name_or_path'?"),
        (["--dataset", "d"], "Did you mean 'dataset_name'?"),
        (["--lora_r", "4"], "Did you mean 'lora.r'?"),
        (["--lora-alpha=4"], "Did you mean 'lora.lora_alpha'?"),
        (["--lisa_activated_layers", "2"], "Did you mean 'lisa.activated_layers'?"),
        (["--lisa_nothing", "2"], "Unknown --lisa_nothing"),
    ],
)
def test_bad_words_are_refused_in_one_sentence(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*NEEDED, *words]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1


def test_a_recipe_without_its_option_is_told_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", *NEEDED]) == 2
    assert "a recipe is named with --config probe" in capsys.readouterr().err


def test_what_other_trainers_call_a_setting_is_none_of_ours_and_leads_to_one() -> None:
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    for word, meant in MEANT.items():
        assert word not in known
        assert meant.split(".")[0] in known


@pytest.mark.parametrize("module", ["lisa_train", "lisa_train.command.ablate", "lisa_analysis"])
def test_every_command_says_its_version_and_loads_no_training_for_it(module: str) -> None:
    code = (
        "import atexit, runpy, sys\n"
        "heavy = {'torch', 'transformers', 'jsonargparse', 'pandas', 'pyarrow'}\n"
        "atexit.register(lambda: print(*sorted(heavy & set(sys.modules))))\n"
        "sys.argv[1:] = ['--version']\n"
        f"runpy.run_module({module!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, heavy = done.stdout.split("\n")[:2]
    assert said.split() == [PROGRAMS[module], metadata.version("lisa-toolkit")]
    assert heavy == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rte: 1", "Did you mean 'learning_rate'?"),
        ("lisa:\n  intervall_steps: 3", "Did you mean 'lisa.interval_steps'?"),
        ("lisa: [1, 2", "cannot be read as YAML"),
        ("- a\n- b", "expected `key: value` lines"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(
    text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert main([*NEEDED, "--config", str(path)]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert str(path) in message
    assert message.count("\n") == 1


def test_missing_required_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="missing --model_name_or_path, --dataset_name"):
        parse(["--config", "lisa"])


def test_print_config_is_a_configuration_that_reads_back(tmp_path: Path) -> None:
    words = ["--config", "lora", *NEEDED, "--lora.r", "4", "--max_steps", "9"]
    done = subprocess.run(
        [sys.executable, "-m", "lisa_train", *words, "--print_config"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    path = tmp_path / "printed.yaml"
    path.write_text(done.stdout)
    assert parse(["--config", str(path)]).config == parse(words).config


def test_resume_takes_the_run_from_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    path = tmp_path / "config.yaml"
    path.write_text("model_name_or_path: m\ndataset_name: d\n")
    command = parse(["--config", str(path), "--resume"])
    assert command.resume
    assert command.config == TrainConfig("m", "d", output_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="--resume needs the run to continue"):
        parse([*NEEDED, "--resume"])


def test_resume_without_settings_is_told_where_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("method: full\n")
    assert main(["--resume", "--output_dir", str(tmp_path)]) == 2
    said = f"--resume needs the settings of the run: add --config {tmp_path / 'config.yaml'}."
    assert said in capsys.readouterr().err
    assert main(["--resume", "--config", str(tmp_path)]) == 2
    assert f"is a folder; that of a run is repeated or continued with --config {tmp_path}" in (
        capsys.readouterr().err
    )


def test_warnings_are_shown_without_the_code_of_a_library(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = warnings.formatwarning
    with at_volume():
        assert warnings.formatwarning(UserWarning("a\nb"), UserWarning, "x.py", 1, "code") == (
            "warning: a b\n"
        )
    assert warnings.formatwarning is before
    with at_volume(verbose=True):
        assert warnings.formatwarning is before


def test_a_number_of_examples_is_whole() -> None:
    with pytest.raises(ConfigError, match=r"eval_size is 1\.5; expected a fraction below 1"):
        TrainConfig("m", "d", eval_size=1.5)
    TrainConfig("m", "d", eval_size=2.0)
