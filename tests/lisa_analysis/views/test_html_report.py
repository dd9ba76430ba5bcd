"""The report: whole for every kind of run, self-contained, deterministic, small, safe."""

import ast
import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers_runs import write_run

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError
from lisa_analysis.views.html_report import figures, page
from lisa_analysis.views.html_report.content import STATES

HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>$\\frac{"
HOSTILE += "\u202e\x07\ud800"
# A lone surrogate cannot be in a file name or a YAML file, but JSON can spell one.
NAME = HOSTILE.replace("\ud800", "")
VOID = {"meta", "br", "wbr", "img", "input", "link", "hr"}


class Page(HTMLParser):
    """Elements of a page with their attributes, and the text of those asked for."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.texts, self.errors = [], [], {}, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), tuple(t for t, _ in self.open)))
        if tag not in VOID:
            self.open.append((tag, len(self.elements) - 1))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), tuple(t for t, _ in self.open)))

    def handle_endtag(self, tag):
        if not self.open or self.open[-1][0] != tag:
            self.errors.append((tag, self.open[-1:], self.getpos()))
            return
        self.open.pop()

    def handle_data(self, data):
        if self.open:
            _, index = self.open[-1]
            self.texts[index] = self.texts.get(index, "") + data

    def all(self, tag):
        return [(i, attrs) for i, (name, attrs, _) in enumerate(self.elements) if name == tag]

    def text(self, tag):
        return [self.texts.get(i, "") for i, _ in self.all(tag)]


def empty_run(path):
    """A run that was killed before anything was flushed."""
    write_run(path, n_layers=4, steps=1, method="full")
    for shard in (path / "metrics").iterdir():
        shard.unlink()
    (path / "scalars.jsonl").write_text("")
    (path / "events.jsonl").write_text("")
    return path


def cut_off_run(path):
    """A run whose last scalars line was cut by a kill."""
    write_run(path, steps=60, n_layers=4, status="running")
    with (path / "scalars.jsonl").open("a") as file:
        file.write('{"step": 61, "lo')
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def pages(folder):
    """HTML of a report for every kind of input."""
    ten = [write_run(folder / f"ten{i}", steps=60, n_layers=4, seed=i, kinds=("attn.q",),
                     method=("lisa", "full")[i % 2]) for i in range(10)]  # fmt: skip
    inputs = {
        "lisa": write_run(folder / "lisa", steps=100, n_layers=8),
        "lora": write_run(folder / "lora", steps=60, method="lora", n_layers=8),
        "full": write_run(folder / "full", steps=60, method="full", n_layers=6, nan_at=20),
        "other": write_run(folder / "other", steps=20, method="prefix-tuning", n_layers=4),
        "empty": empty_run(folder / "empty"),
        "one-step": write_run(folder / "one", steps=1, method="full", n_layers=4),
        "crashed": cut_off_run(folder / "crashed"),
        "failed": write_run(
            folder / "failed",
            status="failed",
            steps=40,
            n_layers=4,
            extra={"error": "CUDA gave up."},
        ),
        "one layer": write_run(folder / "layer", n_layers=1, k=1, steps=20),
        "ten": ten,
        "two depths": [ten[0], write_run(folder / "deep", n_layers=6, steps=40)],
        "with empty": [ten[0], folder / "empty"],
    }
    return {name: la.report(runs).html for name, runs in inputs.items()}


def test_layers_without_a_score_stay_in_the_grid_of_modules(tmp_path):
    run = la.load(write_run(tmp_path / "run", n_layers=12, k=1, interval=10, steps=40))
    profile = la.importance(run, by="module")
    unseen = set(range(12)) - {int(x) for x in profile.to_frame().dropna()["layer"]}
    assert 11 in unseen or unseen
    shown = figures.kind_figure("kinds", profile)
    assert len(shown.table.rows) == 12


def test_a_problem_that_several_runs_share_stands_once(tmp_path):
    shared = [
        write_run(tmp_path / name, steps=40, method="full", nan_at=20) for name in ("one", "two")
    ]
    page = la.report([*shared, write_run(tmp_path / "calm", steps=40)]).html
    title = la.diagnose(la.load(shared[0]))["non_finite"].title
    findings = page[page.index('id="findings"') : page.index('id="numbers"')]
    assert findings.count(f"<bdi>{title}</bdi></h3>") == 1
    article = findings[findings.index(f"<bdi>{title}</bdi></h3>") :].partition("</article>")[0]
    assert "<bdi>one</bdi>, <bdi>two</bdi>" in article
    assert "<bdi>calm</bdi>" not in article


KINDS = ("lisa", "lora", "full", "other", "empty", "one-step", "crashed", "failed", "one layer",
         "ten", "two depths", "with empty")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_page_is_well_formed_with_unique_ids(pages, kind):
    parsed = Page(pages[kind])
    assert parsed.errors == []
    assert parsed.open == []
    ids = [attrs["id"] for _, attrs, _ in parsed.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs, _ in parsed.elements:
        for name in ("aria-labelledby", "for", "data-table"):
            assert set(attrs.get(name, "").split()) <= set(ids)
        if attrs.get("href", "").startswith("#"):
            assert attrs["href"][1:] in ids
        for reference in re.findall(r"url\(#([^)]+)\)", " ".join(v or "" for v in attrs.values())):
            assert reference in ids
    assert len(parsed.all("h1")) == len(parsed.all("main")) == len(parsed.all("title")[:1]) == 1
    assert dict(parsed.all("html"))[0]["lang"] == "en"


@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_has_title_description_table_and_csv(pages, kind):
    parsed = Page(pages[kind])
    every = parsed.all("svg")
    # The same picture for a narrow screen has the table of the wide one.
    pictures = [p for p in every if "-narrow-title" not in p[1]["aria-labelledby"]]
    ids = {attrs["id"]: parsed.texts.get(i, "") for i, (_, attrs, _) in enumerate(parsed.elements)
           if "id" in attrs}  # fmt: skip
    for _, attrs in every:
        assert attrs["role"] == "img"
        assert all(ids[name].strip() for name in attrs["aria-labelledby"].split())
        assert "viewbox" in attrs
    csv = [attrs for _, attrs in parsed.all("button") if attrs.get("class") == "csv"]
    assert len(csv) == len(pictures)
    for _, attrs in parsed.all("th"):
        assert attrs["scope"] == "col"
    assert len(parsed.all("caption")) == len(parsed.all("table"))
    if kind not in ("empty",):
        assert len(pictures) >= 5


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_loaded_and_only_our_script_may_run(pages, kind):
    html = pages[kind]
    parsed = Page(html)
    for tag, attrs, _ in parsed.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            assert not re.match(r"(?i)\s*(https?:|//|file:|javascript:)", attrs.get(name) or "")
        assert tag not in ("link", "iframe", "object", "embed", "base", "img")
        assert not any(name.startswith("on") for name in attrs)
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    policy = next(a["content"] for _, a in parsed.all("meta") if "http-equiv" in a)
    scripts = parsed.text("script")
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe-eval" not in policy
    assert html.index("Content-Security-Policy") < html.index("<style") < html.index("<script")


def test_what_kinds_of_run_say(pages):
    assert "Which layers LISA trained, and when" in pages["lisa"]
    assert "LISA trained" not in pages["full"]
    assert "adapter" in pages["lora"]
    assert "Red: NaN or infinite, 1 time" in pages["full"]
    assert "No training step was recorded" in pages["empty"]
    assert "is interrupted." in pages["crashed"]
    assert "ends in a line that was cut off" in pages["crashed"]
    assert "CUDA gave up." in pages["failed"]
    assert "10 runs compared" in pages["ten"]
    assert pages["two depths"].count('<g class="layer" data-layer="5">') >= 1


def test_findings_are_shown_worst_first_with_words(pages):
    parsed = Page(pages["full"])
    articles = [attrs["class"] for _, attrs in parsed.all("article")]
    assert "finding fail" in articles
    order = [name.split()[1] for name in articles]
    assert order == sorted(order, key=list(STATES).index)
    diagnostics = la.diagnose(la.load(_path_of("full", pages)))
    for finding in diagnostics.findings:
        assert page.Markup.escape(finding.title) in pages["full"]
    failed = sum(finding.state == "fail" for finding in diagnostics.findings)
    assert f"{failed} problem" in pages["full"]


def _path_of(kind, pages):
    return _path_of.folder / kind


@pytest.fixture(autouse=True)
def _remember_folder(folder):
    _path_of.folder = folder


def test_numbers_are_those_of_the_objects(pages, folder):
    profile = la.importance(la.load(folder / "lisa"))
    parsed = Page(pages["lisa"])
    tables = {attrs.get("id"): i for i, attrs in parsed.all("table")}
    assert {"r0-profile-data", "key-numbers", "profile-numbers"} <= set(tables)
    cells = [parsed.texts.get(i, "") for i, (tag, _, _) in enumerate(parsed.elements)
             if tag == "td" and i > tables["r0-profile-data"]]  # fmt: skip
    for score in profile.to_frame()["score"].dropna():
        assert f"{score:.6g}" in cells
    assert profile.verdict in pages["lisa"]


def test_names_from_a_run_cannot_break_out(tmp_path):
    extra = {
        "error": HOSTILE, "command": HOSTILE, "dataset": {"name": HOSTILE},
        "hardware": {"device": HOSTILE, "name": HOSTILE}, "versions": {HOSTILE: HOSTILE},
    }  # fmt: skip
    path = write_run(
        tmp_path / "run", steps=30, n_layers=4, run_id=NAME, model_name=NAME, layer_prefix=NAME,
        status="failed", extra=extra,
    )  # fmt: skip
    # The report calls a run by its folder.
    folder = tmp_path / "<img src=x onerror=alert(3)>$x$"
    other = write_run(folder, steps=20, n_layers=4, run_id=NAME, method="full")
    for report in (la.report(path), la.report([path, other], title=HOSTILE)):
        saved = report.save(tmp_path / "report.html").read_text(encoding="utf-8")
        parsed = Page(saved)
        assert parsed.errors == []
        assert len(parsed.all("script")) == 1
        assert parsed.all("img") == []
        assert not any(n.startswith("on") for _, attrs, _ in parsed.elements for n in attrs)
        assert "alert(1)" in saved  # shown, as text
        assert "\u202e" not in saved
        assert "\x07" not in saved
        frame = report._repr_html_()
        assert len(Page(frame).elements) == 1


def test_secrets_are_redacted(pages):
    for html in pages.values():
        assert "hf_" + "a" * 24 not in html
        assert "hf_" + "b" * 24 not in html
    assert "lisa-train --config lisa --hub_token [redacted]" in pages["lisa"]
    assert "learning_rate: 1.0e-05" in pages["lisa"]


def test_same_run_gives_the_same_bytes(pages, folder):
    code = "import sys, lisa_analysis as la; la.report(sys.argv[1]).save(sys.argv[2])"
    command = [sys.executable, "-c", code, folder / "lisa", folder / "again.html"]
    environment = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    subprocess.run(command, check=True, env=environment, timeout=100)
    assert (folder / "again.html").read_text(encoding="utf-8") == pages["lisa"]


def test_ten_runs_stay_below_5_mb(pages, tmp_path):
    runs = [write_run(tmp_path / f"r{i}", n_layers=32, steps=1000, every=10, kinds=("attn.q",),
                      method="full", seed=i) for i in range(10)]  # fmt: skip
    assert len(la.report(runs).html.encode()) < 5e6


def test_100_000_steps_of_32_layers_stay_below_2_mb(tmp_path):
    path = write_run(tmp_path / "long", n_layers=32, steps=100_000, every=50, interval=50,
                     kinds=("attn.q",))  # fmt: skip
    html = la.report(path).html
    assert len(html.encode()) < 2e6
    assert "each point is the mean of" in html
    assert "each dot is the mean of" in html


def test_probabilities_are_shown_beside_the_profile(folder):
    run = la.load(folder / "lisa")
    probabilities = la.sampling_probabilities(la.importance(run), activated_layers=2)
    html = la.report(run, probabilities=probabilities).html
    assert "How often to sample each layer next time" in html
    assert str(page.Markup.escape(probabilities.statement)) in html


def test_metric_is_chosen_and_an_unknown_one_is_named(folder):
    html = la.report(folder / "one", metric="weight_norm").html
    assert "Importance of each layer: weight_norm" in html
    html = la.report(folder / "one", metric="grad_rsm").html
    assert "There is no profile" in html
    assert "grad_rms" in html


def test_no_run_is_an_error():
    with pytest.raises(LisaError, match="at least one run"):
        la.report([])


def test_notebook_frame_is_sandboxed(pages, folder):
    frame = la.report(folder / "one")._repr_html_()
    (tag, attrs, _) = Page(frame).elements[0]
    assert tag == "iframe"
    assert attrs["sandbox"] == "allow-scripts allow-downloads"
    assert attrs["srcdoc"] == pages["one-step"]


def test_report_formats_and_does_not_compute():
    statistics = {"mean", "std", "var", "median", "quantile", "percentile", "corr", "cov"}
    for path in Path(page.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("lisa_analysis.statistics"), path
            if isinstance(node, ast.Call):
                assert getattr(node.func, "attr", "") not in statistics, (path, node.lineno)


def test_report_of_a_running_run(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    path = write_run(tmp_path / "live", steps=20, n_layers=4, status="running")
    with (path / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        html = la.report(path).html
    assert "is running." in html
    assert json.loads((path / "run.json").read_text())["status"] == "running"
