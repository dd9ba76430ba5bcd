"""A plan of many runs: each once, in an order that its sources allow, on from where it stopped."""

import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from helpers_models import build_tiny_model, sentence, write_jsonl

from lisa_analysis.contract.errors import LisaError
from lisa_train.command.cli import main

REPORTS = Path(__file__).resolve().parents[2] / "reports"


def module(path):
    """A module of the studies, which are no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = found
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def cells():
    sys.path.insert(0, str(REPORTS))  # processes that train look it up there
    yield module(REPORTS / "cells.py")
    sys.path.remove(str(REPORTS))
    del sys.modules["cells"]


@pytest.fixture(scope="module")
def sampling(cells):
    """Environments, arms, seconds and plan of the study of sampling."""
    folder = REPORTS / "2026-11-27-sampling"
    names = ("arms", "sources", "selection", "sampling", "settings", "seconds", "plan")
    shared = module(REPORTS / "environments.py")
    yield [shared, *(module(folder / f"{name}.py") for name in names)]
    for name in ("environments", *names):
        del sys.modules[name]


@pytest.fixture(scope="module")
def differences(cells):
    yield module(REPORTS / "differences.py")
    del sys.modules["differences"]


@pytest.fixture(scope="module")
def outcomes(sampling, differences):
    yield module(REPORTS / "2026-11-27-sampling" / "outcomes.py")
    del sys.modules["outcomes"]


@pytest.fixture(scope="module")
def prediction(outcomes):
    yield module(REPORTS / "2026-11-27-sampling" / "prediction.py")
    del sys.modules["prediction"]


@pytest.fixture(scope="module")
def together(prediction):
    yield module(REPORTS / "2026-11-27-sampling" / "together.py")
    del sys.modules["together"]


@pytest.fixture(scope="module")
def page(together):
    names = ("contrasts", "figures", "page")
    yield [module(REPORTS / "2026-11-27-sampling" / f"{name}.py") for name in names][-1]
    for name in names:
        del sys.modules[name]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run, and the words that made it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    model = folder.with_name("model")
    build_tiny_model(model, layers=2)
    rows = [{"text": sentence(n)} for n in range(20)]
    data = write_jsonl(folder.with_name("data.jsonl"), rows)
    words = [
        "--method=full", f"--model_name_or_path={model}", f"--dataset_name={data}",
        "--max_steps=2", "--max_length=16", "--progress_bar=false", "--record.every=2",
        "--save_final_model=false",
    ]  # fmt: skip
    assert main([*words, f"--output_dir={folder}"]) == 0
    return folder, words


def test_what_is_kept_is_read_as_before_and_names_no_folder(cells, trained, tmp_path):
    import lisa_analysis as la

    run_dir, _ = trained
    cells.keep(run_dir, tmp_path / "study" / "runs" / "a" / "s1", study="study")
    kept = tmp_path / "study" / "runs" / "a" / "s1"
    before, after = la.load(run_dir), la.load(kept)
    assert after.status == "finished"
    assert after.metrics().equals(before.metrics())
    assert after.scalars.equals(before.scalars)
    texts = [p.read_text() for p in kept.iterdir() if p.suffix in (".json", ".yaml", ".jsonl")]
    assert not any(str(part) in text for text in texts for part in (run_dir.parent, "/tmp"))
    config = yaml.safe_load((kept / "config.yaml").read_text())
    assert config["model_name_or_path"] == "model"
    assert [p.name for p in kept.parent.iterdir()] == ["s1"]


def test_cells_run_once_after_their_sources_and_a_failed_one_ends_no_other(
    cells, trained, tmp_path
):
    _, words = trained
    order = []

    def given(name, *more):
        order.append(name)
        return [*words, *more]

    def refused():
        raise LisaError("no layer is named")

    plan = [
        cells.Cell("env/refused/s1", refused),
        cells.Cell("env/second/s1", lambda: given("second"), after=("env/first/s1",)),
        cells.Cell("env/wrong/s1", lambda: given("wrong", "--learning_rate=-1")),
        cells.Cell("env/first/s1", lambda: given("first")),
        cells.Cell("env/never/s1", lambda: given("never"), after=("env/wrong/s1",)),
    ]
    kept, said = tmp_path / "study" / "runs", []
    with pytest.raises(LisaError, match=r"2 of 5 runs failed, first env/refused/s1: no layer"):
        cells.run_cells(plan, kept, tmp_path / "work", jobs=1, say=said.append)
    assert order == ["wrong", "first", "second"]
    assert (kept / "env/second/s1/run.json").exists()
    assert not (kept / "env/wrong").exists()
    assert len(said) == 4
    assert "env/refused/s1: failed, no layer is named" in said[0]
    assert any("env/wrong/s1: failed" in line and "learning_rate" in line for line in said)
    assert (
        cells.run_cells([plan[1], plan[3]], kept, tmp_path / "work", jobs=1, say=said.append) == []
    )
    assert len(said) == 4  # nothing was run again


def test_a_plan_that_fails_ends_no_other(cells, trained, tmp_path):
    commands = module(REPORTS / "commands.py")
    _, words = trained

    class Of:
        def __init__(self, name, *more):
            self.cell = cells.Cell(f"{name}/first/s1", lambda: [*words, *more])

        def cells(self):
            return [self.cell]

    kept = tmp_path / "study" / "runs"
    plans = [Of("a", "--learning_rate=-1"), Of("b"), Of("c", "--max_steps=0.5")]
    with pytest.raises(LisaError, match=r"first a/first/s1(.|\n)*first c/first/s1"):
        commands.run_plans(plans, kept, tmp_path / "work", jobs=1, minutes=None)
    assert [p.parent.name for p in kept.glob("*/first")] == ["b"]
    del sys.modules["commands"]


class TestSampling:
    @pytest.fixture
    def plan(self, sampling, trained, tmp_path):
        """The plan of MiniLM without a log, and a function that makes up a finished run."""
        environments, *_, study = sampling
        environment = environments.environments(tmp_path)["pos"]
        run_dir, _ = trained
        kept = tmp_path / "runs"

        def finish(cell, loss):
            folder = kept / cell.name
            folder.mkdir(parents=True)
            manifest = json.loads((run_dir / "run.json").read_text())
            manifest["result"]["last_held_out_loss"] = loss
            (folder / "run.json").write_text(json.dumps(manifest))
            for path in run_dir.iterdir():
                if path.name != "run.json" and path.is_file():
                    (folder / path.name).write_bytes(path.read_bytes())
            (folder / "metrics").mkdir()
            for path in (run_dir / "metrics").iterdir():
                (folder / "metrics" / path.name).write_bytes(path.read_bytes())

        return study.Plan(environment, kept, tmp_path), finish

    def test_rates_come_first_and_a_best_one_at_the_edge_moves_the_grid(self, plan):
        plan, finish = plan
        assert {c.name.split("/")[1] for c in plan.cells()} == {"source-probe", "rates"}
        centre = plan.environment.centres["head"]
        assert plan.tried("head") == pytest.approx([centre * f for f in (0.1, 0.316, 1, 3.16, 10)])
        for rate in plan.tried("head"):
            for cell in plan.pair("head", rate):
                finish(cell, 1 / rate)  # the largest is the best
        assert len(plan.tried("head")) == 6
        assert plan.tried("head")[-1] == pytest.approx(31.6 * centre)
        for cell in plan.pair("head", plan.tried("head")[-1]):
            finish(cell, 1e9)
        assert len(plan.tried("head")) == 6
        assert plan.rate("head") == pytest.approx(10 * centre)
        with pytest.raises(LisaError, match="rates of full are not complete"):
            plan.rate("full")

    def test_profile_arm_and_placebo_choose_the_rate_together(self, plan):
        plan, _ = plan
        names = [cell.name for cell in plan.pair("mild", 1e-3)]
        assert names == [
            f"pos/rates/{arm}-0.001-s{s}" for arm in ("default", "uniform") for s in (101, 102)
        ]

    def test_every_arm_reads_runs_of_another_seed(self, plan):
        plan, _ = plan
        for arm in plan.arms.values():
            for name in plan.cell(arm, 3).after:
                assert name.endswith("/s4")

    def test_no_source_is_taken_for_an_arm(self, plan, monkeypatch):
        plan, _ = plan
        monkeypatch.setattr(plan, "settled", lambda: True)
        monkeypatch.setattr(plan, "rate", lambda family: 1e-3)
        monkeypatch.setattr("plan.common", lambda *given, **settings: [])  # fetches the model
        cells = {}
        for cell in plan.cells():
            assert cell.name not in cells
            cells[cell.name] = cell
        pilot = cells["pos/source-pilot/s2"]
        assert pilot.after == ()
        assert "--method=full" in pilot.words()
        for name in ("pos/pilot/s1", "pos/level/s1"):
            assert cells[name].after == ("pos/source-pilot/s2",)
        assert {name for cell in cells.values() for name in cell.after} <= set(cells)

    def test_the_pilot_stage_chooses_the_learner_of_online(self, plan, monkeypatch):
        plan, finish = plan
        monkeypatch.setattr(plan, "settled", lambda: True)
        monkeypatch.setattr(plan, "rate", lambda family: 1e-3)
        monkeypatch.setattr("plan.common", lambda *given, **settings: [])
        names = [cell.name for cell in plan.cells()]
        assert "pos/learner-kl/s102" in names
        assert not any("/online" in name for name in names)
        with pytest.raises(LisaError, match="pos: the learners are not compared yet"):
            plan.arms["online"].words(1)
        for place, arm in enumerate(plan.sampling.learners.values()):
            for seed in (101, 102):
                finish(plan.cell(arm, seed), [0.4, 0.3, 0.1, 0.2][place])
        assert plan.preferred == "learner-kl"
        cells = {cell.name: cell for cell in plan.cells()}
        assert {"--lisa.learn.learner=kl", "--lisa.learn.strength=3"} <= {
            *cells["pos/online/s1"].words()
        }
        placebo = cells["pos/online-placebo/s1"].words()
        assert placebo == [*cells["pos/online/s1"].words(), "--lisa.control=permuted"]

    def test_patterns_name_the_layers_of_every_stack(self, sampling):
        import re

        environments, *_ = sampling
        pos = environments.environments(Path("nowhere"))["pos"]
        pattern = pos.targets([1, 5])
        assert re.fullmatch(pattern, "bert.encoder.layer.1.attention.self.query")
        assert re.fullmatch(pattern, "bert.encoder.layer.5.output.dense")
        assert not re.fullmatch(pattern, "bert.encoder.layer.2.output.dense")
        assert not re.fullmatch(pattern, "bert.pooler.dense")
        both = replace(
            pos, stacks=((r"encoder\.layers", 4), (r"decoder\.layers", 4)), linear=("fc1",)
        )
        pattern = both.targets([0, 6])
        assert re.fullmatch(pattern, "model.encoder.layers.0.fc1")
        assert re.fullmatch(pattern, "model.decoder.layers.2.fc1")
        assert not re.fullmatch(pattern, "model.encoder.layers.2.fc1")
        assert both.top([3, 1, 2, 0, 5, 9, 7, 8]) == [0, 5]
        assert both.top([3, 1, 2, 0, 5, 9, 7, 8], lowest=True) == [3, 4]

    def test_the_best_learned_arm_has_its_placebo_with_as_many_seeds(self, plan, monkeypatch):
        plan, _ = plan
        monkeypatch.setattr(plan, "settled", lambda: True)
        monkeypatch.setattr(plan, "rate", lambda family: 1e-3)
        for best, extra in (("pilot", {"pilot-placebo"}), ("strong", set())):
            monkeypatch.setattr(plan, "best_learned", lambda best=best: best)
            names = {cell.name for cell in plan.cells()}
            assert {n for n in names if n.startswith(f"pos/{best}-placebo/")} == {
                f"pos/{best}-placebo/s{seed}" for seed in range(1, 11)
            }
            assert f"pos/{best}/s10" in names
            optional = ("pos/default-placebo", "pos/pilot-placebo", "pos/ablation-placebo")
            found = {n.split("/")[1] for n in names if n.startswith(optional)}
            assert found == extra

    def test_what_the_grid_has_is_not_run_again_to_choose_an_arm(self, plan, monkeypatch):
        plan, _ = plan
        monkeypatch.setattr(plan, "rate", lambda family: 1e-3)
        assert plan.tuned(plan.arms["strong"], 101).name == "pos/rates/strong-0.001-s101"
        assert plan.tuned(plan.arms["pilot"], 101).name == "pos/pilot/s101"

    def test_a_head_apart_keeps_its_rate_whatever_the_rate_of_the_rest(self, plan, monkeypatch):
        plan, finish = plan
        monkeypatch.setattr(plan, "settled", lambda: True)
        monkeypatch.setattr(plan, "rate", lambda family: 1e-2 if family == "head" else 1e-3)
        monkeypatch.setattr("plan.common", lambda *given, **settings: [])
        grid = [c for c in plan.cells() if "uniform-parts" in c.name or "pool-parts" in c.name]
        rates = [rate for rate in plan.tried("parts") for _ in range(4)]
        assert [cell.name for cell in grid] == [c.name for c in plan._grid("parts")]
        for cell, rate in zip(grid, rates, strict=True):
            if "pool" not in cell.name:  # whose probe is not there
                assert f"--learning_rate={rate:.6g}" in cell.words()
                file = cell.words()[-1].removeprefix("--lr_multipliers=")
                factors = json.loads(Path(file).read_text())["multipliers"]
                assert factors["head"] * rate == pytest.approx(1e-2)
                assert {factors[str(layer)] for layer in range(6)} == {1.0}
            finish(cell, 0.3 if rate == rates[9] else 0.5)
        explored = [cell.name for cell in plan.cells() if "s5" in cell.name][-5:]
        assert explored == [f"pos/{name}/s5" for name in plan.sampling.by_part]
        assert "--lisa.always_active=[head,norm,other]" in (
            plan.cell(plan.sampling.by_part["uniform-rests"], 1).words()
        )

    def test_no_profile_is_of_the_examples_that_the_outcome_is_of(self, plan, monkeypatch):
        plan, _ = plan
        monkeypatch.setattr(plan, "rate", lambda family: 1e-3)
        source = plan.source("ablation", 2)
        assert source.name == "pos/source-ablation/s2"
        assert source.ablated is not None
        monkeypatch.setattr("plan.common", lambda _, split, *given, **settings: [split])
        assert source.words()[0] == "validation"
        assert plan.cell(plan.arms["lora-everything"], 2).words()[0] == "test"
        assert plan.cell(plan.arms["lora-everything"], 2).ablated is None


class TestData:
    def test_rows_of_a_tuning_split(self, sampling, tmp_path):
        environments, *_ = sampling
        folder = tmp_path / "given"
        folder.mkdir()
        for split, rows in (("train", 50), ("test", 20)):
            write_jsonl(folder / f"{split}.jsonl", [{"text": f"{split} {n}"} for n in range(rows)])

        def read(folder, split):
            return (folder / f"{split}.jsonl").read_text().splitlines()

        plain = environments.with_validation("plain", folder, tmp_path, 10)
        assert read(plain, "validation") == read(folder, "train")[-10:]
        assert read(plain, "test") == read(folder, "test")
        mixed = environments.with_validation("mixed", folder, tmp_path, 10, mixed=True)
        chosen = read(mixed, "validation")
        assert len(chosen) == 10
        assert sorted(chosen + read(mixed, "train")) == sorted(read(folder, "train"))
        assert chosen != read(folder, "train")[-10:]
        assert sorted(read(mixed, "test")) == sorted(read(folder, "test"))
        assert read(mixed, "test") != read(folder, "test")
        # Whole once, whatever becomes of the source.
        (folder / "train.jsonl").unlink()
        assert environments.with_validation("mixed", folder, tmp_path, 10, mixed=True) == mixed


class TestDifferences:
    def test_holm_is_step_down(self, differences):
        # Worked by hand: 4 * .01, 3 * .013, then never below the one before; at most 1.
        found = differences.holm([0.01, 0.04, 0.013, 0.9])
        assert found == pytest.approx([0.04, 0.08, 0.04, 0.9])
        assert differences.holm([0.6, 0.6]) == [1.0, 1.0]
        assert differences.holm([]) == []

    def test_differences_are_within_seeds(self, differences):
        import scipy.stats

        a, b = {1: 1.0, 2: 2.5, 3: 3.1, 9: 5.0}, {1: 0.9, 2: 2.2, 3: 3.0, 4: 0.0}
        found = differences.difference(a, b)
        reference = scipy.stats.ttest_rel([1.0, 2.5, 3.1], [0.9, 2.2, 3.0])
        bounds = reference.confidence_interval()
        assert found.mean == pytest.approx(0.5 / 3)
        assert (found.low, found.high, found.p) == pytest.approx((*bounds, reference.pvalue))
        assert differences.difference({1: 1.0, 2: 1.0}, b) is None

    def test_a_gain_is_a_share_of_the_way_to_all_layers(self, differences):
        random, everything = {1: 1.0, 2: 1.2, 3: 1.1}, {1: 0.6, 2: 0.6, 3: 0.6}
        assert differences.normalised(random, random, everything) == pytest.approx([0, 0, 0])
        assert differences.normalised(everything, random, everything).mean() == pytest.approx(1)
        half = {1: 0.8, 2: 0.9, 9: 0.0}
        shares = differences.normalised(half | {3: 0.85}, random, everything)
        assert shares == pytest.approx([0.4, 0.6, 0.5])
        assert len(differences.normalised(random, everything, random)) == 0  # no way to go
        # Two seeds tell nothing from 0, nor do three that disagree.
        assert len(differences.normalised(half, random, everything)) == 0
        noisy = {1: 0.6, 2: 1.3, 3: 1.0}
        assert len(differences.normalised(random, random, noisy)) == 0


class TestContrasts:
    def test_where_the_model_keeps_its_head_it_is_explored_at_rest(self, sampling, tmp_path):
        environments, *_, plans = sampling
        plan = plans.Plan(environments.environments(tmp_path)["voice"], tmp_path, tmp_path)
        named = [cell.name for cell in plan._by_part()]
        assert named[-3:] == [f"voice/{name}/s5" for name in plan.sampling.by_part]
        assert len(named) == 15
        words = plan.sampling.by_part["uniform-rests"].words(1)
        assert "--lisa.always_active=[norm,other]" in words

    def test_a_source_is_paid_in_steps(self, sampling, tmp_path, monkeypatch):
        environments, *_, seconds, plans = sampling
        plan = plans.Plan(environments.environments(tmp_path)["pos"], tmp_path / "runs", tmp_path)
        plan.environment = replace(plan.environment, steps=150)
        default, uniform, full = (plan.arms[name] for name in ("default", "uniform", "full"))
        takes = {"default": 2.0, "uniform": 1.0, "full": 0.5}
        monkeypatch.setattr(seconds, "step_cost", lambda plan, arm: takes[arm.name])
        monkeypatch.setattr(seconds, "source_seconds", lambda plan, kind: 50.0)
        # 150 s are given, 50 go to the probe, a step takes 2: 50 steps.
        assert seconds.steps_left(plan, default) == 50
        assert plan.shorter(default, 1).name == "pos/shorter/default-50-s1"
        assert seconds.steps_left(plan, full) == 300  # cheaper steps are more of them
        assert seconds.steps_left(plan, uniform) == 150
        monkeypatch.setattr(seconds, "source_seconds", lambda plan, kind: 151.0)
        assert seconds.steps_left(plan, default) == 0
        assert plan.shorter(default, 1) is None
        monkeypatch.setattr(seconds, "source_seconds", lambda plan, kind: None)  # not timed yet
        assert seconds.steps_left(plan, default) is None

    def test_a_step_costs_what_the_same_work_costs_in_the_median(
        self, sampling, tmp_path, monkeypatch
    ):
        environments, *_, seconds, plans = sampling
        plan = plans.Plan(environments.environments(tmp_path)["pos"], tmp_path, tmp_path)
        monkeypatch.setattr(plan, "best_learned", lambda: None)
        takes = {"iid": 1.2, "full": 3.0, "reset": 2.0, "online": 1.9}
        monkeypatch.setattr(seconds, "step_seconds", lambda plan, arm: takes.get(arm.name, 1.0))
        for learner, online in (("learner-kl", 1.0), ("learner-probe", 1.9)):
            monkeypatch.setattr(plan.sampling, "preferred", lambda learner=learner: learner)
            found = {name: seconds.step_cost(plan, plan.arms[name]) for name in takes}
            # A learner that measures with passes of its own makes other steps.
            assert found == {"iid": 1.0, "full": 3.0, "reset": 2.0, "online": online}

    def test_seconds_of_a_step_are_all_that_passes_between_evaluations(
        self, sampling, tmp_path, monkeypatch
    ):
        import types

        import pandas as pd

        environments, *_, seconds, plans = sampling
        plan = plans.Plan(environments.environments(tmp_path)["pos"], tmp_path, tmp_path)
        arm = plan.arms["uniform"]
        assert seconds.step_seconds(plan, arm) is None
        (tmp_path / plan.timed(arm).name).mkdir(parents=True)
        events = pd.DataFrame(
            {
                "event": ["lisa_draw", "evaluate", "evaluate"],
                "step": [3, 24, 48],
                "time": [90.0, 100.0, 115.0],
                "metrics": [None, {"eval_runtime": 9.0}, {"eval_runtime": 3.0}],
            }
        )
        monkeypatch.setattr(seconds.la, "load", lambda folder: types.SimpleNamespace(events=events))
        assert seconds.step_seconds(plan, arm) == pytest.approx((115 - 3 - 100) / 24)

    def test_validity_predicts_gain_by_rank(self, prediction):
        import scipy.stats

        one = [(0.1, 0.0), (0.2, 0.1), (0.5, 0.2), (0.9, 5.0), (-1, -2)]
        found = prediction.predicts([one])
        assert found.rho == pytest.approx(1)
        assert found.p < 0.05
        mixed = [(0.1, 0.3), (0.2, 0.1), (0.5, 0.2), (0.9, 5.0), (-1, 2.0)]
        reference = scipy.stats.spearmanr(*zip(*mixed, strict=True))
        found = prediction.predicts([mixed])
        assert (found.rho, found.p) == pytest.approx((reference.statistic, reference.pvalue))
        half = 1.959964 / math.sqrt(len(mixed) - 3)  # Fisher's z
        middle = math.atanh(found.rho)
        assert (found.low, found.high) == pytest.approx(
            (math.tanh(middle - half), math.tanh(middle + half)), abs=1e-5
        )
        # Losses of another task may be on any scale: ranks are taken within each.
        large = [(validity, 1000 * gain) for validity, gain in one]
        assert prediction.predicts([one, large])[0] == pytest.approx(1)
        assert prediction.predicts([one[:3]]) is None
        assert prediction.predicts([[(0.1, 0.0)] * 5]) is None
        assert prediction.predicts([[], []]) is None

    def test_over_environments_as_rliable_has_it(self, together):
        import numpy as np
        import scipy.stats

        rng = np.random.default_rng(0)
        values = rng.normal(size=12)
        assert together.interquartile_mean([values]) == pytest.approx(
            scipy.stats.trim_mean(values, 0.25)
        )
        groups = [values[:4], values[4:8], values[8:]]  # of one size: it is of all runs
        assert together.interquartile_mean(groups) == pytest.approx(
            scipy.stats.trim_mean(values, 0.25)
        )
        # An environment with twice the seeds weighs no more for it.
        assert together.interquartile_mean([values[:6].repeat(2), values[6:]]) == pytest.approx(
            together.interquartile_mean([values[:6], values[6:]])
        )
        losses, other = rng.normal(size=7), rng.normal(0.5, size=5)
        other[0] = losses[0]
        u = scipy.stats.mannwhitneyu(-losses, -other).statistic
        assert together.improvement(losses, other) == pytest.approx(u / 35)


class TestPage:
    @pytest.fixture
    def planted(self, sampling, tmp_path, monkeypatch):
        """Every run of the definitions made up: the probe's layers gain, and no profile does."""
        environments, *_, plans = sampling
        plan = plans.Plan(environments.environments(tmp_path)["define"], tmp_path, tmp_path)
        plain = {"lora-probe": 2.0, "lora-everything": 1.9, "full": 1.8, "pool": 2.45}

        def loss(name):
            longer, rates = "/longer/" in name, "/rates/" in name
            arm, seed = name.rsplit("-s" if longer or rates else "/s", 1)
            arm, seed = arm.rsplit("/", 1)[-1], int(seed)
            arm = arm.rsplit("-", 1)[0] if rates else arm
            noise = 0.001 * ((7 * seed + sum(map(ord, arm))) % 11)
            return plain.get(arm, 2.5) + 0.1 * seed + noise - 0.4 * longer

        monkeypatch.setattr(plan, "loss", loss)
        monkeypatch.setattr(plan, "settled", lambda: True)
        monkeypatch.setattr(plan, "losses", lambda family, grid: dict.fromkeys(grid, 1.0))
        monkeypatch.setattr(plans.Plan, "preferred", "learner-kl")
        return plan

    def test_planted_differences_stand_in_the_tables(self, page, planted):
        def row(table, *words):
            found = [x for x in table.splitlines() if all(f" {word} " in x for word in words)]
            assert len(found) == 1, (words, table)
            return [cell.strip() for cell in found[0].strip("|").split("|")]

        def mean(words):
            return float(words.split()[0])

        tables = page.tables([planted], *page.contrasts([planted]))
        assert mean(row(tables["selection"], "lora", "probe")[6]) == pytest.approx(-0.5, abs=0.01)
        assert "(primary)" in " ".join(row(tables["selection"], "lora", "probe"))
        assert "weights" not in tables["selection"]
        assert planted.best_learned() == "pool"
        assert mean(row(tables["sampling"], "define | pool |")[5]) == pytest.approx(-0.05, abs=0.01)
        pool = row(tables["sampling"], "pool less its placebo")
        assert mean(pool[5]) == pytest.approx(-0.05, abs=0.01)
        assert mean(row(tables["anchors"], "define | full |")[5]) == pytest.approx(-0.7, abs=0.01)
        chosen = row(tables["choice"], "define")
        assert (float(chosen[1]) - float(chosen[4]), chosen[-1]) == (
            pytest.approx(0.05, abs=0.01), "pool",
        )  # fmt: skip
        short = row(tables["short"], "define")
        assert [mean(cell.strip("*")) for cell in short[1:]] == pytest.approx(
            [-0.5, 0.0, 0.0, 0.0, -0.05, 0.0, -0.7], abs=0.011
        )
        assert short[5].endswith("(pool)")
        assert short[1].startswith("**")
        found = row(tables["longer"], "A: lora-probe − random", "75")
        assert mean(found[-1]) == pytest.approx(-0.5, abs=0.01)
        found = row(tables["longer"], "A: lora-probe − random", "300")
        assert mean(found[-1]) == pytest.approx(-0.5, abs=0.01)
        found = row(tables["longer"], "B: pool − uniform", "300")
        assert mean(found[-1]) == pytest.approx(-0.05, abs=0.01)
        found = row(tables["together"], "A: probe less random, LoRA")
        assert mean(found[1]) == pytest.approx(0.5 / 0.6, abs=0.01)
        assert found[2:] == ["define 0.83", "1.00 (1.00 … 1.00)", "define 1.00"]
        found = row(tables["together"], "B, beside it: best learned less its placebo")
        assert mean(found[1]) == pytest.approx(0.05 / 0.7, abs=0.01)
        found = row(tables["together"], "B, beside it: its placebo less uniform")
        assert mean(found[1]) == pytest.approx(0.0, abs=0.01)
        found = row(tables["together"], "A, beside it: last less random")
        assert found[-1].startswith("define 0.")
        assert "not yet" in tables["seconds"]  # nothing was timed

    def test_a_profile_at_every_rate_and_at_each_ones_best(
        self, sampling, page, tmp_path, monkeypatch
    ):
        environments, *_, plans = sampling
        plan = plans.Plan(environments.environments(tmp_path)["pos"], tmp_path, tmp_path)

        def loss(name):
            arm, rate = name.rsplit("/", 1)[1].rsplit("-s10", 1)[0].rsplit("-", 1)
            best = {"lora-probe": 1.0, "lora-random-1": 1.6}.get(arm)
            centre = 1e-3 if "probe" in arm else 3.16e-3
            return None if best is None else best + abs(math.log10(float(rate) / centre))

        monkeypatch.setattr(plan, "loss", loss)
        found = {row["pair"]: row for row in page._by_rate([plan])}
        assert list(found) == ["lora-probe less lora-random-1"]
        assert found["lora-probe less lora-random-1"] == {
            "environment": "pos", "pair": "lora-probe less lora-random-1",
            "at the rates tried, two seeds":
                "0.0001: -1.100, 0.000316: -1.100, 0.001: -1.100, 0.00316: -0.100, 0.01: -0.100",
            "chosen": "0.001", "at each one's own best": "-0.600 (0.001, 0.00316)",
        }  # fmt: skip
