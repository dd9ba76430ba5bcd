"""An ablation of every task that is trained: its losses are those that the run evaluated."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers_ablating import by_hand, mixed
from helpers_models import write_jsonl
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
from lisa_train.command.ablate_examples import held_out_rows
from lisa_train.command.ablate_inputs import load_trained, open_run
from lisa_train.command.training import train
from lisa_train.model.layer_map import find_layers

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
    if method == "full":
        swapped_by_hand(run, tmp_path / "model", rows)


def swapped_by_hand(run: Path, base: Path, rows: pd.DataFrame) -> None:
    """Every layer again: both models as transformers loads them, and one layer of the other."""
    trained = load_trained(open_run(run))
    kind, final = type(trained.model), run / "checkpoints/final"
    models = [kind.from_pretrained(folder).eval() for folder in (base, final)]
    with torch.no_grad():  # a head that the base lacks stays as it was trained
        for (name, own), learned in zip(
            models[0].named_parameters(), models[1].parameters(), strict=True
        ):
            if name in trained.change.unmeasured:
                own.copy_(learned)
    held_out = held_out_rows(trained, None, None)
    for layer, names in enumerate(find_layers(models[0]).layers):
        for start, mode in (("trained", "reset"), ("base", "keep")):
            expected = by_hand(mixed(*models, list(names), start), held_out)
            got = rows[(rows["unit"] == str(layer)) & (rows["mode"] == mode)]
            got = got.sort_values("example")["loss"]
            np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


def test_a_whole_speech_model_can_be_loaded_from_its_run(tmp_path):
    """Final weights and checkpoints hold what makes the inputs; a folder without is refused."""
    from transformers import AutoProcessor

    run = train(
        lt.TrainConfig(
            str(build_whisper(tmp_path / "model")), str(write_speech(tmp_path / "data")), "full",
            str(tmp_path / "run"), task="speech-recognition", max_steps=2, save_steps=2,
            eval_size=4, progress_bar=False, per_device_train_batch_size=4,
        )
    )  # fmt: skip
    for name in ("final", "checkpoint-2"):
        folder = run / "checkpoints" / name
        assert AutoProcessor.from_pretrained(folder).feature_extractor.feature_size == 8
    back = tmp_path / "back"
    lt.restore(run, "1", back, max_examples=2, say=lambda line: None)
    assert AutoProcessor.from_pretrained(back).feature_extractor.feature_size == 8
    (run / "checkpoints/final/preprocessor_config.json").unlink()
    with pytest.raises(LisaError, match=r"holds no preprocessor_config.json, .* copy that of"):
        lt.ablate(run, progress=False)


class TestOtherData:
    """Labels of another file are numbered as the trained head does, whatever classes it has."""

    @pytest.fixture(scope="class", params=["full", "lora"])
    @classmethod
    def run(cls, request, tmp_path_factory):
        folder = tmp_path_factory.mktemp(request.param)
        data = write_texts(folder / "data.jsonl")
        return train(
            lt.TrainConfig(
                str(build_bert(folder / "model")), str(data), request.param, str(folder / "run"),
                task="text-classification", max_steps=3, learning_rate=1e-2, eval_size=6,
                progress_bar=False,
            )
        )  # fmt: skip

    @staticmethod
    def rows(run: Path) -> list[dict[str, Any]]:
        lines = (run.parent / "data.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def test_one_class_of_several(self, run, tmp_path):
        rows = self.rows(run)
        names = sorted({row["label"] for row in rows})
        assert len(names) > 1
        rows = [row for row in rows if row["label"] == names[-1]][:5]
        lt.ablate(run, data=str(write_jsonl(tmp_path / "other.jsonl", rows)), progress=False)
        trained = load_trained(open_run(run))
        expected = []
        for row in rows:
            inputs = trained.tokenizer(row["text"], return_tensors="pt")
            with torch.no_grad():
                logits = trained.model.eval()(**inputs).logits.double()
            expected.append(-logits.log_softmax(-1)[0, len(names) - 1].item())
        got = pd.read_parquet(run / ABLATION)
        got = got[got["unit"].isna() & (got["mode"] == "trained")].sort_values("example")
        np.testing.assert_allclose(got["loss"], expected, rtol=1e-4)

    def test_a_class_that_the_head_does_not_know(self, run, tmp_path):
        rows = [{**row, "label": "neither"} for row in self.rows(run)[:4]]
        other = write_jsonl(tmp_path / "other.jsonl", rows)
        with pytest.raises(LisaError, match=r"labelled 'neither' in column 'label', which the tra"):
            lt.ablate(run, data=str(other), progress=False)

    def test_an_adapter_whose_own_data_are_gone(self, run, tmp_path):
        """Its classes cannot be known; a whole model has them in its config.json."""
        other = shutil.copy(run.parent / "data.jsonl", tmp_path / "other.jsonl")
        (run / ABLATION).unlink(missing_ok=True)
        hidden = (run.parent / "data.jsonl").rename(tmp_path / "elsewhere.jsonl")
        try:
            if (run / "adapter").exists():
                with pytest.raises(LisaError, match=r"in its own data, which cannot be read: "):
                    lt.ablate(run, data=str(other), max_examples=2, progress=False)
            else:
                lt.ablate(run, data=str(other), max_examples=2, progress=False)
        finally:
            hidden.rename(run.parent / "data.jsonl")
