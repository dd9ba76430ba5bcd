"""Names in the settings of adapters: PEFT passes over those that fit nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_train.command.training import train


def settings(model: Path, data: Path, out: Path, **lora: Any) -> lt.TrainConfig:
    return lt.TrainConfig(
        str(model), str(data), "lora", str(out), lora={"r": 2, **lora}, max_steps=2, eval_size=0,
        max_length=32, per_device_train_batch_size=4, save_steps=1, progress_bar=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ({"target_modules": ["q_proj", "nope"]}, "lora.target_modules holds 'nope'"),
        ({"target_modules": ["q_proj", "k_porj"]}, "Did you mean 'k_proj'"),
        ({"modules_to_save": ["nope"]}, "lora.modules_to_save holds 'nope'"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [1, 99]},
            "lora.layers_to_transform holds 99, but the model has no such layer",
        ),
        ({"task_type": "SEQ_CLS"}, "lora.task_type is SEQ_CLS, but for the task .* CAUSAL_LM"),
        ({"peft_type": "IA3"}, "set method to peft"),
        ({"inference_mode": True}, "lora.inference_mode is true, with which PEFT freezes"),
    ],
    ids=str,
)
def test_what_fits_nothing_is_refused(
    lora: dict[str, Any], says: str, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        train(settings(tiny_model_dir, text_file, tmp_path / "run", **lora))
    assert not (tmp_path / "run").exists()


def test_names_that_fit_are_taken_and_a_run_of_before_goes_on(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        "target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"],
        "task_type": "CAUSAL_LM", "peft_type": "LORA", "inference_mode": False,
    }  # fmt: skip
    run_dir = train(settings(tiny_model_dir, text_file, tmp_path / "a", **given))
    saved = json.loads((run_dir / "adapter/adapter_config.json").read_text())
    assert sorted(saved["target_modules"]) == sorted(given["target_modules"])
    with monkeypatch.context() as patched:  # as versions before did
        patched.setattr("lisa_train.command.training.check_adapter_names", lambda *_: None)
        wrong = settings(tiny_model_dir, text_file, tmp_path / "b", target_modules=["q_proj", "x"])
        before = train(wrong)
    shutil.rmtree(before / "checkpoints" / "checkpoint-2")
    assert train(wrong, resume=True) == before
