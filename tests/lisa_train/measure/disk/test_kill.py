"""SIGKILL at random moments: every run opens, loses little, and goes on without gaps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def kill(folder, runs, seed):
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONPATH": f"{here.parents[3]}{os.pathsep}{here.parents[2]}",
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, str(here / "kill_server.py"), str(folder), str(runs), str(seed)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    lines = result.stdout.strip().splitlines()
    assert len(lines) == runs
    # Most kills must have hit a run in the middle, or the test shows nothing.
    assert sum(line.endswith("segment 1") for line in lines) >= runs // 3, lines


def test_four_kills(tmp_path):
    kill(tmp_path, 4, 0)


@pytest.mark.slow
def test_a_hundred_kills(tmp_path):
    kill(tmp_path, 100, 1)
