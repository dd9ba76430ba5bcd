"""reports/memory/measure.py on the CPU: it counts what it says, and reports what fails."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "reports" / "memory" / "measure.py"
CASES = ["full", "LoRA r=16", "LISA E+H+2L", "… step in backward"]
WORDS = ["--device", "cpu", "--length", "32"]


@pytest.fixture(scope="module")
def measure():
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        import measure

        yield measure


def run_here(measure, words):
    """Call the script with its cases in this process: processes have a study of their own below."""
    import one

    with pytest.MonkeyPatch.context() as patch:

        def case(command, environment):
            patch.setattr(sys, "argv", command[1:])
            with contextlib.redirect_stdout(io.StringIO()) as out:
                one.main()
            return json.loads(out.getvalue().splitlines()[-1])

        patch.setattr(measure, "result_of", case)
        assert measure.main(words) == 0


@pytest.fixture(scope="module")
def study(measure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    words = [*WORDS, "--shapes", "tiny-llama", "--cases", *CASES, "--out", str(folder)]
    run_here(measure, words)
    return folder


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study from the shell, each case in a process of its own."""
    folder = tmp_path_factory.mktemp("processes")
    cases = ["LISA E+H+2L", "no such case"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *WORDS, "--shapes", "tiny-qwen3", "--cases", *cases,
         "--out", str(folder)],
        capture_output=True, text=True, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_counted_bytes_are_the_estimates(study):
    results = json.loads((study / "results.json").read_text())
    rows = {row["case"]: row for row in results["rows"]}
    assert list(rows) == CASES
    for name in CASES:
        assert rows[name]["status"] == "ok", rows[name]
        found, guess = rows[name]["measured"], rows[name]["estimate"]
        assert found["weights"] == guess["weights"]
        # A fused step counts on the device: four bytes per tensor.
        assert found["optimizer"] == pytest.approx(guess["optimizer"], abs=4 * 200)
        assert found["saved"] == pytest.approx(guess["saved"], rel=0.05)
        assert found["peak_allocated"] == pytest.approx(guess["total"], rel=0.05)
        inside = "backward" in name
        assert found["gradients"] == (0 if inside else guess["gradients"])


def test_a_tied_head_is_counted_once(processes):
    row = json.loads((processes / "results.json").read_text())["rows"][0]
    assert row["measured"]["weights"] == row["estimate"]["weights"]
    assert row["measured"]["gradients"] == row["estimate"]["gradients"]


def test_a_case_that_fails_is_reported_and_ends_alone(processes):
    results = json.loads((processes / "results.json").read_text())
    assert [row["status"] for row in results["rows"]] == ["ok", "failed"]
    assert "| no such case | failed |" in (processes / "results.md").read_text()


def test_what_is_written(study):
    results = json.loads((study / "results.json").read_text())
    assert {"python", "torch", "transformers"} <= set(results["versions"])
    assert not {"host", "hostname"} & set(results["hardware"])
    assert (study / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_times_and_arithmetic_of_later_cases_are_added(measure, study):
    """A second call adds its rows; those of a case that was measured before are replaced."""
    words = [
        *WORDS, "--shapes", "tiny-llama", "--append", "--timed", "2", "--out", str(study),
    ]  # fmt: skip
    added = ["full", "LISA 2L, no E, H, norm"]
    run_here(measure, [*words, "--cases", *added])
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
    with pytest.raises(SystemExit, match=r"with another batch_size \(1, here 2\)"):
        measure.main([*words, "--cases", "full", "--batch-size", "2"])


def test_a_case_that_the_kernel_kills_keeps_its_estimate(measure, monkeypatch):
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
