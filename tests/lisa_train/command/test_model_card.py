"""The card of a trained model: numbers of the run, in the folder of the weights and on the hub."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import lisa_analysis as la
from lisa_train.command.training import train
from lisa_train.config import LisaConfig, RecordConfig, TrainConfig


def trained(model: Path, data: Path, out: Path, **settings: Any) -> Path:
    fast = {"max_steps": 4, "per_device_train_batch_size": 4, "max_length": 16,
            "record": RecordConfig(every=1), "progress_bar": False}  # fmt: skip
    return train(TrainConfig(str(model), str(data), output_dir=str(out), **fast | settings))


def parts(card: str) -> tuple[dict[str, Any], str]:
    _, front, text = card.split("---\n", 2)
    return yaml.safe_load(front), text


def test_a_lisa_model_says_its_probabilities_and_what_was_measured(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    lisa = LisaConfig(activated_layers=1, interval_steps=2, probabilities=(0.1, 0.2, 0.3, 0.4))
    run_dir = trained(tiny_model_dir, text_file, tmp_path / "run", method="lisa", lisa=lisa)
    front, text = parts((run_dir / "checkpoints" / "final" / "README.md").read_text())
    assert front == {"library_name": "transformers", "tags": ["lisa-toolkit", "lisa"]}
    run = la.load(run_dir)
    result = run.manifest["result"]
    assert f"| held-out loss after | {result['last_held_out_loss']:,.4f} |" in text
    assert "| optimizer steps | 4 |" in text
    draws = [layers for e, layers in zip(run.events["event"], run.events["layers"], strict=True)
             if e == "lisa_draw"]  # fmt: skip
    for layer, pi in enumerate(lisa.probabilities):
        visits = sum(layer in drawn for drawn in draws)
        assert f"| {run.layer_names[layer]} | {pi:.4f} | {visits} |" in text
    assert str(tmp_path) not in text  # no folder of this machine
    assert str(tiny_model_dir) not in text


def test_an_adapter_is_pushed_with_its_card(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer pushes as `trainer_args` say; the hub is a stand-in."""
    import transformers

    pushed: list[tuple[str, str]] = []

    def upload(*, repo_id: str, folder_path: str, **_: Any) -> None:
        pushed.append((repo_id, (Path(folder_path) / "README.md").read_text()))

    def init(self: Any, **_: Any) -> None:
        self.hub_model_id, self.push_in_progress = "me/mine", None

    monkeypatch.setattr(transformers.Trainer, "init_hf_repo", init)
    hub = SimpleNamespace(upload_folder=upload)
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    run_dir = trained(
        tiny_model_dir, text_file, tmp_path / "run", method="lora",
        lora={"r": 2, "target_modules": ["q_proj"]},
        trainer_args={"push_to_hub": True, "hub_model_id": "me/mine"},
    )  # fmt: skip
    card = (run_dir / "adapter" / "README.md").read_text()
    front, text = parts(card)
    assert front["library_name"] == "peft"
    assert "| r | 2 |" in text
    assert pushed == [("me/mine", card)]
