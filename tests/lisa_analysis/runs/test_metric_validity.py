"""Validity: a planted metric is found, none is found by chance, runs and lenders count right."""

import numpy as np
import pandas as pd
import pytest
from helpers_ablation import ablation_rows, layers, write_ablation
from helpers_runs import write_run

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError
from lisa_analysis.runs.metric_validity.judging import judge
from lisa_analysis.runs.metric_validity.sides import Part, Side
from lisa_analysis.runs.metric_validity.words import sentences
from lisa_analysis.statistics.association import Cells

KINDS = ("attn.q", "attn.v", "mlp.up", "mlp.down")
# What `write_run` plants into every gradient: a U over the depth.
PLANTED = 0.3 + np.linspace(-1, 1, 12) ** 2


def run_of(path, n_layers=12, **options):
    return write_run(path, n_layers=n_layers, steps=120, every=1, method="full", kinds=KINDS,
                     **options)  # fmt: skip


def ablated(path, worth, *, n_layers=12, noise=0.02, seed=0, **options):
    run = run_of(path, n_layers, seed=seed, **options)
    write_ablation(run, ablation_rows(layers(worth), layers(worth), noise=noise, seed=seed))
    return run


def row(found, metric, level="layer", target="ablation_keep", source=""):
    wanted = {"metric": metric, "level": level, "target": target, "source": source}
    [one] = [r for r in found.to_frame().to_dict("records") if wanted.items() <= r.items()]
    return one


def test_a_metric_that_predicts_is_found_with_its_ceiling(tmp_path):
    found = la.validity(ablated(tmp_path / "run", PLANTED / 10))
    best = row(found, "grad_rms")
    assert best["evidence"]
    assert best["spearman"] > 0.9
    assert best["low"] < best["spearman"] <= best["high"]
    assert best["metric_noise"]
    assert 0.9 < best["ceiling"] <= 1
    assert best["chance"] == pytest.approx(0.587, abs=0.03)  # the 5 % point for 12
    assert "predict what a change is worth alone (keep)" in str(found)
    assert "grad_rms" in str(found)
    assert "One run says nothing of other seeds" in found.sentence
    profile = la.importance(tmp_path / "run")
    keep = la.importance(tmp_path / "run", "ablation_keep")
    expected = pd.Series(profile.scores).corr(pd.Series(keep.scores), method="spearman")
    assert best["spearman"] == pytest.approx(expected)
    assert "probe_rms" in found.missing
    assert not {"lisa_ratio", "ablation_keep"} & {*found.to_frame()["metric"]}


def test_a_worth_that_no_metric_knows_is_called_so(tmp_path):
    worth = np.random.default_rng(5).permutation(np.linspace(0.02, 0.1, 12))
    found = la.validity(ablated(tmp_path / "run", worth))
    assert not found.to_frame()["evidence"].any()
    assert found.sentence.startswith("No metric predicts what the layers were worth")
    assert "needed of one alone" in found.sentence


def test_six_layers_are_no_evidence_below_89_and_it_says_by_kind(tmp_path):
    worth = np.array([0.10, 0.05, 0.02, 0.04, 0.03, 0.09])
    found = la.validity(ablated(tmp_path / "run", worth, n_layers=6))
    frame = found.to_frame()
    assert frame["chance"].min() == pytest.approx(0.886, abs=5e-4)
    assert not frame["evidence"].any()
    assert "6 layers tell little: lisa-ablate --by kind" in found.sentence


def test_an_ablation_of_noise_is_said_to_be_one(tmp_path):
    found = la.validity(ablated(tmp_path / "run", PLANTED / 1e4, noise=0.5))
    assert "hardly tell the order of keep" in found.sentence
    assert "no metric could be seen to agree" in found.sentence
    assert row(found, "grad_rms")["ceiling"] < 0.7
    assert found.reliability["layer", "ablation_keep"] < 0.5


def test_an_order_that_is_hardly_known_may_still_be_predicted():
    """Evidence beside a poor reliability: the sentence does not deny what it has just said."""
    rows = [("keep", "grad_rms", 0.9, True), ("keep", "depth", 0.1, False)]
    table = pd.DataFrame(
        {"level": "layer", "target": f"ablation_{target}", "metric": metric, "source": "",
         "spearman": rho, "low": np.nan, "high": np.nan, "ceiling": 0.6, "chance": 0.4,
         "evidence": evidence, "layers": 30, "kinds": 0}
        for target, metric, rho, evidence in rows
    )  # fmt: skip
    said = sentences(table, {("layer", "ablation_keep"): 0.4}, 1, [], 0.95)
    assert "grad_rms (ρ = 0.90) predicts what a change is worth alone" in said
    assert "the order of keep (0.40) itself" in said
    assert "a metric that shows no agreement may have one; ablate with more" in said
    assert "no metric" not in said


def test_kinds_are_ranked_over_modules_and_within_kinds(tmp_path):
    run = run_of(tmp_path / "run", 8)
    planted = 0.3 + np.linspace(-1, 1, 8) ** 2
    size = dict(zip(KINDS, (1.0, 4.0, 2.0, 3.0), strict=True))
    worth = {(str(i), kind): planted[i] * size[kind] / 50 for i in range(8) for kind in KINDS}
    write_ablation(run, ablation_rows({}, worth))
    found = la.validity(run)
    frame = found.to_frame()
    assert {*frame["level"]} == {"module", "within kind"}
    within = row(found, "grad_rms", "within kind")
    assert within["evidence"]
    assert within["spearman"] > 0.9
    assert (within["layers"], within["kinds"]) == (8, 4)
    over = row(found, "grad_rms", "module")
    # The gradients of the kinds are alike, their worth is not: the kinds hide the layers.
    assert over["spearman"] < within["spearman"]
    assert "Over 8 layers within 4 kinds" in found.sentence


def test_a_module_that_is_missing_takes_its_kind_out(tmp_path):
    run = run_of(tmp_path / "run", 8)
    worth = {(str(i), kind): (i + 1) / 50 for i in range(8) for kind in KINDS}
    del worth["3", "attn.q"]
    write_ablation(run, ablation_rows({}, worth))
    assert row(la.validity(run), "grad_rms", "module")["kinds"] == 3


def test_seeds_are_averaged_and_bounded_over_runs(tmp_path):
    runs = [ablated(tmp_path / f"run{seed}", PLANTED / 10, seed=seed) for seed in range(3)]
    found = la.validity(runs)
    best = row(found, "grad_rms")
    alone = [row(la.validity(run), "grad_rms")["spearman"] for run in runs]
    assert best["runs"] == 3
    assert best["spearman"] == pytest.approx(np.mean(alone))
    reach = 4.303 * np.std(alone, ddof=1) / np.sqrt(3)
    assert best["low"] == pytest.approx(max(np.mean(alone) - reach, -1), abs=2e-3)
    assert "says nothing of other seeds" not in found.sentence
    assert len(found.runs) == 3


def test_runs_of_two_depths_are_said_to_be(tmp_path):
    deep = [ablated(tmp_path / f"deep{seed}", PLANTED / 10, seed=seed) for seed in range(2)]
    worth = 0.3 + np.linspace(-1, 1, 8) ** 2
    flat = [ablated(tmp_path / f"flat{s}", worth / 10, n_layers=8, seed=s) for s in range(2)]
    for runs in ([*deep, *flat], [*flat, *deep]):
        found = la.validity(runs)
        assert "Over 8 to 12 layers: " in found.sentence
        one = row(found, "grad_rms")
        assert (one["layers"], one["layers_at_most"], one["runs"]) == (8, 12, 4)


def test_a_probe_lends_its_metrics(tmp_path):
    run = ablated(tmp_path / "run", PLANTED / 10)
    pilot = run_of(tmp_path / "pilot", seed=9)
    other = run_of(tmp_path / "other", 5)
    found = la.validity([pilot, run, other])
    assert found.lent == ("pilot",)
    assert "none of the layers or modules that were ablated: other." in found.sentence
    lent = row(found, "grad_rms", source="pilot")
    expected = pd.Series(la.importance(pilot).scores).corr(
        pd.Series(la.importance(run, "ablation_keep").scores), method="spearman"
    )
    assert lent["spearman"] == pytest.approx(expected)
    assert not (found.to_frame()["source"] == "other").any()
    depths = found.to_frame()[found.to_frame()["metric"] == "depth"]
    assert {*depths["source"]} == {""}  # what is the same of both is compared once
    assert "grad_rms of pilot" in found.sentence


def test_a_profile_of_scores_from_anywhere_is_compared(tmp_path):
    run = la.load(ablated(tmp_path / "run", PLANTED / 10))
    names = list(la.importance(run).layers["name"])
    scores = np.random.default_rng(3).permutation(12).astype(float)
    shuffled = np.random.default_rng(4).permutation(12)
    mine = la.ImportanceProfile.from_scores(
        scores[shuffled], [names[i] for i in shuffled], metric="mine"
    )
    strange = la.ImportanceProfile.from_scores(scores, metric="strange")
    found = la.validity([run, mine, strange])
    keep = la.importance(run, "ablation_keep")
    expected = pd.Series(scores).corr(pd.Series(keep.scores), method="spearman")
    assert row(found, "mine", source="a profile")["spearman"] == pytest.approx(expected)
    assert "strange" not in {*found.to_frame()["metric"]}
    assert "scores none of the run's layers: its own are" in found.missing["strange"]
    assert found.lent == ()
    assert "modules that were ablated: the profile of strange." in found.sentence
    # As a folder of weights has them, whose encoder has no name where no head stands on it.
    bare = [name.removeprefix("model.") for name in names]
    assert bare != names
    bare_found = la.validity([run, la.ImportanceProfile.from_scores(scores, bare, metric="mine")])
    assert row(bare_found, "mine", source="a profile")["spearman"] == pytest.approx(expected)
    mine.save(tmp_path / "mine.json")  # read again it has no samples, and the same scores
    again = la.validity([run, la.ImportanceProfile.load(tmp_path / "mine.json")])
    assert row(again, "mine", source="a profile")["spearman"] == pytest.approx(expected)
    for given, match in (
        ([run, mine, mine], "two profiles of mine by layer"),
        ([mine], "profiles and no run"),
        ([run, la.importance(run, by="kind")], "is by kind"),
    ):
        with pytest.raises(LisaError, match=match):
            la.validity(given)


def test_few_examples_give_no_interval(tmp_path):
    run = run_of(tmp_path / "run")
    write_ablation(run, ablation_rows(layers(PLANTED), layers(PLANTED), examples=4))
    best = row(la.validity(run), "grad_rms")
    assert np.isnan(best["low"])
    assert np.isfinite(best["spearman"])


@pytest.mark.parametrize("cells", [Cells(6), Cells(12), Cells(5, 3), Cells(6, 4, within=True)])
def test_false_alarms_over_all_metrics_are_few(cells):
    """Ten metrics that know nothing: at least one is called evidence in about 5 %."""
    rng, wrong, n = np.random.default_rng(0), 0, cells.layers * cells.kinds
    for seed in range(100):
        truth = Side(rng.standard_normal(n), None)
        common = rng.standard_normal(n)
        metrics = {("", str(i)): Side(common + rng.standard_normal(n), None) for i in range(10)}
        part = Part("layer", "ablation_keep", ("a",), cells, truth, 1.0, metrics)
        wrong += any(row["evidence"] for row in judge([part], 0.95, seed))
    assert wrong <= 11


def test_what_is_refused(tmp_path):
    run = run_of(tmp_path / "run")
    with pytest.raises(LisaError, match="has no ablation: run lisa-ablate RUN_DIR"):
        la.validity(run)
    write_ablation(run, ablation_rows({("0-5", None): 0.1, ("6-11", None): 0.2}))
    with pytest.raises(LisaError, match="without --range"):
        la.validity(run)
    with pytest.raises(LisaError, match="validity takes a run directory"):
        la.validity(3)
