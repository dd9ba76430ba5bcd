"""Classification of texts and words by every method: it learns, resumes, and is estimated."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers_models import write_jsonl
from helpers_tasks import (
    CLASSES,
    assert_resumed_equals_uninterrupted,
    build_bert,
    classified,
    copy_with,
    train_watched,
    write_tags,
    write_texts,
)

import lisa_analysis as la
import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError, ProbabilitiesError
from lisa_analysis.views.cli import main as analyze
from lisa_train.command.cli import main
from lisa_train.command.training import summary, train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore:.*delta_norm.*")
TASKS = ("text-classification", "token-classification")
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": {"r": 4}, "learning_rate": 1e-2},
    "lisa": {"lisa": lt.LisaConfig(1, 2)},
    "peft": {"peft": {"peft_type": "ia3", "target_modules": ["key", "value"],
                      "feedforward_modules": []}, "learning_rate": 5e-2},
    "select": {"select": lt.SelectConfig(last=2, groups=("head",))},
}  # fmt: skip


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("classes")
    return {
        "text-classification": write_texts(folder / "texts.jsonl"),
        "token-classification": write_tags(folder / "tags.jsonl"),
    }


def settings(model: Path, data: Path, out: Path, task: str, method: str, **more: Any) -> Any:
    given: dict[str, Any] = {
        "max_steps": 20, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "max_length": 32,
        "eval_size": 16, "record": lt.RecordConfig(every=1), "progress_bar": False,
    }  # fmt: skip
    given |= METHODS.get(method, {}) | more
    return lt.TrainConfig(str(model), str(data), method, str(out), task=task, **given)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", TASKS)
def test_every_method_learns_resumes_and_what_rests_keeps_its_bits(
    task: str, method: str, bert: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    config = settings(bert, files[task], tmp_path / "run", task, method, save_steps=14)
    run, norms = train_watched(config, monkeypatch)
    # Scores are in the events, run.json and what is printed.
    scores = run.manifest["result"]["last_held_out_scores"]
    metrics = run.events[run.events["event"] == "evaluate"]["metrics"].iloc[-1]
    assert scores == {n: metrics[f"eval_{n}"] for n in ("accuracy", "macro_f1")}
    assert f"accuracy {scores['accuracy']:.4f}" in summary(run.path)
    heads = [n for n in norms if "classifier" in n]
    names = run.parameters.set_index("param_id")["name"]
    steps = run.metrics(["grad_norm"]).dropna()
    trained = set(steps["param_id"].map(names))
    assert any(n in trained for n in heads), "a new head has to train"
    assert_resumed_equals_uninterrupted(config, run)


@pytest.mark.parametrize("task", TASKS)
def test_a_probe_measures_every_layer(
    task: str, bert: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    config = settings(bert, files[task], tmp_path / "run", task, "probe", probe=lt.ProbeConfig(4))
    profile = la.importance(la.load(train(config)), metric="grad_signal")
    assert len(profile) == 4


def test_the_held_out_loss_and_scores_are_those_of_the_saved_model(
    bert: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    task = "text-classification"
    held_out = write_jsonl(tmp_path / "test.jsonl", [classified(n) for n in range(100, 121)])
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(files[task], folder / "train.jsonl")
    shutil.copy(held_out, folder / "test.jsonl")
    run = la.load(train(settings(bert, folder, tmp_path / "run", task, "full")))
    saved = run.path / "checkpoints" / "final"
    model = AutoModelForSequenceClassification.from_pretrained(saved).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert model.config.id2label == dict(enumerate(CLASSES))
    losses, right = [], []
    for n in range(100, 121):
        row = classified(n)
        label = torch.tensor([model.config.label2id[row["label"]]])
        with torch.no_grad():
            output = model(**tokenizer(row["text"], return_tensors="pt"), labels=label)
        losses.append(float(output.loss))
        right.append(int(output.logits.argmax()) == int(label))
    result = run.manifest["result"]
    assert result["last_held_out_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert result["last_held_out_scores"]["accuracy"] == pytest.approx(np.mean(right))


def test_columns_classes_and_files_of_other_kinds(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [classified(n) for n in range(40)]
    lines = ["utterance,intent,source"]
    lines += [f"{row['text']},{CLASSES.index(row['label'])},web" for row in rows]
    (tmp_path / "intents.csv").write_text("\n".join(lines) + "\n")
    out = tmp_path / "run"
    words = ["--model_name_or_path", str(bert), "--dataset_name", str(tmp_path / "intents.csv"),
             "--task", "text-classification", "--method", "full", "--max_steps", "2",
             "--columns", "{text: utterance, label: intent}", "--output_dir", str(out)]  # fmt: skip
    assert main(words) == 0
    assert "nothing reads the columns 'source'" in capsys.readouterr().err
    run = la.load(out)
    assert run.manifest["dataset"]["labels"] == ["0", "1"]
    assert main(["--config", str(out / "config.yaml"), "--output_dir", str(tmp_path / "b")]) == 0
    again = la.load(tmp_path / "b")
    assert list(again.scalars["loss"]) == list(run.scalars["loss"])


def test_auto_is_what_the_head_is_for_and_a_trained_head_goes_on(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {0: "sky", 1: "animals"}
    model = build_bert(
        tmp_path / "m", head="BertForSequenceClassification", id2label=names,
        label2id={v: k for k, v in names.items()},
    )  # fmt: skip
    data = files["text-classification"]
    run = la.load(train(settings(model, data, tmp_path / "a", "auto", "full", max_steps=1)))
    assert run.manifest["task"] == "text-classification"
    assert run.manifest["dataset"]["labels"] == ["sky", "animals"]
    assert "task" not in (run.path / "config.yaml").read_text()
    other = copy_with(model, tmp_path / "m3", id2label={0: "x", 1: "y", 2: "z"},
                      label2id={"x": 0, "y": 1, "z": 2})  # fmt: skip
    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_pretrained(
        other, ignore_mismatched_sizes=True
    ).save_pretrained(other)
    train(settings(other, data, tmp_path / "b", "auto", "full", max_steps=1))
    assert "the head starts anew" in capsys.readouterr().err


def test_runs_are_compared_by_their_scores(
    bert: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = "text-classification"
    for method in ("full", "select"):
        train(settings(bert, files[task], tmp_path / method, task, method, max_steps=2))
    capsys.readouterr()
    page = tmp_path / "report.html"
    assert analyze([str(tmp_path / "full"), str(tmp_path / "select"), "-o", str(page)]) == 0
    assert "macro f1" in capsys.readouterr().out
    assert "macro f1" in page.read_text()
    table = la.compare([la.load(tmp_path / m) for m in ("full", "select")]).table
    accuracy = la.load(tmp_path / "full").manifest["result"]["last_held_out_scores"]["accuracy"]
    assert table.set_index("run").loc["full", "accuracy"] == accuracy


@pytest.mark.parametrize("task", TASKS)
def test_the_estimate_is_that_of_the_task(
    task: str, bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--estimate", "--model_name_or_path", str(bert), "--task", task, "--method", "full",
             "--max_length", "16", "--optim", "sgd"]  # fmt: skip
    assert main(words) == 0
    text = capsys.readouterr().out
    head = "Sequence" if task == "text-classification" else "Token"
    assert f"BertFor{head}Classification" in text
    assert "as configured" in text


def rows_with(change: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [dict(classified(n)) for n in range(20)]
    change(rows)
    return rows


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rows: rows[3].update(label=None), r"row 4 of split 'train' of .*no label \(None\)"),
        (lambda rows: rows[3].update(text=""), r"row 4 .*column 'text' holds nothing"),
        (lambda rows: [r.update(label="sky") for r in rows], r"the one label 'sky'"),
        (lambda rows: [r.update(label=n / 7) for n, r in enumerate(rows)], r"which is no class"),
        (lambda rows: [r.update(intent=r.pop("label")) for r in rows],
         r"has the columns 'text', 'intent', and task text-classification reads 'text' and "
         r"'label'; say with columns .*\{label: intent\}"),
    ],
    ids=["null", "empty", "one", "number", "columns"],
)  # fmt: skip
def test_rows_that_cannot_be_classified(
    change: Any, expected: str, bert: Path, tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", rows_with(change))
    with pytest.raises(ConfigError, match=expected):
        train(settings(bert, data, tmp_path / "run", "text-classification", "full"))
    assert not (tmp_path / "run").exists()


def test_a_held_out_label_that_training_does_not_have(bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_texts(folder / "train.jsonl", 20)
    write_jsonl(folder / "test.jsonl", [classified(1), {"text": "a b", "label": "trees"}])
    with pytest.raises(ConfigError, match=r"row 2 of split 'test' .*'trees' has no training exam"):
        train(settings(bert, folder, tmp_path / "run", "text-classification", "full"))


def test_a_class_without_an_example_is_said(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    rows = [classified(n) for n in range(20)]
    features = Features({"text": Value("string"), "label": ClassLabel(names=[*CLASSES, "trees"])})
    numbered = [{"text": r["text"], "label": CLASSES.index(r["label"])} for r in rows]
    Dataset.from_list(numbered, features=features).save_to_disk(str(tmp_path / "d"))
    run = train(
        settings(bert, tmp_path / "d", tmp_path / "run", "text-classification", "full", max_steps=1)
    )
    assert "has the label 'trees'" in capsys.readouterr().err
    assert la.load(run).manifest["dataset"]["labels"] == [*CLASSES, "trees"]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"packing": True}, r"packing is True but task is text-classification"),
        ({"columns": {"lable": "x"}}, r"columns.lable: task .*Did you mean 'label'"),
        ({"columns": {"label": "intents"}}, r"columns.label is 'intents', but split 'train' of "),
        ({"trainer_args": {"max_lengt": 3}}, r"not a field of transformers's TrainingArguments"),
        ({"lora": {"r": 2}}, r"lora.r is set but method is 'full'"),
    ],
    ids=str,
)
def test_settings_that_are_not_those_of_the_task(
    more: dict[str, Any], expected: str, bert: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    task = "text-classification"
    with pytest.raises(ConfigError, match=expected):
        train(settings(bert, files[task], tmp_path / "run", task, "full", **more))
    assert not (tmp_path / "run").exists()


def test_models_without_a_head_for_it(
    bert: Path, tiny_model_dir: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    data = files["text-classification"]
    with pytest.raises(ConfigError, match=r"task is auto, but .*set task to text-classification"):
        train(settings(bert, data, tmp_path / "run", "auto", "full"))
    with pytest.raises(ConfigError, match=r"task is 'text-clasification'.*Did you mean"):
        settings(bert, data, tmp_path / "run", "text-clasification", "full")
    vision = copy_with(bert, tmp_path / "v", model_type="vit", architectures=["ViTModel"])
    with pytest.raises(ConfigError, match=r"no head for it on the model of .*\(vit\)"):
        train(settings(vision, data, tmp_path / "run", "text-classification", "full"))
    task, prompt = "token-classification", {"peft_type": "prompt_tuning", "num_virtual_tokens": 2}
    with pytest.raises(ConfigError, match=r"PROMPT_TUNING puts tokens in front of a text"):
        train(settings(bert, files[task], tmp_path / "run", task, "peft", peft=prompt))


def test_a_head_that_is_new_and_rests_is_said(
    bert: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = "text-classification"
    train(settings(bert, files[task], tmp_path / "run", task, "select", max_steps=1,
                   select=lt.SelectConfig(last=1)))  # fmt: skip
    assert "is new and does not train" in capsys.readouterr().err


def test_a_decoder_classifies_too(
    tiny_model_dir: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    task = "text-classification"
    run = la.load(train(settings(tiny_model_dir, files[task], tmp_path / "r", task, "lora")))
    result = run.manifest["result"]
    assert result["last_held_out_loss"] < result["first_held_out_loss"]


def test_a_classifier_is_ablated_as_a_classifier(
    bert: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    task = "text-classification"
    run = train(settings(bert, files[task], tmp_path / "run", task, "full", max_steps=1))
    lt.ablate(run, max_examples=4)
    modes = set(pd.read_parquet(run / "ablation.parquet")["mode"])
    assert modes == {"trained", "base", "reset", "keep"}


def test_files_made_from_a_bare_encoder_steer_it_under_a_head(
    bert: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    # The folder holds encoder.layer.0, the classifier has bert.encoder.layer.0: the same layers.
    task = "text-classification"
    profile = la.importance(la.load(bert), "base_norm")
    assert profile.layers["name"].iloc[0] == "encoder.layer.0"
    probabilities = la.sampling_probabilities(profile, 1, strength=3.0, use_intervals=False)
    probabilities.save(tmp_path / "pi.json")
    profile.save(tmp_path / "profile.json")
    assert analyze([str(bert), "--export", f"lr:{tmp_path / 'lr.json'}", "-o",
                    str(tmp_path / "report")]) == 0  # fmt: skip

    lisa = lt.LisaConfig(1, 2, probabilities=str(tmp_path / "pi.json"))
    given = settings(bert, files[task], tmp_path / "lisa", task, "lisa", lisa=lisa, max_steps=2)
    drawn = la.load(train(given)).events
    first = drawn[drawn["event"] == "lisa_draw"]["inclusion_probabilities"].iloc[0]
    assert first == pytest.approx(list(probabilities.inclusion_probabilities))

    select = lt.SelectConfig(top=1, profile=str(tmp_path / "profile.json"))
    given = settings(bert, files[task], tmp_path / "top", task, "select", select=select,
                     max_steps=1)  # fmt: skip
    run = la.load(train(given))
    trained = (
        run.metrics(["grad_norm"])
        .dropna()["param_id"]
        .map(run.parameters.set_index("param_id")["layer"])
    )
    assert {*trained.dropna()} == {int(np.argmax(profile.scores))}

    given = settings(bert, files[task], tmp_path / "rates", task, "full", max_steps=1,
                     lr_multipliers=str(tmp_path / "lr.json"))  # fmt: skip
    train(given)
    other = build_bert(tmp_path / "five", layers=5)
    given = settings(other, files[task], tmp_path / "none", task, "lisa", lisa=lisa)
    with pytest.raises(ProbabilitiesError, match="was made for 4 layers, this model has 5"):
        train(given)
