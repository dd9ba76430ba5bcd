"""Names with signs that mean something to a library below: the file that was named is the one."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from helpers_models import build_tiny_model, sentence, write_jsonl

import lisa_analysis as la
from lisa_analysis.views.cli import main as analyze
from lisa_train.command.cli import main, parse
from lisa_train.command.output import expand_home
from lisa_train.command.tasks.data import load_data
from lisa_train.command.tasks.literal_paths import literal_path
from lisa_train.config import TrainConfig

NAMES = [
    "chat[1]", "chat*", "chat?", "{chat1,b}", "chat%31", "a#b", "~chat", "a b", "a::chat1", "$HOME",
    "a'b\"c", "ünï", "<b>&amp;", "http:", "a;b|c", "a\\b", "-x", "[chat1]", "!x", "layer=3",
]  # fmt: skip


def rows(word: str, n: int = 24) -> list[dict[str, str]]:
    return [{"text": f"{word} {i}"} for i in range(n)]


def words(path: Path | str) -> set[str]:
    data = load_data(TrainConfig("m", str(path), eval_size=0))
    return {text.split()[0] for text in data.train["text"]}


@pytest.fixture
def decoys(tmp_path: Path) -> Path:
    """A folder with files and folders that patterns of `NAMES` would find instead."""
    for name in ("chat1", "chat12", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", rows("wrong"))
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", rows("wrong"))
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_the_data_that_was_named_is_read(
    name: str, decoys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_jsonl(decoys / f"{name}.jsonl", rows("right"))
    folder = decoys / name
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", rows("right"))
    inside = decoys / "inside"
    inside.mkdir()
    write_jsonl(inside / f"{name}.jsonl", rows("right"))
    saved = decoys / f"saved {name}"
    DatasetDict(train=Dataset.from_list(rows("right"))).save_to_disk(decoys / "s")
    (decoys / "s").rename(saved)
    for path in (file, folder, inside, saved):
        assert words(path) == {"right"}
    monkeypatch.chdir(decoys)
    assert words(file.name) == {"right"}
    assert words(folder.name) == {"right"}


def test_a_plain_path_stays_as_it_is(tmp_path: Path) -> None:
    """Its cache is found again; only a path that needs it gets another name."""
    plain = write_jsonl(tmp_path / "data-1.2_ü, x.jsonl", rows("right"))
    assert literal_path(plain) == plain
    odd = write_jsonl(tmp_path / "data[1].jsonl", rows("right"))
    assert literal_path(odd) != odd
    assert literal_path(odd).read_bytes() == odd.read_bytes()


def test_files_whose_plain_names_coincide_are_all_read(tmp_path: Path) -> None:
    for name in ("a::b", "a_b", "a$b"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}])
    assert sorted(load_data(TrainConfig("m", str(tmp_path), eval_size=0)).train["text"]) == [
        "a$b", "a::b", "a_b",
    ]  # fmt: skip


@pytest.mark.parametrize("word", ["# c", "&a", "!x", "[a]", "{a: b}", "5", "*a", "'q'"])
@pytest.mark.parametrize("option", ["dataset_name", "output_dir", "lisa.probabilities"])
def test_a_name_on_the_command_line_is_no_yaml(option: str, word: str) -> None:
    needed = ["--model_name_or_path=m", "--dataset_name=d"]
    for argv in ([f"--{option}={word}"], [f"--{option}", word]):
        value = parse([*needed, *argv]).config
        for key in option.split("."):
            value = getattr(value, key)
        assert value == word


def test_a_tilde_is_the_home_folder_everywhere_or_a_name_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    config = TrainConfig("~/m", "~/d.jsonl", output_dir="~/runs/a")
    config = dataclasses.replace(
        config, lisa=dataclasses.replace(config.lisa, probabilities="~/p.json")
    )
    found = expand_home(config)
    home = str(tmp_path / "home")
    assert found.model_name_or_path == f"{home}/m"
    assert found.dataset_name == f"{home}/d.jsonl"
    assert found.output_dir == f"{home}/runs/a"
    assert found.lisa.probabilities == f"{home}/p.json"
    (tmp_path / "~").mkdir()
    (tmp_path / "~" / "m").mkdir()
    assert expand_home(config).model_name_or_path == "~/m"


@pytest.mark.parametrize("name", ["r[1]*?{a,b}~ %20#'\"<b>::$HOME&ü", "http:r", "~r"])
def test_the_whole_loop_in_a_folder_of_such_a_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train, resume, analyse, report, and train again with the probabilities: by relative names."""
    folder = tmp_path / name
    folder.mkdir()
    build_tiny_model(tmp_path / "m", layers=2)
    shutil.move(tmp_path / "m", folder / f"{name}m")
    write_jsonl(folder / f"{name}.jsonl", [{"text": sentence(i)} for i in range(24)])
    monkeypatch.chdir(folder)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    before = set(tmp_path.iterdir())
    base = [f"--model_name_or_path={name}m", f"--dataset_name={name}.jsonl", "--max_steps=4",
            "--per_device_train_batch_size=2", "--save_steps=1", "--save_total_limit=2",
            "--progress_bar=false", "--dtype=float32"]  # fmt: skip
    assert main([*base, "--method=lora", f"--output_dir={name}run"]) == 0
    run_dir = folder / f"{name}run"
    checkpoints = run_dir / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir() if p.is_dir()) == [
        "checkpoint-3", "checkpoint-4",
    ]  # fmt: skip
    assert json.loads((run_dir / "run.json").read_text())["status"] == "finished"
    losses = list(la.load(run_dir).scalars["loss"])
    shutil.rmtree(checkpoints / "checkpoint-4")
    assert main([f"--config={name}run/config.yaml", "--resume"]) == 0
    assert list(la.load(run_dir).scalars["loss"]) == losses
    probabilities = f"{name}p.json"
    assert analyze([f"-o={name}.html", f"--probabilities={probabilities}", f"{name}run"]) == 0
    assert "'\"<b>" not in (folder / f"{name}.html").read_text()
    lisa = ["--method=lisa", "--lisa.activated_layers=2", f"--lisa.probabilities={probabilities}"]
    assert main([*base, *lisa, f"--output_dir={name}lisa"]) == 0
    assert set(tmp_path.iterdir()) == before
    assert all(path.name.startswith(".") for path in home.iterdir())  # caches of libraries
    expected = {"m", "run", "lisa", ".html", "p.json", ".jsonl"}
    assert set(os.listdir(folder)) == {name + end for end in expected}
