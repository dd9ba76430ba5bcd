"""What the studies share: train many runs beside each other, keep their logs without paths."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from lisa_train.command.demo.chitchat import chitchat_folder
from lisa_train.command.demo.smollm2 import smollm2_folder

KEPT = ("config.yaml", "parameters.parquet", "scalars.jsonl", "events.jsonl")


def train_all(runs: Mapping[str, Sequence[str]], kept: Path, work: Path, *, jobs: int) -> None:
    """Train the demo's model for every run that is not in `kept` yet, and keep its log there.

    Parameters
    ----------
    runs
        Name -> words of `lisa-train`'s command line, without model, data and folder.
    kept
        Folder of the study's logs.
    work
        Folder that training writes to.
    jobs
        Runs at a time, one processor each.
    """
    wanted = {name: words for name, words in runs.items() if not (kept / name).exists()}
    if not wanted:
        return
    model, data = smollm2_folder(), chitchat_folder()
    work.mkdir(parents=True, exist_ok=True)
    kept.mkdir(exist_ok=True)

    def one(name: str) -> None:
        run_dir = work / name
        shutil.rmtree(run_dir, ignore_errors=True)  # one that was cut short
        print(f"training {name}", flush=True)
        _train(run_dir, [*wanted[name], "--model_name_or_path", str(model),
                         "--dataset_name", str(data)])  # fmt: skip
        _keep(run_dir, kept)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, wanted))


def _train(run_dir: Path, words: Sequence[str]) -> None:
    with (run_dir.parent / f"{run_dir.name}.log").open("w") as log:
        subprocess.run(
            [sys.executable, "-m", "lisa_train", *words, "--output_dir", str(run_dir)],
            check=True, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip


def _keep(run_dir: Path, kept: Path) -> None:
    """Copy the log, whole or not at all; take the machine's folders and name out."""
    partial = kept / f".{run_dir.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name in KEPT:
        shutil.copy(run_dir / name, partial)
    shutil.copytree(run_dir / "metrics", partial / "metrics")
    manifest = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    for key in ("model_name_or_path", "dataset_name"):
        config[key] = Path(config[key]).name
    if config["lisa"]["probabilities"]:
        name = Path(config["lisa"]["probabilities"]).name  # the run directory holds a copy
        shutil.copy(run_dir / name, partial)
        config["lisa"]["probabilities"] = manifest["lisa"]["probabilities"] = name
    manifest["model"]["name"] = config["model_name_or_path"]
    manifest["dataset"]["name"] = config["dataset_name"]
    manifest["command"] = f"python reports/{kept.parent.name}/study.py"
    manifest["hardware"].update(host="example", platform="Linux")
    manifest.pop("pid", None)
    (partial / "run.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    (partial / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    partial.replace(kept / run_dir.name)
