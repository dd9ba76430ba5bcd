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


def test_a_tied_head_is_counted_once(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", "--shapes", "tiny-qwen3", "--length",
         "32", "--cases", "LISA E+H+2L", "--out", str(tmp_path)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [row] = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["measured"]["weights"] == row["estimate"]["weights"]
    assert row["measured"]["gradients"] == row["estimate"]["gradients"]


def test_a_case_that_fails_is_reported_and_ends_alone(study):
    results = json.loads((study / "results.json").read_text())
    assert results["rows"][-1]["status"] == "failed"
    assert "| no such case | failed |" in (study / "results.md").read_text()


def test_what_is_written(study):
    results = json.loads((study / "results.json").read_text())
    assert {"python", "torch", "transformers"} <= set(results["versions"])
    assert not {"host", "hostname"} & set(results["hardware"])
    assert (study / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_times_and_arithmetic_of_later_cases_are_added(study):
    """A second call adds its rows; those of a case that was measured before are replaced."""
    command = [
        sys.executable, str(SCRIPT), "--device", "cpu", "--shapes", "tiny-llama", "--length", "32",
        "--append", "--timed", "2", "--out", str(study),
    ]  # fmt: skip
    added = ["full", "LISA 2L, no E, H, norm"]
    done = subprocess.run([*command, "--cases", *added], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((study / "results.json").read_text())
    assert [row["case"] for row in results["rows"]] == [*CASES, "LISA 2L, no E, H, norm"]
    rows = {row["case"]: row for row in results["rows"]}
    for name in added:
        found = rows[name]["measured"]
        assert found["step_seconds"] > found["optimizer_seconds"] > 0
        assert found["tokens_per_second"] == pytest.approx(32 / found["step_seconds"])
    # Llama's products by hand, per token: 2 operations per weight forward and 4 backward, and two
    # products of attention over 32 keys, as much again for each of their two factors.
    weights, head, attention = 4 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 160), 64 * 512, 4 * 32 * 64
    full = 32 * (6 * (weights + head) + 3 * 2 * 2 * attention)
    assert rows["full"]["flops"] == full
    assert rows["LISA 2L, no E, H, norm"]["measured"]["skipped_seconds"] > 0
    assert "skipped_seconds" not in rows["full"]["measured"]
    assert "| of full | allowed | arithmetic |" in (study / "results.md").read_text()
    other = subprocess.run(
        [*command, "--cases", "full", "--batch-size", "2"], capture_output=True, text=True
    )
    assert other.returncode != 0
    assert "measured with another batch_size (1, here 2)" in other.stderr


def test_a_case_that_the_kernel_kills_keeps_its_estimate(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import measure

    commands = []

    def fake(command, **kwargs):
        commands.append(command)
        killed = "--estimate-only" not in command
        code, out = (-9, "") if killed else (0, json.dumps({"case": "full", "status": "ok"}))
        return subprocess.CompletedProcess(command, code, out, "")

    monkeypatch.setattr(measure.subprocess, "run", fake)
    row = measure.run("tiny-llama", "full", "cpu", 1, 32, 0)
    assert row == {"shape": "tiny-llama", "case": "full", "status": "out of memory"}
    assert len(commands) == 2


def test_without_a_gpu_it_says_so():
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is present")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cuda"], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "no CUDA device is present" in done.stderr
