"""`lisa-ablate` in several processes: the table of one process, to the bit."""

import contextlib
import io
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import pytest
import torch.distributed as dist
from helpers_models import sentence
from helpers_processes import ranks, torchrun

from lisa_analysis.contract.schema import ABLATION, ABLATION_UNFINISHED
from lisa_train.command import ablate_run
from lisa_train.command.ablate import main
from lisa_train.command.ablate_inputs import open_run, read_config
from lisa_train.command.training import train
from lisa_train.config import TrainConfig
from lisa_train.measure.ablation.file import AblationFile

pytestmark = pytest.mark.processes

SETTINGS: dict[str, Any] = {
    "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "max_length": 24,
    "eval_size": 12, "progress_bar": False, "trainer_args": {"adam_epsilon": 1e-6},
}  # fmt: skip
STOPPED = 9  # calls of `add` after which a call is interrupted: in the middle of the units


def call(run: Path, *words: str) -> tuple[int, str]:
    """`lisa-ablate` over batches of two or three examples; what it returned and printed."""
    said = io.StringIO()
    small = mock.patch.dict(ablate_run._TOKENS, {"cpu": 40})
    with small, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main([str(run), "--general", str(run.parent / "general.txt"), *words])
    return code, said.getvalue()


def interrupted(run: Path) -> int:
    add, calls = AblationFile.add, []

    def counting(self: AblationFile, *arguments: Any) -> None:
        add(self, *arguments)
        calls.append(1)
        if len(calls) == STOPPED:
            raise KeyboardInterrupt

    with mock.patch.object(AblationFile, "add", counting):
        return call(run)[0]


def process(rank: int, folder: Path, tasks: list[tuple[str, str]]) -> None:
    """Do several things to runs, in all processes together."""
    for what, name in tasks:
        run = Path(folder, name)
        if what == "interrupt":
            assert interrupted(run) == 130
        else:
            code, said = call(run)
            assert code == 0, said
            Path(folder, f"{name}-{rank}.txt").write_text(said)
        if dist.is_initialized():
            dist.barrier()
        assert (run / ABLATION_UNFINISHED).exists() == (what == "interrupt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any, tiny_model_dir: Path, text_file: Path) -> Path:
    """Copies of two runs, ablated by one process and by two."""
    folder: Path = tmp_path_factory.mktemp("ablated")
    (folder / "general.txt").write_text("\n\n".join(sentence(n) for n in range(90, 97)))
    for method, extra in {"lora": {"lora": {"r": 2}}, "full": {}}.items():
        train(
            TrainConfig(
                str(tiny_model_dir), str(text_file), method=method,
                output_dir=str(folder / method), **{**SETTINGS, **extra},
            )
        )  # fmt: skip
        for copy in ("two", "left-by-two", "left-by-one"):
            shutil.copytree(folder / method, folder / f"{method}-{copy}")
    process(0, folder, [("interrupt", "full-left-by-one"), ("whole", "lora"), ("whole", "full")])
    shutil.copytree(folder / "full-left-by-one", folder / "full-left-to-three")
    ranks(process, folder, [("whole", "lora-two"), ("whole", "full-two"),
                            ("interrupt", "full-left-by-two"),
                            ("whole", "full-left-by-one")])  # fmt: skip
    process(0, folder, [("whole", "full-left-by-two")])
    return folder


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("lora-two", "lora"),
        ("full-two", "full"),
        ("full-left-by-two", "full"),
        ("full-left-by-one", "full"),
    ],
)
def test_the_table_is_that_of_one_process_to_the_bit(folder, name, alone):
    found, wanted = (pd.read_parquet(folder / run / ABLATION) for run in (name, alone))
    assert wanted["loss"].notna().all()
    assert set(wanted["data"]) == {"held_out", "general"}
    pd.testing.assert_frame_equal(found, wanted, check_exact=True)


@pytest.mark.slow
def test_three_processes_go_on_to_the_bit_with_what_one_began(folder):
    ranks(process, folder, [("whole", "full-left-to-three")], world=3)
    found, wanted = (pd.read_parquet(folder / run / ABLATION)
                     for run in ("full-left-to-three", "full"))  # fmt: skip
    pd.testing.assert_frame_equal(found, wanted, check_exact=True)


def test_the_first_process_speaks_and_all_share_the_work(folder):
    first, second = ((folder / f"full-two-{rank}.txt").read_text() for rank in range(2))
    assert "taken out costs" in first
    assert str(folder / "full-two" / ABLATION) in first
    assert second == ""
    alone = (folder / "full-0.txt").read_text()
    assert table(first) == table(alone)


def table(text: str) -> list[str]:
    """The printed losses; not what it took, or where it is."""
    lines = text.splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("held-out loss"))
    end = next(number for number, line in enumerate(lines) if " passes in " in line)
    assert end - begin > 10
    return lines[begin:end]


def test_an_interrupted_call_goes_on(folder):
    words = "this goes on where an interrupted call stopped"
    assert words in (folder / "full-left-by-two-0.txt").read_text()
    assert words in (folder / "full-left-by-one-0.txt").read_text()
    assert not (folder / "full-left-by-one-1.txt").read_text()


@pytest.mark.slow
def test_a_process_that_dies_ends_the_call_and_the_same_call_goes_on(folder, tmp_path):
    run = Path(shutil.copytree(folder / "full", tmp_path / "run"))
    shutil.copy(folder / "general.txt", tmp_path)
    (run / ABLATION).unlink()
    script, general = Path(__file__).with_name("several_processes.py"), tmp_path / "general.txt"
    done = torchrun([script, "ablate", STOPPED, run, "--general", general], fails=True)
    said = [line for line in done.stderr.splitlines() if line.startswith("lisa-ablate:")]
    assert len(said) <= 1  # it is ended, if it has not found the other missing by then
    assert 'Traceback (most recent call last):\n  File "/' not in done.stderr.split("elastic")[0]
    assert (run / ABLATION_UNFINISHED).exists()
    code, words = call(run)
    assert code == 0
    assert "this goes on where an interrupted call stopped" in words
    frames = (pd.read_parquet(path / ABLATION) for path in (run, folder / "full"))
    pd.testing.assert_frame_equal(*frames, check_exact=True)


def test_one_process_restores_and_the_others_leave_it_alone(folder, tmp_path, monkeypatch):
    run = Path(shutil.copytree(folder / "full", tmp_path / "run"))
    shutil.copy(folder / "general.txt", tmp_path)
    given = [str(run), "--restore", "1", "--output", str(tmp_path / "put-back"), "--general",
             str(tmp_path / "general.txt"), "-q"]  # fmt: skip
    launched = {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}
    for rank, wrote in (("1", False), ("0", True)):
        for name, value in {**launched, "RANK": rank}.items():
            monkeypatch.setenv(name, value)
        assert main(given) == 0
        assert (tmp_path / "put-back").exists() == wrote


def test_a_run_that_was_split_while_it_trained_is_measured_whole(folder, tmp_path):
    run = Path(shutil.copytree(folder / "full", tmp_path / "run"))
    path = run / "config.yaml"
    text = path.read_text()
    assert "adam_epsilon" in text
    path.write_text(text.replace("adam_epsilon: 1.0e-06", "adam_epsilon: 1.0e-06\n  fsdp: true"))
    config = read_config(open_run(run))
    assert config is not None
    assert config.trainer_args == {"adam_epsilon": 1e-6}
