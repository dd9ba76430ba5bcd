"""An ablation of every task that is trained: its losses are those that the run evaluated."""

import json
from typing import Any

import pandas as pd
import pytest
from helpers_tasks import (
    build_bert,
    build_t5,
    build_vit,
    build_whisper,
    write_images,
    write_pairs,
    write_speech,
    write_tags,
    write_texts,
)

import lisa_train as lt
from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.schema import ABLATION
from lisa_train.command.training import train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore:.*delta_norm.*")
TASKS: dict[str, tuple[Any, Any]] = {
    "text-classification": (build_bert, lambda f: write_texts(f.with_suffix(".jsonl"))),
    "token-classification": (build_bert, lambda f: write_tags(f.with_suffix(".jsonl"))),
    "seq2seq-lm": (build_t5, lambda f: write_pairs(f.with_suffix(".jsonl"))),
    "image-classification": (build_vit, write_images),
    "speech-recognition": (build_whisper, write_speech),
}


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("task", TASKS)
def test_every_task(task, method, tmp_path):
    build, write = TASKS[task]
    more = {"lora": {"r": 2}} if method == "lora" else {}
    run = train(
        lt.TrainConfig(
            str(build(tmp_path / "model")), str(write(tmp_path / "data")), method,
            str(tmp_path / "run"), task=task, max_steps=3, learning_rate=1e-2, max_length=32,
            eval_size=6, progress_bar=False, per_device_train_batch_size=4, **more,
        )
    )  # fmt: skip
    if (task, method) == ("speech-recognition", "full"):
        with pytest.raises(LisaError, match=r"lacks the processor that .* adapters are"):
            lt.ablate(run, progress=False)
        return
    found = lt.ablate(run, progress=False)
    rows = pd.read_parquet(run / ABLATION)
    whole = rows[rows["unit"].isna()].groupby("mode")
    mean = whole["loss"].sum() / whole["tokens"].sum()
    result = json.loads((run / "run.json").read_text())["result"]
    assert mean["trained"] == pytest.approx(result["last_held_out_loss"], rel=1e-3)
    layers = {str(i) for i in range(len(json.loads((run / "run.json").read_text())["layers"]))}
    assert layers <= set(rows["unit"].dropna())
    assert set(rows["data"]) == {"held_out"}
    assert found.summary.forgetting is None


def test_classes_of_other_data_have_no_number_for_an_adapter(tmp_path):
    data = write_texts(tmp_path / "data.jsonl")
    run = train(
        lt.TrainConfig(
            str(build_bert(tmp_path / "model")), str(data), "lora", str(tmp_path / "run"),
            task="text-classification", max_steps=2, eval_size=6, progress_bar=False,
        )
    )  # fmt: skip
    with pytest.raises(LisaError, match="only the run's own data say which class has which"):
        lt.ablate(run, data=str(data), progress=False)
