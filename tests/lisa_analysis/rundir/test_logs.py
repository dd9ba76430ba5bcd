"""Logs of other trainers: read as their libraries wrote them; what they lack is said."""

import json
import math
import shutil
import sqlite3
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError
from lisa_analysis.rundir.logs import event_files
from lisa_analysis.views.cli import main

LOGS = Path(__file__).resolve().parents[2] / "data" / "others-logs"
STATE = LOGS / "trainer_state.json"
EVENTS = next(LOGS.glob("*tfevents*"))


def trackio(path, runs):
    """A project as trackio 0.43 keeps it: the columns that are read, and one that is not."""
    base = sqlite3.connect(path)
    base.execute(
        "CREATE TABLE metrics (id INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT NOT NULL, "
        "timestamp TEXT NOT NULL, run_name TEXT NOT NULL, step INTEGER NOT NULL, "
        "metrics TEXT NOT NULL, log_id TEXT, space_id TEXT)"
    )
    for name, lines in runs.items():
        for step, line in enumerate(lines):
            row = ("id", "2026-01-01T00:00:00", name, step, json.dumps(line))
            base.execute(
                "INSERT INTO metrics (run_id, timestamp, run_name, step, metrics) "
                "VALUES (?, ?, ?, ?, ?)", row,
            )  # fmt: skip
    base.commit()
    base.close()
    return path


class TestTrainerState:
    def test_it_is_read_as_json_says(self):
        run, state = la.load(STATE), json.loads(STATE.read_text())
        lines = [line for line in state["log_history"] if "loss" in line]
        assert len(lines) == 8
        assert run.scalars["step"].tolist() == [line["step"] for line in lines]
        for name in ("loss", "grad_norm", "learning_rate", "epoch"):
            assert run.scalars[name].tolist() == [line[name] for line in lines], name
        held_out = [line["eval_loss"] for line in state["log_history"] if "eval_loss" in line]
        assert [m["eval_loss"] for m in run.events["metrics"]] == held_out
        assert (run.status, run.method, run.n_layers) == ("finished", "log", 0)
        assert run.manifest["result"]["last_held_out_loss"] == held_out[-1]
        assert run.warnings == []

    def test_it_is_found_in_a_checkpoint_and_in_an_output_folder(self, tmp_path):
        for step in (9, 10, 100):
            folder = tmp_path / "out" / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            state = json.loads(STATE.read_text()) | {"global_step": step}
            (folder / "trainer_state.json").write_text(json.dumps(state))
        assert la.load(tmp_path / "out" / "checkpoint-9").status == "interrupted"  # of 40 steps
        assert la.load(tmp_path / "out").status == "interrupted"
        (tmp_path / "out" / "checkpoint-100" / "trainer_state.json").write_text(STATE.read_text())
        assert la.load(tmp_path / "out").status == "finished"  # 100, and not 9 by the alphabet

    def test_diagnostics_run_and_a_profile_says_what_to_attach(self):
        run = la.load(STATE)
        found = la.diagnose(run)
        assert found.ok
        assert found["non_finite"].state == "ok"
        assert {f.state for f in found.findings} <= {"ok", "info"}
        assert "lisa_train.attach" in found["no_layers"].advice
        with pytest.raises(LisaError, match=r"log without layers.*lisa_train\.attach\(trainer"):
            la.importance(run)

    def test_a_loss_that_is_nan_is_found(self, tmp_path):
        state = json.loads(STATE.read_text())
        lines = [line for line in state["log_history"] if "loss" in line]
        lines[-1]["loss"] = math.inf
        (tmp_path / "trainer_state.json").write_text(json.dumps(state))  # as Infinity, like Trainer
        finding = la.diagnose(la.load(tmp_path))["non_finite"]
        assert (finding.state, finding.step) == ("fail", lines[-1]["step"])


class TestTensorBoard:
    def test_its_numbers_are_those_that_were_logged(self):
        run = la.load(EVENTS)
        steps = np.arange(5, 201, 5)
        assert run.scalars["step"].tolist() == steps.tolist()
        expected = {
            "loss": 2 + np.exp(-steps / 50), "learning_rate": 1e-4 * (1 - steps / 200),
            "grad_norm": 1 + 0.1 * np.sin(steps), "epoch": steps / 100,
        }  # fmt: skip
        for name, values in expected.items():  # TensorBoard keeps 32 bits
            assert run.scalars[name].to_numpy() == pytest.approx(values, rel=1e-6, abs=1e-11), name
        evaluations = {e["step"]: e["metrics"]["eval_loss"] for e in run.events.to_dict("records")}
        assert evaluations == pytest.approx(
            {s: 2.1 + math.exp(-s / 50) for s in range(50, 201, 50)}
        )

    def test_tensorboards_own_reader_agrees(self):
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

        theirs = [
            (value.tag, event.step, value.tensor.float_val[0])
            for event in EventFileLoader(str(EVENTS)).Load()
            for value in event.summary.value
        ]
        assert list(event_files.scalars(EVENTS)) == theirs

    def test_a_file_that_was_cut_off_gives_what_was_whole(self, tmp_path):
        raw = EVENTS.read_bytes()
        whole = list(event_files.scalars(EVENTS))
        path = tmp_path / EVENTS.name
        last = 0
        for cut in range(1, len(raw), 97):
            path.write_bytes(raw[:cut])
            found = list(event_files.scalars(path))
            assert found == whole[: len(found)]
            assert len(found) >= last
            last = len(found)
        assert last > len(whole) - 5

    def test_noise_is_no_crash(self, tmp_path):
        rng = np.random.default_rng(0)
        raw = bytearray(EVENTS.read_bytes())
        path = tmp_path / EVENTS.name
        for _ in range(100):
            broken = bytearray(raw)
            for place in rng.integers(0, len(raw), 5):
                broken[place] = rng.integers(0, 256)
            path.write_bytes(bytes(broken))
            for _, step, value in event_files.scalars(path):
                assert isinstance(step, int)
                assert isinstance(value, float)

    def test_the_check_sum_is_that_of_the_standard(self):
        """CRC-32C of "123456789" is 0xE3069283 (RFC 3720), masked as TFRecord does."""
        crc = 0xE3069283
        assert event_files.masked_crc(b"123456789") == (
            ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        )
        assert zlib.crc32(b"123456789") != crc  # another polynomial

    def test_a_trainers_folder_of_runs_gives_the_newest(self, tmp_path):
        for name, stamp in (("old", 1), ("new", 2)):
            folder = tmp_path / "out" / "runs" / name
            folder.mkdir(parents=True)
            shutil.copy(EVENTS, folder / f"events.out.tfevents.{stamp}.host")
        assert la.load(tmp_path / "out").run_id == "new"

    def test_a_file_without_a_scalar_is_said(self, tmp_path):
        path = tmp_path / "events.out.tfevents.1.host"
        header = struct.pack("<Q", 0)
        path.write_bytes(header + struct.pack("<I", event_files.masked_crc(header)) + b"\0" * 4)
        with pytest.raises(LisaError, match="a log of TensorBoard without any number"):
            la.load(path)


class TestTrackio:
    def test_the_newest_run_with_transformers_steps(self, tmp_path):
        lines = [
            {"train/loss": 3.0 - i / 10, "train/global_step": 5 * i, "train/grad_norm": "NaN"}
            for i in range(1, 4)
        ]
        lines.append({"eval/loss": 2.5, "train/global_step": 15, "note": "words"})
        path = trackio(tmp_path / "mine.db", {"first": [{"train/loss": 9.0}], "second": lines})
        run = la.load(path)
        assert run.run_id == "second"
        assert run.scalars["step"].tolist() == [5, 10, 15]
        assert run.scalars["loss"].tolist() == pytest.approx([2.9, 2.8, 2.7])
        assert run.scalars["grad_norm"].isna().all()
        assert run.events["metrics"].tolist() == [{"eval_loss": 2.5}]
        assert "holds 2 runs; this is the newest, second" in run.warnings[0]

    def test_another_database_is_refused_in_a_sentence(self, tmp_path):
        base = sqlite3.connect(tmp_path / "other.db")
        base.execute("CREATE TABLE t (x)")
        base.commit()
        base.close()
        with pytest.raises(LisaError, match="is no project of trackio"):
            la.load(tmp_path / "other.db")


def test_logs_are_compared_with_runs(make_run):
    comparison = la.compare([la.load(STATE), make_run(method="full", steps=40)])
    assert comparison.table["held_out_loss"].notna().all()


@pytest.mark.parametrize("path", [STATE, EVENTS], ids=["trainer", "tensorboard"])
def test_the_command_reports_a_log_and_writes_nothing_beside_it(
    path, tmp_path, monkeypatch, capsys
):
    mine = tmp_path / "theirs" / path.name
    mine.parent.mkdir()
    shutil.copy(path, mine)
    monkeypatch.chdir(tmp_path)
    assert main([str(mine)]) == 0
    shown = capsys.readouterr().out
    assert "No layers in this log" in shown
    assert "lisa_train.attach" in shown
    assert [p.name for p in mine.parent.iterdir()] == [path.name]
    page = (tmp_path / f"{path.name}-report.html").read_text(encoding="utf-8")
    assert "This is the log of another trainer" in page


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "cannot be read as a log"), ('{"log_history": []}', "without any number"),
     ('{"x": 1}', "cannot be read as a log")],
)  # fmt: skip
def test_a_broken_log_is_one_sentence(tmp_path, text, words, capsys):
    (tmp_path / "trainer_state.json").write_text(text)
    assert main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
