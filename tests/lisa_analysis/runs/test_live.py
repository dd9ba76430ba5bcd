"""A run that goes on: rules on its newest steps, and what is said before anything is written."""

import json
import os
import time

import numpy as np
import pytest

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.schema import LOCK, MANIFEST, METRICS_TABLE
from lisa_analysis.runs.diagnostics.live import NewestSteps, judge, live_rules
from lisa_analysis.runs.diagnostics.schedule import Coverage
from lisa_analysis.views.cli import main

fcntl = pytest.importorskip("fcntl")


def newest(run, last=64):
    """The last steps of a run on the disk, as a recorder holds them."""
    frame = run.metrics()
    frame = frame[frame["step"].isin(sorted(frame["step"].unique())[-last:])]
    rows = []
    for _, part in frame.groupby("step"):
        columns = {n: np.ma.masked_invalid(part[n].to_numpy()) for n in METRICS_TABLE.measured}
        keys = {n: part[n].to_numpy() for n in ("step", "param_id")}
        rows.append({**columns, **keys})
    draws = [
        (int(e["step"]), {"layers": e["layers"], "inclusion_probabilities": None})
        for e in run.events.to_dict("records")
        if e["event"] == "lisa_draw"
    ]
    tensors = json.loads(run.parameters.to_json(orient="records"))
    return NewestSteps(run.manifest, tensors, rows, run.scalars.to_dict("records"), draws)


def edited(column, value, params, steps=None):
    def edit(frame):
        where = frame["param_id"].isin(params)
        if steps is not None:
            where &= frame["step"].isin(steps)
        frame.loc[where, column] = value
        return frame

    return edit


class TestNewestSteps:
    @pytest.mark.parametrize("method", ["full", "lisa", "lora"])
    def test_a_healthy_run_is_silent(self, make_run, method):
        assert judge(newest(make_run(method=method, steps=300)), live_rules()) == []

    @pytest.mark.parametrize(
        ("rule", "edit"),
        [
            ("dead_layers", edited("grad_norm", 0.0, [7, 8])),
            ("sampled_not_updated", edited("update_norm", 0.0, [7, 8])),
        ],
    )
    def test_the_rules_say_what_they_say_of_the_whole_run(self, make_run, rule, edit):
        run = make_run(steps=60, edit=edit)
        found = {finding.id: finding for _, finding in judge(newest(run), live_rules())}
        assert found[rule].layers == la.diagnose(run)[rule].layers == (3,)
        assert found[rule].evidence == la.diagnose(run)[rule].evidence
        # What happened before the steps that are kept is not seen.
        early = make_run(steps=60, edit=edited("update_norm", 0.0, [7, 8], range(1, 30)))
        assert judge(newest(early, last=20), live_rules()) == []

    def test_a_bf16_stall_is_that_of_the_whole_run(self, make_run):
        run = make_run(
            steps=40,
            edit=lambda frame: frame.assign(update_norm=frame["update_norm"] * 1e-3),
            edit_scalars=lambda s: s.assign(learning_rate=1e-5),
        )
        run.parameters = run.parameters.assign(dtype="bfloat16")
        found = {finding.id: finding for _, finding in judge(newest(run), live_rules())}
        assert found["bf16_stall"].evidence == la.diagnose(run)["bf16_stall"].evidence


class TestCoverageInTime:
    """Of 8 layers 2 are drawn: one is passed over n times with probability 0.75ⁿ."""

    def run(self, make_run, draws):
        always = [[0, 1], [2, 3], [4, 5], [6, 0]]
        return make_run(
            method="lisa", steps=10 * draws, draws=[always[i % 4] for i in range(draws)]
        )

    def test_it_waits_for_a_turn_that_may_still_come(self, make_run):
        # 0.75^24 = 1.00e-3 just passes, 0.75^25 = 7.5e-4 does not.
        early, late = self.run(make_run, 23), self.run(make_run, 25)
        rule = Coverage(chance=1e-3)
        assert la.diagnose(early, [rule])["coverage"].state == "info"
        finding = la.diagnose(late, [rule])["coverage"]
        assert (finding.state, finding.layers) == ("warn", (7,))
        assert la.diagnose(early)["coverage"].layers == (7,)  # of a run that has ended: at once
        assert [f.id for _, f in judge(newest(late), live_rules())] == ["coverage"]


@pytest.fixture
def begun(make_run):
    """A run whose writer lives and has flushed its census alone, ten seconds ago."""
    run = make_run(steps=3, manifest={"status": "running", "recording": {"flush_seconds": 30}})
    for shard in sorted((run.path / "metrics").glob("*.parquet"))[1:]:
        shard.unlink()
    (run.path / "scalars.jsonl").write_text("")
    for file in (run.path / MANIFEST, *(run.path / "metrics").glob("*.parquet")):
        os.utime(file, (time.time() - 10,) * 2)
    with (run.path / LOCK).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield la.load(run.path)


class TestNothingFlushedYet:
    def test_it_says_when_to_look_again(self, begun):
        findings = la.diagnose(begun).findings
        assert [finding.state for finding in findings] == ["info"]
        assert findings[0].evidence in (
            "Nothing flushed yet: the next flush is in 20 s.",
            "Nothing flushed yet: the next flush is in 19 s.",
        )
        with pytest.raises(LisaError, match=r"no step to score: nothing flushed yet: .* in \d+ s"):
            la.importance(begun)

    def test_the_command_says_it_too(self, begun, capsys, tmp_path):
        assert main([str(begun.path), "-o", str(tmp_path / "report.html")]) == 0
        shown = capsys.readouterr().out
        assert "the next flush is in" in shown
        assert "could not run" not in shown

    def test_a_flush_that_is_late_comes_with_the_next_step(self, begun):
        os.utime(begun.path / MANIFEST, (time.time() - 99,) * 2)
        for shard in (begun.path / "metrics").glob("*.parquet"):
            os.utime(shard, (time.time() - 99,) * 2)
        assert begun.waiting == "nothing flushed yet: the next flush comes with the next step"

    def test_a_run_that_ended_waits_for_nothing(self, make_run):
        run = make_run(steps=3)
        (run.path / "scalars.jsonl").write_text("")
        assert la.load(run.path).waiting is None
