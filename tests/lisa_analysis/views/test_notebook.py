"""How objects show themselves in a notebook: whole, escaped, left-aligned."""

import json
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.reprs import facts, sentences


class Cells(HTMLParser):
    """Text of every table cell, and the tags that occur."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            assert "text-align:left" in dict(attrs)["style"]

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def test_facts_leave_out_what_is_unknown_and_escape_the_rest() -> None:
    found = Cells(facts([("a", "<b>x</b>"), ("gone", None), ("zero", 0)]))
    assert found.rows == [["a", "<b>x</b>"], ["zero", "0"]]
    assert "b" not in found.tags


def test_sentences_name_their_rows_in_the_second_column() -> None:
    text = sentences(["state", "rule"], [("ok", "<i>")])
    found = Cells(text)
    assert found.rows == [["state", "rule"], ["ok", "<i>"]]
    assert "<th scope='row'" in text
    assert "i" not in found.tags


def test_a_run_shows_what_its_manifest_says(make_run) -> None:
    run = make_run(steps=20, every=2)
    path = run.path / "run.json"
    manifest = json.loads(path.read_text())
    manifest["model"]["name"] = "<script>"
    manifest["result"] = {"steps": 20, "first_held_out_loss": 3.25, "last_held_out_loss": 2.5}
    path.write_text(json.dumps(manifest))
    found = Cells(la.load(run.path)._repr_html_())
    rows = dict(found.rows)
    assert rows["model"] == "<script>"
    assert rows["held-out loss"] == "3.250 → 2.500"
    assert rows["measured"] == "every 2 steps"
    assert rows["folder"] == str(run.path)
    assert "script" not in found.tags


def test_a_run_shows_itself_whatever_its_manifest_holds(make_run) -> None:
    run = make_run(steps=5)
    path = run.path / "run.json"
    odd = {"model": None, "result": {"first_held_out_loss": "x", "last_held_out_loss": []}}
    path.write_text(json.dumps(json.loads(path.read_text()) | odd | {"recording": {}}))
    rows = dict(Cells(la.load(run.path)._repr_html_()).rows)
    assert set(rows) == {"run", "method", "layers", "started", "folder"}


def test_findings_have_a_column_for_advice_only_when_there_is_any(make_run) -> None:
    found = la.diagnose(make_run(steps=30))
    rows = Cells(found._repr_html_()).rows
    advice = any(f.state in ("warn", "fail") for f in found.findings)
    assert len(rows) == len(found.findings) + 1
    assert {len(row) for row in rows} == {4 if advice else 3}


def test_equal_and_unequal_probabilities_are_told_apart(make_run) -> None:
    profile = la.importance(make_run(steps=30))
    equal = la.sampling_probabilities(profile, 2, control="uniform")
    rows = facts_of(equal)
    assert rows["sampling"].endswith("for all")
    assert "uniform control" in rows["from"]
    learned = la.sampling_probabilities(profile, 2, use_intervals=False)
    pi = learned.inclusion_probabilities
    wanted = f"{min(pi):.3g} (layer {pi.index(min(pi))}) to {max(pi):.3g}"
    assert wanted in facts_of(learned)["sampling"]


def facts_of(probabilities: la.SamplingProbabilities) -> dict[str, str]:
    """The facts above the table of all layers."""
    return dict(Cells(probabilities._repr_html_().split("<details>")[0]).rows)


def test_findings_are_read_back(make_run, tmp_path) -> None:
    found = la.diagnose(make_run(steps=30))
    again = la.Diagnostics.load(found.save(tmp_path / "f.json"))
    assert again == found
    assert any(finding.layers for finding in found.findings) or len(found.findings) > 3
    for text in ("[]", "{", '{"findings": [{}], "run_id": "x"}', "null"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(LisaError, match=r"bad\.json holds no findings"):
            la.Diagnostics.load(tmp_path / "bad.json")
    with pytest.raises(LisaError, match="cannot be read"):
        la.Diagnostics.load(tmp_path / "none.json")


@pytest.mark.parametrize("seeds", [(1, 1), (1, 2, 3)])
def test_a_comparison_is_read_back(seeds, make_run, tmp_path) -> None:
    made = la.compare([make_run(steps=20, seed=seed) for seed in seeds])
    again = la.Comparison.load(made.save(tmp_path / "c.json"))
    assert again.to_dict() == made.to_dict()
    for name in ("table", "arms", "differences", "profiles", "rank_agreement", "curves"):
        assert list(getattr(again, name)) == list(getattr(made, name))
        pd.testing.assert_frame_equal(
            getattr(again, name).fillna(np.nan).astype(object),
            getattr(made, name).reset_index(drop=True).fillna(np.nan).astype(object),
            check_dtype=False,
            check_column_type=False,
        )
    assert again._repr_html_().count("<table") == made._repr_html_().count("<table")
    for text in ("[]", "{", "{}", "null"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(LisaError, match=r"bad\.json holds no comparison"):
            la.Comparison.load(tmp_path / "bad.json")


WRONG = {
    "load takes a path, got a int": lambda run, p: la.load(3),
    "load takes a path, got a Run": lambda run, p: la.load(run),
    "base takes a path, got a int": lambda run, p: la.load(run.path, base=3),
    "by None is unknown": lambda run, p: la.importance(run, by=None),
    "Did you mean 'layer'": lambda run, p: la.importance(run, by=["layer"]),
    "seed is 'x': expected": lambda run, p: la.importance(run, seed="x"),
    "thresholds are a int": lambda run, p: la.importance(run, thresholds=1),
    "diagnose takes a run directory": lambda run, p: la.diagnose(p),
    "compare takes": lambda run, p: la.compare([3, 4]),
    "report takes a run directory": lambda run, p: la.report(p),
    "plans are made from a profile": lambda run, p: la.sampling_probabilities(run),
    "columns is 3": lambda run, p: run.metrics(3),
    "layers is 1.5": lambda run, p: run.metrics(["grad_norm"], layers=1.5),
    "layers is 'x'": lambda run, p: run.metrics(["grad_norm"], layers="x"),
    "steps is 'x'": lambda run, p: run.metrics(["grad_norm"], steps="x"),
    "save takes a path": lambda run, p: p.save(3),
    "save takes a path, got a float": lambda run, p: la.report(run).save(1.5),
    "there is no folder": lambda run, p: p.save(run.path / "none" / "p.json"),
    "none: make it": lambda run, p: la.export(p, "lr").save(run.path / "none" / "lr.json"),
    "a folder: give the name of a file": lambda run, p: la.diagnose(run).save(run.path),
    "ImportanceProfile.load takes": lambda run, p: la.ImportanceProfile.load(3),
    "SamplingProbabilities.load takes": lambda run, p: la.SamplingProbabilities.load(3),
    "plots.profile draws": lambda run, p: la.plots.profile(run),
    "plots.profiles draws": lambda run, p: la.plots.profiles(3),
    "plots.profiles draws a mapping or a list": lambda run, p: la.plots.profiles([3]),
    "plots.heatmap draws a run": lambda run, p: la.plots.heatmap(p),
    "plots.schedule draws a run directory": lambda run, p: la.plots.schedule(p),
    "none does not exist": lambda run, p: la.plots.schedule(str(run.path / "none")),
    "plots.learned_probabilities draws": lambda run, p: la.plots.learned_probabilities(3),
    "plots.curves draws a run": lambda run, p: la.plots.curves([run]),
    "plots.bands draws a run": lambda run, p: la.plots.bands(p),
    "plots.update_ratio draws a run": lambda run, p: la.plots.update_ratio(p),
    "plots.trajectories draws a run": lambda run, p: la.plots.trajectories(p),
    "plots.comparison draws a list of runs": lambda run, p: la.plots.comparison(3),
    "got a PosixPath": lambda run, p: la.plots.comparison({"a": run.path}),
    "plots.comparison draws a run": lambda run, p: la.plots.comparison([p]),
    "got one profile: put it into a list": lambda run, p: la.plots.profiles(p),
    "plots.side_by_side draws": lambda run, p: la.plots.side_by_side(p),
    "plots.worth draws": lambda run, p: la.plots.worth(p),
    "plots.worth draws a mapping": lambda run, p: la.plots.worth({"a": 3}),
    "plots.validity draws": lambda run, p: la.plots.validity(p),
    "plots.gain_and_forgetting draws": lambda run, p: la.plots.gain_and_forgetting(p, 3),
    "plots.rank_stability draws": lambda run, p: la.plots.rank_stability(3),
    "plots.strengths draws": lambda run, p: la.plots.strengths(None),
    "plots.differences draws": lambda run, p: la.plots.differences(run),
    "got ax of type int": lambda run, p: p.plot(ax=3),
    "plots.probabilities draws": lambda run, p: la.plots.probabilities(p),
    "profile by module, got one by layer": lambda run, p: la.plots.kind_grid(p),
    "plots.kind_grid draws": lambda run, p: la.plots.kind_grid(3),
}


def test_wrong_types_are_one_sentence(make_run) -> None:
    run = make_run(steps=20)
    profile = la.importance(run)
    for words, call in WRONG.items():
        with pytest.raises(LisaError) as caught:
            call(run, profile)
        assert words in str(caught.value)


OF_A_RUN = [
    "bands", "curves", "heatmap", "learned_probabilities", "schedule", "trajectories",
    "update_ratio", "visits",
]  # fmt: skip


@pytest.mark.parametrize("plot", OF_A_RUN)
def test_a_plot_of_a_run_takes_its_path(plot, make_run) -> None:
    run = make_run(steps=20)

    def drawn(given):
        axes = getattr(la.plots, plot)(given)
        picture = [image.get_array() for image in axes.images]
        return [text.get_text() for text in axes.texts] + [axes.get_xlabel(), axes.get_ylabel()], [
            *picture, *(line.get_ydata() for line in axes.lines)
        ]  # fmt: skip

    words, numbers = drawn(str(run.path))
    same_words, same_numbers = drawn(run)
    assert words == same_words
    assert len(numbers) == len(same_numbers)
    for a, b in zip(numbers, same_numbers, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_runs_are_compared_by_path(make_run) -> None:
    run = make_run(steps=20)
    for given in ([run.path], {"a": [str(run.path)]}, [run]):
        [line] = la.plots.comparison(given).lines
        assert len(line.get_xdata()) == 20


def test_load_opens_what_save_wrote(make_run, tmp_path) -> None:
    run = make_run(steps=20)
    profile = la.importance(run)
    for suffix in ("json", "parquet"):
        assert la.load(profile.save(tmp_path / f"profile.{suffix}")) == profile
    probabilities = la.sampling_probabilities(profile, 2)
    assert la.load(probabilities.save(tmp_path / "probabilities.json")) == probabilities
    findings = la.diagnose(run)
    assert la.load(findings.save(tmp_path / "findings.json")) == findings
    compared = la.compare([run, make_run(steps=20, seed=5)])
    again = la.load(compared.save(tmp_path / "comparison.json"))
    assert isinstance(again, la.Comparison)
    assert again.to_dict() == compared.to_dict()


def test_load_says_what_a_file_for_others_is(make_run, tmp_path) -> None:
    run = make_run(steps=20)
    profile = la.importance(run)
    for name, holds in (("p.csv", "numbers alone"), ("p.png", "a picture"), ("p.svg", "a picture")):
        with pytest.raises(LisaError, match=rf"{name} holds {holds}.* load what was saved as"):
            la.load(profile.save(tmp_path / name))
    with pytest.raises(LisaError, match=r"r\.html holds a page"):
        la.load(la.report(run).save(tmp_path / "r.html"))
    with pytest.raises(LisaError, match="is a file, not a folder"):
        la.load(la.export(profile, "lr").save(tmp_path / "lr.json"))
    (tmp_path / "torn.json").write_text('{"findings": [')
    with pytest.raises(LisaError, match="is a file, not a folder"):
        la.load(tmp_path / "torn.json")


def test_numbers_of_a_frame_choose_layers_and_steps(make_run) -> None:
    run = make_run(steps=20)
    steps = run.metrics(["grad_norm"])["step"].unique()[1:3]
    for chosen in (steps, steps.astype(float), list(steps)):
        found = run.metrics(["grad_norm"], layers=[0, -1], steps=chosen)
        assert sorted(found["step"].unique()) == sorted(steps)


def test_a_profile_by_module_draws_itself_as_a_grid(make_run) -> None:
    run = make_run(steps=20)
    profile = la.importance(run, by="module")
    axes = la.plots.kind_grid(profile)
    drawn = axes.images[0].get_array()
    kinds = [label.get_text() for label in axes.get_yticklabels()]
    for row in profile:
        kind = row.name.rsplit(" ", 1)[-1]
        assert drawn[kinds.index(kind), row.layer] == row.score


def test_profiles_of_a_list_are_called_by_what_differs(make_run) -> None:
    run = make_run(steps=20)
    a, b = la.importance(run), la.importance(run, "update_norm")

    def names(profiles) -> list[str]:
        axes = la.plots.profiles(profiles)
        return [text.get_text() for text in axes.get_legend().get_texts()]

    assert names([a, b]) == [a.metric, b.metric]
    assert [name[:2] for name in names([a, a])] == ["1:", "2:"]


def test_a_metric_of_ones_own_is_one_decorator_away(make_run) -> None:
    run = make_run(steps=20)

    @la.metric("log", "Half of ‖g_t‖.", needs=("grad_norm",))
    def half_gradient(log):
        return log.table["grad_norm"] / 2

    try:
        assert "half_gradient" in la.METRICS
        found = la.importance(run.path, "half_gradient")
        steps = run.norms("grad_norm")[list(range(run.n_layers))]
        expected = np.exp(np.log(steps.astype(float)).mean()) / 2
        np.testing.assert_allclose(found.scores, expected, rtol=1e-5)
        with pytest.raises(LisaError, match="is built in"):
            la.metric("log", "Not ours.", id="grad_rms")(lambda log: log.table["grad_norm"])
    finally:
        la.METRICS.remove("half_gradient")
