"""`lisa-train` looks for the layers once and reads the probabilities once, from start to end."""

import json
from pathlib import Path
from typing import Any

import pytest

import lisa_analysis as la
from lisa_analysis.contract import probabilities_file
from lisa_train.command.training import train
from lisa_train.config import LisaConfig, RecordConfig, TrainConfig
from lisa_train.model import layer_map
from lisa_train.model.layer_map import find_layers


def settings(model: Path, data: Path, out: Path, **more: Any) -> TrainConfig:
    return TrainConfig(
        str(model), str(data), output_dir=str(out), max_steps=4, per_device_train_batch_size=4,
        max_length=32, save_steps=2, record=RecordConfig(every=1), **more,
    )  # fmt: skip


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    counts = {"scans": 0, "reads": 0}
    stacks, parsed = layer_map.stacks, probabilities_file._parsed

    def scanning(model: Any) -> Any:
        counts["scans"] += 1
        return stacks(model)

    def reading(path: Path) -> Any:
        counts["reads"] += 1
        return parsed(path)

    monkeypatch.setattr(layer_map, "stacks", scanning)
    monkeypatch.setattr(probabilities_file, "_parsed", reading)
    return counts


@pytest.fixture
def probabilities(tiny_model_dir: Path, tmp_path: Path) -> Path:
    from transformers import AutoModelForCausalLM

    names = find_layers(AutoModelForCausalLM.from_pretrained(tiny_model_dir)).names
    path = tmp_path / "probabilities.json"
    la.SamplingProbabilities(
        model="tiny", layer_names=names, activated_layers=1,
        inclusion_probabilities=(0.1, 0.2, 0.3, 0.4), scores=(None,) * 4, metric="given",
        gamma=1.0, mix=0.0, floor=0.0, cap=4.0, n_eff=None, source_runs=(), verdict="",
        created="2026-11-26",
    ).save(path)  # fmt: skip
    return path


def test_of_lisa_with_a_file(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, probabilities: Path,
    counted: dict[str, int],
) -> None:  # fmt: skip
    lisa = LisaConfig(activated_layers=1, interval_steps=2, probabilities=str(probabilities))
    run_dir = train(settings(tiny_model_dir, text_file, tmp_path / "run", method="lisa", lisa=lisa))
    assert counted == {"scans": 1, "reads": 1}
    event = next(
        json.loads(line)
        for line in (run_dir / "events.jsonl").read_text().splitlines()
        if "lisa_draw" in line
    )
    assert event["inclusion_probabilities"] == [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize("method", ["full", "lora", "probe"])
def test_of_the_other_methods(
    method: str, tiny_model_dir: Path, text_file: Path, tmp_path: Path, counted: dict[str, int]
) -> None:
    train(settings(tiny_model_dir, text_file, tmp_path / "run", method=method))
    assert counted == {"scans": 1, "reads": 0}


def test_a_file_that_has_changed_is_read_again(
    probabilities: Path, counted: dict[str, int]
) -> None:
    load = la.SamplingProbabilities.load
    first = load(probabilities)
    assert load(probabilities) == first
    record = json.loads(probabilities.read_text())
    record["inclusion_probabilities"] = [0.25, 0.25, 0.25, 0.25]
    probabilities.write_text(json.dumps(record))
    assert load(probabilities).inclusion_probabilities == (0.25,) * 4
    assert counted["reads"] == 2


def test_a_model_that_has_changed_is_looked_at_again(counted: dict[str, int]) -> None:
    from helpers_recording import llama

    from lisa_train.model.layer_cache import known_layers

    model = llama()
    first = known_layers(model)
    assert known_layers(model) is first
    del model.model.layers[2]
    assert len(known_layers(model)) == 2
    assert counted["scans"] == 2
