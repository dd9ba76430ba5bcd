"""What Windows lacks: no resource, no fcntl, no O_CLOEXEC, no sync of what is open for reading."""

import os
import subprocess
import sys

import pytest
import torch

from lisa_analysis.rundir.opening import load
from lisa_train.measure.disk import manifest as environment
from lisa_train.measure.disk import storage

_WINDOWS = """
import errno, os, stat, sys
import torch, transformers, pyarrow.parquet
for module in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[module] = None
for name in ("O_CLOEXEC", "O_DIRECTORY", "register_at_fork", "fork", "uname", "getuid", "geteuid"):
    if hasattr(os, name):
        delattr(os, name)
open_file, sync = os.open, os.fsync

def windows_open(path, flags, *rest, **more):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    return open_file(path, flags, *rest, **more)

def windows_sync(descriptor):
    with open(f"/proc/self/fdinfo/{descriptor}") as info:
        flags = next(int(line.split()[1], 8) for line in info if line.startswith("flags"))
    if flags & 3 == 0:  # open for reading
        raise OSError(errno.EBADF, "Bad file descriptor")
    sync(descriptor)

os.open, os.fsync = windows_open, windows_sync

import lisa_train as lt
import lisa_analysis as la

torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
                              for _ in range(2)))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
config = lt.RecordConfig(sys.argv[1], every=1, on_record_error="raise")
with lt.NormRecorder(model, optimizer, config) as recorder:
    for step in (1, 2):
        model(torch.ones(1, 4)).sum().backward()
        recorder.before_step(step)
        optimizer.step()
        recorder.after_step(step)
        recorder.flush()
        optimizer.zero_grad()
assert la.load(sys.argv[1]).status == "finished"
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/fdinfo"), reason="asks Linux how a file is open")
def test_a_run_is_recorded_where_only_windows_has_it(tmp_path):
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", _WINDOWS, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    run = load(tmp_path / "run")
    assert sorted(run.metrics()["step"].unique()) == [0, 1, 2]
    # not measured is null, not zero
    assert run.scalars["peak_memory_bytes"].isna().all()
    assert run.scalars["learning_rate"].notna().all()
    assert "peak_memory_bytes" not in (run.manifest.get("result") or {})


def test_the_peak_is_counted_where_the_platform_tells():
    assert environment.peak_memory_bytes(torch.device("cpu")) > 2**20


def _held(monkeypatch, times):
    """Let `os.replace` find its target open in a reader so many times."""
    refused, replace = [], os.replace

    def move(source, target):
        if len(refused) < times:
            refused.append(target)
            raise PermissionError(13, "Access is denied", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", move)
    return refused


def test_a_file_that_a_reader_holds_is_replaced_when_it_lets_go(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_READERS_HOLD", True)
    refused = _held(monkeypatch, 3)
    storage.replace_file(tmp_path / "run.json", lambda path: path.write_text("new"))
    assert len(refused) == 3
    assert (tmp_path / "run.json").read_text() == "new"


@pytest.mark.parametrize(("elsewhere", "tries"), [(True, 1), (False, 2)])
def test_a_file_that_may_not_be_replaced_is_given_up(tmp_path, monkeypatch, elsewhere, tries):
    monkeypatch.setattr(storage, "_READERS_HOLD", not elsewhere)
    monkeypatch.setattr(storage, "_LOCK_PATIENCE", 0.01)
    (tmp_path / "run.json").write_text("old")
    refused = _held(monkeypatch, 100)
    with pytest.raises(PermissionError):
        storage.replace_file(tmp_path / "run.json", lambda path: path.write_text("new"))
    assert len(refused) >= tries
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_text() == "old"
