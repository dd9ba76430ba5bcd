"""Train the study's nine runs (three methods, three seeds) and keep their logs, without paths."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from lisa_train.demo.chitchat import chitchat_folder
from lisa_train.demo.smollm2 import smollm2_folder

HERE = Path(__file__).resolve().parent
RUNS = HERE / "runs"
SEEDS = (1, 2, 3)
# Learning rates of the usual size for each method; LISA as in the paper, with two layers of 30.
METHODS = {
    "lora": ["--learning_rate=1e-3"],
    "full": ["--learning_rate=5e-5"],
    "lisa": ["--learning_rate=2e-4", "--lisa.activated_layers=2", "--lisa.interval_steps=4"],
}
KEPT = ("config.yaml", "parameters.parquet", "scalars.jsonl", "events.jsonl")


def train_all(work: Path, *, jobs: int) -> None:
    """Train what is not in `runs/` yet: `jobs` runs at a time, one processor each."""
    wanted = [(m, s) for s in SEEDS for m in METHODS if not (RUNS / f"{m}-{s}").exists()]
    if not wanted:
        return
    model, data = smollm2_folder(), chitchat_folder()
    work.mkdir(parents=True, exist_ok=True)
    RUNS.mkdir(exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        for run_dir in pool.map(lambda run: _train(*run, model, data, work), wanted):
            _keep(run_dir)


def _train(method: str, seed: int, model: Path, data: Path, work: Path) -> Path:
    run_dir = work / f"{method}-{seed}"
    shutil.rmtree(run_dir, ignore_errors=True)  # one that was cut short
    words = [
        "--config", method, "--config", str(HERE / "settings.yaml"),
        "--model_name_or_path", str(model), "--dataset_name", str(data),
        "--output_dir", str(run_dir), f"--seed={seed}", *METHODS[method],
    ]  # fmt: skip
    print(f"training {run_dir.name}", flush=True)
    with (work / f"{run_dir.name}.log").open("w") as log:
        subprocess.run(
            [sys.executable, "-m", "lisa_train", *words],
            check=True, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    return run_dir


def _keep(run_dir: Path) -> None:
    """Copy the log to `runs/`, whole or not at all; take the machine's folders and name out."""
    partial = RUNS / f".{run_dir.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name in KEPT:
        shutil.copy(run_dir / name, partial)
    shutil.copytree(run_dir / "metrics", partial / "metrics")
    manifest = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    names = {key: Path(config[key]).name for key in ("model_name_or_path", "dataset_name")}
    config.update(names)
    manifest["model"]["name"] = names["model_name_or_path"]
    manifest["dataset"]["name"] = names["dataset_name"]
    manifest["command"] = f"python reports/{HERE.name}/study.py"
    manifest["hardware"].update(host="example", platform="Linux")
    manifest.pop("pid", None)
    (partial / "run.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    (partial / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    partial.replace(RUNS / run_dir.name)
