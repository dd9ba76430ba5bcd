"""`lisa-train --estimate` and `--memory`: the table across methods, and bad input."""

import subprocess
import sys
from pathlib import Path

import helpers_memory as small
import pytest

import lisa_train as lt
from lisa_train.command.cli import main, parse
from lisa_train.command.estimate import setting_of
from lisa_train.estimate.cards import Card
from lisa_train.estimate.setting import Setting
from lisa_train.estimate.table import CONFIGURED, method_table

SHORT = ["--max_length", "32", "--per_device_train_batch_size", "2"]
METHODS = [
    CONFIGURED, "full", "LoRA r=16", "LoRA r=128", "LISA E+H", "LISA E+H+2L", "LISA E+H+4L",
    "LISA 2L, no E, H, norm",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config.json and nothing else."""
    path = tmp_path_factory.mktemp("config")
    small.llama(hidden_size=128, intermediate_size=352).save_pretrained(path)
    return path


def test_the_table_needs_a_configuration_only(folder, capsys):
    assert main(["--model_name_or_path", str(folder), *SHORT, "--memory", "1GB,600MiB"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("LlamaForCausalLM")
    header = out[2].split()
    assert header == [
        "method", "weights", "gradients", "optimizer", "activations", "logits", "total", "needs",
        "1", "GB", "600", "MiB",
    ]  # fmt: skip
    rows = out[3 : 3 + len(METHODS)]
    assert [row[: len(name)] for row, name in zip(rows, METHODS, strict=True)] == METHODS
    assert all(row.split()[-2:] == ["fits", "fits"] for row in rows[-1:])
    assert any("E+H embedding and head" in line and "2L two layers" in line for line in out)


def test_the_configured_row_is_what_the_command_line_says(folder, capsys):
    words = ["--config", "lora", "--lora.r", "7", "--optim", "sgd", "--dtype", "bfloat16"]
    words += ["--bf16", "true"]
    command = parse(["--estimate", "--model_name_or_path", str(folder), *SHORT, *words])
    assert command.estimate
    assert command.cards == ()
    setting = setting_of(command.config)
    assert (setting.method, setting.lora["r"], setting.optim) == ("lora", 7, "sgd")
    assert (setting.batch_size, setting.sequence_length) == (2, 32)
    assert (setting.dtype, setting.autocast, setting.chunked_loss) == (
        "bfloat16", "bfloat16", True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "words", [["--memory", "24", "GB"], ["--memory=24GB"], ["--memory", "24GB"]]
)
def test_a_size_may_be_written_in_two_words(words):
    command = parse([*words, "--model_name_or_path", "m"])
    assert command.estimate
    assert command.cards == (Card("24 GB", 24 * 10**9),)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--memory", "24", "bananas"], "--memory '24 bananas' is not a size of memory"),
        (["--memory", "24"], "--memory '24' is not a size of memory"),
        (["--memory"], "--memory '' is not a size of memory"),
        (["--estimate", "--optim", "adamw"], "optim is 'adamw'"),
        (["--estimate", "--lisa.activated_layers", "9"], "activated_layers is 9"),
        (["--estimate", "--max_length", "null"], "max_length is null"),
        (["--estimate", "--learning_rat", "1"], "Did you mean 'learning_rate'"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_sentence_and_exit_2(words, expected, folder, capsys):
    assert main(["--model_name_or_path", str(folder), *words]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1


def test_a_model_that_is_not_there_is_one_sentence(capsys, tmp_path):
    assert main(["--estimate", "--model_name_or_path", str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_the_shell_prints_the_table_alone(folder):
    done = subprocess.run(
        [sys.executable, "-m", "lisa_train", "--estimate", "--model_name_or_path", str(folder),
         *SHORT],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert CONFIGURED in done.stdout


def test_rows_are_estimates_of_their_own():
    config = small.llama()
    base = Setting(sequence_length=32, dtype="bfloat16", lisa=lt.LisaConfig(1), optim="sgd")
    table = method_table(config, base, (Card("tiny", 10**6), Card("huge", 10**12)))
    assert list(table.rows) == METHODS
    options = {"sequence_length": 32, "dtype": "bfloat16", "optim": "sgd"}
    single = {
        CONFIGURED: lt.estimate_memory(config, "lisa", lisa=lt.LisaConfig(1), **options),
        "full": lt.estimate_memory(config, "full", **options),
        "LoRA r=128": lt.estimate_memory(config, "lora", lora={"r": 128}, **options),
        "LISA E+H": lt.estimate_memory(config, "lisa", active_layers=(), **options),
    }
    for name, estimate in single.items():
        assert table.rows[name] == estimate, name
    frame = table.to_frame().set_index("method")
    assert frame.loc["full", "total"] == single["full"].total / 1e9
    assert not frame["tiny"].any()
    assert frame["huge"].all()
    assert "<table" in table._repr_html_()


def test_rows_that_need_more_layers_than_there_are_are_left_out():
    table = method_table(
        small.llama(num_hidden_layers=1), Setting(sequence_length=16, lisa=lt.LisaConfig(1))
    )
    assert "LISA E+H+2L" not in table.rows
    assert "LISA E+H" in table.rows
