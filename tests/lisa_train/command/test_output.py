"""The folder of a run: nobody else begins one there, and a run that did not begin leaves none."""

import contextlib

import pytest

from lisa_analysis.contract import schema
from lisa_analysis.contract.errors import RunDirectoryError
from lisa_train.command.config import TrainConfig
from lisa_train.command.interruption import Interrupted
from lisa_train.command.output import find_run_dir, no_trace_of_a_refused_run


def test_two_commands_at_once_do_not_share_a_folder(tmp_path):
    config = TrainConfig("m", "d", output_dir=str(tmp_path / "run"))
    run_dir = find_run_dir(config, resume=False)
    with no_trace_of_a_refused_run(run_dir):
        (run_dir / "lisa_probabilities.json").write_text("of the first")
        # The second one had looked before the first made anything.
        with (
            pytest.raises(RunDirectoryError, match="is being written by another process"),
            no_trace_of_a_refused_run(run_dir),
        ):
            pytest.fail("it began")
        with pytest.raises(RunDirectoryError, match="is not empty"):
            find_run_dir(config, resume=False)
        assert (run_dir / "lisa_probabilities.json").read_text() == "of the first"
        (run_dir / schema.MANIFEST).write_text("{}")
    assert {path.name for path in run_dir.iterdir()} == {
        "lisa_probabilities.json", schema.MANIFEST,
    }  # fmt: skip


def test_runs_without_a_name_that_start_in_one_second_have_folders_of_their_own(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig("m", "d")
    with contextlib.ExitStack() as begun:
        found = []
        for _ in range(3):
            found.append(find_run_dir(config, resume=False))
            begun.enter_context(no_trace_of_a_refused_run(found[-1]))
        assert len(set(found)) == 3


@pytest.mark.parametrize("began", [False, True])
def test_a_stop_says_whether_anything_was_recorded_and_leaves_nothing_else(tmp_path, began):
    run_dir = tmp_path / "new" / "run"

    def stopped():
        with no_trace_of_a_refused_run(run_dir):
            for folder in (schema.METRICS_DIR, schema.CHECKPOINTS_DIR):
                (run_dir / folder).mkdir()
            for name in (schema.CONFIG, f"{schema.PARAMETERS}.tmp", schema.SCALARS, schema.LOCK):
                (run_dir / name).touch()
            if began:
                (run_dir / schema.MANIFEST).write_text("{}")
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        stopped()
    left = "what was recorded is kept" if began else "nothing was recorded"
    assert caught.value.args == (left,)
    assert run_dir.exists() is began
    assert (tmp_path / "new").exists() is began


def test_a_claim_that_a_kill_left_is_in_nobodys_way(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / ".claim").touch()
    assert find_run_dir(TrainConfig("m", "d", output_dir=str(run_dir)), resume=False) == run_dir
    with no_trace_of_a_refused_run(run_dir):
        (run_dir / schema.MANIFEST).write_text("{}")
    assert [path.name for path in run_dir.iterdir()] == [schema.MANIFEST]
