"""Make tests/data/golden-run: a small committed run of schema 1.0 that every later reader opens.

Run it only to add a *new* golden run for a new schema version; the old ones stay, because they
show that old runs remain readable.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import yaml

import lisa_train as lt
from lisa_train.command.training import train

HERE = Path(__file__).resolve().parent
NAMES = {"model": "tiny-llama", "data": "sentences.jsonl"}


def main() -> None:
    """Train an eight-layer Llama of 0.1 M parameters from random weights for 240 steps."""
    sys.path.insert(0, str(HERE.parent))
    from helpers_models import build_tiny_model, sentence  # the fixtures' own model and text

    with tempfile.TemporaryDirectory() as folder:
        model, data = Path(folder) / NAMES["model"], Path(folder) / NAMES["data"]
        build_tiny_model(model, layers=8)
        data.write_text("".join(json.dumps({"text": sentence(n)}) + "\n" for n in range(400)))
        run_dir = train(
            lt.TrainConfig(
                str(model), str(data), method="full", output_dir=str(Path(folder) / "run"),
                max_steps=240, per_device_train_batch_size=8, max_length=32, learning_rate=2e-3,
                warmup_steps=0.1, eval_steps=80, save_final_model=False,
                record=lt.RecordConfig(every=3, base_delta=True, flush_seconds=3600),
            )
        )  # fmt: skip
        _forget_where(run_dir, Path(folder))
        target = HERE / "golden-run"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for name in ("run.json", "config.yaml", "parameters.parquet", "scalars.jsonl",
                     "events.jsonl"):  # fmt: skip
            shutil.copy(run_dir / name, target)
        shutil.copytree(run_dir / "metrics", target / "metrics")


def _forget_where(run_dir: Path, folder: Path) -> None:
    """Take the machine out of the files: its folders, its name, the command line."""
    manifest = json.loads((run_dir / "run.json").read_text())
    manifest["model"]["name"] = NAMES["model"]
    manifest["dataset"]["name"] = NAMES["data"]
    manifest["command"] = "python tests/data/make_golden_run.py"
    manifest["hardware"].update(host="example", platform="Linux")
    manifest.pop("pid", None)
    (run_dir / "run.json").write_text(json.dumps(manifest, indent=2) + "\n")
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config.update(model_name_or_path=NAMES["model"], dataset_name=NAMES["data"])
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    for path in run_dir.rglob("*.json*"):
        assert str(folder) not in path.read_text(), path


if __name__ == "__main__":
    main()
