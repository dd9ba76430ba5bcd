"""What a run leaves behind when it is stopped from outside, or cannot write."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import lisa_analysis as la
from lisa_train.command.cli import main
from lisa_train.command.interruption import Interrupted, stop_on_signals
from lisa_train.command.output import is_storage_error


def command(model: Path, data: Path, out: Path, *words: str) -> list[str]:
    return ["--model_name_or_path", str(model), "--dataset_name", str(data), "--method", "full",
            "--output_dir", str(out), "--max_length", "16", "--record.every", "1",
            "--eval_on_start", "false", *words]  # fmt: skip


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, id="ctrl-c", marks=pytest.mark.slow),  # one handler for both
        pytest.param(signal.SIGTERM, id="sigterm"),
    ],
)
def test_a_stopped_run_is_readable_and_says_interrupted(
    number: signal.Signals, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = command(tiny_model_dir, text_file, out, "--max_steps", "100000",
                    "--record.flush_seconds", "0.2")  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "lisa_train", *words], stderr=subprocess.PIPE, text=True,
        # A shell's background jobs ignore ctrl-c, and hand that down.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        scalars = out / "scalars.jsonl"
        while not (scalars.exists() and scalars.stat().st_size) and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.1)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert errors.strip().splitlines()[-1].startswith("lisa-train: interrupted")
    assert "Traceback" not in errors
    run = la.load(out)
    assert run.status == "interrupted"
    assert not run.scalars.empty
    assert set(run.metrics(columns=["grad_norm"])["step"]) >= {0, 1}


# What every late import does that defines a dataclass, struck there by the signal.
STRUCK = """
import signal, sys
from lisa_train.command.interruption import stop_on_signals
{handlers}
try:
    exec("import signal; signal.raise_signal({number})")
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
@pytest.mark.parametrize(
    ("handlers", "code"),
    [
        ("stop_on_signals()", 130),
        # Python's own handler, for which the exit code is lost: or the test shows nothing.
        ("signal.signal({number}, signal.default_int_handler)", -signal.SIGINT),
    ],
    ids=["ours", "python's"],
)
def test_the_exit_code_stands_wherever_the_signal_strikes(
    number: signal.Signals, handlers: str, code: int, tmp_path: Path
) -> None:
    text = STRUCK.replace("{handlers}", handlers).replace("{number}", str(int(number)))
    (tmp_path / "struck.py").write_text(text)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "struck"], env={**os.environ, "PYTHONPATH": path},
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )  # fmt: skip
    assert done.returncode == code


def test_a_thread_and_a_shell_s_background_job_keep_their_handlers() -> None:
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        thread = threading.Thread(target=stop_on_signals)
        thread.start()
        thread.join()
        assert {number: signal.getsignal(number) for number in kept} == kept
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stop_on_signals()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("where", ["/proc/lisa-run", "/dev/null/run"])
def test_an_unwritable_output_directory_is_one_sentence(
    where: str, tiny_model_dir: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(tiny_model_dir, text_file, Path(where), "--max_steps", "1")
    assert main(words) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("lisa-train:")
    assert where in message


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files through POSIX")
def test_a_full_disk_ends_in_one_sentence_and_a_readable_run(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    # Files may not grow past 64 kB: the shards fit, the checkpoint of the model does not.
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)); "
        "from lisa_train.command.cli import main; sys.exit(main())"
    )
    out = tmp_path / "run"
    words = command(tiny_model_dir, text_file, out, "--max_steps", "3", "--save_steps", "2")
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("lisa-train:")
    run = la.load(out)
    assert run.status == "failed"
    assert set(run.scalars["step"]) >= {1, 2}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
@pytest.mark.parametrize("elements", [3, 1_000_000])
def test_what_torch_says_of_a_full_disk_is_known(elements: int) -> None:
    """A small file fails as it is ended, a large one within a tensor, in other words."""
    with pytest.raises(RuntimeError) as caught:
        torch.save({"a": torch.ones(elements)}, "/dev/full")
    assert is_storage_error(caught.value), caught.value


def test_a_model_that_is_not_saved_whole_does_not_stand_under_its_name(
    tiny_model_dir: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from transformers import Trainer

    def save(self: Trainer, folder: str) -> None:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "model.safetensors").touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Trainer, "save_model", save)
    out = tmp_path / "run"
    assert main(command(tiny_model_dir, text_file, out, "--max_steps", "1")) == 2
    assert "cannot be written any more" in capsys.readouterr().err
    assert not (out / "checkpoints" / "final").exists()
    monkeypatch.undo()
    other = tmp_path / "other"
    assert main(command(tiny_model_dir, text_file, other, "--max_steps", "1")) == 0
    assert [path.name for path in (other / "checkpoints").iterdir()] == ["final"]
    assert {"model.safetensors", "README.md"} <= {
        path.name for path in (other / "checkpoints" / "final").iterdir()
    }


def test_a_full_disk_is_known_by_the_words_of_tokenizers() -> None:
    assert is_storage_error(Exception("No space left on device (os error 28)"))
    assert not is_storage_error(Exception("no such token"))
