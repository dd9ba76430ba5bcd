"""Runs that learned their probabilities, or gave them to other layers: grid, picture, arms."""

import numpy as np
import pytest

import lisa_analysis as la
from lisa_analysis.contract.schema import CONFIG
from lisa_analysis.rundir.configurations import settings
from lisa_analysis.runs.arms import find_arms
from lisa_analysis.runs.schedule import probability_grid
from lisa_analysis.views import plots
from lisa_analysis.views.html_report import over_time
from lisa_analysis.views.html_report.figure import Budget

LAYERS, K = 6, 2


def moving(events):
    """Edit: π that lean more to layer 4 with every draw."""
    for n, event in enumerate(e for e in events if e["event"] == "lisa_draw"):
        lean = np.ones(LAYERS)
        lean[4] += 0.2 * n
        event["inclusion_probabilities"] = (K * lean / lean.sum()).tolist()
        event["scores"] = None if n < 3 else [None, *lean[1:].tolist()]
    return events


def entry(control="none", learn=True, **more):
    learned = {"metric": "grad_rms", "strength": 1.0, "prior": "uniform"}
    return {"lisa": {
        "activated_layers": K, "interval_steps": 10, "sampling": "balanced", "control": control,
        "learn": learned if learn else None, **more,
    }}  # fmt: skip


def test_probabilities_over_time_are_those_of_the_draws(make_run):
    run = make_run(profile=LAYERS, steps=80, method="lisa", edit_events=moving, manifest=entry())
    grid = probability_grid(run)
    assert grid.steps.tolist() == [10 * n for n in range(8)]
    assert grid.values[4, -1] == pytest.approx(2.4 / (LAYERS + 1.4) * LAYERS)
    np.testing.assert_allclose(grid.values.mean(axis=0), 1)
    ax = plots.learned_probabilities(run)
    image = ax.images[0]
    assert image.get_array().shape == (LAYERS, 8)
    assert image.norm(1.0) == pytest.approx(0.5)  # white where a layer is drawn as uniformly
    assert image.norm.vmax == pytest.approx(grid.values.max())
    page = la.report(run)
    text = page if isinstance(page, str) else page.html
    assert "What was learned: probabilities over time" in text
    assert "probabilities learned meanwhile" in text


def of_modules(events):
    """Edit: two modules a layer take turns, and the first of layer 4 more with every draw."""
    for n, event in enumerate(e for e in events if e["event"] == "lisa_draw"):
        lean = np.ones(2 * LAYERS)
        lean[8] += 0.1 * n
        event["unit_probabilities"] = (K * 2 * lean / lean.sum()).tolist()
        event["inclusion_probabilities"] = None
        event["units"] = sorted({2 * layer for layer in event["layers"]})
    return events


@pytest.mark.parametrize("control", ["none", "permuted"])
def test_the_report_says_that_modules_are_drawn_where_they_are(make_run, control):
    count = 2 * LAYERS
    parts = {
        "by": "module", "unit_names": [f"{i // 2} {'ab'[i % 2]}" for i in range(count)],
        "unit_layers": [i // 2 for i in range(count)], "unit_sizes": [100] * count,
        "unit_tensors": [[f"tensor{i}"] for i in range(count)],
    }  # fmt: skip
    run = make_run(profile=LAYERS, steps=80, method="lisa", edit_events=of_modules,
                   manifest=entry(control, **parts))  # fmt: skip
    grid = probability_grid(run)
    lean = 1.7
    assert grid.values[4, -1] == pytest.approx((lean + 1) / 2 / ((count + lean - 1) / count))
    bar = plots.learned_probabilities(run).figure.axes[-1]
    assert bar.get_ylabel() == "share that trains, over uniform"
    budget = Budget.for_runs(1)
    names = run.layer_names
    learned = over_time.learned_figure("a", run, names, budget)
    drawn = over_time.schedule_figure("b", run, names, budget)
    assert "share of each layer's weights" in learned.caption
    assert "Probability of each layer" not in learned.caption
    assert ("those of other modules" in learned.caption) == (control != "none")
    assert drawn.title == "Layers with a module that LISA trained, and when"
    assert "draws of each layer" not in drawn.caption
    assert "expected" not in str(drawn.table.columns)


def test_probabilities_that_do_not_move_are_no_picture(make_run):
    run = make_run(profile=LAYERS, steps=40, method="lisa")
    assert not len(probability_grid(run))
    assert "do not move" in plots.learned_probabilities(run).texts[0].get_text()
    page = la.report(run)
    text = page if isinstance(page, str) else page.html
    assert "What was learned" not in text


def configured(run, seed, probabilities="null", learn=True, control="none"):
    lines = ["method: lisa", f"seed: {seed}", "lisa:", f"  probabilities: {probabilities}",
             f"  control: {control}"]  # fmt: skip
    lines += ["  learn:", "    metric: grad_rms"] if learn else ["  learn: null"]
    (run.path / CONFIG).write_text("\n".join(lines) + "\n")
    return run


def test_arms_that_learn_are_named_and_their_seeds_belong_together(make_run):
    runs = []
    for control in ("none", "permuted"):
        for seed in (0, 1):
            order = np.random.default_rng(seed).permutation(LAYERS).tolist()
            more = {"control_permutation": order, "control_seed": seed}
            made = make_run(
                profile=LAYERS, steps=40, method="lisa", seed=seed, edit_events=moving,
                manifest=entry(control, **(more if control == "permuted" else {})),
            )  # fmt: skip
            runs.append(configured(made, seed, control=control))
    found = [settings(run) for run in runs]
    assert [s.sampled.word for s in found] == ["learning"] * 2 + ["permuted"] * 2
    arms = find_arms(runs, found)
    assert [arm.runs for arm in arms] == [(0, 1), (2, 3)]
    assert [arm.control for arm in arms] == [0, 1]
    assert "permuted" in arms[1].name


def test_seeds_of_a_permuted_file_are_one_arm(make_run, tmp_path):
    profile = la.ImportanceProfile.from_scores(
        np.arange(1.0, LAYERS + 1), names=[f"model.layers.{i}" for i in range(LAYERS)]
    )
    made = la.sampling_probabilities(profile, K, use_intervals=False)
    path = made.save(tmp_path / "probabilities.json")
    pi = np.array(made.inclusion_probabilities)
    runs = []
    for control in ("none", "permuted"):
        for seed in (0, 1):
            placed = np.random.default_rng(seed).permutation(pi) if control != "none" else pi

            def fixed(events, placed=placed):
                for event in events:
                    if event["event"] == "lisa_draw":
                        event["inclusion_probabilities"] = placed.tolist()
                return events

            run = make_run(profile=LAYERS, steps=40, method="lisa", seed=seed, edit_events=fixed,
                           manifest=entry(control, learn=False))  # fmt: skip
            runs.append(configured(run, seed, path, learn=False, control=control))
    found = [settings(run) for run in runs]
    assert [s.sampled.word for s in found] == ["learned"] * 2 + ["permuted"] * 2
    arms = find_arms(runs, found)
    assert [arm.runs for arm in arms] == [(0, 1), (2, 3)]
    assert [arm.control for arm in arms] == [0, 1]
    assert "permuted" in arms[1].name
