"""Profiles of an ablation: against sums by hand, intervals that hold, and what is refused."""

import numpy as np
import pandas as pd
import pytest
from helpers_ablation import ablation_rows, layers, write_ablation
from helpers_runs import write_run

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError, RunDirectoryError
from lisa_analysis.metrics.ablation import contributions
from lisa_analysis.profiles.ablated import split_half, together
from lisa_analysis.statistics.estimate import fit_series

WORTH = [0.3, 0.1, 0.05, 0.0, 0.2, -0.1]
KINDS = ("attn.q", "mlp.up")


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", n_layers=6, steps=40, every=1, method="full", kinds=KINDS)


def by_hand(frame, unit, mode, kind=None, data="held_out"):
    """Difference of the losses per token, from the sums of both."""
    frame = frame[frame["data"] == data]
    whole = frame[frame["mode"] == {"reset": "trained", "keep": "base"}[mode]]
    rows = frame[(frame["mode"] == mode) & (frame["unit"] == unit)]
    rows = rows[rows["kind"].isna() if kind is None else rows["kind"] == kind]
    sign = 1 if mode == "reset" else -1
    assert len(rows) == len(whole) > 0
    return sign * (rows["loss"].sum() - whole["loss"].sum()) / whole["tokens"].sum()


def test_scores_are_differences_of_losses_per_token(run):
    frame = ablation_rows(layers(WORTH) | {("embed", None): 0.4}, layers(WORTH[::-1]))
    write_ablation(run, frame.sample(frac=1, random_state=0))
    for mode in ("reset", "keep"):
        profile = la.importance(run, f"ablation_{mode}")
        for layer in range(6):
            assert profile[layer].score == pytest.approx(by_hand(frame, str(layer), mode), abs=1e-9)
            assert profile[layer].name == f"model.layers.{layer}"
        assert profile.sufficient
    outside = la.importance(run, "ablation_reset").outside.set_index("name")
    assert outside.loc["embed", "score"] == pytest.approx(by_hand(frame, "embed", "reset"))
    assert outside.loc["embed", "low"] < 0.4 < outside.loc["embed", "high"]
    assert np.isnan(outside.loc["norm", "score"])


def test_a_layer_that_never_trained_is_worth_exactly_nothing(run):
    write_ablation(run, ablation_rows(layers(WORTH)))
    profile = la.importance(run, "ablation_reset")
    assert profile.zero == (3,)
    assert profile[3].score == 0
    assert np.isnan(profile[3].low)
    assert "layer 3: its ablation_reset is exactly 0" in profile.statement.replace("Layer", "layer")
    assert "layers 0, 1, 2, 4 were worth something" in profile.statement
    assert "layer 5 did harm" in profile.statement


def test_forgetting_is_after_less_before_on_general_text(run):
    task = ablation_rows(layers(WORTH), layers(WORTH))
    # On general text a layer that is reset makes it better: loss goes down.
    general = ablation_rows(
        layers([-0.2, 0.1, -0.05, 0.02, -0.1, -0.3]), data="general", gain=-0.5, seed=1
    )
    write_ablation(run, pd.concat([task, general]))
    profile = la.importance(run, "forgetting")
    for layer in range(6):
        expected = -by_hand(general, str(layer), "reset", data="general")
        assert profile[layer].score == pytest.approx(expected, abs=1e-9)
    assert profile[0].low > 0 > profile[1].high
    assert "forgetting of 0.5" in profile.statement or "forgetting of 0.4" in profile.statement
    with pytest.raises(LisaError, match="no keep of single layers on general text"):
        la.importance(run, "forgetting_keep")


def test_kinds_and_modules(run):
    modules = {(str(i), kind): (i + 1) * size for i in range(6)
               for kind, size in zip(KINDS, (0.01, 0.05), strict=True)}  # fmt: skip
    frame = ablation_rows(modules)
    write_ablation(run, frame)
    profile = la.importance(run, "ablation_reset", by="module")
    named = profile.to_frame().set_index("name")["score"]
    for unit, kind in modules:
        expected = by_hand(frame, unit, "reset", kind)
        assert named[f"model.layers.{unit} {kind}"] == pytest.approx(expected, abs=1e-9)
    kinds = la.importance(run, "ablation_reset", by="kind").to_frame().set_index("name")["score"]
    for kind in KINDS:
        total = sum(by_hand(frame, str(i), "reset", kind) for i in range(6))
        assert kinds[kind] == pytest.approx(total, abs=1e-9)
    with pytest.raises(LisaError, match="no reset of single layers"):
        la.importance(run, "ablation_reset")
    with pytest.raises(LisaError, match="not by tensor"):
        la.importance(run, "ablation_reset", by="tensor")


def test_a_kind_that_some_layers_lack_is_the_sum_of_the_others(run):
    rows = ablation_rows({("0", "attn.q"): 0.1, ("2", "attn.q"): 0.2})
    write_ablation(run, rows)
    kinds = la.importance(run, "ablation_reset", by="kind").to_frame().set_index("name")["score"]
    expected = by_hand(rows, "0", "reset", "attn.q") + by_hand(rows, "2", "reset", "attn.q")
    assert kinds["attn.q"] == pytest.approx(expected)
    assert np.isnan(kinds["mlp.up"])


def test_contributions_have_the_variance_of_the_ratio():
    """Against the spread of the ratio itself over many drawn sets of examples."""
    rng = np.random.default_rng(0)
    ratios, claimed = [], []
    for _ in range(1500):
        tokens = rng.integers(2, 80, size=40).astype(float)
        differences = tokens * (0.2 + 0.3 * rng.standard_normal(40) * (tokens > 20))
        rows = contributions(differences[:, None], tokens)[:, 0]
        ratios.append(differences.sum() / tokens.sum())
        assert rows.mean() == pytest.approx(ratios[-1], abs=1e-12)
        claimed.append(rows.var(ddof=1) / 40)
    assert np.mean(claimed) == pytest.approx(np.var(ratios), rel=0.1)


def fitted(truth, seed, examples=64):
    """Fit of `importance` over the examples of one drawn ablation."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, 60, size=examples).astype(float)
    noise = 0.3 * rng.standard_normal((examples, len(truth)))
    rows = contributions(tokens[:, None] * (truth + noise), tokens)
    return fit_series(
        rows, log=False, clusters=None, confidence=0.95, rng=rng, independent=True
    )  # fmt: skip


def test_intervals_hold_at_the_default_number_of_examples():
    """95 % intervals of a mean over 64 examples of unequal length cover about 95 %."""
    truth, inside = np.array([0.1, -0.2, 0.3, 0.02, 0.1, 0.0001]), []
    for seed in range(150):
        fit = fitted(truth, seed)
        inside.append((fit.low <= truth) & (truth <= fit.high))
    assert 0.93 <= np.mean(inside) <= 0.98


@pytest.mark.parametrize("examples", [24, 64])
def test_bounds_of_all_layers_hold_together(examples):
    """Layers of no worth: at least one is called different from nothing in about 5 %."""
    wrong = 0
    for seed in range(200):
        low, high = together(fitted(np.zeros(12), seed, examples))
        wrong += bool(((low > 0) | (high < 0)).any())
    assert wrong <= 20


def test_few_examples_have_no_interval_and_say_so(run):
    write_ablation(run, ablation_rows(layers(WORTH), examples=4))
    profile = la.importance(run, "ablation_reset")
    assert not profile.sufficient
    assert np.isfinite(profile[0].score)
    assert np.isnan(profile[0].low)
    assert "too few for intervals" in profile.statement


def test_interaction_is_said(run):
    parts = {
        "others have learned too": ([0.01] * 6, [0.2] * 6),
        "need each other": ([0.2] * 6, [0.01] * 6),
        "no interaction": ([0.1] * 6, [0.1] * 6),
    }
    for words, (reset, keep) in parts.items():
        write_ablation(run, ablation_rows(layers(reset), layers(keep)))
        assert words in la.importance(run, "ablation_keep").statement


def test_reliability_is_that_of_the_examples():
    """Against the variance ratio that defines it: σ_b²/(σ_b² + σ²/n) with 40 layers."""
    rng = np.random.default_rng(2)
    found = []
    for _ in range(20):
        truth = rng.standard_normal(40)
        found.append(split_half(truth + 6 * rng.standard_normal((64, 40))))
    assert np.mean(found) == pytest.approx(1 / (1 + 36 / 64), abs=0.05)
    assert np.isnan(split_half(np.ones((64, 2))))


def test_reliability_tells_how_many_examples_more(run):
    write_ablation(run, ablation_rows(layers(WORTH), noise=0.01))
    sure = la.importance(run, "ablation_reset")
    assert sure.reliability.split_half > 0.99
    assert "would come out the same again" in sure.statement
    write_ablation(run, ablation_rows(layers(np.linspace(0.1, 0.2, 6)), noise=0.3, seed=3))
    unsure = la.importance(run, "ablation_reset")
    assert unsure.reliability.split_half < 0.9
    assert "examples would make it reliable" in unsure.statement


def test_a_unit_without_a_finite_loss_is_unknown_and_not_averaged(run):
    frame = ablation_rows(layers(WORTH))
    lost = (frame["unit"] == "1") & (frame["example"] == 5)
    write_ablation(run, frame.assign(loss=frame["loss"].where(~lost, np.nan)))
    profile = la.importance(run, "ablation_reset")
    assert profile.unseen == (1,)
    whole = (frame["mode"] == "trained") & (frame["example"] == 5)
    write_ablation(run, frame.assign(loss=frame["loss"].where(~whole, np.inf)))
    with pytest.raises(LisaError, match="loss of the trained model is not a finite number on 1"):
        la.importance(run, "ablation_reset")


def test_what_is_refused(run):
    with pytest.raises(LisaError, match=r"lisa-ablate RUN_DIR"):
        la.importance(run, "ablation_keep")
    frame = ablation_rows(layers(WORTH))
    for column, value, words in (
        ("mode", "remove", "has the mode 'remove'"),
        ("data", "test", "has the data 'test'"),
        ("unit", "9", "has the unit 9, and the run has 6 layers"),
        ("unit", "4-", "has the unit '4-'"),
        ("tokens", 0, "without a single label"),
    ):
        broken = frame.reset_index(drop=True)
        broken.loc[len(broken) - 1, column] = value
        write_ablation(run, broken)
        with pytest.raises(RunDirectoryError, match=words):
            _ = la.load(run).ablation
    write_ablation(run, pd.concat([frame, frame.iloc[-1:]]))
    with pytest.raises(RunDirectoryError, match="two rows of one example"):
        _ = la.load(run).ablation
    (run / "ablation.parquet").write_bytes(b"torn")
    with pytest.raises(RunDirectoryError, match="cannot be read"):
        _ = la.load(run).ablation
