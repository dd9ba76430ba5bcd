"""A task that the package does not know: registered here, trained, scored, refused."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from helpers_models import write_jsonl
from helpers_tasks import build_bert, classified

import lisa_analysis as la
import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError, LisaError
from lisa_analysis.contract.fields import HELD_OUT_SCORES
from lisa_analysis.runs.losses import RunSummary, score_columns, table
from lisa_train.command.tasks import TASKS, register, task_named
from lisa_train.command.tasks.data import TrainingData
from lisa_train.command.tasks.plain_trainer import TaskWithHead
from lisa_train.command.tasks.task import Loaded
from lisa_train.command.tasks.tokens import tokenized
from lisa_train.command.training import train


class CountWords(TaskWithHead):
    """How many words a text has, as a number."""

    name = "count-words"
    mappings: ClassVar[Mapping[str, str]] = {
        "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"
    }
    reads: ClassVar[Mapping[str, str]] = {"text": "the text"}
    needed = ("text",)
    new_scores: ClassVar[Mapping[str, str]] = {"closeness": "share of counts within one word"}

    def load(self, config: Any) -> Loaded:
        train_part, held_out = self.parts(config)
        model, new = self.load_model(
            config, self.source(config), num_labels=1, problem_type="regression"
        )
        tokenizer = self.load_tokenizer(config)
        model.config.pad_token_id = tokenizer.pad_token_id

        def make(rows: dict[str, Any]) -> dict[str, Any]:
            counts = [len(text.split()) / 10 for text in rows["text"]]
            return tokenizer(rows["text"]) | {"labels": counts}

        rows = tokenized((train_part, held_out), make)
        data: TrainingData = self.data(train_part, held_out, rows, config, ())
        return Loaded(model, tokenizer, data, new)

    def collator(self, loaded: Loaded, config: Any) -> Any:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(loaded.processor)

    def predictions(self, logits: Any, labels: Any) -> Any:
        return logits

    def scores(self, predicted: Any, labels: Any, loaded: Loaded) -> Mapping[str, float]:
        return {"closeness": float(np.mean(np.abs(predicted.ravel() - labels.ravel()) < 0.1))}


@pytest.fixture
def counting() -> Iterator[None]:
    register(CountWords)
    yield
    del TASKS["count-words"]
    HELD_OUT_SCORES.pop("closeness", None)


def test_a_task_can_be_added_from_outside(counting: None, tmp_path: Path) -> None:
    model = build_bert(tmp_path / "bert", layers=2)
    rows = [{"text": " ".join(classified(n)["text"].split()[: 2 + n % 5])} for n in range(40)]
    config = lt.TrainConfig(
        str(model), str(write_jsonl(tmp_path / "texts.jsonl", rows)), "lisa",
        str(tmp_path / "run"), task="count-words", max_steps=8, per_device_train_batch_size=8,
        learning_rate=5e-3, eval_size=10, lisa=lt.LisaConfig(1, 2),
        record=lt.RecordConfig(every=1), progress_bar=False,
    )  # fmt: skip
    train(config)
    run = la.load(tmp_path / "run")
    result = run.manifest["result"]
    assert run.status == "finished"
    assert run.manifest["task"] == "count-words"
    assert result["last_held_out_loss"] < result["first_held_out_loss"]
    [closeness] = result["last_held_out_scores"].values()
    assert set(result["last_held_out_scores"]) == {"closeness"}
    # Whoever reads the run knows nothing of the task.
    del HELD_OUT_SCORES["closeness"]
    frame = table([RunSummary.of(run, "run")])
    assert score_columns(frame) == ["closeness"]
    assert frame["closeness"].tolist() == [closeness]
    assert f"closeness {closeness:.4f}" in lt.METHODS["lisa"].outcome(result)


def test_a_score_without_a_meaning_is_refused(counting: None, monkeypatch: Any) -> None:
    monkeypatch.setattr(CountWords, "new_scores", {})
    output = SimpleNamespace(predictions=np.ones((2, 1)), label_ids=np.ones(2))
    with pytest.raises(LisaError, match="task count-words gives the score 'closeness', of which"):
        task_named("count-words")._judge(Loaded(None, None, None), output)


def test_names_are_taken_and_given_back(counting: None, tmp_path: Path) -> None:
    register(CountWords)  # the cell of a notebook, run again
    for name in ("text-classification", "auto"):
        with pytest.raises(ConfigError, match=f"task {name!r} is built in"):
            register(type("Mine", (CountWords,), {"name": name}))
    with pytest.raises(ConfigError, match=re.escape("count-words")):
        lt.TrainConfig("m", "d", "full", str(tmp_path), task="count-word")


def test_without_it_the_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="task is 'count-words', but must be one of auto"):
        lt.TrainConfig("m", "d", "full", str(tmp_path), task="count-words")
