"""Plots: what is drawn is the data; nothing leaks, reads files, overlaps or parses names."""

import ast
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from helpers_runs import write_run
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from lisa_analysis import plots
from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.layers import short_stacks, stacks_of
from lisa_analysis.metrics.layer_grid import LayerGrid
from lisa_analysis.plans.sampling import sampling_probabilities
from lisa_analysis.profiles.from_run import importance
from lisa_analysis.rundir.opening import load
from lisa_analysis.runs.schedule import visit_counts
from lisa_analysis.views.plots import style


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {
        "lisa": load(write_run(folder / "lisa", steps=100)),
        "full": load(write_run(folder / "full", steps=60, method="full", nan_at=20)),
        "one": load(write_run(folder / "one", steps=1, method="full")),
    }


def profile(n_layers=12, *, low=True, initial=True, unseen=()):
    score = 1 + np.linspace(-1, 1, n_layers) ** 2
    score[list(unseen)] = np.nan
    frame = pd.DataFrame(
        {
            "layer": range(n_layers), "name": [f"model.layers.{i}" for i in range(n_layers)],
            "score": score, "low": score * 0.9 if low else np.nan, "high": score * 1.1,
            "joint_low": score * 0.8 if low else np.nan, "joint_high": score * 1.2,
            "n_eff": 40.0, "visits": 3, "initial": 0.4 if initial else np.nan,
        }
    )  # fmt: skip
    return SimpleNamespace(to_frame=lambda: frame, metric="update_norm", by="layer", run_id="run")


def probabilities(n_layers=12):
    pi = tuple(np.full(n_layers, 2 / n_layers))
    return SimpleNamespace(inclusion_probabilities=pi, activated_layers=2, scores=pi, uniform=pi,
                           layer_names=[f"h.{i}" for i in range(n_layers)])  # fmt: skip


def strengths():
    pi = [np.full(4, 0.5), np.array([0.0, 0.0, 1.0, 1.0]), None]
    return pd.DataFrame({"strength": ["0", "pool", "pool=1"], "gain": [1.0, 1.5, np.nan], "pi": pi})


def agreements():
    row = {"level": "layer", "target": "ablation_keep", "metric": "grad_rms", "source": "",
           "spearman": 0.5, "low": 0.2, "high": 0.7, "ceiling": 0.9, "chance": 0.6,
           "evidence": False}  # fmt: skip
    return SimpleNamespace(to_frame=lambda: pd.DataFrame([row, row | {"metric": "depth"}]))


def differences():
    rows = [("a", "b", -0.2, -0.3, -0.1, 3), ("a", "c", 0.1, -0.1, 0.3, 0),
            ("b", "c", 0.3, np.nan, np.nan, 1), ("c", "d", np.nan, np.nan, np.nan, 0)]  # fmt: skip
    return pd.DataFrame(rows, columns=["a", "b", "mean", "low", "high", "pairs"])


def moving(run):
    """The same run with probabilities that wander."""
    events = run.events.copy()
    draws = events["event"] == "lisa_draw"
    wander = [list(np.roll(np.linspace(0.1, 0.3, 12), n)) for n in range(draws.sum())]
    events.loc[draws, "inclusion_probabilities"] = pd.Series(wander, events.index[draws])
    return SimpleNamespace(events=events, n_layers=run.n_layers, manifest=run.manifest,
                           layer_names=run.layer_names)  # fmt: skip


def everything(runs):
    run = runs["lisa"]
    scored = SimpleNamespace(scores=np.linspace(0, 1, 12), metric="forgetting",
                             to_frame=profile().to_frame)  # fmt: skip
    kinds = pd.DataFrame({"layer": [0, 1], "kind": ["attn.q", "norm"], "score": [1.0, 2.0]})
    pairs = pd.DataFrame({"run_a": ["a"], "run_b": ["b"], "kendall": [0.5]})
    return {
        "profile": lambda ax: plots.profile(profile(), ax=ax),
        "profiles": lambda ax: plots.profiles({"a": profile(), "b": profile()}, ax=ax),
        "side_by_side": lambda ax: plots.side_by_side([profile(), profile()], ax=ax),
        "heatmap": lambda ax: plots.heatmap(run, "grad_norm", ax=ax),
        "visits": lambda ax: plots.visits(run, "grad_norm", ax=ax),
        "differences": lambda ax: plots.differences(differences(), ax=ax),
        "trajectories": lambda ax: plots.trajectories(run, ax=ax),
        "bands": lambda ax: plots.bands(run, ax=ax),
        "update_ratio": lambda ax: plots.update_ratio(run, ax=ax),
        "schedule": lambda ax: plots.schedule(run, ax=ax),
        "learned_probabilities": lambda ax: plots.learned_probabilities(moving(run), ax=ax),
        "probabilities": lambda ax: plots.probabilities(probabilities(), ax=ax),
        "strengths": lambda ax: plots.strengths(strengths(), ax=ax),
        "kind_grid": lambda ax: plots.kind_grid(kinds, ax=ax),
        "rank_stability": lambda ax: plots.rank_stability(pairs, ax=ax),
        "curves": lambda ax: plots.curves(run, ax=ax),
        "comparison": lambda ax: plots.comparison([run, runs["full"]], ax=ax),
        "worth": lambda ax: plots.worth({"ablation_keep": profile()}, ax=ax),
        "gain_and_forgetting": lambda ax: plots.gain_and_forgetting(scored, scored, ax=ax),
        "validity": lambda ax: plots.validity(agreements(), ax=ax),
    }


def test_every_public_plot_is_covered(runs):
    public = {
        name for name, value in vars(plots).items()
        if callable(value) and getattr(value, "__module__", "").startswith(plots.__name__)
    }  # fmt: skip
    assert public == set(everything(runs))


@pytest.mark.parametrize("name", ["profile", "profiles", "side_by_side", "heatmap",
                                  "visits", "differences", "trajectories", "bands",
                                  "update_ratio", "schedule", "learned_probabilities",
                                  "probabilities", "strengths",
                                  "kind_grid", "rank_stability", "curves",
                                  "comparison", "worth", "gain_and_forgetting",
                                  "validity"])  # fmt: skip
def test_axes_in_axes_out_and_no_figure_is_left_in_pyplot(runs, name):
    draw = everything(runs)[name]
    mine = Figure().add_subplot()
    assert draw(mine) is mine
    assert mine.has_data()
    fresh = draw(None)
    assert fresh.figure is not mine.figure
    assert plt.get_fignums() == []


def test_plots_do_not_read_files_show_or_use_pyplot():
    for path in Path(plots.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                    for alias in node.names}  # fmt: skip
        imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & {"matplotlib.pyplot", "pathlib", "os", "io"}, path
        assert not any("rundir" in (name or "") for name in imported), path
        called = {getattr(node.func, "attr", getattr(node.func, "id", ""))
                  for node in ast.walk(tree) if isinstance(node, ast.Call)}  # fmt: skip
        assert not called & {"show", "open", "read_text", "read_parquet", "savefig"}, path


def test_heatmap_shows_values_frozen_and_non_finite_cells():
    values = np.array([[1.0, 10.0, 100.0], [np.nan, 2.0, np.nan]])
    bad = np.array([[False, False, False], [False, False, True]])
    ax = plots.heatmap(LayerGrid("grad_norm", np.array([1, 10, 20]), values, bad))
    image, alarm = ax.images
    shown = image.get_array()
    assert shown.mask.tolist() == [[False, False, False], [True, False, True]]
    np.testing.assert_array_equal(shown.compressed(), [1, 10, 100, 2])
    assert image.norm.vmin == 1
    assert image.norm.vmax == 100
    assert ax.get_facecolor() == to_rgba(style.FROZEN)
    assert alarm.get_array()[1, 2].tolist() == list(to_rgba(style.NON_FINITE))
    assert alarm.get_array()[..., 3].sum() == 1
    assert ax.get_ylim() == (-0.5, 1.5)  # layer 0 at the bottom


def test_strengths_show_every_pi_and_no_mark_where_a_layer_is_never_drawn():
    ax = plots.strengths(strengths())
    flat, pool = (line.get_ydata() for line in ax.get_lines())
    assert flat.tolist() == [0.5] * 4
    assert pool[2:].tolist() == [1.0, 1.0]
    assert np.isnan(pool[:2]).all()
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["0 (×1.00)", "pool (×1.50)"]
    nothing = plots.strengths(strengths().tail(1))
    assert not nothing.get_lines()


def test_schedule_counts_visits_as_drawn(runs):
    run = runs["lisa"]
    draws = run.events[run.events["event"] == "lisa_draw"]
    expected = np.bincount(np.concatenate(draws["layers"].tolist()), minlength=12)
    visits = visit_counts(run)
    assert visits["observed"].tolist() == expected.tolist()
    np.testing.assert_allclose(visits["expected"], len(draws) * 2 / 12)
    image = plots.schedule(run).images[0].get_array()
    assert image.shape == (12, len(draws))
    assert image.sum(axis=1).tolist() == expected.tolist()


def test_profile_draws_bars_intervals_the_initial_part_and_the_unseen():
    source = profile(8, unseen=(3,))
    ax = plots.profile(source)
    frame = source.to_frame()
    grey = to_rgba(style.MUTED)[:3]
    bars = [bar for bar in ax.patches if bar.get_facecolor()[:3] != grey]
    initial = [bar for bar in ax.patches if bar.get_facecolor()[:3] == grey]
    assert [bar.get_height() for bar in bars] == frame["score"].dropna().tolist()
    assert [bar.get_height() for bar in initial] == [0.4] * 7
    level, intervals, joint = ax.collections
    assert {path.vertices[0, 1] for path in level.get_paths()} == {0.4}
    for lines, bounds in ((intervals, ["low", "high"]), (joint, ["joint_low", "joint_high"])):
        ends = [path.vertices[:, 1].tolist() for path in lines.get_paths()]
        assert ends == frame.dropna(subset=["score"])[bounds].to_numpy().tolist()
    labels = ax.get_legend_handles_labels()[1]
    assert "never measured" in labels
    assert "too little data for an interval" not in labels
    assert (
        "too little data for an interval"
        in (plots.profile(profile(low=False)).get_legend_handles_labels()[1])
    )


def test_profile_of_modules_gives_every_row_its_own_place(runs):
    by_module = importance(runs["full"], by="kind")
    ax = plots.profile(by_module)
    places = {round(bar.get_center()[0], 6) for bar in ax.patches}
    assert places == set(range(by_module.n_layers))
    assert [t.get_text() for t in ax.get_xticklabels()] == by_module.to_frame()["name"].tolist()


@pytest.mark.parametrize("quantity", ["loss", "learning_rate", "grad_norm", "memory", "recorder"])
def test_curves_draw_at_most_400_points_of_a_long_run(quantity):
    steps = np.arange(1, 100_001)
    scalars = pd.DataFrame(
        {"step": steps, "loss": 1.0 / steps, "learning_rate": 1e-4, "grad_norm": 1.0,
         "clip_coef": 0.5, "peak_memory_bytes": 2**30, "step_seconds": 1.0,
         "recorder_seconds": 0.01}
    )  # fmt: skip
    run = SimpleNamespace(scalars=scalars, events=pd.DataFrame())
    ax = plots.curves(run, quantity)
    assert len(ax.lines[0].get_xdata()) == 400
    assert "mean of 250 records" in ax.get_xlabel()


def test_unknown_quantity_is_refused_with_a_suggestion(runs):
    with pytest.raises(LisaError, match="Did you mean 'loss'"):
        plots.curves(runs["lisa"], "los")


def test_comparison_draws_the_range_of_seeds():
    def run(loss):
        frame = pd.DataFrame({"step": [1, 2, 3], "loss": loss})
        return SimpleNamespace(scalars=frame, events=pd.DataFrame())

    ax = plots.comparison({"lisa": [run([3.0, 2, 1]), run([5.0, 4, 3])]})
    assert ax.lines[0].get_ydata().tolist() == [4, 3, 2]
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 1
    assert band[:, 1].max() == 5
    assert ax.get_legend_handles_labels()[1] == ["lisa (2 runs)"]


def test_plots_without_data_say_so(runs):
    assert "LISA was not used" in plots.schedule(runs["full"]).texts[0].get_text()
    empty = LayerGrid("grad_norm", np.empty(0, int), np.empty((4, 0)), np.empty((4, 0), bool))
    for draw in (plots.heatmap, plots.trajectories, plots.bands):
        assert "recorded" in draw(empty).texts[0].get_text()


def test_profiles_of_seeds_share_a_line_and_a_band():
    scores = np.array([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0], [3.0, 2.0, np.nan]])
    seeds = [SimpleNamespace(to_frame=lambda row=row: pd.DataFrame(
        {"layer": range(3), "score": row})) for row in scores]  # fmt: skip
    ax = plots.profiles({"seeds": seeds, "alone": seeds[1]})
    line, alone, _ = ax.get_lines()
    # Over their means: (½, 1, 3/2), (1, 1, 1) and (6/5, 4/5, unknown).
    np.testing.assert_allclose(line.get_ydata(), [0.9, 2.8 / 3, 1.25])
    np.testing.assert_allclose(alone.get_ydata(), 1)
    [band] = ax.collections
    edges = band.get_paths()[0].vertices
    for layer, (low, high) in enumerate([(0.5, 1.2), (0.8, 1.0), (1.0, 1.5)]):
        at = edges[edges[:, 0] == layer, 1]
        assert (at.min(), at.max()) == pytest.approx((low, high))


@pytest.mark.parametrize("name", ["$\\frac{", "_hidden", "a\nb", "x" * 300, "\ud800", "$a$ $b$"])
def test_names_from_a_run_are_drawn_literally(name):
    ax = plots.profiles({name: profile(), "other": profile()})
    ax.figure.canvas.draw()
    text = ax.get_legend().get_texts()[0]
    assert len(text.get_text()) <= 42
    assert not text._preprocess_math(text.get_text())[1]


@pytest.mark.parametrize("n_layers", [1, 12, 33, 80, 126])
@pytest.mark.parametrize("n_steps", [1, 1000, 100_000])
def test_tick_labels_do_not_touch(n_layers, n_steps):
    steps = np.arange(1, n_steps + 1)
    values = np.ones((n_layers, min(n_steps, 2000)))
    grid = LayerGrid("grad_norm", np.linspace(1, n_steps, values.shape[1]).astype(int), values,
                     np.zeros(values.shape, bool))  # fmt: skip
    assert steps[-1] == grid.steps[-1]
    ax = plots.heatmap(grid)
    ax.figure.canvas.draw()
    for axis in (ax.xaxis, ax.yaxis):
        boxes = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text()]
        for first, second in pairwise(boxes):
            assert not first.overlaps(second)
    figure = ax.figure.bbox
    for label in [*ax.get_xticklabels(), ax.xaxis.label, ax.yaxis.label]:
        box = label.get_window_extent()
        assert box.x0 >= figure.x0 - 1
        assert box.x1 <= figure.x1 + 1


def test_one_step_has_one_tick():
    grid = LayerGrid("grad_norm", np.array([1]), np.ones((4, 1)), np.zeros((4, 1), bool))
    for draw in (plots.trajectories, plots.bands):
        ax = draw(grid)
        ax.figure.canvas.draw()
        labels = [label.get_text() for label in ax.get_xticklabels() if label.get_text()]
        assert len(labels) == len(set(labels)), draw.__name__
        plt.close(ax.figure)


def test_a_value_between_gaps_is_marked():
    values = np.array([[1.0, np.nan, 2.0, 2.0, np.nan, 3.0], [1.0] * 6])
    grid = LayerGrid("grad_norm", np.arange(1, 7), values, np.zeros((2, 6), bool))
    lone, whole = plots.trajectories(grid).get_lines()
    assert lone.get_marker() == "."
    assert whole.get_marker() in ("None", None)


def test_runs_are_grouped_by_what_they_sampled():
    """One line of all twelve before: their method is the same."""
    kept = Path(__file__).parents[3] / "reports" / "2026-11-24-learned-sampling" / "runs"
    runs = [load(kept / f"{arm}-{seed}") for arm in ("learned", "uniform") for seed in (1, 2)]
    labels = plots.comparison(runs).get_legend_handles_labels()[1]
    assert labels == ["learned (2 runs)", "uniform (2 runs)"]


def test_runs_compare_where_one_of_them_diverged():
    def run(losses):
        scalars = pd.DataFrame({"step": range(1, 6), "loss": losses})
        return SimpleNamespace(scalars=scalars, events=pd.DataFrame(), method="full")

    ax = plots.comparison(
        {"a": [run([3.0, 2.0, 1.0, 1.0, 1.0]), run([3.0, 4.0, np.inf, 5.0, 5.0])]}
    )
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), [3.0, 3.0, 3.0, 3.0])


def standing_profile(words, wide=1.2):
    frame = profile(len(words)).to_frame().assign(standing=words)
    frame["joint_high"] = frame["score"] * wide
    return SimpleNamespace(to_frame=lambda: frame, metric="grad_rms", by="layer", run_id=str(words))


def test_side_by_side_shares_axes_and_names_the_layers_that_stand_apart():
    words = ["above", *["within"] * 6, "below", *["unknown"] * 3, "above"]
    ax = plots.side_by_side({"one": standing_profile(words), "two": standing_profile(words, 9)})
    one, two = ax.child_axes
    assert one.get_ylim() == two.get_ylim()
    assert one.get_xlim() == two.get_xlim()
    for panel in (one, two):
        assert [text.get_text() for text in panel.texts] == ["0", "7", "11"]
        ax.figure.canvas.draw()
        top = panel.get_window_extent().y1
        assert all(text.get_window_extent().y1 <= top + 2 for text in panel.texts)
    heights = [bar.get_height() for bar in one.patches]
    assert np.mean(heights) == pytest.approx(1)


def test_side_by_side_leaves_scores_of_both_signs_in_their_unit():
    frame = profile(4).to_frame().assign(score=[-1.0, -2.0, 0.5, 0.1])
    shown = SimpleNamespace(to_frame=lambda: frame, metric="ablation_reset", by="layer")
    [panel] = plots.side_by_side({"a": shown}).child_axes
    assert [bar.get_height() for bar in panel.patches] == [-1.0, -2.0, 0.5, 0.1]
    assert panel.get_ylim()[0] <= -2


def test_visits_are_a_dot_per_recorded_value_at_its_layer():
    values = np.full((3, 4), np.nan)
    values[0, 0], values[2, 3], values[2, 1] = 1.0, 8.0, 2.0
    grid = LayerGrid("grad_norm", np.arange(4), values, np.isinf(values))
    [dots] = plots.visits(grid).collections[:1]
    at = dots.get_offsets()
    assert np.round(at[:, 0]).tolist() == [0, 2, 2]
    assert at[:, 1].tolist() == [1.0, 2.0, 8.0]
    assert dots.get_array().tolist() == [0, 1, 3]


def test_differences_have_a_row_each_and_a_filled_mark_where_zero_is_outside():
    ax = plots.differences(differences())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a − b", "a − c", "b − c"]
    marks = [line for line in ax.lines if line.get_marker() == "o"]
    assert [mark.get_xdata()[0] for mark in marks] == [-0.2, 0.1, 0.3]
    assert [mark.get_markerfacecolor() == "none" for mark in marks] == [False, True, True]
    assert len(ax.collections) == 2  # whiskers


@pytest.mark.parametrize(("values", "kind"), [
    ([1e-6, 1e-3, 1.0], "LogNorm"),
    ([-0.01, 1e-3, 1.0], "LogNorm"),
    ([-1.0, 0.5, 1.0], "SymLogNorm"),
])  # fmt: skip
def test_colours_of_kinds_follow_the_signs_of_their_scores(values, kind):
    frame = pd.DataFrame({"layer": [0, 1, 2], "kind": "norm", "score": values})
    image = plots.kind_grid(frame).images[0]
    assert type(image.norm).__name__ == kind
    assert image.norm(max(values)) == pytest.approx(1)


def test_stacks_are_parted_where_one_ends(tmp_path):
    """Encoder and decoder: a line between their layers, and their names below."""
    layers = [{"index": i, "name": f"model.{side}.layers.{i % 4}", "stack": f"model.{side}.layers"}
              for i, side in enumerate(["encoder"] * 4 + ["decoder"] * 4)]  # fmt: skip
    run = load(write_run(tmp_path / "two", n_layers=8, steps=60, extra={"layers": layers}))
    profile = importance(run)
    chosen = sampling_probabilities(profile, activated_layers=2)
    across = "layer: encoder 0–3, decoder 4–7"
    for ax in (plots.profile(profile), plots.probabilities(chosen), plots.visits(run)):
        assert ax.get_xlabel() == across
        assert [3.5, 3.5] in [list(line.get_xdata()) for line in ax.lines]
    for ax in (plots.heatmap(run), plots.schedule(run)):
        assert ax.get_ylabel() == "layer: encoder, decoder"
        assert [3.5, 3.5] in [list(line.get_ydata()) for line in ax.lines]
    one = plots.profile(importance(load(write_run(tmp_path / "one", n_layers=8, steps=60))))
    assert one.get_xlabel() == "layer"
    assert [3.5, 3.5] not in [list(line.get_xdata()) for line in one.lines]


def test_stacks_are_called_by_what_tells_them_apart():
    assert stacks_of(["h.0", "h.11", "embed"]) == ("h", "h", "")
    assert short_stacks(["encoder.block"] * 2) == {"encoder.block": "encoder.block"}
    assert [*short_stacks(["encoder.block", "decoder.block"]).values()] == ["encoder", "decoder"]
    towers = ["model.language_model.layers", "model.vision_tower.encoder.layers"]
    assert [*short_stacks(towers).values()] == ["language_model", "vision_tower.encoder"]
    assert [*short_stacks(["a", "b.a"]).values()] == ["a", "b.a"]
