"""reports/memory/measure.py on the CPU: it counts what it says, and reports what fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "reports" / "memory" / "measure.py"
CASES = ["full", "LoRA r=16", "LISA E+H+2L", "… step in backward", "no such case"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", "--shapes", "tiny-llama", "--length",
         "32", "--cases", *CASES, "--out", str(folder)],
        capture_output=True, text=True, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_counted_bytes_are_the_estimates(study):
    results = json.loads((study / "results.json").read_text())
    rows = {row["case"]: row for row in results["rows"]}
    assert list(rows) == CASES
    for name in CASES[:4]:
        assert rows[name]["status"] == "ok", rows[name]
        found, guess = rows[name]["measured"], rows[name]["estimate"]
        assert found["weights"] == guess["weights"]
        # A fused step counts on the device: four bytes per tensor.
        assert found["optimizer"] == pytest.approx(guess["optimizer"], abs=4 * 200)
        assert found["saved"] == pytest.approx(guess["saved"], rel=0.05)
        assert found["peak_allocated"] == pytest.approx(guess["total"], rel=0.05)
        inside = "backward" in name
        assert found["gradients"] == (0 if inside else guess["gradients"])


def test_a_case_that_fails_is_reported_and_ends_alone(study):
    results = json.loads((study / "results.json").read_text())
    assert results["rows"][-1]["status"] == "failed"
    assert "| no such case | failed |" in (study / "results.md").read_text()


def test_what_is_written(study):
    results = json.loads((study / "results.json").read_text())
    assert {"python", "torch", "transformers"} <= set(results["versions"])
    assert not {"host", "hostname"} & set(results["hardware"])
    assert (study / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_gpu_it_says_so():
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is present")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cuda"], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "no CUDA device is present" in done.stderr
