"""Runs side by side: equal cost by hand, agreement against noise, seeds together."""

import json
from pathlib import Path

import numpy as np
import pytest

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError
from lisa_analysis.rundir import configurations
from lisa_analysis.runs import losses

X = np.linspace(-1, 1, 12)


def evaluations(*pairs):
    """Edit: these held-out losses."""

    def edit(events):
        kept = [e for e in events if e["event"] != "evaluate"]
        return kept + [
            {"event": "evaluate", "step": step, "time": 0.0, "metrics": {"eval_loss": loss}}
            for step, loss in pairs
        ]

    return edit


class TestTable:
    def test_one_row_per_run_with_its_cost(self, make_run):
        runs = [make_run(steps=40, method="lisa"), make_run(steps=60, method="lora")]
        frame = la.compare(runs).to_frame()
        assert frame["run"].tolist() == ["run1", "run2"]
        assert frame["method"].tolist() == ["lisa", "lora"]
        assert frame["steps"].tolist() == [40, 60]
        assert frame["tokens"].tolist() == [512 * 40, 512 * 60]
        assert frame["seconds"].tolist() == [10.0, 15.0]
        assert frame["peak_memory_bytes"].tolist() == [10**9, 10**9]
        assert frame["held_out_loss"].tolist() == pytest.approx([2 + np.exp(-3)] * 2)

    def test_losses_at_equal_cost_by_hand(self, make_run):
        """Steps 100 and 200; the second takes twice the time and half the tokens per step."""

        def slower(scalars):
            return scalars.assign(step_seconds=0.5, tokens=256 * scalars["step"])

        a = make_run(steps=100, edit_events=evaluations((0, 4.0), (50, 3.0), (100, 2.0)))
        b = make_run(steps=200, edit_scalars=slower,
                     edit_events=evaluations((0, 4.0), (200, 1.0)))  # fmt: skip
        frame = la.compare([a, b]).to_frame().set_index("run")
        # Steps: 100 of 200 is half way from 4 to 1.
        assert frame.loc["run1", "loss_at_equal_steps"] == pytest.approx(2.0)
        assert frame.loc["run2", "loss_at_equal_steps"] == pytest.approx(2.5)
        # Tokens: both saw 51 200.
        assert frame.loc["run1", "loss_at_equal_tokens"] == pytest.approx(2.0)
        assert frame.loc["run2", "loss_at_equal_tokens"] == pytest.approx(1.0)
        # Seconds: the first took 25 s, which is 50 steps of the second.
        assert frame.loc["run1", "loss_at_equal_seconds"] == pytest.approx(2.0)
        assert frame.loc["run2", "loss_at_equal_seconds"] == pytest.approx(3.25)

    def test_a_run_that_ended_early_is_named_with_the_step(self, make_run):
        long = [make_run(steps=100, edit_events=evaluations((0, 4.0), (50, 3.0), (100, 2.0)))]
        cut = make_run(steps=50, edit_events=evaluations((0, 4.0), (50, 3.1)))
        comparison = la.compare([*long, cut])
        last = comparison.table["run"].iloc[1]
        assert f"They are read at step 50, where {last} ends; others go on." in comparison.statement
        broken = make_run(steps=3, edit_events=evaluations((0, 4.0)))
        said = la.compare([*long, broken]).statement
        assert "These are losses before the first step, the only ones of " in said
        assert "nothing trained is compared. Leave it out." in said
        assert "They are read" not in la.compare(long * 2).statement

    def test_a_run_that_diverged_has_no_number_where_it_did(self, make_run):
        """Its earlier losses are not what it came to, and pull nobody back to their step."""
        well = make_run(steps=100, edit_events=evaluations((0, 4.0), (50, 3.0), (100, 2.0)))
        ill = make_run(steps=100, edit_events=evaluations((0, 4.0), (50, 1.0), (100, "NaN")))
        frame = la.compare([well, ill]).to_frame()
        assert frame["loss_at_equal_steps"].iloc[0] == 2.0
        assert frame[["held_out_loss", "loss_at_equal_steps"]].iloc[1].isna().all()

    def test_runs_without_evaluation_are_unknown_not_zero(self, make_run):
        runs = [make_run(steps=20, edit_events=lambda e: []), make_run(steps=20)]
        frame = la.compare(runs).to_frame()
        assert frame["held_out_loss"].isna().tolist() == [True, False]
        assert frame["loss_at_equal_steps"].isna().tolist() == [True, False]

    def test_loss_outside_what_was_evaluated_is_unknown(self):
        import pandas as pd

        curve = pd.DataFrame({"step": [10, 20], "held_out_loss": [2.0, 1.0]})
        assert losses.loss_at(curve, "step", 15) == 1.5
        assert np.isnan(losses.loss_at(curve, "step", 5))
        assert np.isnan(losses.loss_at(curve, "step", 25))

    def test_repeated_names_are_told_apart(self, make_run):
        assert configurations.distinct(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]
        run = make_run(steps=10, run_id="same")
        assert la.compare([run, run]).to_frame()["run"].tolist() == ["same", "same (2)"]

    def test_folders_of_one_name_are_told_apart_by_the_way_to_them(self, make_run, tmp_path):
        for arm in ("lora", "full"):
            (tmp_path / arm).mkdir()
            make_run(steps=10).path.rename(tmp_path / arm / "s1")
        runs = [la.load(tmp_path / arm / "s1") for arm in ("lora", "full")]
        assert la.compare(runs).to_frame()["run"].tolist() == ["lora/s1", "full/s1"]
        assert configurations.labels(runs[:1]) == ["s1"]

    def test_no_run_is_refused(self):
        with pytest.raises(LisaError, match="at least one run"):
            la.compare([])


class TestInput:
    def test_paths_are_opened(self, make_run):
        runs = [make_run(steps=20), make_run(steps=20)]
        assert la.compare([str(run.path) for run in runs]).to_frame()["run"].tolist() == [
            run.path.name for run in runs
        ]

    def test_other_things_are_refused_in_words(self, make_run):
        run = make_run(steps=20)
        for wrong in (run, str(run.path), {"a": run}, None, 3):
            with pytest.raises(LisaError, match="compare takes a list of runs, or a mapping"):
                la.compare(wrong)
        with pytest.raises(LisaError, match="compare takes a run directory"):
            la.compare([la.importance(run)])
        with pytest.raises(LisaError, match="Did you mean 'grad_rms'"):
            la.compare([run], "grad_rmss")

    def test_comparisons_can_be_put_into_sets(self, make_run):
        comparison = la.compare([make_run(steps=5)])
        assert len({comparison, comparison}) == 1
        assert comparison == comparison


class TestAgreement:
    def test_two_seeds_of_one_profile_agree_within_noise(self, make_run):
        truth = np.exp(0.4 * X)
        runs = [make_run(profile=truth, steps=300, seed=seed) for seed in (1, 2)]
        pair = la.compare(runs).rank_agreement.iloc[0]
        assert pair["kendall"] > 0.85
        assert pair["kendall_low"] <= pair["kendall"] <= pair["kendall_high"]
        assert pair["agreement"] >= pair["kendall"]
        assert pair["agreement_high"] == 1
        assert not pair["beyond_noise"]
        assert pair["layers"] == 12

    def test_the_true_agreement_of_one_ramp_is_one(self, make_run):
        """S5: the interval of τ as measured held 1 in a fifth of such pairs."""
        holds, repeats = [], []
        for pair in range(12):
            runs = [
                make_run(profile=np.exp(0.15 * X), steps=40, noise=0.3, seed=2 * pair + side)
                for side in (0, 1)
            ]
            row = la.compare(runs).rank_agreement.iloc[0]
            holds.append(np.isnan(row["agreement"]) or row["agreement_high"] >= 1 - 1e-9)
            repeats.append(row["kendall"])
        assert np.mean(repeats) < 0.85
        assert sum(holds) >= 11

    def test_two_profiles_differ_beyond_noise(self, make_run):
        runs = [make_run(profile=np.exp(0.4 * sign * X), steps=300) for sign in (1, -1)]
        pair = la.compare(runs).rank_agreement.iloc[0]
        assert pair["kendall"] < -0.85
        assert pair["kendall_high"] < 0
        assert pair["agreement_high"] < 0
        assert pair["beyond_noise"]

    def test_the_noise_floor_holds_for_equal_profiles(self, make_run):
        """Nominal 5 %: of 10 pairs of runs of one profile at most 3 are beyond it."""
        truth = np.exp(0.2 * X)
        beyond = 0
        for seed in range(10):
            runs = [make_run(profile=truth, steps=100, seed=2 * seed + i) for i in (100, 101)]
            beyond += bool(la.compare(runs).rank_agreement["beyond_noise"].iloc[0])
        assert beyond <= 3

    def test_short_runs_have_no_interval(self, make_run):
        runs = [make_run(steps=2, seed=seed) for seed in (1, 2)]
        pair = la.compare(runs).rank_agreement.iloc[0]
        assert np.isfinite(pair["kendall"])
        assert np.isnan(pair["kendall_low"])
        assert np.isnan(pair["agreement"])
        assert pair["beyond_noise"] is None

    def test_other_layers_are_not_aligned(self, make_run):
        comparison = la.compare([make_run(steps=50, profile=8), make_run(steps=50, profile=5)])
        pair = comparison.rank_agreement.iloc[0]
        assert pair["layers"] == 0
        assert np.isnan(pair["kendall"])
        assert len(comparison.profiles) == 8
        assert comparison.profiles["run2"].isna().sum() == 3

    def test_unseen_layers_take_no_part(self, make_run):
        short = make_run(method="lisa", steps=20, draws=[[0, 1], [2, 3]])
        pair = la.compare([short, make_run(steps=50)]).rank_agreement.iloc[0]
        assert pair["layers"] == 4

    def test_shares_sum_to_one_and_align_by_name(self, make_run):
        comparison = la.compare([make_run(steps=40, seed=s) for s in (1, 2, 3)])
        table = comparison.profiles
        assert table["name"].tolist() == [f"model.layers.{i}" for i in range(8)]
        np.testing.assert_allclose(table[["run1", "run2", "run3"]].sum(), 1)

    def test_concordance_of_three_runs(self, make_run):
        same = [make_run(profile=np.exp(X), steps=100, seed=s) for s in (1, 2, 3)]
        assert la.compare(same).concordance > 0.95
        assert np.isnan(la.compare(same[:2]).concordance)

    def test_a_run_without_the_metric_keeps_its_row(self, make_run):
        bare = make_run(steps=20, edit=lambda f: f.drop(columns="descent"))
        comparison = la.compare([make_run(steps=20), bare], "descent")
        assert len(comparison.to_frame()) == 2
        assert len(comparison.rank_agreement) == 0


class TestMetric:
    """What is asked for by name is given, or said to be missing."""

    @staticmethod
    def bare(make_run, **options):
        return make_run(steps=20, edit=lambda f: f.drop(columns="descent"), **options)

    def test_the_statement_says_which_runs_lack_the_metric_that_was_named(self, make_run):
        runs = [make_run(steps=20), self.bare(make_run)]
        with pytest.raises(LisaError) as why:
            la.importance(runs[1], "descent")
        found = la.compare(runs, "descent").statement
        words = str(why.value).rstrip(".")
        assert found.endswith(
            f"Without a profile of descent, and in no agreement of rankings: run2 ({words})."
        )
        assert "Without a profile" not in la.compare(runs, "grad_rms").statement
        # The default is nobody's wish: a log without layers has no profile of anything.
        for run in runs:
            assert "Without a profile" not in la.compare([run]).statement

    def test_a_metric_that_no_run_gives_is_refused(self, make_run):
        runs = [self.bare(make_run, seed=seed) for seed in (1, 2)]
        with pytest.raises(LisaError, match=r"no run has a profile of descent: .*descent"):
            la.compare(runs, "descent")
        with pytest.raises(LisaError) as alone:
            la.compare(runs[:1], "descent")
        with pytest.raises(LisaError) as own:
            la.importance(runs[0], "descent")
        assert str(alone.value) == str(own.value)

    def test_options_of_the_profiles_are_checked(self, make_run):
        with pytest.raises(LisaError, match="confidence is 95"):
            la.compare([make_run(steps=20)], confidence=95)

    def test_given_profiles_name_the_metric(self, make_run):
        runs = [make_run(steps=20, seed=seed) for seed in (1, 2)]
        first, second = (la.importance(run, "update_norm") for run in runs)
        assert la.compare(runs, profiles=[first, second]).metric == "update_norm"
        assert la.compare(runs, profiles=[None, second]).metric == "update_norm"
        assert la.compare(runs, "update_norm", profiles=[first, None]).metric == "update_norm"
        assert la.compare(runs, profiles=[None, None]).metric == "grad_rms"

    def test_profiles_of_other_metrics_are_refused(self, make_run):
        runs = [make_run(steps=20, seed=seed) for seed in (1, 2)]
        first, second = la.importance(runs[0], "update_norm"), la.importance(runs[1])
        with pytest.raises(LisaError, match="of update_norm and grad_rms: expected those of one"):
            la.compare(runs, profiles=[first, second])
        with pytest.raises(LisaError, match=r"of update_norm, and the metric is grad_rms: .*leave"):
            la.compare(runs, "grad_rms", profiles=[first, None])
        with pytest.raises(LisaError, match="profiles are 1 for 2 runs"):
            la.compare(runs, profiles=[first])


class TestSeeds:
    def test_the_table_tells_the_seed_of_a_real_run(self):
        golden = Path(__file__).parents[2] / "data" / "golden-run"
        assert la.compare([la.load(golden)]).table["seed"].tolist() == [42]

    def test_the_older_name_of_the_arms(self, make_run):
        comparison = la.compare([make_run(steps=30, seed=seed) for seed in range(3)])
        assert comparison.seeds["held_out_loss"].tolist() == comparison.arms["mean"].tolist()
        assert comparison.seeds["configuration"].tolist() == ["full"]

    def test_configuration_ignores_seeds_and_folders_only(self, make_run):
        runs = [make_run(steps=5) for _ in range(6)]
        texts = [
            "seed: 1\nlearning_rate: 0.1\noutput_dir: a\n",
            "seed: 2\nlearning_rate: 0.1\noutput_dir: b\n",
            "seed: 1\nlearning_rate: 0.2\noutput_dir: a\n",
            "lisa:\n  seed: 9\nseed: 1\nlearning_rate: 0.1\noutput_dir: a\n",
            "seed: 3\nnew_setting: false\nlearning_rate: 0.1\nother: null\noutput_dir: c",
            "seed: 3\nnew_setting: true\nlearning_rate: 0.1\noutput_dir: c",
        ]
        for run, text in zip(runs, texts, strict=True):
            (run.path / "config.yaml").write_text(text)
        names = la.compare(runs).table["arm"].tolist()
        assert names[0] == names[1]
        assert names[0] != names[2]
        assert names[0] != names[3]  # a section that the other lacks
        assert names[0] == names[4]  # settings that are off, written by a newer version
        assert names[0] != names[5]

    def test_off_and_unset_are_different_settings(self, make_run):
        """`null` may stand for a default that is on; only a key that is not there is off."""
        runs = [make_run(steps=5) for _ in range(5)]
        texts = [
            "data:\n  completion_only_loss: false\n  files:\n  - a\n",
            "data:\n  completion_only_loss: null\n  files:\n  - a\n",
            "data:\n  files:\n  - a\n",
            "data:\n  files:\n  - b\n",
            "completion_only_loss: false\ndata:\n  completion_only_loss: null\n  files:\n  - a\n",
        ]
        for run, text in zip(runs, texts, strict=True):
            (run.path / "config.yaml").write_text(text)
        names = la.compare(runs).table["arm"].tolist()
        assert names[0] != names[1]
        assert names[2] == names[0]
        assert names[3] not in names[:3]
        assert names[4] == names[1]


class TestObject:
    def test_files_and_views(self, make_run, tmp_path):
        runs = [make_run(steps=30, run_id="<i>x</i>"), make_run(steps=30)]
        comparison = la.compare(runs)
        saved = json.loads(comparison.save(tmp_path / "c.json").read_text())
        assert len(saved["runs"]) == 2
        assert comparison.save(tmp_path / "c.csv").exists()
        with pytest.raises(LisaError, match=r"\.csv or \.json"):
            comparison.save(tmp_path / "c")
        page = comparison._repr_html_()
        assert "<i>" not in page
        assert "<td>1</td>" in page.split("<details>")[0]  # GB, where the table has 10⁹ bytes
        assert len(repr(comparison)) < 80

    def test_a_run_of_unknown_memory_shows_itself(self, make_run):
        runs = [make_run(steps=30), make_run(steps=30)]
        for run in runs:
            text = (run.path / "scalars.jsonl").read_text()
            lines = [json.loads(line) for line in text.splitlines()]
            kept = [{k: v for k, v in x.items() if k != "peak_memory_bytes"} for x in lines]
            (run.path / "scalars.jsonl").write_text("".join(json.dumps(x) + "\n" for x in kept))
            manifest = json.loads((run.path / "run.json").read_text())
            manifest.get("result", {}).pop("peak_memory_bytes", None)
            (run.path / "run.json").write_text(json.dumps(manifest))
        comparison = la.compare([la.load(run.path) for run in runs])
        assert comparison.table["peak_memory_bytes"].isna().all()
        assert "NaN" in comparison._repr_html_()

    def test_agreement_of_many_pairs_is_told_with_how_little_is_known_of_it(self, make_run):
        """τ of 0.5 as measured, "from 1.00 to 1.00" without noise: no interval said how surely."""
        truth = np.exp(np.linspace(0, 0.4, 12))
        runs = [make_run(profile=truth, steps=100, noise=0.5, seed=seed) for seed in range(3)]
        comparison = la.compare(runs)
        known = comparison.rank_agreement.dropna(subset=["agreement"])
        assert len(known)
        assert (
            f"the intervals of pairs reach down to {known['agreement_low'].min():.2f}."
            in comparison.statement
        )
        assert "from 1.00 to 1.00" not in comparison.statement

    def test_statement_warns_of_single_seeds(self, make_run):
        text = la.compare([make_run(steps=30), make_run(steps=30, method="lisa")]).statement
        assert "three seeds" in text
        assert "τ" in text

    @pytest.mark.parametrize(
        ("gap", "words"),
        [
            (0.5, "full − lisa: +0.5000 (+0.5000 … +0.5000, in 3 pairs of one seed), higher"),
            (0.0, "no difference shown"),
        ],
    )
    def test_statement_speaks_of_arms_where_seeds_give_intervals(self, make_run, gap, words):
        runs = [
            make_run(
                steps=30, seed=seed, method=method,
                edit_events=evaluations((0, 4.0), (30, 2.0 + 0.05 * seed + lag)),
            )
            for method, lag in (("full", gap), ("lisa", 0.0))
            for seed in range(3)
        ]  # fmt: skip
        comparison = la.compare(runs)
        text = comparison.statement
        assert not any(f"{run.path.name} has" in text for run in runs)
        # t(2) = 4.303 and a standard deviation of 0.05 over three seeds.
        low = 2.05 - 4.303 * 0.05 / np.sqrt(3)
        assert f" lisa 2.0500 ({low:.4f} … " in text
        assert words in text
        assert "repeat with three seeds" not in text
        lone = make_run(steps=30, method="lora")
        assert "1 more arm without an interval" in la.compare([*runs, lone]).statement

    def test_a_single_run(self, make_run):
        comparison = la.compare([make_run(steps=30)])
        assert len(comparison.rank_agreement) == 0
        assert len(comparison.to_frame()) == 1
