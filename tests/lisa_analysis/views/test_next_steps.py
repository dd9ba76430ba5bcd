"""What to do next, the first screen's headline, and what the pictures leave out."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as hf
from helpers_runs import write_run

import lisa_analysis as la
from lisa_analysis.metrics.layer_grid import layer_grids, over_learning_rate
from lisa_analysis.runs.curves import curve_frame
from lisa_analysis.runs.words import headline
from lisa_analysis.views.analysis import Analysis
from lisa_analysis.views.cli import main as lisa_analyze
from lisa_analysis.views.html_report.content import gather
from lisa_analysis.views.html_report.figure import Budget
from lisa_analysis.views.next_steps import next_step
from lisa_analysis.views.terminal import overview
from lisa_train.methods.lisa.config import LisaConfig
from lisa_train.methods.lisa.plan import Plan as DrawPlan


def small_llama():
    """Four layers, wide enough for ranks that differ."""
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
                       num_attention_heads=2)
    )  # fmt: skip


class TestCommandsDoWhatTheySay:
    """What is advised makes the file on the page, and the trainer takes it."""

    PROBE = Path(__file__).parents[3] / "reports/2026-11-27-sampling/runs/voice/source-probe/s2"

    def words(self, command):
        """Lines of a command, split as a shell does."""
        return [shlex.split(line) for line in command.replace("\\\n", " ").split("\n")]

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"activated_layers": 4, "strength": 3.0},
            {"activated_layers": 1, "use_intervals": False, "control": "permuted",
             "control_seed": 3},
        ],
        ids=["none", "four", "fewer than stacks"],
    )  # fmt: skip
    def test_of_a_probe(self, options, tmp_path, monkeypatch):
        analysis = Analysis.of([self.PROBE], **options)
        analyze, train = self.words(next_step(analysis).command)
        monkeypatch.chdir(tmp_path)
        assert analyze[:2] == ["lisa-analyze", "s2"]
        assert lisa_analyze([str(self.PROBE), *analyze[2:], "-o", "report.html"]) == 0
        made = la.SamplingProbabilities.load("probabilities.json")
        wanted = analysis.probabilities
        assert made.inclusion_probabilities == wanted.inclusion_probabilities
        flags = dict(zip(train[1::2], train[2::2], strict=True))
        config = LisaConfig(
            activated_layers=int(flags.get("--lisa.activated_layers", 2)),
            stacks=flags.get("--lisa.stacks", "apart"),
            probabilities=flags["--lisa.probabilities"],
        )
        small = dict.fromkeys(("encoder_layers", "decoder_layers"), 4)
        small |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
        small |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 16)
        model = hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(d_model=16, vocab_size=60, pad_token_id=0, bos_token_id=1,
                             eos_token_id=2, decoder_start_token_id=1, **small)
        )  # fmt: skip
        plan = DrawPlan.make(model, config, seed=0)
        np.testing.assert_allclose(
            plan.schedule.inclusion_probabilities, wanted.inclusion_probabilities
        )

    def test_of_weights(self, tmp_path, monkeypatch):
        model = small_llama()
        model.save_pretrained(tmp_path / "base")
        with torch.no_grad():
            for number, layer in enumerate(model.model.layers):
                layer.mlp.up_proj.weight += 0.01 * (number + 1) * torch.randn(96, 64)
        model.save_pretrained(tmp_path / "tuned")
        alone = next_step(Analysis.of([la.load(tmp_path / "tuned")]))
        assert alone.sentence.startswith("Say which model these weights came from")
        assert alone.command == "lisa-analyze tuned --base BASE"
        beside = next_step(Analysis.of([la.load(tmp_path / "tuned", base=tmp_path / "base")]))
        assert "--base base --ignore-intervals --export peft-rank:lora.json" in beside.command
        [words] = self.words(beside.command)
        monkeypatch.chdir(tmp_path)
        assert lisa_analyze([*words[1:], "-o", "report.html"]) == 0
        ranks = json.loads((tmp_path / "lora.json").read_text("utf-8"))["rank_pattern"]
        assert len(set(ranks.values())) > 1
        tuned = [la.load(tmp_path / "tuned", base=tmp_path / "base")]
        asked = next_step(Analysis.of(tuned, "delta_norm", strength="pool = 2")).command
        assert "--base base --metric delta_norm --strength pool=2 --ignore-intervals" in asked

    def test_of_several_weights(self, tmp_path):
        model = small_llama()
        model.save_pretrained(tmp_path / "models" / "base")
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for seed in (1, 2, 3):
            model.load_state_dict(start)
            with torch.no_grad():
                for number, layer in enumerate(model.model.layers):
                    layer.mlp.up_proj.weight += 0.05 * 3**number * torch.randn(96, 64)
            model.save_pretrained(tmp_path / f"t{seed}")
        base = tmp_path / "models" / "base"
        analysis = Analysis.of([la.load(tmp_path / f"t{seed}", base=base) for seed in (1, 2, 3)])
        said = "lisa-analyze t1 t2 t3 --base models/base --probabilities probabilities.json"
        assert next_step(analysis).command == said

    def test_of_an_arm_that_has_the_next_seed_already(self, tmp_path):
        runs = [write_run(tmp_path / "lisa" / f"s{seed}", steps=30, n_layers=4, seed=seed)
                for seed in (1, 2)]  # fmt: skip
        runs += [write_run(tmp_path / "full" / f"s{seed}", steps=30, n_layers=4, method="full",
                           seed=seed) for seed in (1, 2, 3)]  # fmt: skip
        step = next_step(Analysis.of(runs))
        assert "--config lisa/s1/config.yaml --seed 3 --output_dir lisa/s1-seed-3" in step.command
        (tmp_path / "lisa" / "s1" / "config.yaml").unlink()
        step = next_step(Analysis.of(runs))
        assert step.sentence.endswith("s1 first.")
        assert step.command == ""


def test_a_fault_comes_first(tmp_path):
    run = write_run(tmp_path / "run", steps=40, n_layers=4, method="full", nan_at=20)
    step = next_step(Analysis.of([run]))
    assert step.sentence.startswith("First mend what is wrong: ")
    assert step.command == ""


def test_a_profile_that_leaves_layers_open_asks_a_probe(tmp_path):
    run = write_run(
        tmp_path / "run", steps=4, n_layers=4, method="full", model_name="/somewhere/Model",
        extra={"dataset": {"name": "org/data"}},
    )  # fmt: skip
    step = next_step(Analysis.of([run]))
    assert "probe" in step.sentence
    wanted = "lisa-train --config probe --model_name_or_path Model --dataset_name org/data"
    assert step.command == wanted


def test_single_runs_are_repeated_with_another_seed(tmp_path):
    runs = [write_run(tmp_path / name, steps=30, n_layers=4, method=name) for name in
            ("full", "lora")]  # fmt: skip
    analysis = Analysis.of(runs)
    if analysis.comparison.arms["mean"].notna().sum() < 2:
        pytest.skip("the runs have no held-out loss")
    step = next_step(analysis)
    assert "3 seeds" in step.sentence
    assert step.command.startswith("lisa-train --config full/config.yaml --seed ")
    assert "--output_dir full-seed-" in step.command


def test_runs_in_folders_of_one_name_are_named_by_the_way_to_them(tmp_path):
    runs = [
        write_run(tmp_path / arm / "s1", steps=200, n_layers=8, method="full", seed=seed)
        for seed, arm in enumerate(("a", "b"))
    ]
    analysis = Analysis.of(runs)
    assert analysis.profile is not None
    said = "lisa-analyze a/s1 b/s1 --probabilities probabilities.json"
    assert next_step(analysis).command == said
    printed = overview(analysis)
    assert "a/s1: full on" in printed
    assert "b/s1: full on" in printed
    assert analysis.comparison.table["run"].tolist() == ["a/s1", "b/s1"]
    assert "No profile over all runs" not in printed


def test_runs_that_look_like_seeds_and_are_none_are_told_why(tmp_path):
    runs = [write_run(tmp_path / f"s{n}", steps=30, n_layers=4, method="full") for n in (1, 2)]
    printed = " ".join(overview(Analysis.of(runs)).split())
    assert "No profile over all runs: s1 and s2 have the same seed" in printed
    other = write_run(tmp_path / "lora", steps=30, n_layers=4, method="lora", seed=2)
    assert "No profile over all" not in overview(Analysis.of([runs[0], other]))


def comparison(*rows, statement="One. Two. Three.", last=20):
    frame = pd.DataFrame(rows, columns=["a", "b", "mean", "low", "high"])
    curves = pd.DataFrame({"run": ["r1", "r2"], "step": [last, 20]})
    return SimpleNamespace(differences=frame, statement=statement, curves=curves)


def test_the_headline_of_a_comparison_says_who_is_lower():
    told = headline(comparison(("x", "y", -0.2, -0.3, -0.1), ("x", "z", 0.1, -0.1, 0.3),
                               ("z", "y", 0.4, 0.2, 0.6)))  # fmt: skip
    assert "x is below y by 0.2 (0.1 … 0.3)" in told
    assert "y is below z by 0.4 (0.2 … 0.6)" in told
    assert "x is below z" not in told
    same = headline(comparison(("x", "y", -0.2, -0.3, 0.1)))
    assert same == "No arm has a lower held-out loss than another beyond what seeds may explain."
    assert headline(comparison(("x", "y", -0.2, np.nan, np.nan))) == "One. Two."
    others = "Of other data: their losses do not compare. More."
    void = headline(comparison(("x", "y", -0.2, -0.3, -0.1), statement=others))
    assert void == "Of other data: their losses do not compare."
    untrained = headline(comparison(("x", "y", -0.2, -0.3, -0.1), last=0))
    assert "only ones of r1: nothing trained is compared. Leave it out." in untrained


def test_updates_over_the_rate_do_not_follow_its_schedule(tmp_path):
    run = la.load(write_run(tmp_path / "run", steps=20, n_layers=4, method="full"))
    grid = layer_grids(run, ["update_norm"])["update_norm"]
    shown = over_learning_rate(grid, run)
    rates = run.scalars.set_index("step")["learning_rate"]
    for column, step in enumerate(grid.steps):
        rate = float(rates.get(step, np.nan))
        wanted = grid.values[:, column] / rate if rate > 0 else np.full(4, np.nan)
        np.testing.assert_allclose(shown.values[:, column], wanted)
    assert shown.column == "update_norm / learning rate"


def test_recording_never_takes_more_than_its_step():
    scalars = pd.DataFrame({"step": [1, 2, 3], "step_seconds": [1.0, 1.0, 2.0],
                            "recorder_seconds": [0.5, 1.9, 0.0]})  # fmt: skip
    found = curve_frame(SimpleNamespace(scalars=scalars), "recorder")["value"]
    assert found[0] == 50
    assert found[1:].isna().all()


def test_the_schedule_of_a_sparse_run_is_shown_once(tmp_path):
    sparse = Analysis.of([write_run(tmp_path / "lisa", steps=40, n_layers=8)])
    dense = Analysis.of([write_run(tmp_path / "full", steps=40, n_layers=8, method="full")])
    content = gather(sparse.runs[0], 0, Budget.for_runs(1), alone=True)
    assert content.schedule is not None
    assert [figure.title for figure in content.heatmaps] == [
        "Gradient norm at every visit", "Update norm / learning rate at every visit",
    ]  # fmt: skip
    content = gather(dense.runs[0], 0, Budget.for_runs(1), alone=True)
    assert [figure.slug for figure in content.heatmaps] == [
        "r0-grad_norm", "r0-update_norm", "r0-weight_norm",
    ]  # fmt: skip


def test_an_arm_has_the_profile_over_its_seeds_and_a_single_run_its_own(tmp_path):
    runs = [write_run(tmp_path / f"s{i}", steps=40, n_layers=6, method="full", seed=i)
            for i in range(3)]  # fmt: skip
    runs.append(write_run(tmp_path / "alone", steps=40, n_layers=6, method="lora"))
    analysis = Analysis.of(runs)
    profiles = analysis.arm_profiles
    assert len(profiles) == len(analysis.comparison.arms)
    assert list(profiles)[-1].startswith("alone")
    repeated = next(iter(profiles.values()))
    if len(analysis.comparison.arms) == 2:
        assert repeated.seeds is not None
        assert next(iter(profiles)).endswith("(3 runs)")


def test_seeds_that_tell_no_layer_ask_for_a_probe_not_for_a_run_by_them(tmp_path):
    kept = Path(__file__).parents[3] / "reports/2026-11-27-sampling/runs/pos/full"
    runs = [la.load(kept / f"s{seed}") for seed in (2, 3)]
    analysis = Analysis.of(runs)
    assert not analysis.profile.above + analysis.profile.below
    step = next_step(analysis)
    assert step.sentence.startswith("Ask a probe, which names layers without training, or add")
    assert "--config probe" in step.command
    told = [write_run(tmp_path / f"t{i}", steps=80, n_layers=6, method="full", seed=i)
            for i in range(3)]  # fmt: skip
    assert "by the profile over seeds" in next_step(Analysis.of(told)).sentence


def test_an_undecided_profile_is_an_open_question_however_healthy_the_run(tmp_path):
    run = write_run(tmp_path / "run", steps=4, n_layers=4, method="full")
    content = gather(Analysis.of([run]).runs[0], 0, Budget.for_runs(1), alone=True)
    assert content.open_question
    page = la.report([run, write_run(tmp_path / "other", steps=4, n_layers=4, method="lora")]).html
    assert '<li class="ok">' not in page
    assert page.count('<li class="open-question">') + page.count('<li class="warn">') == 2
