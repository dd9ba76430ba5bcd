"""How objects show themselves in a notebook: whole, escaped, left-aligned."""

import json
from html.parser import HTMLParser

import lisa_analysis as la
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
