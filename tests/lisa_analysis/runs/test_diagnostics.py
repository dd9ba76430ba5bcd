"""Every rule: a planted fault makes it fire and say where, a healthy run leaves it silent."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError
from lisa_analysis.runs.diagnostics import RULES, Evidence, Finding, Outcome, Rule, register
from lisa_analysis.runs.diagnostics.gradients import ClipPressure
from lisa_analysis.runs.diagnostics.schedule import binomial_tail


def fired(run, rule):
    return la.diagnose(run)[rule]


def scale(column, factor, *, steps=None, params=None):
    """Edit: multiply `column` where steps and params match."""

    def edit(frame):
        where = pd.Series(True, index=frame.index)
        if steps is not None:
            where &= frame["step"].isin(steps)
        if params is not None:
            where &= frame["param_id"].isin(params)
        frame.loc[where, column] *= factor
        return frame

    return edit


def params_of(layer):
    """Tensors of a layer in synthetic runs without adapters (0 is the embedding)."""
    return [1 + 2 * layer, 2 + 2 * layer]


class TestHealthy:
    @pytest.mark.parametrize("method", ["full", "lora", "lisa"])
    def test_nothing_fires(self, make_run, method):
        def merged(frame):
            return frame.assign(merged_norm=np.where(frame["delta_norm"].notna(), 2.0, np.nan))

        run = make_run(method=method, steps=400, rho=0.5,
                       edit=merged if method == "lora" else None)  # fmt: skip
        found = la.diagnose(run)
        assert {f.id: f.state for f in found.findings if f.state != "ok"} == {}
        assert found.ok

    def test_rules_that_mean_nothing_are_left_out(self, make_run):
        ids = {f.id for f in la.diagnose(make_run(method="full", steps=50)).findings}
        assert "lora_dead" not in ids
        assert "coverage" not in ids
        lisa = {f.id for f in la.diagnose(make_run(method="lisa", steps=50)).findings}
        assert {"coverage", "visits", "schedule_mismatch", "reactivation_spike"} <= lisa

    def test_every_rule_has_its_texts(self):
        ids = [rule.id for rule in RULES]
        assert len(set(ids)) == len(ids) == 17
        for rule in RULES:
            for text in (rule.title, rule.meaning, rule.advice, rule().threshold):
                assert isinstance(text, str), rule.id
                assert len(text) > 8, rule.id


class TestUpdates:
    def test_sampled_not_updated(self, make_run):
        run = make_run(steps=60, edit=scale("update_norm", 0.0, params=params_of(3)))
        finding = fired(run, "sampled_not_updated")
        assert finding.state == "fail"
        assert finding.layers == (3,)
        assert finding.step == 1

    def test_sampled_not_updated_in_one_interval_only(self, make_run):
        draws = [[0, 1], [2, 3], [0, 3]]
        lost = scale("update_norm", 0.0, steps=range(11, 21), params=params_of(2))
        run = make_run(method="lisa", steps=30, profile=4, draws=draws, edit=lost)
        finding = fired(run, "sampled_not_updated")
        assert (finding.state, finding.layers, finding.step) == ("fail", (2,), 11)

    def test_zero_learning_rate_is_no_fault(self, make_run):
        run = make_run(
            steps=30,
            edit=scale("update_norm", 0.0, steps=[1]),
            edit_scalars=lambda s: s.assign(learning_rate=np.where(s["step"] == 1, 0, 1e-3)),
        )
        assert fired(run, "sampled_not_updated").state == "ok"

    def test_bf16_stall(self, make_run):
        """Weights of size 0.02 in bfloat16 are 1.2e-4 apart at most: lr 1e-6 is lost."""
        run = make_run(
            steps=40,
            edit=scale("update_norm", 1e-5),
            edit_scalars=lambda s: s.assign(learning_rate=1e-6),
        )
        assert fired(run, "bf16_stall").state == "ok"
        bf16 = make_run(
            steps=40,
            edit=scale("update_norm", 1e-3),
            edit_scalars=lambda s: s.assign(learning_rate=1e-5),
        )
        bf16.parameters = bf16.parameters.assign(dtype="bfloat16")
        finding = fired(bf16, "bf16_stall")
        assert finding.state == "warn"
        assert len(finding.layers) == 8
        healthy = make_run(steps=40, edit=scale("update_norm", 60.0))
        healthy.parameters = healthy.parameters.assign(dtype="bfloat16")
        assert fired(healthy, "bf16_stall").state == "ok"

    @pytest.mark.parametrize(
        ("factor", "state"), [(100, "info"), (1000, "warn"), (1e-3, "info"), (1e-4, "warn")]
    )
    def test_update_ratio(self, make_run, factor, state):
        run = make_run(steps=40, edit=scale("update_norm", factor))
        assert fired(run, "update_ratio").state == state

    def test_steps_of_warm_up_and_end_are_not_the_learning_rate(self, make_run):
        """The last step of a cosine has a millionth of the rate: it asks for no other one."""

        def cosine(scalars):
            share = scalars["step"] / len(scalars)
            return scalars.assign(learning_rate=1e-3 * (1 + np.cos(np.pi * share)) / 2 + 1e-9)

        small = scale("update_norm", 1e-4, steps=[100])
        run = make_run(steps=100, every=100, edit=small, edit_scalars=cosine)
        assert fired(run, "update_ratio").state == "ok"  # by step 1 alone
        last = scale("update_norm", 0.0, steps=[1])
        run = make_run(steps=100, every=100, edit=lambda f: last(small(f)), edit_scalars=cosine)
        finding = fired(run, "update_ratio")
        assert finding.state == "could not run"
        assert "more than 10% of the largest learning rate" in finding.evidence

    def test_reactivation_spike(self, make_run):
        firsts = range(1, 400, 10)
        run = make_run(method="lisa", steps=400, edit=scale("update_norm", 9.0, steps=firsts))
        finding = fired(run, "reactivation_spike")
        assert finding.state == "warn"
        assert finding.step == 1

    def test_reactivation_needs_the_first_step_of_an_interval(self, make_run):
        run = make_run(method="lisa", steps=400, every=7, interval=10)
        run2 = make_run(method="lisa", steps=100, every=10, interval=10)
        assert fired(run2, "reactivation_spike").state == "could not run"
        assert fired(run, "reactivation_spike").state in ("ok", "could not run")


class TestGradients:
    def test_steps_without_recorded_gradients_have_no_total_to_disagree(self, make_run):
        """A resumed run may record other quantities."""
        run = make_run(steps=100)
        for path in (run.path / "metrics").glob("*.parquet"):
            shard = pq.read_table(path)
            frame = shard.to_pandas()
            frame["grad_norm"] = frame["grad_norm"].where(frame["step"] < 20)  # NaN becomes null
            pq.write_table(pa.Table.from_pandas(frame, shard.schema, preserve_index=False), path)
        finding = fired(la.load(run.path), "norm_mismatch")
        assert finding.state == "ok", finding.evidence

    def test_norm_mismatch(self, make_run):
        run = make_run(steps=40, edit_scalars=lambda s: s.assign(grad_norm=s["grad_norm"] * 1.05))
        finding = fired(run, "norm_mismatch")
        assert finding.state == "fail"
        assert "4.8%" in finding.evidence
        slightly = make_run(
            steps=40, edit_scalars=lambda s: s.assign(grad_norm=s["grad_norm"] * 1.005)
        )
        assert fired(slightly, "norm_mismatch").state == "ok"

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_non_finite_names_layer_and_step(self, make_run, value):
        def plant(frame):
            late = (frame["step"] >= 23) & frame["param_id"].isin(params_of(5))
            frame.loc[late, "grad_norm"] = value
            frame.loc[frame["step"] >= 25, "update_norm"] = value
            return frame

        finding = fired(make_run(steps=40, edit=plant), "non_finite")
        assert (finding.state, finding.layers, finding.step) == ("fail", (5,), 23)
        assert "model.layers.5" in finding.evidence
        assert "update_norm" in finding.evidence

    def test_non_finite_loss(self, make_run):
        def plant(scalars):
            return scalars.assign(loss=scalars["loss"].where(scalars["step"] != 31, np.nan))

        finding = fired(make_run(steps=40, edit_scalars=plant), "non_finite")
        assert (finding.state, finding.step) == ("fail", 31)

    def test_a_loss_logged_now_and_then_is_finite(self, make_run):
        def plant(scalars):
            return scalars.assign(loss=scalars["loss"].where(scalars["step"] % 10 == 0, np.nan))

        assert fired(make_run(steps=40, edit_scalars=plant), "non_finite").state == "ok"

    def test_clip_pressure(self, make_run):
        def clip(share, factor):
            return lambda s: s.assign(
                clip_coef=np.where(np.arange(len(s)) < share * len(s), factor, 1.0)
            )

        assert fired(make_run(edit_scalars=clip(0.6, 0.5)), "clip_pressure").state == "warn"
        assert fired(make_run(edit_scalars=clip(0.4, 0.5)), "clip_pressure").state == "ok"
        assert fired(make_run(edit_scalars=clip(1.0, 0.01)), "clip_pressure").state == "warn"

    def test_layers_drawn_early_are_not_taken_for_larger(self, make_run):
        """Gradients that fall a thousandfold are no imbalance of layers that LISA draws in turn."""
        options = {"method": "lisa", "profile": 4, "steps": 40, "k": 1, "trend": -9.0, "noise": 0.1}
        turns = [[0], [1], [2], [3]]
        few = make_run(**options, every=10, draws=turns)
        assert fired(few, "depth_imbalance").state == "could not run"
        assert "recorded at other steps" in fired(few, "depth_imbalance").evidence
        together = make_run(**options, draws=[[0, 1], [1, 2], [2, 3], [3, 0]])
        finding = fired(together, "depth_imbalance")
        assert finding.state == "ok", finding.evidence
        assert float(finding.evidence.split(" has ")[1].split(" times")[0]) < 1.5

    def test_depth_imbalance(self, make_run):
        run = make_run(profile=np.geomspace(1, 150, 8), steps=40)
        finding = fired(run, "depth_imbalance")
        assert (finding.state, finding.layers) == ("info", (7, 0))
        assert fired(make_run(profile=np.geomspace(1, 50, 8)), "depth_imbalance").state == "ok"

    def test_loss_spike_names_the_layer_that_moved_first(self, make_run):
        rng = np.random.default_rng(0)

        def spike(scalars):
            loss = 2 + 0.05 * rng.standard_normal(len(scalars))
            loss[scalars["step"] == 210] += 3
            return scalars.assign(loss=loss)

        def push(frame):
            for layer, step in ((6, 206), (2, 208)):
                later = frame["step"].between(step, 210) & frame["param_id"].isin(params_of(layer))
                frame.loc[later, "grad_norm"] *= 8.0
            return frame

        finding = fired(make_run(steps=300, edit=push, edit_scalars=spike), "loss_spikes")
        assert (finding.state, finding.layers, finding.step) == ("warn", (6,), 210)
        assert "at step 206" in finding.evidence
        alone = fired(make_run(steps=300, edit_scalars=spike), "loss_spikes")
        assert (alone.state, alone.layers) == ("warn", ())

    def test_noisy_losses_are_no_spikes(self, make_run):
        def noisy(scalars):
            rng = np.random.default_rng(1)
            return scalars.assign(loss=2 + rng.gamma(2.0, 0.2, len(scalars)))

        assert fired(make_run(steps=500, edit_scalars=noisy), "loss_spikes").state == "ok"


class TestSchedule:
    def test_schedule_mismatch(self, make_run):
        def wrong(events):
            for event in events:
                if event["event"] == "lisa_draw" and event["step"] == 20:
                    event["layers"] = [0, 7]
            return events

        draws = [[1, 2], [3, 4], [5, 6], [1, 3]]
        run = make_run(method="lisa", steps=40, draws=draws, edit_events=wrong)
        finding = fired(run, "schedule_mismatch")
        assert (finding.state, finding.step) == ("fail", 21)
        assert finding.layers == (0, 5, 6, 7)

    def test_coverage(self, make_run):
        run = make_run(method="lisa", steps=40, draws=[[1, 2], [3, 4], [5, 6], [1, 3]])
        finding = fired(run, "coverage")
        assert (finding.state, finding.layers) == ("warn", (0, 7))

    def test_layers_left_out_by_the_probabilities_are_not_missed(self, make_run):
        def declare(events):
            for event in events:
                if event["event"] == "lisa_draw":
                    event["inclusion_probabilities"] = [0, 0.5, 0.5, 0.5, 0.5, 0, 0, 0]
            return events

        draws = [[1, 2], [3, 4], [1, 3], [2, 4]]
        options = {"method": "lisa", "steps": 40, "edit_events": declare}
        finding = fired(make_run(draws=draws, **options), "coverage")
        assert finding.state == "ok"
        assert "layers 0, 5, 6, 7 left out by π = 0" in finding.evidence
        finding = fired(make_run(draws=[[1, 2]] * 4, **options), "coverage")
        assert (finding.state, finding.layers) == ("warn", (3, 4))
        assert "2 of 4 layers were never drawn" in finding.evidence

    def test_visits_of_a_naive_sampler(self, make_run):
        """π declares layer 0 at .9; it is drawn like all others."""

        def declare(events):
            for event in events:
                if event["event"] == "lisa_draw":
                    event["inclusion_probabilities"] = [0.9, *[1.1 / 7] * 7]
            return events

        finding = fired(make_run(method="lisa", steps=600, edit_events=declare), "visits")
        assert (finding.state, finding.layers[0]) == ("warn", 0)

    def test_visits_of_exact_samplers_are_silent(self, make_run):
        for seed in range(5):
            run = make_run(method="lisa", steps=600, seed=seed)
            assert fired(run, "visits").state == "ok"
        cyclic = make_run(method="lisa", steps=400, draws=[[0, 1], [2, 3], [4, 5], [6, 7]] * 10)
        assert fired(cyclic, "visits").state == "ok"

    @pytest.mark.parametrize(("n", "p"), [(10, 0.3), (200, 0.05), (50, 0.99)])
    def test_binomial_tail_against_scipy(self, n, p):
        for x in range(0, n + 1, max(1, n // 7)):
            upper, lower = scipy.stats.binom.sf(x - 1, n, p), scipy.stats.binom.cdf(x, n, p)
            assert binomial_tail(n, p, x, upper=True) == pytest.approx(upper, rel=1e-9)
            assert binomial_tail(n, p, x, upper=False) == pytest.approx(lower, rel=1e-9)
        assert binomial_tail(5, 1.0, 5, upper=True) == 1
        assert binomial_tail(5, 1.0, 4, upper=False) == 0

    def test_a_lisa_run_without_draws_could_not_be_checked(self, make_run):
        run = make_run(
            method="lisa",
            steps=40,
            edit_events=lambda events: [e for e in events if e["event"] != "lisa_draw"],
        )
        for rule in ("coverage", "visits", "schedule_mismatch", "reactivation_spike"):
            finding = fired(run, rule)
            assert finding.state == "could not run"
            assert "no lisa_draw event" in finding.evidence


class TestWeights:
    def test_dead_lora(self, make_run):
        def kill(frame):
            b = frame["delta_norm"].notna()
            first = frame.loc[b, "param_id"].min()
            frame.loc[frame["param_id"] == first, "delta_norm"] = 0.0
            return frame

        finding = fired(make_run(method="lora", steps=40, edit=kill), "lora_dead")
        assert finding.state == "fail"
        assert "1 of 17" in finding.evidence

    def test_frozen_half_of_an_adapter(self, make_run):
        run = make_run(method="lora", steps=40)
        a = run.parameters[run.parameters["role"] == "lora_A"]["param_id"].iloc[3]
        frozen = make_run(method="lora", steps=40, edit=lambda f: f[f["param_id"] != a])
        finding = fired(frozen, "lora_dead")
        assert finding.state == "warn"
        assert "lora_A" in finding.evidence

    def test_too_early_to_call_lora_dead(self, make_run):
        run = make_run(method="lora", steps=5, edit=scale("delta_norm", 0.0))
        assert fired(run, "lora_dead").state == "could not run"

    def test_weight_drift(self, make_run):
        run = make_run(steps=40, edit=scale("weight_norm", 1.2, params=params_of(4)))
        finding = fired(run, "weight_drift")
        assert (finding.state, finding.layers) == ("warn", (4,))
        small = make_run(steps=40, edit=scale("weight_norm", 1.05, params=params_of(4)))
        assert fired(small, "weight_drift").state == "ok"

    def test_weight_drift_of_lora_is_that_of_the_merged_weight(self, make_run):
        def merged(frame):
            b = frame["delta_norm"].notna()
            return frame.assign(merged_norm=np.where(b, 2.6, np.nan))

        finding = fired(make_run(method="lora", steps=40, edit=merged), "weight_drift")
        assert finding.state == "warn"
        assert "+30" in finding.evidence

    def test_weight_drift_of_lora_takes_the_last_census(self, make_run):
        def merged(frame):
            last = frame["delta_norm"].notna() & (frame["step"] == frame["step"].max())
            return frame.assign(merged_norm=np.where(last, 2.6, np.nan))

        run = make_run(method="lora", steps=40, edit=merged)
        assert "+30" in fired(run, "weight_drift").evidence

    def test_weight_drift_of_lora_counts_what_trains_beside_adapters_at_both_ends(self, make_run):
        """What trains whole (modules_to_save) is in the weights at the start and at the end."""

        def merged(frame):
            made = frame.assign(merged_norm=np.where(frame["delta_norm"].notna(), 2.0, np.nan))
            whole = made[made["param_id"] == 13].assign(param_id=12, weight_norm=2.0)
            return pd.concat([made[~made["param_id"].isin([13, 14])], whole])

        run = make_run(method="lora", steps=40, edit=merged)
        finding = fired(run, "weight_drift")
        assert (finding.state, "+0.00%" in finding.evidence) == ("ok", True), finding.evidence

    def test_weight_drift_of_lora_is_not_zero_when_only_the_start_is_known(self, make_run):
        def start(frame):
            ids = set(frame.loc[frame["delta_norm"].notna(), "param_id"])
            first = (frame["step"] == 0) & frame["param_id"].isin(ids)
            return frame.assign(merged_norm=np.where(first, 2.0, np.nan))

        finding = fired(make_run(method="lora", steps=40, edit=start), "weight_drift")
        assert finding.state == "could not run"
        assert "merged_norm" in finding.evidence

    def test_weight_drift_without_a_census(self, make_run):
        finding = fired(make_run(steps=40, census=False), "weight_drift")
        assert finding.state == "could not run"


class TestRecording:
    def test_log_gaps(self, make_run):
        gap = make_run(steps=60, every=5, edit=lambda f: f[~f["step"].isin([25, 30])])
        finding = fired(gap, "log_gaps")
        assert (finding.state, finding.step) == ("warn", 25)
        assert "2 of 12" in finding.evidence

    def test_unfinished_runs(self, make_run):
        for status, state in (("failed", "warn"), ("interrupted", "warn")):
            run = make_run(steps=20, manifest={"status": status})
            assert fired(run, "log_gaps").state == state
        run = make_run(steps=20)
        run.status = "running"
        assert fired(run, "log_gaps").state == "info"

    def test_record_that_ends_early(self, make_run):
        run = make_run(steps=60, manifest={"result": {"steps": 100}})
        assert "finished at step 100" in fired(run, "log_gaps").evidence

    def test_recorder_cost(self, make_run):
        run = make_run(steps=30, edit_scalars=lambda s: s.assign(recorder_seconds=0.05))
        finding = fired(run, "recorder_cost")
        assert finding.state == "info"
        assert "20.0%" in finding.evidence


class TestCouldNotRun:
    def test_missing_columns_are_never_a_pass(self, make_run):
        run = make_run(
            steps=30,
            edit=lambda f: f.drop(columns=["update_norm"]),
            edit_scalars=lambda s: s[["step"]],
        )
        states = {f.id: f.state for f in la.diagnose(run).findings}
        for rule in ("sampled_not_updated", "update_ratio", "norm_mismatch", "clip_pressure",
                     "recorder_cost", "loss_spikes"):  # fmt: skip
            assert states[rule] == "could not run", rule

    def test_an_empty_run(self, make_run):
        run = make_run(steps=3, edit=lambda f: f.iloc[:0], edit_scalars=lambda s: s.iloc[:0])
        found = la.diagnose(run)
        assert {f.state for f in found.findings} <= {"could not run", "warn", "ok"}
        assert found["log_gaps"].state == "warn"
        assert found["non_finite"].state != "fail"


class TestObjects:
    def test_thresholds_can_be_changed(self, make_run):
        run = make_run(edit_scalars=lambda s: s.assign(clip_coef=np.where(s["step"] < 40, 0.5, 1)))
        assert la.diagnose(run, [ClipPressure()]).ok
        strict = la.diagnose(run, [ClipPressure(share=0.2)])
        assert not strict.ok
        assert "20%" in strict["clip_pressure"].threshold

    def test_worst_first(self, make_run):
        run = make_run(
            steps=60,
            edit=scale("update_norm", 0.0, params=params_of(3)),
            edit_scalars=lambda s: s.assign(clip_coef=0.01),
        )
        states = [f.state for f in la.diagnose(run).findings]
        assert states[:2] == ["fail", "warn"]

    def test_table_files_and_views(self, make_run, tmp_path):
        found = la.diagnose(make_run(steps=30, run_id="<b>x</b>"))
        assert list(found.to_frame())[:7] == [f.name for f in dataclasses.fields(Finding)][:7]
        saved = json.loads(found.save(tmp_path / "d.json").read_text())
        assert len(saved["findings"]) == len(found.findings)
        assert found.save(tmp_path / "d.csv").exists()
        with pytest.raises(LisaError, match=r"\.csv or \.json"):
            found.save(tmp_path / "d.xml")
        assert "<b>" not in found._repr_html_()
        assert len(repr(found)) < 120
        with pytest.raises(KeyError):
            found["no_such_rule"]

    def test_paths_are_opened_and_other_things_refused_in_words(self, make_run):
        run = make_run(steps=30)
        assert la.diagnose(str(run.path)) == la.diagnose(run)
        for wrong in ([run], None, 3):
            with pytest.raises(LisaError, match="diagnose takes a run directory"):
                la.diagnose(wrong)
        for rules in ([ClipPressure], "clip_pressure", 3, ["clip_pressure"]):
            with pytest.raises(LisaError, match="expected a list of rules"):
                la.diagnose(run, rules)

    def test_a_rule_is_added_from_outside(self, make_run):
        @dataclasses.dataclass(frozen=True)
        class TooShort(Rule):
            id = "too_short"
            title = "Hardly a run"
            meaning = "Nothing can be said after so few steps."
            advice = "Train for longer."
            threshold = "fewer than 10 steps"

            def check(self, evidence):
                short = len(evidence.table.steps) < 10
                return Outcome("warn" if short else "ok", f"{len(evidence.table.steps)} steps.")

        register(TooShort)
        try:
            assert la.diagnose(make_run(steps=5))["too_short"].state == "warn"
            assert la.diagnose(make_run(steps=50))["too_short"].state == "ok"
            assert "Hardly a run" in la.report(make_run(steps=5)).html
        finally:
            RULES.remove(TooShort)
        with pytest.raises(LisaError, match="'clip_pressure' is built in"):
            register(type("Mine", (ClipPressure,), {}))

    def test_evidence_is_shared(self, make_run):
        evidence = Evidence(make_run(steps=5))
        assert evidence.table is evidence.table
