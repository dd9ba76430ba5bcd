"""Settings that contradict or make no sense are refused in one sentence."""

import dataclasses
import math
import shutil
from pathlib import Path

import pytest

from lisa_analysis import load
from lisa_analysis.contract.errors import ConfigError
from lisa_analysis.rundir.configurations import differing, settings
from lisa_train.command.output import to_yaml
from lisa_train.config import LisaConfig, TrainConfig

GOLDEN = Path(__file__).parents[2] / "data" / "golden-run"


def make(**settings: object) -> TrainConfig:
    return TrainConfig(model_name_or_path="m", dataset_name="d", **settings)  # type: ignore[arg-type]


def test_configurations_are_frozen_values() -> None:
    config = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
    assert config == make()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "loar"}, "Did you mean 'lora'"),
        ({"method": "full", "lora": {"r": 8}}, "lora.r is set but method is 'full'"),
        ({"method": "lora", "lisa": LisaConfig(activated_layers=3)}, "lisa.activated_layers"),
        ({"bf16": True, "fp16": True}, "bf16 and fp16 are both true"),
        ({"dtype": "float16", "method": "full"}, "fp16 weights cannot be trained"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; expected 0 or more"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"per_device_train_batch_size": 0}, "expected at least 1"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"max_steps": -1, "num_train_epochs": 0.0}, "nothing would be trained"),
        ({"eval_steps": 5, "eval_size": 0, "dataset_test_split": None}, "nothing is held out"),
        ({"lisa": LisaConfig(precision="fp32_active")}, "but dtype is float32, in which every"),
        ({"packing": True, "max_length": None}, "set the length to pack to"),
        ({"assistant_only_loss": True, "completion_only_loss": True}, "both true"),
        ({"trainer_args": {"learning_rate": 1.0}}, "write learning_rate at the top level"),
        ({"trainer_args": {"deepspeed": "zero1.json"}}, "trainer_args.deepspeed is set, but grad"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**settings)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message


def test_no_default_tells_a_run_of_today_from_one_of_an_older_version(tmp_path: Path) -> None:
    """What the golden run did not know has to be off, or stand with its old meaning in the reader.

    Otherwise seeds that were run before and after an update are two arms, for nothing.
    """
    old = shutil.copytree(GOLDEN, tmp_path / "old")
    known = {line.split(":")[0] for line in (old / "config.yaml").read_text().splitlines()}
    section, lines = "", (old / "config.yaml").read_text().splitlines()
    new = shutil.copytree(GOLDEN, tmp_path / "new")
    added = 0
    for line in to_yaml(make()).splitlines():
        key = line.split(":")[0]
        if not line.startswith((" ", "-")):
            section = f"{key}:"
        if key in known or line.lstrip().startswith("-"):
            continue
        at = lines.index(section) + 1 if line.startswith(" ") else len(lines)
        lines.insert(at, line)
        added += 1
    (new / "config.yaml").write_text("\n".join(lines) + "\n")
    manifest = (old / "run.json").read_text()
    for folder in (old, new):  # as if both were runs of every method: no section is left out
        used = '"method": "full", "lisa": {}, "lora": {}, "peft": {}, "select": {},'
        (folder / "run.json").write_text(manifest.replace('"method": "full",', used))
    assert added > 5
    assert differing([settings(load(old)), settings(load(new))]) == []
