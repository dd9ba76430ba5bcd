"""Text to text, images and speech by every method; and images and sounds that are not right."""

import dataclasses
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_models import build_tiny_model, write_jsonl
from helpers_tasks import (
    RATE,
    assert_resumed_equals_uninterrupted,
    build_bert,
    build_t5,
    build_vit,
    build_whisper,
    copy_with,
    train_watched,
    write_images,
    write_pairs,
    write_speech,
    write_texts,
    write_tone,
)
from transformers import (
    AutoConfig,
    T5ForConditionalGeneration,
    ViTForImageClassification,
    WhisperForConditionalGeneration,
)

import lisa_analysis as la
import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_analysis.views.cli import main as analyze
from lisa_train.command.cli import main
from lisa_train.command.tasks.image_classification import read_image
from lisa_train.command.tasks.sound import read_sound
from lisa_train.command.training import train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore:.*delta_norm.*")
# What IA³ scales in each architecture, and the score of the task.
TASKS: dict[str, tuple[list[str], str]] = {
    "seq2seq-lm": (["k", "v"], "token_accuracy"),
    "image-classification": (["k_proj", "v_proj"], "accuracy"),
    "speech-recognition": (["k_proj", "v_proj"], "word_error_rate"),
}
HEADS: dict[str, Any] = {
    "seq2seq-lm": T5ForConditionalGeneration,
    "image-classification": ViTForImageClassification,
    "speech-recognition": WhisperForConditionalGeneration,
}
METHODS = ("full", "lora", "lisa", "peft", "select")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Model and data of every task."""
    home = tmp_path_factory.mktemp("inputs")
    build_tiny_model(home / "llama", layers=4)
    return {
        "seq2seq-lm": (build_t5(home / "t5"), write_pairs(home / "pairs.jsonl")),
        "image-classification": (build_vit(home / "vit"), write_images(home / "images")),
        "speech-recognition": (build_whisper(home / "whisper"), write_speech(home / "speech")),
        "causal-lm": (home / "llama", write_texts(home / "texts.jsonl")),
    }


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bert(tmp_path_factory.mktemp("bert"))


def settings(
    inputs: dict[str, tuple[Path, Path]], out: Path, task: str, method: str, **more: Any
) -> lt.TrainConfig:
    model, data = inputs[task]
    targets = TASKS[task][0] if task in TASKS else ["k_proj", "v_proj"]
    scaled = {"peft_type": "ia3", "target_modules": targets, "feedforward_modules": []}
    groups = ("head",) if task == "image-classification" else ()
    own: dict[str, dict[str, Any]] = {
        "lora": {"lora": {"r": 4}},
        "lisa": {"lisa": lt.LisaConfig(2, 2)},
        "peft": {"peft": scaled, "learning_rate": 3e-2},
        "select": {"select": lt.SelectConfig(last=1, groups=groups)},
    }
    given: dict[str, Any] = {
        "max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "max_length": 32,
        "eval_size": 8, "record": lt.RecordConfig(every=1), "progress_bar": False,
    }  # fmt: skip
    given |= own.get(method, {}) | more
    return lt.TrainConfig(str(model), str(data), method, str(out), task=task, **given)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", [*TASKS, "causal-lm"])
def test_methods_learn_resume_and_what_rests_keeps_its_bits(
    task: str, method: str, inputs: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    config = settings(inputs, tmp_path / "run", task, method, save_steps=6)
    run, _ = train_watched(config, monkeypatch)
    scores = list(run.manifest["result"].get("last_held_out_scores") or {})
    assert scores[:1] == ([TASKS[task][1]] if task in TASKS else [])
    if method == "lisa" and task in ("seq2seq-lm", "speech-recognition"):
        drawn = run.events.query("event == 'lisa_draw'")["layers"]
        assert all(
            sum(i < 2 for i in layers) == 1 == sum(i > 1 for i in layers) for layers in drawn
        )
        assert sorted(run.manifest["lisa"]["activated_of_stack"].values()) == [1, 1]
    assert_resumed_equals_uninterrupted(config, run)


def test_a_run_of_two_stacks_becomes_probabilities_that_the_next_one_draws_each_by(
    inputs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command's file, and with the same numbers in other stacks a sentence and code 2."""
    task = "seq2seq-lm"
    pilot = train(settings(inputs, tmp_path / "pilot", task, "full", max_steps=6))
    path = tmp_path / "p.json"
    assert analyze([str(pilot), "--probabilities", str(path), "--ignore-intervals"]) == 0
    pi = np.array(json.loads(path.read_text())["inclusion_probabilities"])
    assert [pi[:2].sum(), pi[2:].sum()] == pytest.approx([1, 1])
    assert np.ptp(pi) > 0.01
    config = settings(inputs, tmp_path / "next", task, "lisa", max_steps=4)
    by_file = dataclasses.replace(config, lisa=lt.LisaConfig(2, 1, probabilities=str(path)))
    draws = la.load(train(by_file)).events.query("event == 'lisa_draw'")
    assert {tuple(i > 1 for i in layers) for layers in draws["layers"]} == {(False, True)}
    np.testing.assert_allclose(np.stack(list(draws["inclusion_probabilities"])), [pi] * 4)
    record = json.loads(path.read_text()) | {"inclusion_probabilities": [0.3, 0.5, 0.6, 0.6]}
    path.write_text(json.dumps(record))
    model, data = inputs[task]
    words = ["--config", "lisa", "--task", task, "--model_name_or_path", str(model),
             "--dataset_name", str(data), "--output_dir", str(tmp_path / "refused"),
             "--lisa.probabilities", str(path)]  # fmt: skip
    capsys.readouterr()
    assert main(words) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert "sum to 0.8 in encoder.block, 1.2 in decoder.block" in said
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("task", TASKS)
def test_a_probe_and_an_estimate(task: str, inputs: Any, tmp_path: Path) -> None:
    config = settings(inputs, tmp_path / "run", task, "probe", probe=lt.ProbeConfig(3))
    assert len(la.importance(la.load(train(config)), metric="grad_signal")) == 4
    source = AutoConfig.from_pretrained(inputs[task][0])
    source.architectures = [HEADS[task].__name__]
    found = lt.estimate_memory(source, "full", sequence_length=16, optim="sgd")
    model = HEADS[task](source)
    assert found.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_command_estimates_a_task(
    inputs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = "image-classification"
    model = copy_with(inputs[task][0], tmp_path / "one", num_hidden_layers=1)
    words = ["--estimate", "--model_name_or_path", str(model), "--task", task, "--method", "full",
             "--optim", "sgd"]  # fmt: skip
    assert main(words) == 0
    assert "as configured" in capsys.readouterr().out


def test_what_an_estimate_counts_of_images_is_what_a_step_keeps(inputs: Any) -> None:
    """Twice the images, twice the activations; weights and gradients as they are."""
    source = AutoConfig.from_pretrained(inputs["image-classification"][0])
    source.architectures = ["ViTForImageClassification"]
    one, two = (lt.estimate_memory(source, "full", batch_size=b, optim="sgd").fullest
                for b in (8, 16))  # fmt: skip
    assert two.weights == one.weights
    assert two.gradients == one.gradients
    assert two.activations == pytest.approx(2 * one.activations, rel=0.01)


def test_instructions_are_answered(inputs: Any, tmp_path: Path) -> None:
    rows = [{"instruction": f"say {n}", "input": "", "output": "brown fox"} for n in range(40)]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    both = {"seq2seq-lm": (inputs["seq2seq-lm"][0], data)}
    config = settings(both, tmp_path / "run", "seq2seq-lm", "full", max_steps=2)
    run = la.load(train(dataclasses.replace(config, task="auto")))
    assert run.manifest["task"] == "seq2seq-lm"


def test_the_word_error_rate_is_that_of_what_the_saved_model_writes(
    inputs: Any, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoFeatureExtractor, AutoTokenizer

    from lisa_train.command.tasks.scores import word_error_rate

    task = "speech-recognition"
    folder = tmp_path / "speech"
    write_speech(folder / "train", 24)
    write_speech(folder / "test", 6)
    both = {task: (inputs[task][0], folder)}
    run = la.load(train(settings(both, tmp_path / "run", task, "full", max_steps=25)))
    saved = run.path / "checkpoints" / "final"
    model = WhisperForConditionalGeneration.from_pretrained(saved).eval()
    tokenizer = AutoTokenizer.from_pretrained(saved)
    extractor = AutoFeatureExtractor.from_pretrained(inputs[task][0])
    said, meant = [], []
    for n in range(6):
        sound = read_sound(f"{n}.wav", folder / "test", RATE)
        features = extractor(sound, sampling_rate=RATE, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(features["input_features"], max_length=24)
        said += tokenizer.batch_decode(ids, skip_special_tokens=True)
        meant.append(" ".join([("low", "high")[n % 2]] * 2))
    found = run.manifest["result"]["last_held_out_scores"]["word_error_rate"]
    assert found == pytest.approx(word_error_rate(said, meant))
    first = run.events[run.events["event"] == "evaluate"]["metrics"].iloc[0]
    assert found < first["eval_word_error_rate"]


# ------------------------------------------------------------------ images and sounds


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_sounds_of_every_width_are_the_samples_that_were_written(
    width: int, tmp_path: Path
) -> None:
    if width == 1:
        import wave

        with wave.open(str(tmp_path / "a.wav"), "wb") as file:
            file.setparams((1, 1, RATE, 0, "NONE", ""))
            file.writeframes(bytes([128, 192, 64, 255]))
        assert read_sound("a.wav", tmp_path, RATE).tolist() == [0, 0.5, -0.5, 127 / 128]
        return
    write_tone(tmp_path / "a.wav", 440, width=width)
    time = np.arange(RATE // 2) / RATE
    found = read_sound("a.wav", tmp_path, RATE)
    assert found.dtype == np.float32
    assert (
        np.abs(found - 0.5 * np.sin(2 * np.pi * 440 * time)).max() < 2.0 ** (1 - 8 * width) + 1e-7
    )


def test_two_channels_are_averaged_and_arrays_are_taken(tmp_path: Path) -> None:
    array = np.stack([np.ones(4), np.zeros(4)], axis=1)
    found = read_sound({"array": array, "sampling_rate": RATE}, tmp_path, RATE)
    assert found.tolist() == [0.5] * 4


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("slow.wav", r"8000 samples a second and the model expects 16000; convert"),
        ("gone.wav", r"gone.wav cannot be read \(No such file"),
        ("text.wav", r"text.wav is no WAV file of whole numbers .*install soundfile"),
        (None, r"'None' is no sound"),
        ({"array": [], "sampling_rate": RATE}, r"the sound has no samples"),
    ],
    ids=str,
)
def test_sounds_that_cannot_be_used(value: Any, expected: str, tmp_path: Path) -> None:
    write_tone(tmp_path / "slow.wav", 440, rate=8000)
    (tmp_path / "text.wav").write_text("no sound")
    with pytest.raises(ConfigError, match=expected):
        read_sound(value, tmp_path, RATE)


def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"a.png cannot be read as an image"):
        read_image("a.png", tmp_path)
    with pytest.raises(ConfigError, match=r"None.* is no image"):
        read_image({"path": None, "bytes": None}, tmp_path)


@pytest.mark.parametrize("fault", ["image", "torn", "sound", "text"])
def test_one_bad_row_is_named_before_anything_is_written(
    fault: str, inputs: Any, tmp_path: Path
) -> None:
    task = "image-classification" if fault in ("image", "torn") else "speech-recognition"
    if fault in ("image", "torn"):
        folder = write_images(tmp_path / "d", 12)
        path = folder / "train" / "dark" / "4.png"
        path.write_bytes(path.read_bytes()[:200] if fault == "torn" else b"no image at all")
        expected = r"of split 'train' of .*cannot be read as an image .*Replace it"
    else:
        folder = write_speech(tmp_path / "d", 12)
        if fault == "sound":
            write_tone(folder / "4.wav", 440, rate=8000)
        else:
            path = folder / "metadata.csv"
            path.write_text(path.read_text().replace("4.wav,low low", "4.wav,"))
        expected = r"row 5 of split 'train' .*" + ("8000 samples" if fault == "sound" else "'text'")
    both = {task: (inputs[task][0], folder)}
    with warnings.catch_warnings(), pytest.raises(ConfigError, match=expected):
        train(settings(both, tmp_path / "run", task, "full", eval_size=0))
    assert not (tmp_path / "run").exists()


def test_lists_of_sounds_with_their_columns_named(inputs: Any, tmp_path: Path) -> None:
    task = "speech-recognition"
    write_speech(tmp_path / "s", 12)
    rows = [{"file": f"s/{n}.wav", "words": "low"} for n in range(12)]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    both = {task: (inputs[task][0], data)}
    columns = {"audio": "file", "text": "words"}
    run = train(settings(both, tmp_path / "run", task, "full", max_steps=1, columns=columns))
    assert la.load(run).manifest["dataset"]["train_examples"] == 4


# ------------------------------------------------------------------ one sentence, exit code 2


def _no_label(folder: Path) -> Path:
    rows = [{"picture": f"images/{n}.png", "kind": "dark"} for n in range(8)]
    return write_jsonl(folder / "rows.jsonl", rows)


def _labels_of(values: list[Any]) -> Any:
    def write(folder: Path) -> Path:
        images = write_images(folder / "d", len(values))
        paths = sorted(str(p.resolve()) for p in images.rglob("*.png"))
        rows = [{"image": p, "label": v} for p, v in zip(paths, values, strict=True)]
        return write_jsonl(folder / "rows.jsonl", rows)

    return write


def _torn(folder: Path) -> Path:
    images = write_images(folder / "d", 8)
    (images / "train" / "dark" / "4.png").write_bytes(b"no image at all")
    return images


def _sounds(fault: str) -> Any:
    def write(folder: Path) -> Path:
        speech = write_speech(folder / "d", 8)
        listed = speech / "metadata.csv"
        if fault == "rate":
            write_tone(speech / "3.wav", 440, rate=8000)
        elif fault == "gone":
            (speech / "3.wav").unlink()
        elif fault == "text":
            listed.write_text(listed.read_text().replace("file_name,text", "file_name,words"))
        return speech

    return write


def _tags(row: dict[str, Any]) -> Any:
    def write(folder: Path) -> Path:
        rows = [{"tokens": ["a", "fox"], "tags": ["x", "y"]} for _ in range(8)]
        return write_jsonl(folder / "rows.jsonl", [*rows, row])

    return write


def _images(folder: Path) -> Path:
    return write_images(folder / "d", 12)


def _held_out(folder: Path) -> Path:
    """Images with a class in the held-out part that training has not."""
    images = write_images(folder / "d", 12)
    shutil.copytree(images / "train" / "dark", images / "test" / "blue")
    shutil.copytree(images / "train" / "light", images / "test" / "light")
    return images


def _unseen_tag(folder: Path) -> Path:
    rows = [{"tokens": ["a", "fox"], "tags": ["x", "y"]} for _ in range(8)]
    (folder / "d").mkdir()
    write_jsonl(folder / "d" / "train.jsonl", rows)
    write_jsonl(folder / "d" / "test.jsonl", [rows[0], {"tokens": ["a"], "tags": ["z"]}])
    return folder / "d"


# Task, what writes the data, what is said; perhaps whose model is taken, and more words.
BAD: dict[str, tuple[Any, ...]] = {
    "columns of an image": (
        "image-classification", _no_label,
        r"columns 'picture', 'kind', and task image-classification reads 'image' and 'label'",
    ),
    "an image that is none": ("image-classification", _torn, r"cannot be read as an image"),
    "a label that is a fraction": (
        "image-classification", _labels_of([0.5, 1.5] * 4), r"holds 0\.5, which is no class",
    ),
    "a label that is missing": (
        "image-classification", _labels_of(["a", "b", None, "a"] * 2), r"holds no label \(None\)",
    ),
    "a label that is a list": (
        "image-classification", _labels_of([["a"], ["b"]] * 4), r"holds \['a'\], which is no",
    ),
    "one class": ("image-classification", _labels_of(["a"] * 8), r"the one label 'a'"),
    "sound at another rate": (
        "speech-recognition", _sounds("rate"), r"row 4 .*8000 samples a second .*expects 16000",
    ),
    "a sound that is gone": ("speech-recognition", _sounds("gone"), r"row 4 .*3\.wav cannot be"),
    "sounds without a text": (
        "speech-recognition", _sounds("text"), r"task speech-recognition reads 'audio' and 'text'",
    ),
    "a tag too few": (
        "token-classification", _tags({"tokens": ["a", "fox"], "tags": ["x"]}),
        r"row 9 .*column 'tags' must have an entry for each of the 2 tokens; it has 1",
    ),
    "no words": (
        "token-classification", _tags({"tokens": [], "tags": []}), r"'tokens' must be a list of wo",
    ),
    "a tag that is nothing": (
        "token-classification", _tags({"tokens": ["a"], "tags": [None]}), r"holds no label \(None",
    ),
    "a class of images unseen in training": (
        "image-classification", _held_out, r"'blue' has no training example",
    ),
    "a tag unseen in training": (
        "token-classification", _unseen_tag, r"row 2 of split 'test' .*'z' has no training exam",
    ),
    "a model without a head for images": (
        "image-classification", _images, r"no head for it on the model of .*\(bert\)", "bert",
    ),
    "a model without a head for sounds": (
        "speech-recognition", _sounds(""), r"no head for it on the model of .*\(vit\)",
        "image-classification",
    ),
    "a model without a head for answers": (
        "seq2seq-lm", lambda folder: write_pairs(folder / "d.jsonl", 12),
        r"no head for it on the model of .*\(vit\)", "image-classification",
    ),
    "settings of another method": (
        "image-classification", _images, r"lora\.r is set but method is 'full'", None,
        "--lora.r", "2",
    ),
    "settings of LISA for the head alone": (
        "image-classification", _images, r"lisa\.activated_layers is set but method is 'select'",
        None, "--config", "head", "--lisa.activated_layers", "3",
    ),
    "an unknown task": ("image-clasification", _torn, r"Did you mean 'image-classification'"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_the_command_refuses_in_one_sentence(
    what: str, inputs: Any, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, write, expected, *more = BAD[what]
    data = write(tmp_path)
    whose = (more[0] if more else None) or task
    model = inputs[whose][0] if whose in inputs else bert
    words = ["--config", "full", "--task", task, "--model_name_or_path", str(model),
             "--dataset_name", str(data), "--output_dir", str(tmp_path / "run")]  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main([*words, "--max_steps", "1", "--eval_size", "0", *more[1:]]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(said) == 1, said
    assert said[0].startswith("lisa-train: ")
    assert re.search(expected, said[0]), said[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_of_a_class_is_said(
    inputs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = "image-classification"
    (write_images(tmp_path / "d", 12) / "train" / "blue").mkdir()
    both = {task: (inputs[task][0], tmp_path / "d")}
    run = train(settings(both, tmp_path / "run", task, "full", max_steps=1, eval_size=4))
    said = [line for line in capsys.readouterr().err.splitlines() if "'train/blue'" in line]
    assert len(said) == 1
    assert "folders without an image, which are no classes" in said[0]
    assert la.load(run).manifest["dataset"]["labels"] == ["dark", "light"]


@pytest.mark.parametrize("task", ["auto", "speech-recognition"])
def test_a_model_that_spells_by_ctc_is_refused_in_one_sentence(
    task: str, inputs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers as hf

    config = hf.Wav2Vec2Config(architectures=["Wav2Vec2ForCTC"])
    config.save_pretrained(tmp_path / "model")
    words = ["--config", "lisa", "--task", task, "--model_name_or_path", str(tmp_path / "model"),
             "--dataset_name", str(inputs["speech-recognition"][1])]  # fmt: skip
    capsys.readouterr()
    assert main([*words, "--output_dir", str(tmp_path / "run")]) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert re.search(r"\(wav2vec2\) spells sounds out by CTC.*give a model that writes", said)
    assert not (tmp_path / "run").exists()
