"""An ablation in the report, the terminal, the JSON and the plots, and what it forbids to say."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from helpers_ablation import ablation_rows, layers, write_ablation
from helpers_runs import write_run

import lisa_analysis as la
from lisa_analysis.profiles.profile import ImportanceProfile
from lisa_analysis.views.cli import main
from lisa_analysis.views.plots import ablations

PLANTED = (0.3 + np.linspace(-1, 1, 12) ** 2) / 10


def ablated(path, worth, *, general=True, modules=False):
    run = write_run(path, n_layers=12, steps=120, every=2, method="full")
    kinds = {(str(i), k): w / 4 for i, w in enumerate(worth) for k in ("attn.q", "mlp.up")}
    frames = [ablation_rows(layers(worth / 5), layers(worth) | (kinds if modules else {}))]
    if general:
        frames.append(ablation_rows(layers(-worth[::-1]), data="general", gain=-0.2, seed=3))
    write_ablation(run, pd.concat(frames))
    return run


@pytest.fixture(scope="module")
def against(tmp_path_factory):
    """A run whose ablation ranks the layers in another way than its gradients."""
    worth = np.random.default_rng(5).permutation(PLANTED)
    return ablated(tmp_path_factory.mktemp("against") / "run", worth, modules=True)


def test_the_report_says_what_the_layers_were_worth(against):
    html = la.report(against).html
    section = html[html.index('id="worth"') : html.index('id="heatmaps"')]
    assert "What the layers were worth" in section
    for title in ("What each layer’s change is worth", "Who gains, and who forgets",
                  "ablation_keep by kind of module", "Which metric predicts it, over layers",
                  "over layers within each kind"):  # fmt: skip
        assert title in section, title
    assert "Over 64 held-out examples" in section
    assert "forgetting of 0." in section
    assert "No metric predicts" in section
    assert '<a href="#worth">' in html
    assert html == la.report(against).html


def test_narrow_screens_have_pictures_of_their_own(against):
    """Not wider than 390 pixels, and everything that is read out of the wide picture is there."""
    html = la.report(against).html
    for slug in ("r0-worth", "validity-0", "validity-1"):
        figure = re.search(rf'<figure id="{slug}".*?</figure>', html, re.DOTALL)[0]
        wide, narrow = (int(w) for w in re.findall(r"<svg [^>]*max-width:(\d+)px", figure))
        assert narrow <= 390 < wide
        read = [json.loads(r)["p"] for r in re.findall(r"data-readout='(.*?)'", figure)]
        assert [p[-1] for p in read[0]] == [p[-1] for p in read[1]]
        assert len(read[0]) > 8
        assert all(0 <= p[0] <= 0.75 * narrow for p in read[1])  # in points


def test_a_proxy_is_no_importance_where_the_ablation_disagrees(against, tmp_path):
    profile = la.importance(against)
    assert profile.agrees_with_ablation is False
    assert "Read it as a score, not as importance" in profile.statement
    html = la.report(against).html
    assert "Score of each layer: grad_rms" in html
    assert "Importance of each layer" not in html
    assert "Importance profile" not in html
    kept = profile.save(tmp_path / "profile.json")
    assert ImportanceProfile.load(kept) == profile

    agreeing = la.importance(ablated(tmp_path / "run", PLANTED))
    assert agreeing.agrees_with_ablation is True
    assert "Read it as a score" not in agreeing.statement
    assert "Importance of each layer: grad_rms" in la.report(tmp_path / "run").html


@pytest.mark.parametrize("several", [False, True])
def test_a_score_is_called_a_score_everywhere(against, several, tmp_path, capsys):
    """Terminal, JSON and page, of one run and two: the word is denied, or names a function."""
    other = ablated(tmp_path / "other", np.random.default_rng(5).permutation(PLANTED))
    runs = [against, other] if several else [against]
    files = [tmp_path / "r.html", tmp_path / "o.json"]
    options = ["-o", str(files[0]), "--json", str(files[1])]
    assert main([*map(str, runs), *options]) == 0
    denied = "Read it as a score, not as importance"
    for text in (capsys.readouterr().out, *(f.read_text() for f in files)):
        text = re.sub(r"<(script|style).*?</\1>|<[^>]+>", " ", text, flags=re.DOTALL)
        text = " ".join(text.split())
        # Of several runs the terminal has a line each.
        assert denied in text or (several and text.startswith("run:"))
        for known in (denied, "importance metric '", "la.importance(run)"):
            text = text.replace(known, "")
        assert not re.findall(r".{40}importan.{20}|.{40}Importan.{20}", text)


def test_an_ablation_that_knows_no_order_forbids_nothing(tmp_path):
    run = write_run(tmp_path / "run", n_layers=12, steps=120, every=2, method="full")
    write_ablation(run, ablation_rows(layers(PLANTED * 1e-4), noise=0.5))
    assert la.importance(run).agrees_with_ablation is None
    (run / "ablation.parquet").write_bytes(b"torn")
    assert la.importance(run).agrees_with_ablation is None


def test_terminal_and_json_hold_it(against, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert main([str(against), "--json", str(out), "-o", str(tmp_path / "r.html")]) == 0
    printed = capsys.readouterr().out
    assert "What the layers were worth, nats per token" in printed
    assert "No metric predicts" in " ".join(printed.split())
    content = json.loads(out.read_text())
    assert {*content["runs"][0]["worth"]} == {"ablation_keep", "ablation_reset", "forgetting"}
    assert content["validity"]["table"][0]["metric"]
    assert content["validity"]["sentence"] in content["validity"]["sentence"]


def test_a_run_without_an_ablation_has_no_such_section(tmp_path, capsys):
    run = write_run(tmp_path / "run", n_layers=12, steps=40, every=2, method="full")
    html = la.report(run).html
    assert "What the layers were worth" not in html
    assert "#worth" not in html
    assert main([str(run), "--json", str(tmp_path / "x.json")]) == 0
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["runs"][0]["worth"] == {}
    assert content["validity"] is None


def test_several_runs_share_one_validity(tmp_path):
    runs = [ablated(tmp_path / name, PLANTED, general=False) for name in ("a", "b")]
    html = la.report(runs).html
    section = html[html.index('id="worth"') : html.index('id="heatmaps"')]
    assert section.count("What each layer’s change is worth") >= 2
    assert section.count("Two runs say nothing of other seeds") == 1


def test_marks_of_the_section_are_drawn_for_narrow_screens_too(against):
    html = la.report(against).html
    section = html[html.index('id="worth"') : html.index('id="heatmaps"')]
    figures = section.split("<figure ")[1:]
    marks = [f for f in figures if "-kinds" not in f[:40]]  # a matrix of colours has no small text
    assert len(marks) == 4
    assert "Who gains, and who forgets" in marks[1]
    assert all(f.count('class="picture slim"') == 1 for f in marks)


def test_layers_in_a_crowd_get_no_number():
    """Two layers stand apart; the other ten lie upon each other, and no number could be read."""
    x = np.r_[np.linspace(0, 0.02, 10), 1.0, 0.5]
    y = np.r_[np.linspace(0, 0.02, 10), 0.4, 1.0]
    assert ablations._apart(x, y, np.ones(12, bool)) == [11, 10]
    assert ablations._apart(x, y, np.arange(12) != 11) == [10]


def test_plots_mark_what_is_there(against):
    keep, reset = (la.importance(against, f"ablation_{m}") for m in ("keep", "reset"))
    ax = la.plots.worth({"ablation_keep": keep, "ablation_reset": reset})
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["alone (keep)", "missed (reset)"]
    drawn = [line for line in ax.lines if str(line.get_gid()).startswith("layer-")]
    assert sorted(line.get_ydata()[0] for line in drawn) == sorted([*keep.scores, *reset.scores])
    ax = la.plots.gain_and_forgetting(reset, la.importance(against, "forgetting"))
    assert "forgetting" in ax.get_ylabel()
    found = la.validity(against)
    ax = la.plots.validity(found, level="layer")
    rows = found.to_frame().query("level == 'layer'")
    assert len(ax.get_yticks()) == rows["metric"].nunique()
    best = rows.loc[rows["spearman"] == rows["spearman"].max(), "metric"].tolist()
    assert ax.get_yticklabels()[0].get_text() in best
    empty = la.plots.worth({})
    assert "No layer was ablated" in empty.texts[0].get_text()
