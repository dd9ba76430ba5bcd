"""The held-out part: a split that was asked for is there or refused, and what stands in for it."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers_models import write_jsonl

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_train.command.tasks import task_named
from lisa_train.command.tasks.data import TrainingData, load_data

ROWS = 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set with the splits train and validation."""
    path = tmp_path / "data"
    path.mkdir()
    for split, rows in (("train", ROWS), ("validation", 7)):
        lines = [json.dumps({"text": f"line {i}", "label": f"{i % 2}"}) for i in range(rows)]
        (path / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines))
    return path


def loaded(data: Path, **settings: Any) -> TrainingData:
    return load_data(lt.TrainConfig("m", str(data), **settings))


def sizes(data: TrainingData) -> tuple[int, int | None]:
    return len(data.train), None if data.held_out is None else len(data.held_out)


def test_a_split_that_is_named_and_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"has no split 'validaton', only 'train', 'validation'; .* Did you mean 'validation'",
    ):
        loaded(folder, dataset_test_split="validaton")
    with pytest.raises(ConfigError, match="has no split 'dev'"):
        loaded(folder, dataset_test_split="dev", eval_size=0)


def test_the_split_that_is_trained_on_is_not_held_out_beside(folder: Path) -> None:
    with pytest.raises(ConfigError, match="are both 'validation'"):
        loaded(folder, dataset_train_split="validation", dataset_test_split="validation")


def test_a_share_in_the_place_of_the_default_split_is_said(folder: Path) -> None:
    data = loaded(folder)
    assert sizes(data) == (ROWS - 2, 2)
    assert data.said == (
        f"{folder} has no split 'test': 5 % of split 'train' (eval_size) are held out instead; it "
        "has split 'validation': set dataset_test_split to validation",
    )
    limited = loaded(folder, eval_size=12, max_eval_samples=3)
    assert "12 examples of split 'train'" in limited.said[0]


def test_one_file_has_no_other_split_to_name(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": f"line {i}"} for i in range(ROWS)])
    assert loaded(path).said[0].endswith("5 % of split 'train' (eval_size) are held out instead")


@pytest.mark.parametrize("settings", [
    {"dataset_test_split": "validation"}, {"dataset_test_split": None}, {"eval_size": 0},
])  # fmt: skip
def test_nothing_is_said_where_the_settings_say_it(settings: dict[str, Any], folder: Path) -> None:
    data = loaded(folder, **settings)
    assert data.said == ()
    assert (
        sizes(data)
        == {"validation": (ROWS, 7), None: (ROWS - 2, 2), "test": (ROWS, None)}[
            settings.get("dataset_test_split", "test")
        ]
    )


def test_a_split_called_test_that_is_trained_on_is_no_mistake(folder: Path) -> None:
    (folder / "validation.jsonl").rename(folder / "test.jsonl")
    data = loaded(folder, dataset_train_split="test", eval_size=2)
    assert sizes(data) == (5, 2)
    assert "trains on split 'test': 2 examples" in data.said[0]


def test_an_eval_size_beside_a_held_out_split_is_said(folder: Path) -> None:
    data = loaded(folder, dataset_test_split="validation", eval_size=0.2)
    assert sizes(data) == (ROWS, 7)
    assert "is held out, and eval_size 0.2 has no effect" in data.said[0]


def test_tasks_with_a_head_say_it_too(folder: Path) -> None:
    config = lt.TrainConfig("m", str(folder), task="text-classification")
    task: Any = task_named("text-classification")
    train, held_out = task.parts(config)
    rows = (train.dataset, held_out.dataset)
    assert "has no split 'test'" in task.data(train, held_out, rows, config).said[0]
